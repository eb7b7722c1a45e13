"""The router's kernels and the sort's with other tiles, warps and blocks: which are fast?

Nothing is changed by it. The numbers are constants of the package: `TILE` and `BLOCKS` in
`turnout.ragged.counts`, `STEP` and the backward's in `turnout.routing.config`, `PLACE_WARPS` in
`turnout.ragged.kernels`.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from routing_cases import OURS, Shape, Step, make_work, shape_named
from torch import Tensor
from triton.runtime.errors import TritonError

from turnout.launch import Launch, recording
from turnout.measure import seconds
from turnout.ragged import counts, kernels
from turnout.routing import config, fused

TILES = (32, 64, 128, 256)
STEPS = (8, 16, 32, 64)
BLOCKS = (132, 264, 528)
PLACE_WARPS = (4, 8)
ELEMENTS = (1024, 2048, 4096, 8192)
BACKWARD_WARPS = (2, 4, 8)
MOST_PER_WARP = 2048  # elements; twice of it take 4 KiB of local memory per thread and 17 s
WORKERS = 12  # processes that compile
NAMES = ("route_kernel", "_place_kernel", "route_backward_kernel")
Launched = tuple[Launch, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Tuning:
    """What the host code launches with; the package's own by default."""

    tile: int = counts.TILE
    step: int = config.STEP
    blocks: int = counts.BLOCKS
    place_warps: int = kernels.PLACE_WARPS
    elements: int = config.BACKWARD_ELEMENTS
    backward_warps: int = config.BACKWARD_WARPS


def _forget() -> None:
    for remembered in (
        config.forward_rule,
        config.backward_rule,
        fused._plan,
        fused._backward_launch,
        kernels._place_launch,
    ):
        remembered.cache_clear()


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Within it, route and sort run with this tuning."""
    with (
        patch.object(counts, "TILE", tuning.tile),
        patch.object(config, "STEP", tuning.step),
        patch.object(counts, "BLOCKS", tuning.blocks),
        patch.object(kernels, "PLACE_WARPS", tuning.place_warps),
        patch.object(config, "BACKWARD_ELEMENTS", tuning.elements),
        patch.object(config, "BACKWARD_WARPS", tuning.backward_warps),
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
        torch.autograd.set_multithreading_enabled(False),  # heard are those of this thread
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
            # those that take longest come last in `tunings`
            running = {pool.submit(compile_one, *job): job for job in reversed(jobs)}
            for future, job in running.items():
                if error := future.exception():
                    print(f"{job[0]} {job[2]} failed: {error}", flush=True)
    except (OSError, BrokenProcessPool) as error:
        print(f"no processes to compile in, so it takes longer: {error}", flush=True)


def tunings() -> list[Tuning]:
    """All that `sweep` compiles for, the slowest to compile last."""
    pairs = itertools.product(ELEMENTS, BACKWARD_WARPS)
    found = [
        *(Tuning(place_warps=warps) for warps in PLACE_WARPS),
        *(Tuning(tile=tile) for tile in TILES),
        *(Tuning(step=step) for step in STEPS),
        *(Tuning(elements=e, backward_warps=w) for e, w in pairs if e <= MOST_PER_WARP * w),
    ]
    return [one for one in dict.fromkeys(found) if one != Tuning()]


def sweep(shapes: Sequence[Shape], tokens: int, device: torch.device, repeats: int) -> None:
    """Prints for each shape what every kernel takes when one number is another."""
    for shape in shapes:
        step = Step(make_work(shape, tokens, device), OURS, "fwd+bwd")
        print(f"\n{shape.name} T={tokens}, microseconds; the package has {Tuning()}")
        print(f"{'route':>9s} {'place':>9s} {'backward':>9s}")
        blocks = [Tuning(blocks=blocks) for blocks in BLOCKS if blocks != Tuning.blocks]
        for tuning in (Tuning(), *blocks, *tunings()):
            changed = {n: v for n, v in vars(tuning).items() if v != getattr(Tuning, n)}
            try:
                times = microseconds(step, tuning, NAMES, repeats)
            except TritonError as error:
                print(f"{changed} failed: {error}", flush=True)
                continue
            cells = " ".join(f"{one:9.1f}" for one in times)
            print(f"{cells}  {changed or ''}", flush=True)
