"""The router's kernels and the sort's with other tiles, warps and blocks: which are fast?

Nothing is changed by it. The numbers are constants of the package: `TILE_ELEMENTS` and `BLOCKS` in
`turnout.ragged.counts`, the warps in `turnout.routing.fused` and `turnout.ragged.kernels`.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from routing_cases import OURS, Shape, Step, make_work, shape_named
from torch import Tensor
from triton.runtime.errors import TritonError

from turnout.launch import Launch, recording
from turnout.measure import seconds
from turnout.ragged import counts, kernels
from turnout.routing import fused

TILES = (1024, 2048, 4096, 8192)
WARPS = (2, 4, 8)
BLOCKS = (264, 512, 1024)
PLACE_WARPS = (4, 8)
MOST_PER_WARP = 2048  # elements; twice of it take 4 KiB of local memory per thread and 17 s
WORKERS = 12  # processes that compile
Launched = tuple[Launch, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Tuning:
    """What the host code launches with; the package's own by default."""

    tile: int = counts.TILE_ELEMENTS
    warps: int = 4
    blocks: int = counts.BLOCKS
    place_warps: int = 8


def _forget() -> None:
    for remembered in (
        fused._constants,
        fused._forward_launch,
        fused._backward_launch,
        kernels._place_launch,
    ):
        remembered.cache_clear()


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Within it, route and sort run with this tuning."""

    def launch_with(warps: int) -> Any:
        return lambda kernel, grid, numbers, constants, _: Launch(
            kernel, grid, numbers, constants, warps
        )

    with (
        patch.object(counts, "TILE_ELEMENTS", tuning.tile),
        patch.object(counts, "BLOCKS", tuning.blocks),
        patch.object(fused, "Launch", launch_with(tuning.warps)),
        patch.object(kernels, "Launch", launch_with(tuning.place_warps)),
    ):
        _forget()
        try:
            yield
        finally:
            _forget()


def launched(step: Step, tuning: Tuning) -> dict[str, Launched]:
    """The launches of a step by kernel, each ready to run again."""
    found: dict[str, Launched] = {}
    with (
        tuned(tuning),
        recording(
            lambda launch, tensors: found.update({launch.kernel.__name__: (launch, tensors)})
        ),
    ):
        step()
    return found


def microseconds(step: Step, tuning: Tuning, names: Iterable[str], repeats: int) -> list[float]:
    """Of the kernels alone."""
    found, device = launched(step, tuning), step.logits.device
    times = []
    for name in names:
        launch, tensors = found[name]
        timing = seconds(
            lambda launch=launch, tensors=tensors: launch(*tensors),  # type: ignore[misc]
            device=device,
            warmup=min(3, repeats),
            repeats=repeats,
        )
        times.append(timing.median * 1e6)
    return times


def compile_one(shape: str, tokens: int, tuning: Tuning, device: str) -> None:
    """Runs once, in a process of its own, so that the compiled kernels lie in Triton's cache."""
    work = make_work(shape_named(shape), min(tokens, 4096), torch.device(device))
    launched(Step(work, OURS, "fwd+bwd"), tuning)
    if tuning == Tuning():
        Step(work, "rules", "fwd")()  # the sort in three launches


def compile_all(wanted: Iterable[tuple[Shape, Tuning]], tokens: int, device: torch.device) -> None:
    """Seconds per kernel, so by many processes. What they fail in fails again when it is timed."""
    jobs = [(shape.name, tokens, tuning, str(device)) for shape, tuning in wanted]
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(WORKERS, len(jobs)), mp_context=spawn) as pool:
            # the largest tiles, which take longest, come last in `tunings`
            running = {pool.submit(compile_one, *job): job for job in reversed(jobs)}
            for future, job in running.items():
                if error := future.exception():
                    print(f"{job[0]} {job[2]} failed: {error}", flush=True)
    except (OSError, BrokenProcessPool) as error:
        print(f"no processes to compile in, so it takes longer: {error}", flush=True)


def tunings() -> list[Tuning]:
    """All that `sweep` compiles for."""
    pairs = itertools.product(TILES, WARPS)
    routes = [Tuning(tile, warps) for tile, warps in pairs if tile <= MOST_PER_WARP * warps]
    return [*(Tuning(place_warps=w) for w in PLACE_WARPS if w != Tuning.place_warps), *routes]


def sweep(shapes: Sequence[Shape], tokens: int, device: torch.device, repeats: int) -> None:
    """Prints two tables for each shape: the router's kernels, then the sort behind the fastest."""
    for shape in shapes:
        step = Step(make_work(shape, tokens, device), OURS, "fwd+bwd")
        names = ("route_kernel", "route_backward_kernel")
        print(f"\n{shape.name} T={tokens}, microseconds; the package has {Tuning()}")
        print(f"{'tile':>6s} {'warps':>6s} {'route':>9s} {'backward':>9s}")
        times: dict[Tuning, list[float]] = {}
        for tuning in sorted(tunings(), key=lambda one: (one.tile, one.warps)):
            if tuning.place_warps != Tuning.place_warps:
                continue
            try:
                times[tuning] = microseconds(step, tuning, names, repeats)
            except TritonError as error:
                print(f"{tuning.tile:6d} {tuning.warps:6d} failed: {error}", flush=True)
                continue
            cells = " ".join(f"{one:9.1f}" for one in times[tuning])
            print(f"{tuning.tile:6d} {tuning.warps:6d} {cells}", flush=True)
        best = min(times, key=lambda tuning: times[tuning][0])
        print(f"{'tile':>6s} {'blocks':>6s} {'warps':>6s} {'route':>9s} {'place':>9s}")
        bases = dict.fromkeys((Tuning(), best))
        for base, blocks, warps in itertools.product(bases, BLOCKS, PLACE_WARPS):
            tuning = replace(base, blocks=blocks, place_warps=warps)
            found = microseconds(step, tuning, ("route_kernel", "_place_kernel"), repeats)
            cells = " ".join(f"{one:9.1f}" for one in found)
            print(f"{tuning.tile:6d} {blocks:6d} {warps:6d} {cells}", flush=True)
