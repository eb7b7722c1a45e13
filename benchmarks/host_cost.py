"""What the host spends in a forward of `expert_mlp`, with so few tokens that nothing else counts.

    PYTHONPATH=src python3 benchmarks/host_cost.py --commit $(git rev-parse --short HEAD)

All cases are measured in turn, `--rounds` times, and the least of a case's medians counts: whoever
shares the machine slows the host for seconds at a time, and nothing makes it faster than it is.

Demand: at most 30 microseconds beyond 15 for each launch. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from compare import HERE, git_commit

from turnout.bench.musts import Must, show
from turnout.bench.records import slug
from turnout.bench.sweep import version_of
from turnout.bench.table import File, Table
from turnout.bench.truth import bundles
from turnout.bench.work import SPEC, Mode, make_weights, make_work
from turnout.device import device_of
from turnout.experts.ops import expert_mlp
from turnout.launch import recording
from turnout.measure import host_seconds
from turnout.shapes import shape_named

MODES: tuple[Mode, ...] = ("fwd", "lora16")
PER_LAUNCH, BEYOND = 15.0, 30.0  # microseconds


@dataclass(frozen=True, slots=True)
class Row:
    """One shape and mode: the columns of the CSV. `beyond_us` is `host_us` less 15 a launch;
    `typical_us` is the median of the rounds, whatever the machine did meanwhile."""

    commit: str
    device: str
    torch: str
    triton: str
    shape: str
    tokens: int
    mode: str
    launches: int
    host_us: float
    beyond_us: float
    typical_us: float | None = None


TABLE = Table(Row, {"host_us": ".1f", "beyond_us": ".1f", "typical_us": ".1f"})


def forward(shape_name: str, tokens: int, mode: Mode, device: torch.device) -> Callable[[], object]:
    """A forward pass, in `lora16` with what it keeps for the backward pass."""
    shape = replace(shape_named(shape_name), tokens=tokens)
    work = make_work(shape, make_weights(shape, device))
    leaves = work.leaves(mode)
    weights, lora = bundles(leaves)

    def run() -> object:
        return expert_mlp(leaves.x, work.experts_TK, leaves.weights_TK, weights, SPEC, lora=lora)

    return run


def launches_of(run: Callable[[], object]) -> int:
    """How many kernels of ours a call launches."""
    heard: list[object] = []
    with recording(lambda launch, tensors: heard.append(launch)):
        run()
    return len(heard)


def demands(rows: Iterable[Row]) -> list[Must]:
    """Those of the rows that launched kernels; plain PyTorch has no such limit."""
    return [
        Must(
            f"{row.shape} T={row.tokens} {row.mode}: host us beyond launches",
            row.beyond_us,
            BEYOND,
            False,
            f"{row.host_us:.0f} us, {row.launches} launches",
        )
        for row in rows
        if row.launches
    ]


def main() -> int:
    """Run, save, judge; 1 if a demand is missed."""
    args = arguments()
    device = torch.device(args.device)
    name = device_of(device).name
    out = Path(args.out) if args.out else HERE / "results" / f"host_{slug(name)}.csv"
    file = File(TABLE, out)
    facts = args.commit or git_commit(), name, torch.__version__, version_of("triton")
    cases = {
        (shape, mode): forward(shape, args.tokens, mode, device)
        for shape in args.shapes.split(",")
        for mode in MODES
    }
    medians: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case, run in cases.items():
            timing = host_seconds(run, device=device, warmup=20, repeats=args.repeats)
            medians[case].append(timing.median * 1e6)
    for (shape, mode), run in cases.items():
        launches = launches_of(run)
        found_us = medians[shape, mode]
        host, typical = min(found_us), median(found_us)
        beyond = host - PER_LAUNCH * launches
        file.add(Row(*facts, shape, args.tokens, mode, launches, host, beyond, typical))
        others = ", ".join(f"{us:.0f}" for us in found_us)
        print(f"{shape:12s} {mode:6s} {host:7.1f} us of {others}; {launches} launches")
    found = demands(file.rows)
    print(f"\n{len(file.rows)} rows in {out}\n\n{show(found)}")
    return 0 if all(must.passed for must in found) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--shapes", default="qwen3-30b,gptoss-20b,mixtral", help="joined by commas")
    add("--tokens", type=int, default=4)
    add("--rounds", type=int, default=25)
    add("--repeats", type=int, default=200, help="calls in a round")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="the CSV; benchmarks/results/host_<gpu>.csv by default")
    add("--commit", help="for the first column; asked of git by default")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
