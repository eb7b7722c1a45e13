"""Replay: launches recorded once and run again on other memory.

The kernels are stand-ins that work on bare addresses on the CPU, as compiled ones do on a GPU.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turnout import compile_ahead, replay
from turnout import launch as launching
from turnout.launch import TensorMap
from turnout.replay import replayed, why_not

N = 64


def _view(address: int, dtype: torch.dtype) -> Any:
    """NumPy, whose work torch does not see, as it does not see a kernel's."""
    assert address, "a kernel reads address 0"
    kinds = {torch.float32: np.float32, torch.float64: np.float64}
    memory = (ctypes.c_char * (N * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype=kinds[dtype])


class Kernel:
    """out = a * factor + b on N elements; compiled, that is fixed to a dtype, at its first call."""

    grid, constants = (1, 1, 1), {"N": N}
    maps: ClassVar[dict[int, TensorMap]] = {}

    def __init__(self, factor: float) -> None:
        self.numbers = (factor,)
        self._ready: dict[torch.dtype, tuple[Any, ...]] = {}

    def ready(self, device: int, tensors: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return self._ready.get(tensors[0].dtype)

    def __call__(self, *tensors: Any) -> None:
        dtype = tensors[0].dtype
        ready = self._ready.setdefault(dtype, (_run, dtype, None))
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        args = self.arguments(addresses)
        ready[0](1, 1, 1, 0, *ready[1:], None, None, None, *args, *self.numbers, N)
        if launching._listener.heard is not None:
            launching._listener.heard(self, tensors)

    def arguments(self, addresses: Sequence[int | None]) -> Sequence[Any]:
        return launching.Launch.arguments(self, addresses)  # type: ignore[arg-type]


class Mapped(Kernel):
    """Takes its first tensor as a descriptor."""

    maps: ClassVar = {0: TensorMap((1, N), (N, 1), (1, N))}


def _run(x: int, y: int, z: int, stream: int, dtype: Any, *rest: Any) -> None:
    _, _, _, _, a, b, out, factor, _ = rest
    if not isinstance(a, int):
        assert (a.shape, a.strides, a.padding) == ((1, N), (N, 1), "zero")
        a = a.base.data_ptr()
    value = _view(a, dtype) * factor
    _view(out, dtype)[:] = value if b is None else value + _view(b, dtype)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_programs", type(replay._programs)())
    monkeypatch.setattr(replay, "current_device", lambda: -1)
    monkeypatch.setattr(replay, "stream_of", lambda device: 0)
    monkeypatch.setattr(replay, "listening", lambda: launching._listener.heard is not None)


class Pass:
    """out1 = 2 * (3 a + b), out2 = 5 * (3 a + b) + a, by three launches and two temporaries."""

    def __init__(self) -> None:
        self.kernels = Kernel(3.0), Kernel(2.0), Kernel(5.0)
        self.calls = 0
        self.extra: Any = lambda a: None

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        def function() -> list[torch.Tensor]:
            self.calls += 1
            first, second, third = self.kernels
            shared = torch.empty(N, dtype=a.dtype)
            first(a, b, shared)
            self.extra(a)
            outs = [torch.empty(N, dtype=a.dtype), torch.empty_like(a)]
            second(shared, None, outs[0])
            third(shared, a, outs[1])
            return outs

        return list(replayed("pass", (a, None, b), function))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N).to(dtype), torch.randn(N).to(dtype)


def check(run: Pass, a: torch.Tensor, b: torch.Tensor) -> None:
    one, two = run(a, b)
    shared = 3 * a + b
    torch.testing.assert_close(one, 2 * shared)
    torch.testing.assert_close(two, 5 * shared + a)


def test_a_replay_computes_something_else() -> None:
    run = Pass()
    for _ in range(5):
        check(run, *inputs())
    assert run.calls == 2, "once as it is, once recorded, then replayed"


def test_a_replay_gives_a_descriptor_of_the_recorded_tensor() -> None:
    run = Pass()
    run.kernels = Mapped(3.0), Mapped(2.0), Kernel(5.0)
    for _ in range(5):
        check(run, *inputs())
    assert run.calls == 2


def test_a_replay_writes_where_the_recording_did() -> None:
    run = Pass()
    kept = [run(*inputs()) for _ in range(4)]
    before = [[t.clone() for t in outs] for outs in kept]
    check(run, *inputs())
    for outs, copies in zip(kept, before, strict=True):
        assert all(torch.equal(t, c) for t, c in zip(outs, copies, strict=True))
    pointers = [t.data_ptr() for outs in kept for t in outs]
    assert len(set(pointers)) == len(pointers)


def test_a_replay_runs_the_kernel_of_another_dtype() -> None:
    """One launch serves several dtypes; what was compiled for the first is not for the second."""
    run = Pass()
    for _ in range(4):
        check(run, *inputs(torch.float32))
        check(run, *inputs(torch.float64))
    assert run.calls == 4


def test_other_strides_or_sizes_are_taken_for_the_same() -> None:
    run = Pass()
    for _ in range(3):
        check(run, *inputs())
    wide = torch.randn(2 * N)
    run(wide[:N], torch.randn(N))
    assert run.calls == 2
    run(wide, torch.randn(N))
    assert run.calls == 3


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (lambda a: a + 1, "aten.add.Tensor"),
        (lambda a: torch.zeros(3), "aten.zero"),
        (lambda a: a.double(), "aten._to_copy"),
        (lambda a: Kernel(1.0)(torch.ones(N), None, torch.empty(N)), "aten.ones"),
    ],
)
def test_what_a_recording_can_not_repeat_is_replayed(extra: Any, reason: str) -> None:
    run = Pass()
    run.extra = extra
    for _ in range(4):
        check(run, *inputs())
    assert run.calls == 4
    (key,) = replay._programs
    assert reason in str(why_not(key))


