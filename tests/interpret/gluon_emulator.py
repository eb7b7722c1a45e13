"""The Hopper kernels' own source, run on the CPU: Gluon has no interpreter, so here is one for what
they use.

Device functions are executed as Python with stand-ins for `gl`, `tl`, TMA, mbarriers and wgmma. The
partitions of a `warp_specialize` are threads. What the hardware does asynchronously is done as late
as it may be: a product reads its operands when it is waited for, so a stage that is handed back too
early gives wrong numbers; what is loaded from shared memory arrives at the next fence; what TMA
copies out of it is read when it is waited for; and shared memory that nobody wrote is NaN. A load
or store out of bounds is an error, and so is a barrier that nobody completes. Layouts, registers
and speed are not here.
"""

from __future__ import annotations

import ast
import inspect
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language

from turnout.experts import hopper_epilogues, hopper_gram, hopper_kernels, triton_math
from turnout.experts.hopper_config import BOUND
from turnout.launch import Launch, TensorMap

DEADLOCK = 20.0  # seconds
_turn = threading.Condition()


class Pointer:
    """Addresses in a tensor's memory, in elements."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)

    def _flat(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset = torch.as_tensor(self.offset)
        kept = torch.as_tensor(True if mask is None else mask)
        offset, kept = torch.broadcast_tensors(offset, kept)
        inside = offset[kept]
        if inside.numel():
            assert inside.min() >= 0, "an address before the tensor"
            assert inside.max() < self.memory.numel(), "an address behind the tensor"
        return offset, kept

    def load(self, mask: Any, other: Any) -> Tensor:
        offset, kept = self._flat(mask)
        values = self.memory[torch.where(kept, offset, 0)]
        return torch.where(kept, values, torch.as_tensor(other, dtype=values.dtype))

    def store(self, value: Any, mask: Any) -> None:
        offset, kept = self._flat(mask)
        value = torch.as_tensor(value, dtype=self.memory.dtype).expand(offset.shape)
        self.memory[offset[kept]] = value[kept]


@dataclass
class Map:
    """A descriptor: boxes of a tensor of up to five dims; addresses wrap at 2^64 bytes."""

    memory: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def _places(self, coordinates: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Addresses of a box, in elements, and which of them are within the tensor."""
        first = [int(c) for c in coordinates]
        assert len(first) == len(self.shape)
        assert min(first) >= 0
        begin = sum(c * s for c, s in zip(first, self.strides, strict=True))
        around = 2**64 // self.memory.element_size()
        begin = (begin + around // 2) % around - around // 2
        at, inside = torch.tensor(begin), torch.tensor(True)
        for dim, (c, size) in enumerate(zip(first, self.box, strict=True)):
            along = [-1 if d == dim else 1 for d in range(len(self.box))]
            i = torch.arange(size)
            stride = self.strides[dim] if size > 1 else 0
            at = at + (i * stride).view(along)
            inside = inside & (c + i < self.shape[dim]).view(along)
        touched = at[inside]
        if touched.numel():
            assert touched.min() >= 0, "an address before the tensor"
            assert touched.max() < self.memory.numel(), "an address behind the tensor"
        return at, inside

    def at(self, coordinates: Sequence[Any]) -> Tensor:
        at, inside = self._places(coordinates)
        values = self.memory[torch.where(inside, at, 0)]
        return torch.where(inside, values, torch.zeros_like(values))

    def put(self, coordinates: Sequence[Any], values: Tensor) -> None:
        at, inside = self._places(coordinates)
        assert values.shape == at.shape, "a box of another shape than its place"
        self.memory[at[inside]] = values[inside]


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have landed."""

    count: int = 0
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, expected: int = 0, landed: int = 0) -> None:
        with _turn:
            self.pending -= count
            self.bytes += expected - landed
            assert self.pending >= 0, "more arrivals than a phase has"
            if not self.pending and not self.bytes:
                self.phase ^= 1
                self.pending = self.count
            _turn.notify_all()

    def wait(self, parity: Any) -> None:
        with _turn:
            ready = _turn.wait_for(lambda: self.phase != int(parity), timeout=DEADLOCK)
        assert ready, "a barrier that nobody completes"


class _Late(threading.local):
    """What this thread has begun and the hardware may not have done yet.

    Loads from shared memory arrive at the next fence, stores to it are seen by TMA behind one, and
    what TMA copies out of it is read when it is waited for.
    """

    def __init__(self) -> None:
        self.loads: list[tuple[Tensor, Tensor]] = []
        self.stored = False
        self.copies: deque[tuple[Map, Sequence[Any], Shared]] = deque()

    def fence(self) -> None:
        for found, tensor in self.loads:
            found.copy_(tensor)
        self.loads.clear()
        self.stored = False

    def copy(self, to: Map, coordinates: Sequence[Any], source: Shared) -> None:
        assert not self.stored, "TMA reads what no fence has published"
        self.copies.append((to, list(coordinates), source))

    def wait(self, outstanding: int) -> None:
        while len(self.copies) > outstanding:
            to, coordinates, source = self.copies.popleft()
            to.put(coordinates, source.tensor)


_late = _Late()


@dataclass
class Shared:
    """Shared memory, or a view of it."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def index(self, index: Any) -> Shared:
        return Shared(self.tensor[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.tensor.shape[dim]
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.tensor.permute(tuple(order)))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.tensor.view(tuple(shape)))

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.tensor.dtype
        self.tensor.copy_(value)
        _late.stored = True

    def load(self, layout: Any) -> Tensor:
        """What is read arrives at the next fence: a queue of stores may lie before it."""
        found = torch.full_like(self.tensor, float("nan"))
        _late.loads.append((found, self.tensor))
        return found


@dataclass
class Barriers:
    all: list[Barrier]

    def index(self, index: Any) -> Barrier:
        return self.all[int(index)]


@dataclass
class Sums:
    """An accumulator with the products that are under way."""

    value: Tensor
    running: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)

    def wait(self, outstanding: int) -> None:
        while len(self.running) > outstanding:
            a, b = self.running.popleft()
            self.value = self.value + a.float() @ b.float()


