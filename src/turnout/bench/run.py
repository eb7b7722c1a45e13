"""One measurement: the gate, then memory, then time; and the same under a CUDA graph.

    step:  out = run(leaves);  in `full` and `lora16` also torch.autograd.grad(out, leaves, dout)
    saved: memory allocated after the forward, less before it, the output alive
    peak:  most memory allocated over forward and backward, less what was before it

Both are counted by torch's allocator, on GPUs only. Time is the median of `turnout.measure`, the
same clock for every provider. A red gate prints no time: the step does not run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from turnout.bench.providers import Options, Provider, Run
from turnout.bench.truth import Judge, Results, sampled
from turnout.bench.work import DTYPE, GRADIENTS, Leaves, Mode, Work, flops
from turnout.experts.weights import alternating
from turnout.launch import Launch, recording
from turnout.measure import seconds

MIB = 2**20
SLOW = 0.15  # seconds; work slower than this is timed three times
MOST_REPEATS = 100
GRAPH = "+graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One provider on one work. What was not measured is None; `reason` says why there is no time.

    Attributes:
        provider: its name, with `+graph` for replays of a CUDA graph.
        first_s: seconds of the first step, compilation and the peer's own tuning included.
        backend: turnout's back ends that ran, joined by `+`; empty for peers.
        config_source: where their configs came from, in the words of `turnout.tuning.entry.Source`,
            joined by `+`; empty where no kernel with a config ran, and for peers.
    """

    provider: str
    ms: float | None = None
    tflops: float | None = None
    saved_mb: float | None = None
    peak_mb: float | None = None
    rel_err: float | None = None
    first_s: float | None = None
    backend: str = ""
    config_source: str = ""
    reason: str | None = None

    @property
    def is_row(self) -> bool:
        """A step that no CUDA graph captures is no row: nothing was computed."""
        return self.rel_err is not None


def measure(
    provider: Provider,
    work: Work,
    mode: Mode,
    judge: Judge,
    options: Options | None = None,
    *,
    repeats: int = 20,
    graph: bool = False,
) -> Iterator[Measured]:
    """Measures one provider; with `graph`, yields a second row for replays of a CUDA graph.

    Args:
        provider: who.
        work: on what.
        mode: what of it.
        judge: its truth and yardstick.
        options: turnout's own; peers ignore them.
        repeats: timed calls at least; up to 100 while they fit in a quarter of a second.
        graph: capture a step as well, on a GPU.
    """
    options = options or Options()
    device = work.x_TH.device
    step = _Step(provider, work, mode, options)
    found: list[Results] = []
    ran = _Ran()
    with _listening(ran) if provider.is_ours else nullcontext():
        first = seconds(lambda: found.append(step.run()), device=device, warmup=0, repeats=1)
    measured = Measured(
        provider=provider.name,
        first_s=first.median,
        backend=provider.backend or "+".join(sorted(ran.backends)),
        config_source="+".join(sorted(ran.sources)),
    )
    rel_err, reason = _verdict(judge, found.pop(), provider)
    measured = replace(measured, rel_err=rel_err, reason=reason)
    if reason is not None:
        yield measured
        return
    saved, peak = step.memory()
    milliseconds = _milliseconds(step.run, device, repeats)
    yield replace(
        measured,
        saved_mb=saved,
        peak_mb=peak,
        ms=milliseconds,
        tflops=_tflops(work, mode, milliseconds),
    )
    if graph:
        yield _graphed(step, measured, judge, repeats)


