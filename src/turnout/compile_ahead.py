"""The kernels of a step are compiled before the first of them runs, their launchers beside them.

Triton compiles a kernel at its first launch, and then, with the machine's C compiler, the function
that starts it; the first step of a layer does both some twenty times. But the host code of a pass
reads no value of a tensor: it can run once with its launches noted instead of started. So all that
a step needs is known at once, and while Triton works on one kernel, a second thread has the C
compiler at work for the kernel before.

The kernels themselves are compiled one after the other: with many threads at once (Triton's
`AsyncCompileMode`) a run of the GPU tests ended in an illegal memory access, and the same run
without it did not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch

from turnout.launch import Launch, ValueNeeded, noting

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
        with torch.cuda.device(device), ThreadPoolExecutor(1) as beside:
            _compile(dict.fromkeys(wanted), beside)


def _compile(
    wanted: Iterable[tuple[Launch, tuple[torch.dtype | None, ...]]], beside: Executor
) -> None:
    from triton.runtime import driver
    from triton.runtime.errors import TritonError

    def build_launcher(kernel: Any) -> None:
        """Into Triton's cache; an error is met again, and said, when the kernel is launched."""
        driver.active.launcher_cls(kernel.src, kernel.metadata)

    for launch, dtypes in wanted:
        try:
            kernel = launch.compile(dtypes)
        except (TritonError, RuntimeError):
            return  # the launch meets it again, if the step gets there
        if kernel is not None:  # a hook of Triton's may leave it out
            beside.submit(build_launcher, kernel)
