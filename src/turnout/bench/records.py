"""The CSV of record: one row per measurement, appended, written whole or not at all.

Empty cells were not measured; a row whose gate was red has no time. `saved_mb` and `peak_mb` are
MiB. `dense_tflops` is the largest rate of the dense matmul in the run that wrote the row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The columns, in their order."""

    commit: str
    device: str
    torch: str
    triton: str
    shape: str
    tokens: int
    mode: str
    routing: str
    recompute: str
    router: str
    backend: str
    provider: str
    ms: float | None
    tflops: float | None
    dense_tflops: float
    saved_mb: float | None
    peak_mb: float | None
    rel_err: float | None
    config_source: str

    @property
    def key(self) -> tuple[str, int, str, str, str, str]:
        """What was measured: rows with the same key are repetitions."""
        return self.shape, self.tokens, self.mode, self.routing, self.recompute, self.provider

    @property
    def fraction(self) -> float | None:
        """Of the dense rate."""
        return None if self.tflops is None else self.tflops / self.dense_tflops


COLUMNS = tuple(field.name for field in fields(Row))
_FORMATS = {
    "ms": ".4f",
    "tflops": ".4g",
    "dense_tflops": ".4g",
    "saved_mb": ".2f",
    "peak_mb": ".2f",
    "rel_err": ".3e",
}


class Record:
    """The rows of one run, and the file they go to after every row, if there is one."""

    def __init__(self, path: Path | None) -> None:
        """Reads what is in `path`; its rows stay.

        Raises:
            ValueError: the file has other columns, or its folder does not exist.
        """
        self.path = path
        self.rows: list[Row] = []
        self.dense = 0.0
        self._before = [] if path is None else lines_before(path, COLUMNS)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def saw_dense(self, tflops: float) -> None:
        """The largest rate counts, for every row of the run."""
        if tflops <= self.dense:
            return
        self.dense = tflops
        self.rows = [replace(row, dense_tflops=tflops) for row in self.rows]
        self._write()

    def _write(self) -> None:
        if self.path is not None and self.rows:
            write(self.path, self._before, COLUMNS, (_cells(row) for row in self.rows))


def read(path: Path) -> list[Row]:
    """The rows of a CSV of record.

    Raises:
        ValueError: it has other columns, or a number is none.
    """
    lines = lines_before(path, COLUMNS)
    return [_row(cells) for cells in csv.DictReader(lines)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every key, in the order in which the keys first came."""
    return list({row.key: row for row in rows}.values())


def slug(device: str) -> str:
    """A file name for a device: `NVIDIA H100 80GB HBM3` is h100."""
    words = device.lower().replace("nvidia", " ").replace("-", " ").split()
    for word in words:
        if re.fullmatch(r"[a-z]{1,2}\d{2,3}[a-z]*", word):
            return word
    return "-".join(words) or "unknown"


def lines_before(path: Path, columns: Sequence[str]) -> list[str]:
    """What is in a CSV to append to, each line with its end; nothing if it is not there yet.

    Raises:
        ValueError: it has other columns, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"the CSV is {path}; expected a file in a folder that exists. Create {path.parent} "
            "first or name another file."
        )
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    expected = ",".join(columns)
    if lines and lines[0].strip() != expected:
        raise ValueError(
            f"{path} starts with {lines[0].strip()!r}; expected the columns {expected}. "
            "Name another file."
        )
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return lines


def write(
    path: Path, before: Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Puts `before`, what `lines_before` found, and the rows into the file, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not before:
        writer.writerow(columns)
    writer.writerows(rows)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(before) + text.getvalue(), encoding="utf-8")
    temporary.replace(path)


def _cells(row: Row) -> list[str]:
    return [_text(name, getattr(row, name)) for name in COLUMNS]


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    return format(value, _FORMATS.get(name, ""))


def _row(cells: dict[str, str]) -> Row:
    values: dict[str, object] = dict(cells)
    values["tokens"] = int(cells["tokens"])
    for name in _FORMATS:
        values[name] = float(cells[name]) if cells[name] else None
    return Row(**values)  # type: ignore[arg-type]  # the columns are the fields
