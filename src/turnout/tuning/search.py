"""The search for the fastest config of one problem. Every candidate is right before it is timed.

1. The incumbent (what would run without a search), the analytic default and all candidates that
   fit run once; the gate looks at what they computed. Those that fail are counted and listed.
2. The others are timed with few calls, then the best `FINALISTS` and the first two with more.
3. The fastest takes the incumbent's place only if their times lie apart: its 80 % quantile below
   the incumbent's 20 % quantile. Inside the noise the incumbent stays.

Times are those of `turnout.measure`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from turnout.measure import Timing, seconds
from turnout.tuning.candidates import candidates
from turnout.tuning.entry import Entry, Search
from turnout.tuning.key import Ask, Config, bucket_of

FINALISTS = 3
Clock = Callable[..., Timing]
OnTrial = Callable[[Config, int, int], None]


class Trial(Protocol):
    """How to run one problem with a config; made by who knows the kernels.

    Attributes:
        device: where it runs.
        failures: what may be raised by a config that does not compile or run.
    """

    device: torch.device
    failures: tuple[type[Exception], ...]

    def compile(self, configs: Sequence[Config]) -> None:
        """May compile them side by side; what fails is left for its first launch."""

    def prepare(self, config: Config) -> Callable[[], Any]:
        """A function that launches once and returns the outputs; compiles at its first call."""

    def rejects(self, outputs: Any) -> str | None:
        """Why these outputs are wrong, or None."""


class OutOfTime(Exception):
    """The deadline passed before the search had an answer."""


class IncumbentFails(RuntimeError):
    """What would run without a search does not run, or computes something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much a search may cost.

    Attributes:
        deadline: of `time.monotonic`; None is none.
        quick, thorough: timed calls of a candidate and of a finalist.
        warmup: calls before each.
    """

    deadline: float | None = None
    quick: int = 5
    thorough: int = 30
    warmup: int = 1

    def check(self) -> None:
        """Raises `OutOfTime` after the deadline."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime


def search(
    ask: Ask,
    incumbent: Config,
    default: Config,
    trial: Trial,
    effort: Effort,
    *,
    listed: tuple[Config, ...] | None = None,
    on_trial: OnTrial | None = None,
    clock: Clock = seconds,
) -> Entry:
    """The entry to store for this question: see the module's docstring.

    Args:
        ask: the question.
        incumbent: what would run without a search; default: the analytic default.
        trial: how to run it.
        effort: what it may cost.
        listed: candidates instead of the built-in ones.
        on_trial: told of the config about to run, its number and how many there are.
        clock: `turnout.measure.seconds`, or a test's.

    Raises:
        OutOfTime: the deadline passed.
        IncumbentFails: nothing to compare with.
        torch.OutOfMemoryError: no memory for the gate or the outputs.
    """
    started = time.monotonic()
    kept, pruned = candidates(ask, listed)
    configs = list(dict.fromkeys((incumbent, default, *kept)))
    effort.check()
    trial.compile(configs)
    right: dict[Config, Callable[[], Any]] = {}
    failed: dict[Config, str] = {}
    for number, config in enumerate(configs):
        effort.check()
        if on_trial is not None:
            on_trial(config, number, len(configs))
        reason, run = _gate(trial, config)
        if run is not None:
            right[config] = run
            continue
        failed[config] = reason
        if config == incumbent:
            raise IncumbentFails(
                f"{ask.key} at {ask.rows} rows fails with the config that would run anyway, "
                f"{incumbent}: {reason}. Report this; backend='torch' avoids the kernel"
            )
    times = _time(right, trial, effort, effort.quick, clock)
    best = sorted(times, key=lambda config: times[config].median)[:FINALISTS]
    known = (config for config in (incumbent, default, *best) if config in right)
    final = {config: right[config] for config in known}
    times |= _time(final, trial, effort, effort.thorough, clock)
    winner = min(final, key=lambda config: times[config].median)
    if times[winner].high >= times[incumbent].low:
        winner = incumbent
    others = [timing.median for config, timing in times.items() if config != winner]
    return Entry(
        key=ask.key,
        rows=bucket_of(ask.rows),
        device=ask.device.name,
        config=winner,
        search=Search(
            winner_s=times[winner].median,
            runner_up_s=min(others, default=None),
            incumbent_s=times[incumbent].median,
            default_s=times[default].median if default in times else None,
            tried=len(times),
            pruned=len(pruned),
            failed=tuple(failed.items()),
            seconds=time.monotonic() - started,
            times=tuple((config, timing.median) for config, timing in times.items()),
        ),
    )


def _gate(trial: Trial, config: Config) -> tuple[str, Callable[[], Any] | None]:
    """("", how to run it), or (why it fails, None)."""
    try:
        run = trial.prepare(config)
        reason = trial.rejects(run())
    except torch.OutOfMemoryError:
        raise  # it has nothing to do with the config: all of them have the same outputs
    except trial.failures as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300], None
    return ("", run) if reason is None else (f"wrong result: {reason}", None)


def _time(
    runs: dict[Config, Callable[[], Any]],
    trial: Trial,
    effort: Effort,
    repeats: int,
    clock: Clock,
) -> dict[Config, Timing]:
    found = {}
    for config, run in runs.items():
        effort.check()
        found[config] = clock(run, device=trial.device, warmup=effort.warmup, repeats=repeats)
    return found
