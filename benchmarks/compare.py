"""The run of record: every shape, mode and provider in one process, into a CSV, then the demands.

    PYTHONPATH=src python3 benchmarks/compare.py --commit $(git rev-parse --short HEAD)

See benchmarks/README.md. Needs torch, and matplotlib for --plot; nothing else of turnout's.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from turnout.bench import musts
from turnout.bench.providers import provider_named
from turnout.bench.records import Record, Row, read, slug
from turnout.bench.run import Measured
from turnout.bench.sweep import Case, Setting, default_providers, line, missing, sweep
from turnout.bench.work import Mode
from turnout.device import device_of
from turnout.shapes import SHAPES, shape_named

HERE = Path(__file__).resolve().parent
SECTIONS = ("main", "recompute", "skew", "decode", "tokens")


def main() -> int:
    """Run, print, save; 1 if a provider failed or turnout's gate was red."""
    started = time.perf_counter()
    args = arguments()
    add_peers(HERE / "peers")
    sections = words(args.sections)
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"--sections has {sorted(unknown)}; expected some of {SECTIONS}")
    device = torch.device(args.device)
    name = device_of(device).name
    out = Path(args.out) if args.out else HERE / "results" / f"{slug(name)}.csv"
    commit = args.commit or git_commit()
    if not args.judge:
        print(f"{name}, torch {torch.__version__}, commit {commit}, into {out}", flush=True)
        failed = run(args, sections, device, commit, out)
    else:
        failed = 0
    rows = [row for row in read(out) if row.commit == commit]
    print(f"\n{len(rows)} rows of {commit} in {out}\n")
    print(musts.show(musts.musts(rows, sections)))
    if args.plot:
        from turnout.bench.plot import plot

        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(Path(args.plot), rows)
        print(f"\nwrote {args.plot}")
    red = any(row.ms is None and row.provider == musts.OURS for row in rows)
    print(f"\n{failed} failed, {time.perf_counter() - started:.0f} s")
    return 1 if failed or red else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--sections", default="main", help=f"some of {','.join(SECTIONS)}; main by default")
    add("--shapes", help="of main and recompute, joined by commas; all by default")
    add("--modes", default=",".join(get_args(Mode)), help="of main and tokens")
    add("--providers", help="who is timed; all that are installed by default")
    add("--without", default="", help="providers to leave out, such as eager")
    add("--repeats", type=int, default=20, help="timed calls, at least")
    add("--backend", default="auto", help="turnout's back end")
    add("--graph", action="store_true", help="add rows for CUDA graphs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="the CSV; benchmarks/results/<gpu>.csv by default")
    add("--commit", help="for the first column; asked of git by default")
    add("--plot", help="a PNG to draw from the rows of this commit")
    add("--judge", action="store_true", help="run nothing: demands and plot of what is in the CSV")
    add("--trace", action="store_true", help="print the traceback of what fails")
    return parser.parse_args()


def run(
    args: argparse.Namespace, sections: list[str], device: torch.device, commit: str, out: Path
) -> int:
    """Runs the sections; the number of pieces that failed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cases = list(dict.fromkeys(planned(args, sections)))
    names = dict.fromkeys(provider for case in cases for provider in case.providers)
    for provider, reason in missing(names, device).items():
        print(f"{provider} does not run: {reason}", flush=True)
    setting = Setting(
        device=device,
        commit=commit,
        backend=args.backend,
        repeats=args.repeats,
        graph=args.graph,
    )
    failures = 0

    def guard(what: str, work: Callable[[], None]) -> None:
        nonlocal failures
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way; the run goes on
            failures += 1
            text = " ".join(str(error).split())[:300]
            print(f"{what} FAILED {type(error).__name__}: {text}", flush=True)
            if args.trace:
                traceback.print_exc()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def on_row(row: Row, measured: Measured) -> None:
        print(line(row, measured), flush=True)
        if row.provider == musts.OURS and (measured.first_s or 0.0) > musts.FIRST_S:
            print(f"MISS  the first step took more than {musts.FIRST_S:g} s", flush=True)

    record = Record(out)
    sweep(cases, setting, record, on_row, guard)
    print(f"dense bf16 {record.dense:.0f} TFLOP/s")
    return failures


def planned(args: argparse.Namespace, sections: Iterable[str]) -> Iterable[Case]:
    """The cases of the sections. `main` is everyone; `recompute` and `skew` are turnout alone."""
    ours = (musts.OURS,)
    shapes = [shape_named(name) for name in words(args.shapes)] if args.shapes else list(SHAPES)
    for section in sections:
        if section == "main":
            for shape in shapes:
                for mode in words(args.modes):
                    yield Case(shape=shape, mode=mode, providers=providers(args, shape.tokens))  # type: ignore[arg-type]
        elif section == "recompute":
            for shape in shapes:
                yield Case(shape=shape, mode="lora16", providers=ours, recompute="gate_up")
        elif section == "skew":
            qwen = shape_named("qwen3-30b")
            odd = replace(qwen, tokens=musts.ODD_TOKENS)
            if "main" not in sections or qwen not in shapes:
                yield Case(shape=qwen, mode="lora16", providers=ours)
            yield Case(shape=qwen, mode="lora16", providers=ours, routing="zipf1.2")
            yield Case(shape=qwen, mode="lora16", providers=ours, routing="half-empty")
            yield Case(shape=odd, mode="lora16", providers=ours)
        elif section == "tokens":
            everyone = (*ours, musts.PORTABLE, "grouped_mm")
            for tokens in musts.EVERY_T:
                shape = replace(shape_named(musts.EVERY_T_SHAPE), tokens=tokens)
                for mode in words(args.modes):
                    yield Case(
                        shape=shape,
                        mode=mode,  # type: ignore[arg-type]
                        providers=everyone,
                        runs=musts.EVERY_T_RUNS,
                    )
        else:
            stock = (*ours, "grouped_mm", "batched_mm")
            for name in musts.DECODE_SHAPES:
                for tokens in musts.DECODE_TOKENS:
                    shape = replace(shape_named(name), tokens=tokens)
                    yield Case(shape=shape, mode="fwd", providers=stock)


def providers(args: argparse.Namespace, tokens: int) -> tuple[str, ...]:
    chosen = words(args.providers) if args.providers else default_providers(tokens)
    without = words(args.without)
    return tuple(provider_named(name).name for name in chosen if name not in without)


def words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def add_peers(folder: Path) -> None:
    """Makes what lies in benchmarks/peers importable, behind what is installed."""
    if folder.is_dir():
        found = sorted(path for path in folder.iterdir() if path.is_dir())
        sys.path += [str(path) for path in (*found, folder)]


def git_commit() -> str:
    """The commit of the tree, or `unknown`."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
