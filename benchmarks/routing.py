"""Routing and sorting as the stock path does it and as turnout does: timed, recorded and judged.

    PYTHONPATH=src python3 benchmarks/routing.py --commit $(git rev-parse --short HEAD)

See benchmarks/README.md. Needs torch and triton; transformers' operations are written out in
`routing_cases.py`.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from compare import HERE, git_commit, words
from routing_cases import (
    MODES,
    OURS,
    PROVIDERS,
    SHAPES,
    Results,
    Shape,
    Step,
    Work,
    make_work,
    missing,
    shape_named,
    verdict,
)
from routing_sweep import Tuning, compile_all, sweep, tunings
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from turnout.bench.musts import Must, show
from turnout.bench.records import slug
from turnout.bench.table import File, Table
from turnout.device import device_of
from turnout.measure import seconds

TOKENS = 16384  # of the demands
MORE_TOKENS = (4096, 131_072)
FASTER = {"fwd": 5.0, "fwd+bwd": 3.0}  # than hf
MOST_LAUNCHES = {"fwd": 2, "fwd+bwd": 3}
DEMANDED = ("qwen3-30b", "deepseek-v3")
FITTING_S = 0.06  # more repeats while they fit in this
SETTLING_S = 4.0  # before anything is timed: the first calls of a process take the host longer


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider in one mode. No `ms`: its gate was red. Empty: not measured."""

    commit: str
    device: str
    torch: str
    triton: str
    shape: str
    tokens: int
    experts: int
    top_k: int
    rule: str
    mode: str
    provider: str
    ms: float | None
    graph_ms: float | None
    launches: int | None
    rel_err: float | None

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What was measured: of rows with the same key the last counts."""
        return self.shape, self.tokens, self.mode, self.provider


TABLE = Table(Row, {"ms": ".5f", "graph_ms": ".5f", "rel_err": ".3e"})
COLUMNS = TABLE.columns
read = TABLE.read


class Record(File[Row]):
    """The rows of one run and their file."""

    def __init__(self, path: Path) -> None:
        """As `File`."""
        super().__init__(TABLE, path)


def musts(rows: Iterable[Row]) -> list[Must]:
    """What is asked of the rows at T = 16384: speed against `hf`, launches, no red gate of ours."""
    last = {row.key: row for row in rows}
    found = []
    for shape in DEMANDED:
        for mode in MODES:
            ratio = _ratio(last, (shape, TOKENS, mode), "ms")
            name = f"{shape} {mode}: speed / hf"
            found.append(Must(name, ratio, FASTER[mode], True, f"T={TOKENS}"))
    for shape in DEMANDED:
        for mode in MODES:
            row = last.get((shape, TOKENS, mode, OURS))
            got = None if row is None or row.launches is None else float(row.launches)
            name = f"{shape} {mode}: launches"
            found.append(Must(name, got, MOST_LAUNCHES[mode], False, f"T={TOKENS}"))
    red = [row for row in last.values() if row.provider == OURS and row.ms is None]
    names = ", ".join(f"{row.shape} {row.tokens} {row.mode}" for row in red)
    return [*found, Must("red gates of ours (law 2)", float(len(red)), 0.0, False, names)]


def _ratio(last: dict[tuple[str, int, str, str], Row], what: tuple, column: str) -> float | None:
    theirs, ours = (last.get((*what, name)) for name in ("hf", OURS))
    if theirs is None or ours is None:
        return None
    slow, fast = getattr(theirs, column), getattr(ours, column)
    return slow / fast if slow and fast else None


def table(rows: Iterable[Row]) -> str:
    """How many times as fast as `hf` everything is, one call at a time and in a CUDA graph."""
    last = {row.key: row for row in rows}
    lines = [f"{'speed / hf':18s} {'T':>7s} {'mode':8s} {'eager':>7s} {'graph':>7s}"]
    for what in dict.fromkeys(key[:3] for key in last):
        ratios = [_ratio(last, what, column) for column in ("ms", "graph_ms")]
        cells = ["      -" if ratio is None else f"{ratio:7.2f}" for ratio in ratios]
        lines.append(f"{what[0]:18s} {what[1]:7d} {what[2]:8s} {' '.join(cells)}")
    return "\n".join(lines)


def milliseconds(fn: Callable[[], object], device: torch.device, repeats: int) -> float:
    once = seconds(fn, device=device, warmup=min(3, repeats), repeats=min(3, repeats)).median
    count = max(repeats, min(100, math.ceil(FITTING_S / once))) if repeats > 1 else 1
    return seconds(fn, device=device, warmup=0, repeats=count).median * 1e3


def settle(steps: Sequence[Step]) -> None:
    """All steps in turn, untimed."""
    end = time.perf_counter() + SETTLING_S
    while time.perf_counter() < end:
        for step in steps:
            step()
    torch.cuda.current_stream().synchronize()


def device_work(step: Step) -> int | None:
    """How many kernels, copies and fills a step is; nothing without a GPU."""
    if step.logits.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.current_stream().synchronize()
    events = profiler.profiler.kineto_results.events()
    return sum(event.device_type() == DeviceType.CUDA for event in events)


def captured(step: Step) -> tuple[Callable[[], None], Results]:
    """A replay of the step as a CUDA graph, and what it writes.

    Raises:
        RuntimeError: a host sync, or whatever else torch does not capture.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    return graph.replay, results