def dense_tflops(device: torch.device) -> float:
    """The rate of a dense bf16 matmul: 8192^3 on a GPU, 1024^3 elsewhere.

    Timed for as long as a provider is: a GPU lowers its clock after some milliseconds at its power
    limit, so the rate of fewer calls is one that nothing longer reaches.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
    return 2 * size**3 / _milliseconds(lambda: a @ b, device, repeats=20) / 1e9


class _Step:
    """A provider's step on its own leaves."""

    def __init__(self, provider: Provider, work: Work, mode: Mode, options: Options) -> None:
        self.provider, self.work, self.mode = provider, work, mode
        self.leaves = work.leaves(mode)
        if provider.interleaved:
            self.leaves = _interleaved(self.leaves)
        self._run: Run = provider.prepare(work, mode, options)
        self._wanted = [getattr(self.leaves, name) for name in GRADIENTS[mode]]

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.mode != "fwd"):
            return self._run(self.leaves)

    def run(self) -> Results:
        """Output and gradients by name."""
        out = self.forward()
        results = {"out": out.detach()}
        if self._wanted:
            grads = torch.autograd.grad(out, self._wanted, self.work.dout_TH)
            results.update(zip(GRADIENTS[self.mode], grads, strict=True))
        return results

    def memory(self) -> tuple[float | None, float | None]:
        """(saved, peak) in MiB, or nothing on a device without an allocator that counts."""
        device = self.work.x_TH.device
        if device.type != "cuda":
            return None, None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = self.forward()
        saved = torch.cuda.memory_allocated(device) - before
        if self._wanted:
            torch.autograd.grad(out, self._wanted, self.work.dout_TH)
        peak = torch.cuda.max_memory_allocated(device) - before
        return saved / MIB, peak / MIB


def _interleaved(leaves: Leaves) -> Leaves:
    """The leaves with gate and up rows alternating."""

    def again(tensor: Tensor, dim: int) -> Tensor:
        return alternating(tensor.detach(), dim).requires_grad_(tensor.requires_grad)

    leaves = replace(leaves, gate_up=again(leaves.gate_up, 1))
    return leaves if leaves.b_up is None else replace(leaves, b_up=again(leaves.b_up, 0))


def _verdict(judge: Judge, results: Results, provider: Provider) -> tuple[float, str | None]:
    compared = sampled(results, judge.sample, interleaved=provider.interleaved)
    return judge.verdict(compared, is_ours=provider.is_ours)


@dataclass(slots=True)
class _Ran:
    """What a step of turnout's launched: the back ends, and where the configs came from."""

    backends: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)


@contextmanager
def _listening(ran: _Ran) -> Iterator[None]:
    """Collects what runs meanwhile, the backward pass included, which then stays in this thread.

    A step that launches nothing of ours ran in plain PyTorch, where there is no config to choose.
    """

    def heard(launch: Launch, tensors: object) -> None:
        ran.backends.add("hopper" if "hopper" in launch.kernel.__module__ else "triton")
        if launch.chosen is not None:
            ran.sources.add(launch.chosen.source)

    with recording(heard), torch.autograd.set_multithreading_enabled(False):
        yield
    if not ran.backends:
        ran.backends.add("torch")


def _milliseconds(fn: Callable[[], object], device: torch.device, repeats: int) -> float:
    once = seconds(fn, device=device, warmup=1, repeats=1).median
    if once > SLOW:
        return seconds(fn, device=device, warmup=0, repeats=3).median * 1e3
    fitting = min(MOST_REPEATS, math.ceil(0.25 / once))
    warmup = min(20, math.ceil(0.03 / once))
    timing = seconds(fn, device=device, warmup=warmup, repeats=max(repeats, fitting))
    return timing.median * 1e3


def _tflops(work: Work, mode: Mode, milliseconds: float) -> float:
    return flops(work.shape, mode) / milliseconds / 1e9


def _graphed(step: _Step, measured: Measured, judge: Judge, repeats: int) -> Measured:
    """The step captured once and replayed. What can not be captured says so."""
    device = step.work.x_TH.device
    row = replace(measured, provider=measured.provider + GRAPH, first_s=None)
    if device.type != "cuda":
        return replace(row, rel_err=None, reason="no CUDA graph: the work runs on the CPU")
    if step.provider.waits:
        return replace(row, rel_err=None, reason="no CUDA graph: the host waits in every step")
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            step.run()
    torch.cuda.current_stream(device).wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            results = step.run()
    except RuntimeError as error:  # what torch raises for a host sync within a capture
        first_line = str(error).strip().split("\n")[0]
        return replace(row, rel_err=None, reason=f"no CUDA graph: {first_line}")
    graph.replay()
    rel_err, reason = _verdict(judge, results, step.provider)
    if reason is not None:
        return replace(row, rel_err=rel_err, reason=reason)
    milliseconds = _milliseconds(graph.replay, device, repeats)
    tflops = _tflops(step.work, step.mode, milliseconds)
    return replace(row, rel_err=rel_err, ms=milliseconds, tflops=tflops)
