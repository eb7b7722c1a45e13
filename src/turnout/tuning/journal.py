"""Report files: JSON lines, appended by runs and read with every fault named.

{"event": "head", "format": 1, ...}       once per run: versions and devices
{"event": "kernel", ...}                  one problem that was launched
{"event": "autotuner", ...}               one choice of another library's autotuner
{"event": "roof", ...}                    measured peaks of a device
{"event": "experts", "step": n, ...}      load of the experts at a logging step

A number that is not finite is written as null: JSON has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turnout.tuning.report import FORMAT

NAME = "turnout-report.jsonl"


@dataclass(frozen=True, slots=True)
class Journal:
    """The lines of one file by event, and what could not be read, in words."""

    path: Path
    lines: tuple[dict[str, Any], ...]
    faults: tuple[str, ...] = field(default=())

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    def last(self, event: str) -> list[dict[str, Any]]:
        """Those of the last run in the file."""
        found: list[dict[str, Any]] = []
        for line in self.lines:
            if line["event"] == "head":
                found = []
            if line["event"] == event:
                found.append(line)
        return found


def append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Adds lines in one write.

    Raises:
        OSError: the file can not be written, or the disk is full.
    """
    text = "".join(json.dumps(_finite(line), allow_nan=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_cut_off(path):
        text = "\n" + text
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, as the entropy of a model that
    diverged."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_cut_off(path: Path) -> bool:
    """The file does not end with a line: a run ended while it wrote."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def find(place: Path) -> Path:
    """The report that `place` is, or that lies in the folder of a run.

    Raises:
        ValueError: there is none, or more than one below the folder.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise ValueError(f"{place} does not exist; expected a report or the folder of a run")
    if (place / NAME).is_file():
        return place / NAME
    found = sorted(place.rglob("*.jsonl"))
    reports = [path for path in found if is_report(path)]
    if len(reports) != 1:
        names = ", ".join(str(path.relative_to(place)) for path in reports[:5])
        raise ValueError(
            f"{place} has {len(reports)} reports{': ' + names if names else ''}; expected one, "
            f"{NAME}. Name the file, or train with turnout.integrations.trainer.TurnoutCallback"
        )
    return reports[0]


def is_report(path: Path) -> bool:
    """The file begins as a report does."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return '"event": "head"' in file.readline()


def read(path: Path) -> Journal:
    """All lines that can be read; `Journal.faults` says which can not.

    Raises:
        ValueError: the file is no report, or one of another format.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path} can not be read: {error}") from None
    lines: list[dict[str, Any]] = []
    faults: list[str] = []
    written = text.splitlines()
    for number, line in enumerate(written, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            what = "is cut off" if number == len(written) else "is no JSON"
            faults.append(f"{path}:{number} {what}; it is left out")
            continue
        if not isinstance(found, dict) or not isinstance(found.get("event"), str):
            faults.append(f"{path}:{number} is no event; it is left out")
            continue
        if found["event"] == "head" and found.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {found.get('format')!r}, of turnout {found.get('turnout')}; "
                f"expected format {FORMAT}. Read it with that version"
            )
        lines.append(found)
    if not any(line["event"] == "head" for line in lines):
        raise ValueError(f"{path} has no head; expected a report of turnout (JSON lines)")
    return Journal(path, tuple(lines), tuple(faults))
