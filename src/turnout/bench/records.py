"""The CSV of record: one row per measurement, appended, written whole or not at all.

Empty cells were not measured; a row whose gate was red has no time. `saved_mb` and `peak_mb` are
MiB. `dense_tflops` is the largest rate of the dense matmul in the run that wrote the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from turnout.bench.table import File, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The columns, in their order. `first_s`: seconds of the first step, with its compilation."""

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
    first_s: float | None = None

    @property
    def key(self) -> tuple[str, int, str, str, str, str]:
        """What was measured: rows with the same key are repetitions."""
        return self.shape, self.tokens, self.mode, self.routing, self.recompute, self.provider

    @property
    def fraction(self) -> float | None:
        """Of the dense rate."""
        return None if self.tflops is None else self.tflops / self.dense_tflops


TABLE = Table(
    Row,
    {
        "ms": ".4f",
        "tflops": ".4g",
        "dense_tflops": ".4g",
        "saved_mb": ".2f",
        "peak_mb": ".2f",
        "rel_err": ".3e",
        "first_s": ".2f",
    },
)
COLUMNS = TABLE.columns
read = TABLE.read


class Record(File[Row]):
    """The rows of one run, in a file if there is one, and the largest dense rate that it saw."""

    def __init__(self, path: Path | None) -> None:
        """As `File`."""
        super().__init__(TABLE, path)
        self.dense = 0.0

    def saw_dense(self, tflops: float) -> None:
        """The largest rate counts, for every row of the run."""
        if tflops <= self.dense:
            return
        self.dense = tflops
        self.rows = [replace(row, dense_tflops=tflops) for row in self.rows]
        self.save()


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
