"""A slim launcher: a repeated launch of a compiled Triton kernel skips Triton's argument binding.

Triton compiles one kernel per combination of constexprs, options and what it specialises arguments
on: dtype and 16-byte alignment of a pointer, whether an integer is 1 or a multiple of 16 or needs
64 bits. A `Launch` has all of these fixed but the tensors; where they are aligned and of dtypes
that it met before, it calls the compiled kernel with bare addresses, which costs a few microseconds
instead of tens. Everything else goes through Triton.

A kernel's parameters stand in this order: tensors, numbers, constexprs. Numbers that change with
the count of tokens are listed in the kernel's `do_not_specialize`. A tensor that Hopper's copy
engine (TMA) reads is given to the kernel as a descriptor, made from its `TensorMap` and address.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from turnout.specs import Unsupported


@cache
def _triton() -> tuple[Callable[[], int], Callable[[int], int], Any]:
    """Triton's current device, its current stream, and the settings with the hooks of profilers."""
    from triton import knobs
    from triton.runtime import driver

    return driver.active.get_current_device, driver.active.get_current_stream, knobs.runtime


class ValueNeeded(Exception):
    """Host code asks for a value of a tensor while launches are noted and nothing runs."""


class _Listener(threading.local):
    """Who is told of launches in this thread, and where they are noted instead."""

    heard: Callable[[Any, tuple[Tensor | None, ...]], None] | None = None
    noted: list[tuple[Any, tuple[torch.dtype | None, ...]]] | None = None


_listener = _Listener()


@contextmanager
def recording(heard: Callable[[Any, tuple[Tensor | None, ...]], None]) -> Iterator[None]:
    """Within it, `heard(launch, tensors)` is called after every launch of this thread."""
    before, _listener.heard = _listener.heard, heard
    try:
        yield
    finally:
        _listener.heard = before


@contextmanager
def noting(into: list[tuple[Any, tuple[torch.dtype | None, ...]]]) -> Iterator[None]:
    """Within it, no launch of this thread runs; those that are not compiled go into the list."""
    before, _listener.noted = _listener.noted, into
    try:
        yield
    finally:
        _listener.noted = before


def nothing_runs() -> bool:
    """Launches of this thread are noted, so what they would write is not written."""
    return _listener.noted is not None


def needs_values() -> None:
    """To be called before the host waits for a tensor's values.

    Raises:
        ValueNeeded: launches are noted, so there are none.
    """
    if nothing_runs():
        raise ValueNeeded


def profiled() -> bool:
    """Hooks of a profiler wait for launches, so each has to go through Triton."""
    runtime = _triton()[2]
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def listening() -> bool:
    """Somebody counts the launches of this thread, or profiles them."""
    return _listener.heard is not None or profiled()


def current_device() -> int:
    """The GPU that Triton launches on."""
    return _triton()[0]()


def stream_of(device: int) -> int:
    """The current stream of a GPU, as an address."""
    return _triton()[1](device)


class TensorMap(NamedTuple):
    """What TMA has to know of a tensor besides its address; the last dim is contiguous.

    Attributes:
        shape, strides: in elements; what a copy takes beyond the shape is zero.
        box: what one copy takes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def describe(self, tensor: Tensor) -> Any:
        """The descriptor that Triton compiles for."""
        from triton.experimental.gluon import language
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        name = str(tensor.dtype).removeprefix("torch.")
        layout = language.NVMMASharedLayout.get_default_for(self.box, vars(language)[name])
        return TensorDescriptor(tensor, [*self.shape], [*self.strides], [*self.box], layout)


class _Placed:
    """What Triton's launcher reads of a descriptor."""

    __slots__ = ("address", "base", "padding", "shape", "strides")

    def __init__(self, tensor_map: TensorMap, address: int) -> None:
        self.address, self.base, self.padding = address, self, "zero"
        self.shape, self.strides = tensor_map.shape, tensor_map.strides

    def data_ptr(self) -> int:
        """Of the tensor."""
        return self.address


class Chosen(Protocol):
    """How a config was chosen."""

    @property
    def source(self) -> str:
        """Where it came from."""

    def note(self) -> None:
        """The config runs."""