def test_layers_that_differ_in_what_wants_gradients_are_never_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first layer's input wants none. What the second one's backward pass needs is then
    compiled ahead in the call that is recorded."""
    monkeypatch.setattr(compile_ahead, "_met", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    run, layers = Pass(), count()

    def ahead(a: torch.Tensor) -> None:
        compile_ahead.compile_ahead(next(layers), torch.device("cpu"), lambda: torch.zeros(N))

    run.extra = ahead
    for _ in range(4):
        check(run, *inputs())
    assert run.calls == 2
    (key,) = replay._programs
    assert why_not(key) is None


def test_memory_from_outside_is_replayed() -> None:
    """Its address would be that of the recording for ever."""
    outside = torch.randn(N)
    run = Pass()
    run.extra = lambda a: Kernel(1.0)(outside, None, torch.empty(N))
    for _ in range(3):
        check(run, *inputs())
    assert run.calls == 3


def test_inputs_that_overlap_are_told_apart_by_luck() -> None:
    run = Pass()
    for _ in range(3):
        a = torch.randn(N)
        check(run, a, a)
    assert run.calls == 3
    check(run, *inputs())


def test_an_unaligned_input_reaches_an_aligned_kernel() -> None:
    run = Pass()
    for _ in range(3):
        check(run, *inputs())
    check(run, torch.randn(N + 1)[1:], torch.randn(N))
    assert run.calls == 3


def test_memory_that_was_given_back_reaches_a_kernel() -> None:
    """As FSDP and offloading do with weights. The launches themselves refuse it with a reason."""
    run = Pass()
    for _ in range(3):
        check(run, *inputs())
    a, b = inputs()
    run.extra = lambda a: 1 / 0
    run.kernels = (lambda *tensors: None, *run.kernels[1:])  # type: ignore[assignment]
    b.untyped_storage().resize_(0)
    with pytest.raises(ZeroDivisionError):
        run(a, b)


def test_an_output_that_is_a_view_is_replayed() -> None:
    calls = 0

    def once(a: torch.Tensor) -> torch.Tensor:
        def function() -> list[torch.Tensor]:
            nonlocal calls
            calls += 1
            both = torch.empty(2, N)
            kernel(a, None, both[1])
            return [both[1]]

        return next(iter(replayed("view", (a,), function)))

    kernel = Kernel(2.0)
    for _ in range(3):
        a = torch.randn(N)
        torch.testing.assert_close(once(a), 2 * a)
    assert calls == 3


def test_an_output_that_is_the_head_of_more_memory_is_replayed() -> None:
    """A replay would allocate the head alone, and the kernels would write past it."""
    kernel = Kernel(2.0)

    def once(a: torch.Tensor) -> torch.Tensor:
        def function() -> list[torch.Tensor]:
            both = torch.empty(2, N)
            kernel(a, None, both[0])
            kernel(a, None, both[1])
            return [both[0]]

        return next(iter(replayed("head", (a,), function)))

    for _ in range(3):
        a = torch.randn(N)
        torch.testing.assert_close(once(a), 2 * a)
    (key,) = replay._programs
    assert why_not(key) == "an output is a part of its memory"


def test_a_mode_that_follows_operators_misses_the_replayed() -> None:
    """Selective checkpointing pairs the operators of two runs by their order."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    run, seen = Pass(), []
    for _ in range(5):
        names: list[str] = []
        a, b = inputs()
        with Names():
            run(a, b)
        seen.append(names)
    assert all(names == seen[0] for names in seen)
    assert "aten.empty.memory_format" in seen[0]