def _multiply(a: Shared, b: Shared, acc: Any, is_async: bool) -> Sums:
    assert is_async
    sums = acc if isinstance(acc, Sums) else Sums(acc)
    assert a.shape[1] == b.shape[0], (a.shape, b.shape)
    sums.running.append((a.tensor, b.tensor))
    return sums


def _wait(outstanding: int, deps: list[Sums | Tensor]) -> Any:
    (sums,) = deps
    if isinstance(sums, Tensor):
        return sums
    sums.wait(outstanding)
    return sums if sums.running else sums.value


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared | Barriers:
    if dtype is torch.int64:
        return Barriers([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))


def _copy_by_tma(described: Map, coordinates: Sequence[Any], barrier: Barrier, to: Shared) -> None:
    box = described.at(coordinates)
    assert box.shape == to.shape, "a box of another shape than its place"
    to.tensor.copy_(box)
    barrier.arrive(0, landed=box.numel() * box.element_size())


def _copy_rows(to: Shared, pointer: Pointer, mask: Any = None) -> None:
    to.tensor.copy_(pointer.load(mask, 0.0))


def _together(parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    def run(function: Callable[..., None], *args: Any) -> None:
        with torch.no_grad():
            function(*args)
        assert not _late.copies, "shared memory goes before it is copied"

    with ThreadPoolExecutor(len(parts)) as pool:
        started = [pool.submit(run, function, *args) for function, args in parts]
    failures = [f.exception() for f in started if f.exception() is not None]
    # who failed first left the others waiting
    failures.sort(key=lambda error: "nobody completes" in str(error))
    if failures:
        raise failures[0]


def _range(*limits: Any) -> Iterator[Tensor]:
    return (torch.tensor(i) for i in range(*map(int, limits)))


def _full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
    return torch.full(tuple(shape), value, dtype=dtype)


_program: dict[str, int] = {"number": 0, "count": 1}

GL = types.SimpleNamespace(
    constexpr=lambda value: value,
    BlockedLayout=language.BlockedLayout,
    SliceLayout=lambda dim, parent: None,
    DistributedLinearLayout=lambda *bases: None,
    NVMMADistributedLayout=language.NVMMADistributedLayout,
    NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda shape, dtype: None),
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    program_id=lambda axis: _program["number"],
    num_programs=lambda axis: _program["count"],
    static_range=range,
    cdiv=lambda a, b: -(-a // b),
    minimum=lambda a, b: min(int(a), int(b)),
    arange=lambda first, last, layout=None: torch.arange(first, last),
    load=lambda pointer, mask=None, other=0: pointer.load(mask, other),
    store=lambda pointer, value, mask=None: pointer.store(value, mask),
    full=_full,
    zeros=lambda shape, dtype, layout=None: _full(shape, 0.0, dtype),
    reshape=lambda x, shape: x.reshape(tuple(shape)),
    permute=lambda x, order: x.permute(tuple(order)),
    split=lambda x: x.unbind(-1),
    join=lambda a, b: torch.stack((a, b), -1),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    where=lambda mask, a, b: torch.where(mask, a, torch.as_tensor(b, dtype=a.dtype)),
    sum=lambda x, axis: x.sum(axis),
    allocate_shared_memory=_allocate,
    warp_specialize=_together,
)
_ASSEMBLY = {
    "ex2.approx.ftz.f32 $0, $1;": torch.exp2,
    "rcp.approx.ftz.f32 $0, $1;": torch.reciprocal,
}

TL = types.SimpleNamespace(
    float32=torch.float32,
    inline_asm_elementwise=lambda text, constraints, args, **_: _ASSEMBLY[text](*args),
    constexpr=lambda value: value,
    PropagateNan=types.SimpleNamespace(ALL=None),
    maximum=lambda a, b, propagate_nan=None: torch.clamp(a, min=b),
    minimum=lambda a, b, propagate_nan=None: torch.clamp(a, max=b),
    fma=lambda a, b, c: a * b + c,
    exp2=torch.exp2,
    math=types.SimpleNamespace(erf=torch.erf),
    where=lambda mask, a, b: torch.where(mask, a, b),
)
STAND_INS = {
    "interpreting": lambda: False,
    "range": _range,
    "gl": GL,
    "tl": TL,
    "fence_async_shared": lambda: _late.fence(),
    "BOUND": BOUND,
    "warpgroup_mma": _multiply,
    "warpgroup_mma_wait": _wait,
    "tma": types.SimpleNamespace(
        async_copy_global_to_shared=_copy_by_tma,
        async_copy_shared_to_global=lambda to, at, source: _late.copy(to, at, source),
        store_wait=lambda pendings: _late.wait(pendings),
    ),
    "async_copy": types.SimpleNamespace(
        async_copy_global_to_shared=_copy_rows,
        mbarrier_arrive=lambda barrier, increment_count: barrier.arrive(128),
    ),
    "mbarrier": types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase: barrier.wait(phase),
        expect=lambda barrier, bytes: barrier.arrive(expected=bytes),
        arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
    ),
}


