"""The one clock: seconds per call of a function, on the CPU or on a GPU.

    low, median, high = 20 %, 50 % and 80 % quantile of the time of single calls

On a GPU the time is that between two events around the call, in stream order, and before every call
a buffer larger than the L2 cache is overwritten, so no call finds its inputs there (the method of
`triton.testing.do_bench`, with counts instead of milliseconds). The host does not wait between
calls; work that the host submits too slowly is timed with its gaps, as it runs.

`host_seconds` is what the host spends in a call, whatever the GPU does meanwhile.

Not here: gradients that must be cleared between calls (the function does that itself), CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from turnout.device import device_of

_FLUSH_BYTES = 256 * 2**20
_QUEUED = 8  # calls before the host waits: a full queue would make it wait within a call


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds per call: median, and the quantiles 20 % (`low`) and 80 % (`high`)."""

    median: float
    low: float
    high: float
    repeats: int


def seconds(fn: Callable[[], object], *, device: torch.device, warmup: int, repeats: int) -> Timing:
    """Call `fn` `warmup + repeats` times and time the last `repeats` calls, each by itself.

    Args:
        fn: the work, without arguments. Its result is dropped.
        device: where the work runs; a GPU is timed by events on its current stream.
        warmup: calls before the first timed one; they compile and fill caches.
        repeats: timed calls.

    Raises:
        ValueError: `warmup` is negative, `repeats` is not positive, or the GPU is not there.
    """
    _check_counts(warmup, repeats)
    time_calls = _time_gpu if device.type == "cuda" else _time_host
    return _quantiles(time_calls(fn, device, warmup, repeats))


def host_seconds(
    fn: Callable[[], object], *, device: torch.device, warmup: int, repeats: int
) -> Timing:
    """Time of the host alone: until `fn` returns, with the work it submitted still to be done.

    The GPU is waited for between some calls, off the clock, so that no call finds its queue full.

    Args:
        fn: the work, without arguments. Its result is dropped on the clock.
        device: where the work runs.
        warmup: calls before the first timed one.
        repeats: timed calls.

    Raises:
        ValueError: `warmup` is negative or `repeats` is not positive.
    """
    _check_counts(warmup, repeats)
    samples: list[float] = []
    while len(samples) < repeats:
        count = min(_QUEUED, repeats - len(samples))
        samples += _time_host(fn, device, 0 if samples else warmup, count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _quantiles(samples)


def _check_counts(warmup: int, repeats: int) -> None:
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}; expected 0 or more")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected at least 1")


def _quantiles(times: list[float]) -> Timing:
    samples = torch.tensor(times, dtype=torch.float64)
    low, median, high = samples.quantile(samples.new_tensor([0.2, 0.5, 0.8])).tolist()
    return Timing(median=median, low=low, high=high, repeats=len(times))


def _time_host(
    fn: Callable[[], object], device: torch.device, warmup: int, repeats: int
) -> list[float]:
    for _ in range(warmup):
        fn()
    samples = []
    for _ in range(repeats):
        start = perf_counter()
        fn()
        samples.append(perf_counter() - start)
    return samples


def _time_gpu(
    fn: Callable[[], object], device: torch.device, warmup: int, repeats: int
) -> list[float]:
    flush_bytes = max(_FLUSH_BYTES, 2 * device_of(device).l2_bytes)
    flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)
    with torch.cuda.device(device):
        for _ in range(warmup):
            fn()
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        stops = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for event in (*starts, *stops):
            event.record()  # an event is made when it is first recorded
        for start, stop in zip(starts, stops, strict=True):
            flush.zero_()
            start.record()
            fn()
            stop.record()
        torch.cuda.synchronize()
        pairs = zip(starts, stops, strict=True)
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]
