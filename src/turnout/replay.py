"""Replay: the launches of a function recorded once, later run again with new addresses.

A pass of kernels asks Python the same questions at every call: which tile, how large a buffer,
which strides. For small problems that costs more than the kernels do. `replayed` runs a function
normally, records what it allocated and launched, and from then on, for inputs of the same shapes,
strides and dtypes, launches the same kernels on memory of the same size. Outputs are allocated when
they are first needed. What was a temporary becomes a part of a few slabs, none larger than the
largest temporary, that live as long as their parts; temporaries that are never needed together
share memory.

A function can be replayed if all that it does to tensors is to allocate, to view, and to call
`turnout.launch.Launch`. That is observed, not trusted: the recording sees every operator, and a
function that runs another one (a conversion, say) is left alone, as are inputs that overlap in
memory, are not aligned to 16 bytes or have no memory (any more).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turnout.launch import Launch, aligned, current_device, listening, recording, stream_of
from turnout.shortcuts import empty_on

_aten = torch.ops.aten
_ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
}
_VIEW = {
    _aten.transpose.int,
    _aten.permute.default,
    _aten.view.default,
    _aten.view.dtype,
    _aten.unsqueeze.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.t.default,
    _aten.detach.default,
    _aten.alias.default,
}
_ALIGN = 256
_STREAM = 3  # its place among a launcher's arguments, behind the grid
_LIMIT = 512  # programs that are kept
_SLAB = 16 * 2**20  # bytes that a slab may have whatever its parts have: one allocation for many


@dataclass(slots=True)
class _Buffer:
    """One allocation of the recorded run, and the launches that touch it first and last."""

    start: int
    size: int
    first: int = -1
    last: int = -1


class _Tape(TorchDispatchMode):
    """What happens while a function runs.

    Attributes:
        inputs: start and bytes of each.
        buffers: what was allocated, in order.
        launches: each with what is compiled of it, and the owner (inputs first, then buffers) and
            offset of its tensors.
        obstacle: why this can not be replayed.
    """

    def __init__(self, device: int, inputs: list[tuple[int, int]]) -> None:
        super().__init__()
        self.device = device
        self.inputs = inputs
        self.buffers: list[_Buffer] = []
        self.launches: list[tuple[Launch, tuple[Any, ...], list[tuple[int, int] | None]]] = []
        self.obstacle: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            self.buffers.append(_Buffer(out.data_ptr(), out.untyped_storage().nbytes()))
        elif func not in _VIEW:
            self._stop(str(func))
        return out

    def launched(self, launch: Launch, tensors: tuple[Tensor | None, ...]) -> None:
        """Note a launch, and which compiled kernel it ran."""
        now = len(self.launches)
        ready = launch.ready(self.device, tensors)
        if ready is None or not aligned(None if t is None else t.data_ptr() for t in tensors):
            self._stop("a kernel was launched with an address that is not aligned")
            return
        places = [None if t is None else self._place(t.data_ptr(), now) for t in tensors]
        self.launches.append((launch, ready, places))

    def _place(self, address: int, now: int) -> tuple[int, int]:
        # newest first: memory that was freed is given out again
        for index in range(len(self.buffers) - 1, -1, -1):
            buffer = self.buffers[index]
            if buffer.start <= address < buffer.start + max(buffer.size, 1):
                buffer.first = now if buffer.first < 0 else buffer.first
                buffer.last = now
                return len(self.inputs) + index, address - buffer.start
        for index, (start, size) in enumerate(self.inputs):
            if start <= address < start + size:
                return index, address - start
        self._stop("a launch reads memory that is neither an input nor allocated here")
        return 0, 0

    def _stop(self, reason: str) -> None:
        self.obstacle = self.obstacle or reason


class _Memory(NamedTuple):
    """An output or a slab.

    Attributes:
        shape, stride, dtype: as it is allocated.
        places: (index, offset) of its addresses among all addresses.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    places: tuple[tuple[int, int], ...]