def test_who_counts_launches_misses_the_replayed() -> None:
    run = Pass()
    for _ in range(3):
        run(*inputs())
    heard = []
    with launching.recording(lambda launch, tensors: heard.append(launch)):
        run(*inputs())
    assert heard == list(run.kernels)


def test_programs_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_LIMIT", 3)
    for number in range(10):
        replayed(number, inputs(), lambda: [])
    assert len(replay._programs) == 3


def test_a_key_that_says_all_is_told_apart_by_shapes() -> None:
    """The caller vouches for the inputs, which are then not looked at."""
    for a, b in [inputs(), inputs(), inputs()]:
        replayed("known", (a, None, b), lambda: [], known=True)
    assert list(replay._programs) == ["known"]


def test_small_temporaries_take_an_allocation_each() -> None:
    sizes = [100, 70000, 5000, 100, 256]
    owners: dict[int, int] = {}
    offsets: dict[int, int] = {}
    buffers = [replay._Buffer(0, size, 0, 5) for size in sizes]
    assert len(replay._plan(buffers, owners, offsets, 0)) == 1
    large = [replay._Buffer(0, replay._SLAB, 0, 5) for _ in sizes]
    assert replay._plan(large, {}, {}, 0) == [replay._SLAB] * len(sizes)


@pytest.mark.parametrize("allowed", [0, 20000])
def test_temporaries_needed_together_share_memory(allowed: int) -> None:
    for seed in range(300):
        generator = random.Random(seed)
        buffers = []
        for _ in range(generator.randint(1, 15)):
            first = generator.randint(0, 10)
            last = generator.randint(first, 12)
            size = generator.choice([100, 256, 1000, 5000, 70000])
            buffers.append(replay._Buffer(0, size, first, last))
        owners: dict[int, int] = {}
        offsets: dict[int, int] = {}
        slabs = replay._plan(buffers, owners, offsets, 100, allowed)
        largest = max(allowed, *[buffer.size for buffer in buffers])
        assert max(slabs) <= largest + 255, "a slab is larger than it may be"
        for i, one in enumerate(buffers):
            assert offsets[i] + one.size <= slabs[owners[i] - 100]
            for j, other in enumerate(buffers[:i]):
                together = one.first <= other.last and other.first <= one.last
                apart = (
                    owners[i] != owners[j]
                    or offsets[i] + one.size <= offsets[j]
                    or offsets[j] + other.size <= offsets[i]
                )
                assert apart or not together, f"seed {seed}: {i} and {j}"
