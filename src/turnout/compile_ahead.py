"""The kernels of a step are compiled side by side, before the first of them runs.

Triton compiles a kernel at its first launch, so the first step of a layer compiles some twenty, one
after the other. But the host code of a pass reads no value of a tensor: it can run once with its
launches noted instead of started, and what it would launch is compiled by many threads (Triton's
`AsyncCompileMode`; its compiler lets go of Python's lock). An error is left for the launch itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from turnout.launch import Launch, ValueNeeded, noting

WORKERS = 16

_met: set[Hashable] = set()


def compile_ahead(key: Hashable, device: torch.device, dry: Callable[[], object]) -> None:
    """Compile all that `dry` would launch on a GPU and is not compiled, once per key.

    Args:
        key: what decides the kernels.
        device: the GPU.
        dry: the host code; nothing that it makes may be used.
    """
    if key in _met or torch.cuda.is_current_stream_capturing():
        return
    _met.add(key)
    wanted: list[tuple[Launch, tuple[torch.dtype | None, ...]]] = []
    try:
        with noting(wanted):
            dry()
    except (ValueNeeded, torch.OutOfMemoryError):
        return  # then each is compiled when it is launched
    if len(wanted) > 1:
        workers = min(WORKERS, len(os.sched_getaffinity(0)))
        with torch.cuda.device(device), ThreadPoolExecutor(workers) as pool:
            _compile(list(dict.fromkeys(wanted)), pool)


def _compile(
    wanted: list[tuple[Launch, tuple[torch.dtype | None, ...]]], pool: ThreadPoolExecutor
) -> None:
    from triton import AsyncCompileMode

    device = torch.cuda.current_device()

    def load(kernel: Any) -> None:
        """The kernel on the GPU, and what starts it, which is compiled as well."""
        torch.cuda.set_device(device)  # of this thread
        _ = kernel.run

    with AsyncCompileMode(pool, ignore_errors=True):
        compiling = [launch.compile(dtypes) for launch, dtypes in wanted]
    done = [one.result(True) if hasattr(one, "result") else one for one in compiling]
    for kernel in done:
        if kernel is not None:
            pool.submit(load, kernel)