class _AsPython(ast.NodeTransformer):
    """Imports, decorators and layouts go; `x += y` makes a new x, as it does on the device."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        return node if node.module == "__future__" else None

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        is_layout = node.attr == "layout" and isinstance(node.value, ast.Attribute)
        if is_layout and node.value.attr == "type":
            return ast.Constant(None)
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        assert isinstance(node.target, ast.Name)
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.Assign([node.target], value)


def _load(module: types.ModuleType, known: dict[str, Any]) -> dict[str, Any]:
    """The module's functions as plain Python."""
    tree = ast.fix_missing_locations(_AsPython().visit(ast.parse(inspect.getsource(module))))
    space = dict(known)
    exec(compile(tree, str(module.__file__), "exec"), space)
    return space


_math = _load(triton_math, STAND_INS)
_epilogues = _load(hopper_epilogues, _math)
_rows = _load(hopper_kernels, _epilogues)
_gram = _load(hopper_gram, _rows)
KERNELS = {"rows_kernel": _rows["rows_kernel"], "gram_kernel": _gram["gram_kernel"]}


def _argument(tensor: Tensor | None, tensor_map: TensorMap | None) -> Any:
    if tensor is None:
        return None
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((size,), (1,))
    return Pointer(memory) if tensor_map is None else Map(memory, *tensor_map)


def emulate(launch: Launch, *tensors: Tensor | None) -> None:
    """Runs a launch of a Hopper kernel, program after program."""
    assert launch.kernel.__module__ in (hopper_kernels.__name__, hopper_gram.__name__)
    kernel = KERNELS[launch.kernel.__name__]
    args = [_argument(t, launch.maps.get(place)) for place, t in enumerate(tensors)]
    for program in product(*map(range, launch.grid)):
        _program.update(number=program[0], count=launch.grid[0])
        kernel(*args, *launch.numbers, **launch.constants)
