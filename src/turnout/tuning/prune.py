"""From the records of many machines to fewer candidates and a table that ships.

Records of searches hold the time of every candidate, and so do the files of a cache. Of one family
(kernel, row tile, element size, width, architecture) the kept candidates are chosen greedily:
whichever lowers the mean loss over the problems most, until no problem loses more than `TOLERANCE`
or `most` are kept.

    loss of a problem = time of the best kept candidate / time of the best of all candidates - 1

The regret is that loss on problems that the choice did not see: every `HOLD_OUT`-th one, by a hash
of its key, so that the same records always give the same answer.

A list that ships already can be the start: all of it stays, and more is kept only where it loses
more than `TOLERANCE`. It was made without these records, so all of them say what it loses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from turnout.tuning.candidates import MOST, Family
from turnout.tuning.entry import Entry, Search, config_of
from turnout.tuning.journal import Journal
from turnout.tuning.key import FIXED, TILES, Config, Key, bucket_of, checked
from turnout.tuning.table import Table

TOLERANCE = 0.01
HOLD_OUT = 5

Group = tuple[Family, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One search of one machine, and the config that it chose."""

    key: Key
    rows: int
    device: str
    winner: Config
    search: Search

    @property
    def times(self) -> dict[Config, float]:
        return dict(self.search.times)

    @property
    def group(self) -> Group:
        k = self.key
        return Family.of_sizes(k.kernel, k.tile_rows, k.dtype, k.n), k.arch

    @property
    def is_held_out(self) -> bool:
        text = f"{replace(self.key, triton='')} {self.rows}"
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) % HOLD_OUT == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The candidates of one group after pruning.

    Attributes:
        base: what `kept` begins with, a list that ships already; empty without one.
        kept, dropped: in the order of their use.
        regret: (geometric mean, largest) loss on held-out problems; None without any.
        base_regret: the same of `base` alone, over all problems; None without one.
        held_out: how many.
    """

    group: Group
    base: tuple[Config, ...]
    kept: tuple[Config, ...]
    dropped: tuple[Config, ...]
    regret: tuple[float, float] | None
    base_regret: tuple[float, float] | None
    seen: int
    held_out: int


def records_of(journal: Journal) -> tuple[list[Record], list[str]]:
    """The searches in a report, and what was left out and why."""
    found, faults = [], list(journal.faults)
    for line in journal.of("kernel"):
        try:
            record = _record(line)
        except ValueError as error:
            faults.append(f"{journal.path}: an event is left out: {error}")
            continue
        if record is not None:
            found.append(record)
    return found, faults


def records_in(found: Table) -> tuple[list[Record], list[str]]:
    """The searches in a file of a cache, and what was left out and why."""
    records, faults = [], []
    for entry in found.entries:
        if entry.search is None or entry.key.kernel in FIXED:
            continue
        try:
            search = _timed(entry.search)
        except ValueError as error:
            faults.append(f"{entry.key} is left out: {error}")
            continue
        records.append(
            Record(
                key=entry.key,
                rows=bucket_of(entry.rows),
                device=entry.device,
                winner=entry.config,
                search=search,
            )
        )
    return records, faults


def _record(line: dict[str, Any]) -> Record | None:
    """None for a problem that was not searched."""
    kernel = checked(line, "kernel", str)
    if kernel in FIXED:
        return None
    if kernel not in TILES:
        raise ValueError(f"kernel {kernel!r} is not in this version")
    if line.get("search") is None:
        return None
    key = checked(line, "key", dict)
    winner = {n: v for n, v in config_of(line).to_dict().items() if n != "num_ctas"}
    return Record(
        key=Key.from_dict(key),
        rows=bucket_of(checked(key, "rows", int)),
        device=checked(line, "device", str),
        winner=Config.of(winner),
        search=_timed(Search.from_dict(checked(line, "search", dict))),
    )


def _timed(search: Search) -> Search:
    if min((seconds for _, seconds in search.times), default=0.0) <= 0:
        raise ValueError("its search has no times")
    return search


def prune(
    records: Iterable[Record],
    most: int = MOST,
    base: Mapping[Group, tuple[Config, ...]] | None = None,
) -> tuple[Pruned, ...]:
    """The shorter lists, one per group; groups in the order of their first record.

    Args:
        records: searches of any groups.
        most: no list grows beyond it; one of `base` that is longer stays as it is.
        base: lists to start from. Groups without a record are not in the answer.
    """
    groups: dict[Group, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    lists = base or {}
    return tuple(
        _prune(group, found, most, lists.get(group, ())) for group, found in groups.items()
    )


def _prune(group: Group, records: list[Record], most: int, base: tuple[Config, ...]) -> Pruned:
    timed = (config for record in records for config in record.times)
    every = list(dict.fromkeys([*base, *timed]))
    seen = [record for record in records if not record.is_held_out]
    held_out = [record for record in records if record.is_held_out] if seen else []
    kept = _choose(seen or records, every, most, base)
    return Pruned(
        group=group,
        base=base,
        kept=tuple(kept),
        dropped=tuple(config for config in every if config not in kept),
        regret=_regret(held_out, kept),
        base_regret=_regret(records, base) if base else None,
        seen=len(seen or records),
        held_out=len(held_out),
    )


def _choose(
    records: list[Record], every: list[Config], most: int, base: tuple[Config, ...]
) -> list[Config]:
    kept = list(base)
    while len(kept) < min(most, len(every)):
        if kept and all(loss(record, kept) <= TOLERANCE for record in records):
            break
        rest = [config for config in every if config not in kept]
        kept.append(min(rest, key=lambda config: _mean_loss(records, [*kept, config])))
    return kept


def _regret(records: list[Record], kept: Sequence[Config]) -> tuple[float, float] | None:
    """(geometric mean, largest) loss; None without records."""
    if not records:
        return None
    losses = [loss(record, kept) for record in records]
    return math.exp(sum(map(math.log1p, losses)) / len(losses)) - 1, max(losses)


def _mean_loss(records: list[Record], kept: list[Config]) -> float:
    return sum(min(loss(record, kept), 10.0) for record in records) / len(records)


def loss(record: Record, kept: Iterable[Config]) -> float:
    """What this problem loses if only `kept` is tried; infinite if none of it was timed."""
    times = record.times
    best = min((times[config] for config in kept if config in times), default=math.inf)
    return best / min(times.values()) - 1


def shipped_table(records: Iterable[Record], pruned: Iterable[Pruned]) -> Table:
    """One entry per key, bucket and device, and the lists of candidates.

    Of one record, what its search chose. Where several have the same place, the config with the
    least geometric mean of time / best time, of those that most of them timed.
    """
    places: dict[tuple[Key, int, str], list[Record]] = {}
    for record in records:
        places.setdefault((record.key, record.rows, record.device), []).append(record)
    entries = [
        Entry(key=key, rows=rows, device=device, config=_agreed(found))
        for (key, rows, device), found in places.items()
    ]
    return Table(tuple(entries), {one.group: one.kept for one in pruned})


def _agreed(records: list[Record]) -> Config:
    if len(records) == 1:
        return records[0].winner
    ratios: dict[Config, list[float]] = {}
    for record in records:
        best = min(record.times.values())
        for config, seconds in record.times.items():
            ratios.setdefault(config, []).append(math.log(seconds / best))
    most = max(len(found) for found in ratios.values())
    known = [config for config, found in ratios.items() if len(found) == most]
    return min(known, key=lambda config: sum(ratios[config]) / most)
