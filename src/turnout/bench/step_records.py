"""The CSV of `turnout bench --step`: one row per provider and case, appended, whole or not at all.

Empty cells were not measured; `note` says why a row has no time. `peak_mb` is MiB above the
weights. `moe_ms` is `step_ms` less that of the identity model of the same run and case.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from turnout.bench.records import lines_before, write

Provider = Literal["identity", "stock", "eager", "turnout", "turnout-fused"]
Switch = Literal["off", "on"]
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """The columns, in their order.

    Attributes:
        tokens: of a step.
        sequence: tokens of one packed sequence.
        first_s: seconds of the first step, compilation included.
        loss: of the first step.
        gate: whose first step the row was compared with; empty for the identity.
        grad_err: RMS difference of the first step's gradients from its, over all adapters.
    """

    commit: str
    device: str
    torch: str
    triton: str
    transformers: str
    peft: str
    shape: str
    layers: int
    tokens: int
    sequence: int
    checkpointing: str
    provider: str
    step_ms: float | None = None
    moe_ms: float | None = None
    tokens_per_s: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    loss: float | None = None
    gate: str = ""
    grad_err: float | None = None
    note: str = ""

    @property
    def case(self) -> tuple[str, int, int, int, str]:
        """What all providers were given."""
        return self.shape, self.layers, self.tokens, self.sequence, self.checkpointing

    @property
    def key(self) -> tuple[tuple[str, int, int, int, str], str]:
        """What was measured: rows with the same key are repetitions."""
        return self.case, self.provider

    @property
    def out_of_memory(self) -> bool:
        """The step did not fit."""
        return self.note.startswith(OUT_OF_MEMORY)

    @property
    def failed(self) -> bool:
        """No time, and not for want of memory: a red gate or an error."""
        return bool(self.note) and not self.out_of_memory


COLUMNS = tuple(field.name for field in fields(StepRow))
_COUNTS = ("layers", "tokens", "sequence")
_FORMATS = {
    "step_ms": ".3f",
    "moe_ms": ".3f",
    "tokens_per_s": ".1f",
    "peak_mb": ".1f",
    "first_s": ".3f",
    "loss": ".5f",
    "grad_err": ".3e",
}


class StepRecord:
    """The rows of one run, and the file they go to after every row, if there is one."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is in `path`; its rows stay.

        Raises:
            ValueError: the file has other columns, or its folder does not exist.
        """
        self.path = path
        self.rows: list[StepRow] = []
        self._before = [] if path is None else lines_before(path, COLUMNS)

    def add(self, row: StepRow) -> None:
        """Append and save."""
        self.rows.append(row)
        if self.path is not None:
            write(self.path, self._before, COLUMNS, (_cells(row) for row in self.rows))


def read(path: Path) -> list[StepRow]:
    """The rows of a CSV of steps.

    Raises:
        ValueError: it has other columns, or a number is none.
    """
    return [_row(cells) for cells in csv.DictReader(lines_before(path, COLUMNS))]


def latest(rows: Iterable[StepRow]) -> list[StepRow]:
    """The last row of every key, in the order in which the keys first came."""
    return list({row.key: row for row in rows}.values())


def _cells(row: StepRow) -> list[str]:
    return [_text(name, getattr(row, name)) for name in COLUMNS]


def _text(name: str, value: object) -> str:
    return "" if value is None else format(value, _FORMATS.get(name, ""))


def _row(cells: dict[str, str]) -> StepRow:
    values: dict[str, object] = dict(cells)
    for name in _COUNTS:
        values[name] = int(cells[name])
    for name in _FORMATS:
        values[name] = float(cells[name]) if cells[name] else None
    return StepRow(**values)  # type: ignore[arg-type]  # the columns are the fields
