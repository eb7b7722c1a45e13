"""What code of kernels asks of Triton and of sizes, without torch: worker processes compile kernels
without it."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

INSTALLED = find_spec("triton") is not None


@cache
def _interprets() -> bool:
    return bool(sys.modules["triton"].knobs.runtime.interpret)


def interpreting() -> bool:
    """Triton runs its kernels in the interpreter, on the CPU (decided when Triton is imported)."""
    return "triton" in sys.modules and _interprets()


@cache
def has_gluon() -> bool:
    """Triton has Gluon as the kernels for Hopper are written in it: 3.5 starts warps otherwise."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return (int(major), int(minor)) >= (3, 6)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: what a tile can be wide."""
    return 1 << max(0, n - 1).bit_length()
