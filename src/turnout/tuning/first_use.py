"""Tuning where a config is first needed: `turnout.patch(model, tune="first-use")`, `turnout tune`.

A back end asks `current()` before it builds a launch. Without a tuner that is one look at a list,
and no config is ever timed. With one, a problem that no stored config of its own bucket and device
answers is searched on the tensors at hand, once per process and, by a lock in the cache folder,
once per machine. A search that runs out of time or memory leaves the problem as it was.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch

from turnout import replay
from turnout.measure import seconds
from turnout.tuning import cache
from turnout.tuning.entry import Entry
from turnout.tuning.key import Ask, Config, Key, bucket_of
from turnout.tuning.search import (
    Clock,
    Effort,
    IncumbentFails,
    OutOfTime,
    Trial,
    search,
)

RUN_SECONDS = 600.0  # what `patch(tune="first-use")` may add to a run
log = logging.getLogger("turnout.tuning")

OnTrial = Callable[[Ask, Config, int, int], None]
OnEntry = Callable[[Entry], None]


class Tuner:
    """Searches what it is asked for the first time, within a budget of seconds.

    Args:
        seconds_left: for all searches together, and for waiting for those of other processes;
            None is no limit.
        until: of `time.monotonic`; no further candidate is tried after that.
        keep_shipped: a shipped config of the right bucket and device is an answer. `turnout tune`
            says False: who calls it wants this machine's own.
        quick, thorough: timed calls, as in `turnout.tuning.search.Effort`.
        on_trial, on_entry: told of every config tried and every problem finished.
        clock: `turnout.measure.seconds`, or a test's.
    """

    def __init__(
        self,
        *,
        seconds_left: float | None = RUN_SECONDS,
        until: float = math.inf,
        keep_shipped: bool = True,
        quick: int = 5,
        thorough: int = 30,
        on_trial: OnTrial | None = None,
        on_entry: OnEntry | None = None,
        clock: Clock = seconds,
    ) -> None:
        self.keep_shipped = keep_shipped
        self.entries: list[Entry] = []  # what was searched
        self.reused: list[Entry] = []  # of problems that were in the cache already
        self.broken: list[str] = []  # problems whose own config fails, and why
        self.no_memory: list[str] = []  # problems that there was no memory to search
        self.is_out_of_time = False
        self._left = math.inf if seconds_left is None else seconds_left
        self._until = until
        self._quick, self._thorough = quick, thorough
        self._done: set[tuple[Key, int]] = set()
        self._on_trial, self._on_entry, self._clock = on_trial, on_entry, clock
        self._lock = threading.RLock()  # backward passes run in threads of autograd

    def wants(self, ask: Ask) -> bool:
        """The problem has no config of its own yet, and there is time to look for one."""
        place = (ask.key, bucket_of(ask.rows))
        if place in self._done or self.is_out_of_time or _capturing():
            return False
        stored = cache.store().find(ask, shipped=self.keep_shipped)
        if stored is None or not stored.is_exact:
            return True
        self._done.add(place)
        self.reused.append(stored.entry)
        return False

    def tune(self, ask: Ask, default: Config, trial: Trial) -> None:
        """Searches and stores, unless another process did meanwhile."""
        with self._lock:
            store = cache.store()
            started = time.monotonic()
            try:
                entry = self._found(ask, default, trial, store)
            finally:
                self._left = max(0.0, self._left - (time.monotonic() - started))
            if entry is None:
                return
            self.entries.append(entry)
            if self._on_entry is not None:
                self._on_entry(entry)

    def _found(self, ask: Ask, default: Config, trial: Trial, store: cache.Store) -> Entry | None:
        """Waits for another process that searches the same; None if there is nothing to add."""
        started = time.monotonic()
        seconds = max(0.0, min(self._left, self._until - started))
        with store.searching(ask, seconds):
            if not self.wants(ask):
                return None
            self._done.add((ask.key, bucket_of(ask.rows)))
            entry = self._search(ask, default, trial, store, started + seconds)
            if entry is not None:
                store.put([entry])
            return entry

    def _search(
        self, ask: Ask, default: Config, trial: Trial, store: cache.Store, deadline: float
    ) -> Entry | None:
        """None if the problem stays as it was; a message says why."""
        stored = store.find(ask)
        try:
            return search(
                ask,
                default if stored is None else stored.entry.config,
                default,
                trial,
                Effort(deadline=deadline, quick=self._quick, thorough=self._thorough),
                listed=store.listed(ask),
                on_trial=None if self._on_trial is None else partial(self._on_trial, ask),
                clock=self._clock,
            )
        except OutOfTime:
            self.is_out_of_time = True
            log.warning("tuning is out of time; what is left runs with stored or default configs")
        except torch.OutOfMemoryError:
            text = f"{ask.key} at {ask.rows} rows: no memory to tune beside what runs"
            self.no_memory.append(text)
            log.warning("%s", text)
        except IncumbentFails as error:
            self.broken.append(str(error))
            log.warning("%s", error)
        return None


def _capturing() -> bool:
    """A CUDA graph is being captured: nothing may be timed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_owners: WeakSet[Any] = WeakSet()
_in_runs: list[Tuner] = []  # the one of `start`, if there is any
_stack: list[Tuner | None] = []


def current() -> Tuner | None:
    """Who tunes now, or None."""
    if _stack:
        return _stack[-1]
    return _in_runs[0] if _in_runs and _owners else None


def start(owner: Any) -> None:
    """Tune problems as they are first met, until `stop(owner)` or the owner is gone.

    Passes that were recorded for replay are forgotten: they would go on with their configs.
    """
    _owners.add(owner)
    if not _in_runs:
        _in_runs.append(Tuner())
    replay.forget()


def stop(owner: Any) -> None:
    """Ends what `start(owner)` began; other owners go on."""
    _owners.discard(owner)
    if not _owners:
        _in_runs.clear()


@contextmanager
def tuning(tuner: Tuner) -> Iterator[Tuner]:
    """Within it, `tuner` is asked, whatever a model was patched with."""
    _stack.append(tuner)
    replay.forget()
    try:
        yield tuner
    finally:
        _stack.remove(tuner)


@contextmanager
def paused() -> Iterator[None]:
    """Within it nobody tunes: host code runs to see what it would launch."""
    _stack.append(None)
    try:
        yield
    finally:
        _stack.remove(None)