class _Step(NamedTuple):
    """One launch: what is allocated before it, what runs, and the slabs that end with it.

    Attributes:
        run, arguments: Triton's launcher, and what it takes; the stream and the addresses are
            filled in.
        pick, places: takes this launch's addresses from all of them; where they go.
    """

    born: tuple[int, ...]
    run: Any
    arguments: list[Any]
    pick: Any
    places: slice
    gone: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Program:
    """A recorded function.

    Attributes:
        device: of all tensors.
        num_outputs: how many tensors it returns.
        memory: outputs, then slabs.
        inputs: (index, input, offset) of the inputs' addresses among all addresses.
        num_places: how many addresses there are; one more stands for None.
    """

    device: torch.device
    num_outputs: int
    memory: tuple[_Memory, ...]
    inputs: tuple[tuple[int, int, int], ...]
    num_places: int
    steps: tuple[_Step, ...]

    def run(self, addresses: list[int]) -> list[Tensor]:
        flat: list[int | None] = [None] * (self.num_places + 1)
        for place, owner, offset in self.inputs:
            flat[place] = addresses[owner] + offset
        alive: list[Tensor | None] = [None] * len(self.memory)
        empty, stream = empty_on(self.device), stream_of(self.device.index)

        def allocate(index: int) -> Tensor:
            shape, stride, dtype, places = self.memory[index]
            made = alive[index] = empty(shape, stride, dtype)
            start = made.data_ptr()
            for place, offset in places:
                flat[place] = start + offset
            return made

        for born, run, template, pick, places, gone in self.steps:
            for index in born:
                allocate(index)
            arguments = template.copy()
            arguments[_STREAM] = stream
            arguments[places] = pick(flat)
            run(*arguments)
            for index in gone:
                alive[index] = None
        return [
            allocate(index) if made is None else made
            for index, made in enumerate(alive[: self.num_outputs])
        ]


_programs: OrderedDict[Hashable, _Program | str | None] = OrderedDict()
_MISSING = object()


def _observed() -> bool:
    """Somebody follows launches or operators (selective checkpointing does): show all of them."""
    return listening() or torch._C._len_torch_dispatch_stack() > 0


def forget() -> None:
    """Drops what was recorded: the next call of every function runs it again."""
    _programs.clear()


def why_not(key: Hashable) -> str | None:
    """What kept the function with this key from being replayed, if it was recorded."""
    found = _programs.get(key)
    return found if isinstance(found, str) else None


def replayed(
    key: Hashable,
    inputs: Sequence[Tensor | None],
    function: Callable[[], Sequence[Tensor]],
    *,
    known: bool = False,
) -> Sequence[Tensor]:
    """`function()`, by replay once it was recorded for inputs like these.

    The first call with a key runs the function, the second records it, further ones replay.

    Args:
        key: everything that `function` depends on besides `inputs`; their types, shapes, strides,
            dtypes and device are added here.
        inputs: every tensor that `function` reads, on one GPU.
        function: returns new tensors, none of them a view of another or of an input.
        known: `key` says all of that of the inputs, and which are None, already.
    """
    present = [t for t in inputs if t is not None]
    device = present[0].get_device()
    if not known:
        absent = tuple([t is None for t in inputs])
        facts = tuple([(type(t), t.shape, t.stride(), t.dtype) for t in present])
        key = (key, device, absent, facts)
    program = _programs.get(key, _MISSING)
    if program is _MISSING:
        _programs[key] = None
        if len(_programs) > _LIMIT:
            _programs.popitem(last=False)
        return function()
    if isinstance(program, str):
        return function()
    addresses = list(map(Tensor.data_ptr, present))
    if not (all(addresses) and aligned(addresses)) or _observed() or device != current_device():
        return function()  # of a tensor without memory a launch says what it is
    if isinstance(program, _Program):
        return program.run(addresses)
    outputs, _programs[key] = _record(present, addresses, function)
    return outputs


def _record(
    inputs: list[Tensor], addresses: list[int], function: Callable[[], Sequence[Tensor]]
) -> tuple[Sequence[Tensor], _Program | str]:
    """The outputs of a normal run, and the program or what stands in its way."""
    spans = [(a, _extent(t)) for a, t in zip(addresses, inputs, strict=True)]
    ordered = sorted(spans)
    for (start, size), (following, _) in pairwise(ordered):
        if start + size > following:
            return function(), "two inputs overlap in memory"
    tape = _Tape(inputs[0].get_device(), spans)
    with tape, recording(tape.launched):
        outputs = function()
    return outputs, tape.obstacle or _compile(inputs[0].device, tape, outputs)