class Launch:
    """One kernel with everything fixed but the tensors. Build it once, behind an `lru_cache`.

    Args:
        kernel: a Triton jit function with its parameters in the order of the module's docstring.
        grid: programs per axis.
        numbers: the run-time integers and floats.
        constants: constexpr parameters by name, in the kernel's order.
        num_warps, num_stages: Triton's options.
        maps: of the tensors that are given as descriptors, by their place.
        same_dtypes: every call has tensors of the same dtypes, and the same ones are None, because
            whoever keeps this launch keeps one for each combination; so calls need not be told
            apart by it.
        chosen: how its config was chosen, told when the launch runs for the first time; None where
            there is nothing to choose.
    """

    __slots__ = (
        "_ready",
        "_rest",
        "chosen",
        "constants",
        "grid",
        "kernel",
        "maps",
        "numbers",
        "options",
        "same_dtypes",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int = 1,
        maps: dict[int, TensorMap] | None = None,
        same_dtypes: bool = False,
        chosen: Chosen | None = None,
    ) -> None:
        self.chosen = chosen
        self.maps, self.same_dtypes = maps or {}, same_dtypes
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self._rest = (*numbers, *constants.values())
        self._ready: dict[Any, tuple[Any, ...]] = {}

    def _key(self, device: int, tensors: tuple[Tensor | None, ...]) -> Any:
        """What tells apart the calls that need different compiled kernels."""
        if self.same_dtypes:
            return device
        return (device, *[None if t is None else t.dtype for t in tensors])

    def ready(self, device: int, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
        """What `_shortened` says of the kernel for tensors of these dtypes, once compiled."""
        return self._ready.get(self._key(device, tensors))

    def compile(self, dtypes: tuple[torch.dtype | None, ...]) -> Any:
        """Triton's compiled kernel for aligned tensors of these dtypes; None if a hook forbids."""
        from triton.runtime.jit import MockTensor

        given: list[Any] = [None if dtype is None else MockTensor(dtype) for dtype in dtypes]
        for place, tensor_map in self.maps.items():
            given[place] = None if given[place] is None else tensor_map.describe(given[place])
        return self.kernel.run(
            *given,
            *self.numbers,
            grid=self.grid,
            warmup=True,
            **self.constants,
            **self.options,
        )

    def arguments(self, addresses: Sequence[int | None]) -> Sequence[Any]:
        """Addresses as the compiled kernel takes them."""
        if not self.maps:
            return addresses
        found: list[Any] = list(addresses)
        for place, tensor_map in self.maps.items():
            address = addresses[place]
            found[place] = None if address is None else _Placed(tensor_map, address)
        return found

    def __call__(self, *tensors: Tensor | None) -> None:
        """Run on the device of the first tensor, in that device's current stream."""
        if _listener.noted is not None:
            on = tensors[0]
            if on is not None and self.ready(on.get_device(), tensors) is None:
                dtypes = tuple([None if t is None else t.dtype for t in tensors])
                _listener.noted.append((self, dtypes))
            return
        self._run(tensors)
        if _listener.heard is not None:
            _listener.heard(self, tensors)

    def _run(self, tensors: tuple[Tensor | None, ...]) -> None:
        on = tensors[0]
        assert on is not None
        device = on.get_device()
        if device < 0:  # the interpreter
            if self.chosen is not None:
                self.chosen.note()
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            return
        get_device, get_stream, _ = _triton()
        if device != get_device():
            with torch.cuda.device(device):
                self._run(tensors)
            return
        addresses: list[int | None] = []
        bits = 0  # of all addresses together
        for t in tensors:
            if t is None:
                addresses.append(None)
            else:
                address = t.data_ptr()
                bits |= address
                addresses.append(address)
        if 0 in addresses:
            _check_storage(tensors)
        is_aligned = not bits & 15
        key = self._key(device, tensors)
        ready = self._ready.get(key)
        if ready is not None and is_aligned and not profiled():
            run, *head = ready
            args = self.arguments(addresses) if self.maps else addresses
            run(*self.grid, get_stream(device), *head, None, None, None, *args, *self._rest)
            return
        if self.chosen is not None:
            self.chosen.note()
        given: list[Any] = list(tensors)
        for place, tensor_map in self.maps.items():
            tensor = tensors[place]
            given[place] = None if tensor is None else tensor_map.describe(tensor)
        compiled = self.kernel[self.grid](*given, *self.numbers, **self.constants, **self.options)
        if is_aligned:
            self._ready.setdefault(key, _shortened(compiled))


def _shortened(compiled: Any) -> tuple[Any, ...]:
    """What starts a compiled kernel, and its arguments between the stream and three hooks.

    Triton 3.6's launcher is a C function behind Python that allocates scratch memory. For a kernel
    that needs none this Python is a quarter of a launch, so the C function is called instead. A
    launcher of another version or GPU, whose C function may take other arguments, is called as it
    is.
    """
    run = compiled.run
    version = sys.modules["triton"].__version__
    known = version.startswith("3.6.") and type(run).__name__ == "CudaLauncher"
    if not known or run.global_scratch_size or run.profile_scratch_size:
        return run, compiled.function, compiled.packed_metadata
    flags = run.launch_cooperative_grid, run.launch_pdl
    no_scratch = None, None
    return run.launch, compiled.function, *flags, *no_scratch, compiled.packed_metadata


def _check_storage(tensors: tuple[Tensor | None, ...]) -> None:
    """A wrapper around other tensors has no memory of its own to give to a kernel."""
    for t in tensors:
        if t is not None and t.numel() and not t.data_ptr():
            raise Unsupported(
                f"a {type(t).__name__} of shape {tuple(t.shape)} has no memory of its own, so a "
                "kernel can not read it; pass the plain tensor inside (wait for a collective first)"
            )


def aligned(addresses: Iterable[int | None]) -> bool:
    """All to 16 bytes, which is what Triton asks for wide loads."""
    bits = 0
    for address in addresses:
        bits |= address or 0
    return not bits & 15
