"""`turnout tune --from-reports`: records in, a table that ships out, and what that costs.

A cache counts as well: a search is in it as soon as it ends, the record is written at the end.
With `--onto` a table that ships already is the start, so its records need not be at hand.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from turnout.tuning import cache, journal, table
from turnout.tuning.prune import (
    Pruned,
    Record,
    prune,
    records_in,
    records_of,
    shipped_table,
)

log = logging.getLogger("turnout.tuning")


def main(places: Sequence[Path], emit: Path | None, onto: Path | None = None) -> dict[str, Any]:
    """Merges the reports, writes `emit`, prints what was dropped, returns the `--json` content.

    Args:
        places: reports and files of a cache, or folders of them.
        emit: the file to write, for `src/turnout/tuning/configs/`.
        onto: a table to start from, which may be `emit`. Its lists of candidates stay and may grow;
            its entries stay but where a report has the same key, bucket and device.

    Raises:
        ValueError: no `emit` or one that can not be written, a place that is not there, no search
            in any report, or an `onto` that can not be read whole.
    """
    if emit is None:
        raise ValueError("--from-reports is given without --emit; name the file to write")
    if emit.is_dir() or not emit.parent.is_dir():
        raise ValueError(f"--emit is {emit}; expected a file in a folder that exists")
    base = _whole(onto) if onto else table.Table()
    records, faults, files = _read(places)
    for fault in faults:
        log.warning("%s", fault)
    if not records:
        raise ValueError(
            f"{len(files)} reports hold no search; expected records of `turnout tune` or files of "
            "its cache, which keep the time of every candidate"
        )
    pruned = prune(records, base=base.candidates)
    new = shipped_table(records, pruned)
    made = table.Table(table.merged(base.entries, new.entries), base.candidates | new.candidates)
    try:
        table.write(emit, made)
    except OSError as error:
        raise ValueError(f"--emit is {emit}, which can not be written: {error}") from None
    console = Console()
    console.print(_summary(pruned))
    for one in pruned:
        added = one.kept[len(one.base) :] if one.base else ()
        for what, configs in (("added", added), ("dropped", one.dropped)):
            for config in configs:
                text = f"{what}: {_name(one)}: {config}"
                console.print(text, soft_wrap=True, highlight=False, markup=False)
    start = f", onto {len(base.entries)} configs of {onto}" if onto else ""
    console.print(
        f"{len(records)} searches in {len(files)} reports{start}: {len(made.entries)} configs, "
        f"{sum(len(one.kept) for one in pruned)} candidates kept of "
        f"{sum(len(one.kept) + len(one.dropped) for one in pruned)}, written to {emit}",
        soft_wrap=True,
        highlight=False,
    )
    return {
        "emit": str(emit),
        "onto": None if onto is None else str(onto),
        "reports": [str(path) for path in files],
        "faults": faults,
        "searches": len(records),
        "entries": len(made.entries),
        "groups": [_group(one) for one in pruned],
    }


def _whole(onto: Path) -> table.Table:
    """The table in `onto`; what a reader may leave out with a warning is an error here."""
    do = "Name a table that `turnout tune --emit` wrote, or leave --onto out"
    if not onto.is_file():
        raise ValueError(f"--onto is {onto}, which is no file; expected a table that ships. {do}")
    try:
        found = table.read(onto)
        held = {"candidates": []} | json.loads(onto.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"--onto can not be read: {error}. {do}") from None
    if found.to_dict() != held:
        raise ValueError(
            f"--onto is {onto}, of which {len(found.entries)} of {len(held['entries'])} entries "
            f"and {len(found.candidates)} lists of candidates can be read; expected all of it, as "
            f"the rest would be lost. {do}"
        )
    return found


def _read(places: Sequence[Path]) -> tuple[list[Record], list[str], list[Path]]:
    records: list[Record] = []
    faults: list[str] = []
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise ValueError(f"{place} does not exist; expected a report or a folder of reports")
        if place.is_file():
            files.append(place)
        else:
            files += [*sorted(place.rglob("*.jsonl")), *sorted(place.rglob(cache.FILES))]
    files = list(dict.fromkeys(files))
    for path in files:
        try:
            found, wrong = _searches(path)
        except (ValueError, OSError) as error:  # another version's, or none: the others count
            faults.append(f"{error}; the file is left out")
            continue
        records += found
        faults += wrong
    return list(dict.fromkeys(records)), faults, files  # a later run repeats what it found


def _searches(path: Path) -> tuple[list[Record], list[str]]:
    if path.suffix != ".json" or journal.is_report(path):
        return records_of(journal.read(path))
    found, wrong = records_in(table.read(path))
    return found, [f"{path}: {text}" for text in wrong]


def _name(one: Pruned) -> str:
    family, arch = one.group
    words = [family.kernel, "interpreter" if arch is None else f"sm_{arch}"]
    words += [f"tile {family.tile_rows}"] if family.tile_rows else []
    words += ["float32"] if family.item == 4 else []
    words += [f"narrow {family.narrow}"] if family.narrow else []
    return " ".join(words)


def _summary(pruned: Sequence[Pruned]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    out.add_column("family")
    has_base = any(one.base for one in pruned)
    headings = ["kept", "dropped", "seen", "held out", "regret", "worst"]
    headings += ["base", "base worst"] if has_base else []
    for heading in headings:
        out.add_column(heading, justify="right")
    for one in pruned:
        sizes = (len(one.kept), len(one.dropped), one.seen, one.held_out)
        of_base = _cells(one.base_regret) if has_base else []
        out.add_row(_name(one), *map(str, sizes), *_cells(one.regret), *of_base)
    return out


def _cells(regret: tuple[float, float] | None) -> list[str]:
    return ["", ""] if regret is None else [f"{100 * r:.2f} %" for r in regret]


def _group(one: Pruned) -> dict[str, Any]:
    family, arch = one.group
    return {
        "kernel": family.kernel,
        "tile_rows": family.tile_rows,
        "item": family.item,
        "narrow": family.narrow,
        "arch": arch,
        "kept": [config.to_dict() for config in one.kept],
        "dropped": [config.to_dict() for config in one.dropped],
        "seen": one.seen,
        "held_out": one.held_out,
        "regret": None if one.regret is None else one.regret[0],
        "worst_regret": None if one.regret is None else one.regret[1],
        "base_regret": None if one.base_regret is None else one.base_regret[0],
        "worst_base_regret": None if one.base_regret is None else one.base_regret[1],
    }