def _extent(t: Tensor) -> int:
    """Bytes from the first to the last element of an input."""
    if not t.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _compile(device: torch.device, tape: _Tape, outputs: Sequence[Tensor]) -> _Program | str:
    starts = [b.start for b in tape.buffers]
    owners: dict[int, int] = {}  # buffer to memory: outputs, then slabs
    offsets: dict[int, int] = {}
    for index, out in enumerate(outputs):
        if not out.numel():
            continue
        if out.data_ptr() not in starts:
            return "an output is not memory of its own"
        buffer = len(starts) - 1 - starts[::-1].index(out.data_ptr())
        if tape.buffers[buffer].size != out.numel() * out.element_size():
            return "an output is a part of its memory"
        if buffer in owners:
            return "two outputs share memory"
        owners[buffer], offsets[buffer] = index, 0
    slabs = _plan(tape.buffers, owners, offsets, len(outputs))
    places: dict[tuple[bool, int, int], int] = {}  # (an input, owner, offset) to index
    seen: dict[int, tuple[int, int]] = {}  # memory to its first and last launch
    runs = []
    for number, (launch, ready, touched) in enumerate(tape.launches):
        picks = []
        for place in touched:
            if place is None:
                picks.append(-1)
                continue
            owner, offset = place
            is_input = owner < len(tape.inputs)
            if not is_input:
                buffer = owner - len(tape.inputs)
                owner, offset = owners[buffer], offsets[buffer] + offset
                seen[owner] = (seen.get(owner, (number, 0))[0], number)
            picks.append(places.setdefault((is_input, owner, offset), len(places)))
        assert len(picks) > 1, "a kernel reads one tensor and writes another"
        runs.append((launch, ready, picks))
    steps = []
    for number, (launch, ready, picks) in enumerate(runs):
        born = tuple(m for m, (first, _) in seen.items() if first == number)
        gone = tuple(m for m, (_, last) in seen.items() if last == number and m >= len(outputs))
        steps.append(_step(launch, ready, picks, born, gone))
    memory = [(tuple(t.shape), t.stride(), t.dtype) for t in outputs]
    memory += [((size,), (1,), torch.uint8) for size in slabs]
    return _Program(
        device,
        len(outputs),
        tuple(
            _Memory(*facts, tuple((at, o) for (i, m, o), at in places.items() if not i and m == n))
            for n, facts in enumerate(memory)
        ),
        tuple((at, owner, offset) for (i, owner, offset), at in places.items() if i),
        len(places),
        tuple(steps),
    )


def _step(
    launch: Launch,
    ready: tuple[Any, ...],
    picks: list[int],
    born: tuple[int, ...],
    gone: tuple[int, ...],
) -> _Step:
    run, *head = ready
    before = [*launch.grid, None, *head, None, None, None]
    after = [*launch.numbers, *launch.constants.values()]
    places = slice(len(before), len(before) + len(picks))
    arguments = [*before, *[None] * len(picks), *after]
    return _Step(born, run, arguments, _picker(launch, picks), places, gone)


def _picker(launch: Launch, picks: list[int]) -> Callable[[list[int | None]], Sequence[Any]]:
    """Takes a launch's addresses from all of them, as its compiled kernel wants them."""
    pick = itemgetter(*picks)
    if not launch.maps:
        return pick
    return lambda flat: launch.arguments(pick(flat))


def _plan(
    buffers: list[_Buffer],
    owners: dict[int, int],
    offsets: dict[int, int],
    first_slab: int,
    allowed: int = _SLAB,
) -> list[int]:
    """Places the temporaries (added to `owners` and `offsets`); returns the slabs' bytes.

    Largest first, at the lowest free place of the first slab that has one. No slab is larger than
    the largest temporary or `allowed`.
    """
    temporary = [i for i, b in enumerate(buffers) if i not in owners and b.first >= 0]
    temporary.sort(key=lambda i: -buffers[i].size)
    slabs: list[list[int]] = []
    ends: list[int] = []
    for index in temporary:
        buffer = buffers[index]
        limit = max(_round(buffers[temporary[0]].size), allowed)
        places = (_free_place(index, members, buffers, offsets) for members in [*slabs, []])
        fits = ((n, o) for n, o in enumerate(places) if o + buffer.size <= limit)
        number, offset = next(fits)
        if number == len(slabs):
            slabs.append([])
            ends.append(0)
        slabs[number].append(index)
        owners[index], offsets[index] = first_slab + number, offset
        ends[number] = max(ends[number], offset + _round(buffer.size))
    return ends


def _round(size: int) -> int:
    return -(-max(size, 1) // _ALIGN) * _ALIGN


def _free_place(
    index: int, members: list[int], buffers: list[_Buffer], offsets: dict[int, int]
) -> int:
    """The lowest offset in a slab where this buffer meets nobody alive at the same time."""
    own = buffers[index]
    rivals = sorted(
        (offsets[i], offsets[i] + _round(buffers[i].size))
        for i in members
        if buffers[i].first <= own.last and own.first <= buffers[i].last
    )
    offset = 0
    for begin, end in rivals:
        if offset + own.size <= begin:
            break
        offset = max(offset, end)
    return offset
