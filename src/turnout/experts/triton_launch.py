"""A slim launcher: a repeated launch of a compiled Triton kernel skips Triton's argument binding.

Triton compiles one kernel per combination of constexprs, options and what it specialises arguments
on: dtype and 16-byte alignment of a pointer, whether an integer is 1 or a multiple of 16 or needs
    64
bits. The launcher keys on the same and calls the compiled kernel directly, which costs a few
microseconds instead of tens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _specialised(value: Any) -> Any:
    """What Triton 3.6 specialises an argument on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return value is None


class Launcher:
    """Launches one jit kernel whose constexpr parameters come last."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int,
        on: Tensor,
    ) -> None:
        """Run on the device and current stream of `on`.

        Args:
            grid: programs per axis.
            arguments: the run-time arguments, in order.
            constants: the constexprs by name, in the order of the kernel's parameters.
        """
        values = tuple(constants.values())
        device = on.device.index
        key = (device, num_warps, num_stages, values, *map(_specialised, arguments))
        with torch.cuda.device_of(on):
            compiled = self._compiled.get(key)
            if compiled is not None:
                compiled[grid](*arguments, *values)
                return
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = self._kernel[grid](*arguments, **constants, **options)
            if compiled is not None:  # the interpreter returns nothing
                self._compiled[key] = compiled