def measure(work: Work, provider: str, mode: str, args: argparse.Namespace, commit: str) -> Row:
    """The gate, then the counts and times. A red gate prints no time."""
    step, device = Step(work, provider, mode), work.logits.device
    is_ours = provider == OURS
    rel_err, reason = verdict(work, step(), is_ours)
    ms = graph_ms = launches = None
    if reason is None:
        ms = milliseconds(step, device, args.repeats)
        launches = device_work(step)
    if reason is None and device.type == "cuda":
        try:
            replay, results = captured(step)
        except RuntimeError as error:
            print(f"  no CUDA graph: {str(error).strip().splitlines()[0]}", flush=True)
        else:
            _, red = verdict(work, results, is_ours)
            graph_ms = None if red else milliseconds(replay, device, args.repeats)
            reason = red and f"in a CUDA graph: {red}"
    if reason is not None:
        print(f"  no time: {reason}", flush=True)
    shape = work.shape
    return Row(
        commit=commit,
        device=device_of(device).name,
        torch=torch.__version__,
        triton=version("triton"),
        shape=shape.name,
        tokens=work.tokens,
        experts=shape.experts,
        top_k=shape.spec.top_k,
        rule=shape.rule,
        mode=mode,
        provider=provider,
        ms=ms,
        graph_ms=graph_ms,
        launches=launches,
        rel_err=rel_err,
    )


def line(row: Row) -> str:
    def cell(value: float | None, kind: str) -> str:
        return format(value, kind) if value is not None else "-".rjust(int(kind.split(".")[0]))

    what = f"{row.shape:17s} {row.tokens:6d} {row.mode:7s} {row.provider:8s}"
    times = f"{cell(row.ms, '8.4f')} ms, graph {cell(row.graph_ms, '8.4f')} ms"
    return f"{what} {times}, {cell(row.launches, '3.0f')} launches, err {cell(row.rel_err, '7.1e')}"


def planned(args: argparse.Namespace) -> list[tuple[Shape, int]]:
    """Shapes and tokens; without flags, float32 logits at T = 16384 alone."""
    shapes = [shape_named(name) for name in words(args.shapes)] if args.shapes else SHAPES
    if args.tokens:
        return [(shape, int(tokens)) for shape in shapes for tokens in words(args.tokens)]
    first = [(shape, TOKENS) for shape in shapes]
    usual = [shape for shape in shapes if shape.dtype == torch.bfloat16]
    return first + [(shape, tokens) for tokens in MORE_TOKENS for shape in usual]


def run(args: argparse.Namespace, device: torch.device, commit: str, out: Path) -> int:
    """Measures everything that is planned; how much of it failed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    record, failed = Record(out), 0
    names = words(args.providers) if args.providers else list(PROVIDERS)
    reasons = {name: reason for name in names if (reason := missing(name, device)) is not None}
    for name, reason in reasons.items():
        print(f"{name} does not run: {reason}", flush=True)
    settled = device.type != "cuda"
    for shape, tokens in planned(args):
        work = make_work(shape, tokens, device)
        if not settled:
            settle(
                [Step(work, name, mode) for mode in MODES for name in names if name not in reasons]
            )
            settled = True
        for mode in MODES:
            for name in (name for name in names if name not in reasons):
                try:
                    row = measure(work, name, mode, args, commit)
                except Exception as error:  # noqa: BLE001 - what one can not do, others still may
                    failed += 1
                    text = " ".join(str(error).split())[:300]
                    print(f"{shape.name} {tokens} {mode} {name} FAILED: {text}", flush=True)
                    traceback.print_exc()
                    continue
                record.add(row)
                print(line(row), flush=True)
        del work
        gc.collect()
    return failed


def main() -> int:
    """Run, print, save, judge; 1 if something failed, was red, or a demand is missed."""
    started = time.perf_counter()
    args = arguments()
    device = torch.device(args.device)
    name = device_of(device).name
    out = Path(args.out) if args.out else HERE / "results" / f"routing_{slug(name)}.csv"
    commit = args.commit or git_commit()
    failed = 0
    swept = [shape_named(shape) for shape in DEMANDED] if args.sweep else []
    wanted = [(shape, tuning) for shape in swept for tuning in tunings()]
    if not args.judge:
        wanted += [(shape, Tuning()) for shape in dict.fromkeys(s for s, _ in planned(args))]
    if device.type == "cuda" and wanted:
        compile_all(wanted, TOKENS, device)
    if not args.judge:
        print(f"{name}, torch {torch.__version__}, commit {commit}, into {out}", flush=True)
        failed = run(args, device, commit, out)
    rows = [row for row in read(out) if row.commit == commit]
    demands = musts(rows)
    print(
        f"\n{len(rows)} rows of {commit} in {out}\n\n{table(rows)}\n\n{show(demands)}", flush=True
    )
    if swept:
        sweep(swept, args.sweep_tokens, device, args.repeats)
    print(f"\n{failed} failed, {time.perf_counter() - started:.0f} s")
    return 1 if failed or not all(must.passed for must in demands) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--shapes", help=f"some of {','.join(s.name for s in SHAPES)}; all by default")
    add("--tokens", help=f"{TOKENS}, and for bf16 {MORE_TOKENS} by default")
    add("--providers", help=f"some of {','.join(PROVIDERS)}; all by default")
    add("--repeats", type=int, default=20, help="timed calls, at least")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="the CSV; benchmarks/results/routing_<gpu>.csv by default")
    add("--commit", help="for the first column; asked of git by default")
    add("--judge", action="store_true", help="run nothing: demands of what is in the CSV")
    add("--sweep", action="store_true", help="also time our kernels with other tiles and warps")
    add("--sweep-tokens", type=int, default=TOKENS, help="T of the sweep")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
