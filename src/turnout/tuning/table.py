"""Files of stored configs: read with every fault named, written whole or not at all.

    {"format": 1, "entries": [...], "candidates": [...]}

`entries` are `turnout.tuning.entry.Entry`, `candidates` shorter lists for the search. An entry that
can not be read (a kernel that no longer exists, a missing field) is left out and counted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from turnout.tuning.candidates import Family
from turnout.tuning.entry import Entry, config_of
from turnout.tuning.key import Config, checked

FORMAT = 1
log = logging.getLogger("turnout.tuning")


class Corrupt(ValueError):
    """The file is no table of this version."""


@dataclass(frozen=True, slots=True)
class Table:
    """The content of one file. `candidates`: family and architecture to its list."""

    entries: tuple[Entry, ...] = ()
    candidates: dict[tuple[Family, int | None], tuple[Config, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "entries": [entry.to_dict() for entry in self.entries],
            "candidates": [
                {
                    "kernel": family.kernel,
                    "tile_rows": family.tile_rows,
                    "item": family.item,
                    "narrow": family.narrow,
                    "arch": arch,
                    "configs": [config.to_dict() for config in configs],
                }
                for (family, arch), configs in self.candidates.items()
            ],
        }


def read(path: Path) -> Table:
    """The table in `path`; an empty one if there is no file.

    Raises:
        Corrupt: the file is no JSON, or no table of this format.
        OSError: it can not be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Table()
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path} is no text: {error}") from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise Corrupt(f"{path} is no JSON: {error}") from None
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT or not isinstance(found.get("entries"), list):
        raise Corrupt(
            f"{path} has format {version!r}; expected a table of format {FORMAT}. Another version "
            "of turnout made it"
        )
    return Table(tuple(_entries(path, found["entries"])), _candidates(path, found))


def _entries(path: Path, found: list[Any]) -> Iterable[Entry]:
    reasons = []
    for one in found:
        try:
            yield Entry.from_dict(one)
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        log.warning("%s: %d entries are left out: %s", path, len(reasons), _first(reasons))


def _candidates(
    path: Path, found: dict[str, Any]
) -> dict[tuple[Family, int | None], tuple[Config, ...]]:
    lists: dict[tuple[Family, int | None], tuple[Config, ...]] = {}
    listed = found.get("candidates", [])
    if not isinstance(listed, list):
        log.warning("%s: candidates is %r; expected a list. They are left out", path, listed)
        return lists
    for one in listed:
        try:
            if not isinstance(one, dict):
                raise ValueError(f"it is {one!r}; expected an object")
            family = Family(
                kernel=checked(one, "kernel", str),
                tile_rows=checked(one, "tile_rows", int),
                item=checked(one, "item", int),
                narrow=checked(one, "narrow", int),
            )
            arch = None if one.get("arch") is None else checked(one, "arch", int)
            configs = [config_of({"config": c}) for c in checked(one, "configs", list)]
            lists[family, arch] = tuple(configs)
        except ValueError as error:
            log.warning("%s: a list of candidates is left out: %s", path, error)
    return lists


def _first(reasons: list[str]) -> str:
    distinct = list(dict.fromkeys(reasons))
    return "; ".join(distinct[:3]) + ("; ..." if len(distinct) > 3 else "")


def merged(before: Iterable[Entry], new: Iterable[Entry]) -> tuple[Entry, ...]:
    """All entries; of those with the same place the new one."""
    found = {entry.place: entry for entry in before}
    found |= {entry.place: entry for entry in new}
    return tuple(found.values())


def write(path: Path, table: Table) -> None:
    """Into a temporary file beside `path`, then renamed: readers see the old or the new table.

    Raises:
        OSError: the folder can not be written, or the disk is full; the old table is unchanged.
    """
    text = json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def set_aside(path: Path) -> Path | None:
    """Renames a corrupt file, so that it can be looked at; None if that is not possible."""
    for number in range(1, 100):
        target = path.with_name(f"{path.name}.corrupt-{number}")
        if not target.exists():
            try:
                path.replace(target)
            except OSError:
                return None
            return target
    return None
