"""A CSV of records: one frozen dataclass per row, appended, written whole or not at all.

The fields of the dataclass are the columns. An empty cell is None: it was not measured.
"""

from __future__ import annotations

import csv
import io
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

RowT = TypeVar("RowT")


class Table(Generic[RowT]):
    """The columns of one kind of row, and how its numbers are written.

    Args:
        kind: the dataclass; its fields are `str`, `int`, `float`, or one of them or None.
        formats: of columns that `str` would not write as they should be.
    """

    def __init__(self, kind: type[RowT], formats: Mapping[str, str]) -> None:
        hints = get_type_hints(kind)
        self.kind, self.formats = kind, formats
        self.columns = tuple(field.name for field in fields(kind))  # type: ignore[arg-type]
        self._numbers = {name: _number(hints[name]) for name in self.columns}

    def cells(self, row: RowT) -> list[str]:
        """A row as text."""
        values = {name: getattr(row, name) for name in self.columns}
        return ["" if v is None else format(v, self.formats.get(n, "")) for n, v in values.items()]

    def read(self, path: Path) -> list[RowT]:
        """The rows of a file.

        Raises:
            ValueError: it has other columns, or a number is none.
        """
        return [self._row(cells) for cells in csv.DictReader(lines_before(path, self.columns))]

    def _row(self, cells: Mapping[str, str]) -> RowT:
        values: dict[str, Any] = dict(cells)
        for name, number in self._numbers.items():
            if number is not None:
                values[name] = number(cells[name]) if cells[name] else None
        return self.kind(**values)


class File(Generic[RowT]):
    """The rows of one run, and the file they go to after every row, if there is one."""

    def __init__(self, table: Table[RowT], path: Path | None) -> None:
        """Reads what is in `path`; its rows stay.

        Raises:
            ValueError: the file has other columns, or its folder does not exist.
        """
        self.path, self._table = path, table
        self.rows: list[RowT] = []
        self._before = [] if path is None else lines_before(path, table.columns)

    def add(self, *rows: RowT) -> None:
        """Append and save."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        """What was there, and the rows of this run."""
        if self.path is not None and self.rows:
            table = self._table
            write(self.path, self._before, table.columns, map(table.cells, self.rows))


def _number(hint: Any) -> type[int] | type[float] | None:
    """int or float where the column holds one."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in (int, float) if kind in kinds), None)


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
