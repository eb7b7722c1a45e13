"""The `bench` command: shapes, modes and providers from words, a line per row, a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from turnout._version import __version__
from turnout.bench.providers import provider_named
from turnout.bench.records import Record, Row
from turnout.bench.run import Measured
from turnout.bench.sweep import (
    Case,
    Setting,
    default_providers,
    line,
    missing,
    sweep,
    with_tokens,
)
from turnout.bench.words import choices, device_named, words
from turnout.bench.work import DTYPE, Mode, Routing
from turnout.device import device_of
from turnout.experts import sonic
from turnout.experts.early import check_possible
from turnout.shapes import Shape, shape_named
from turnout.specs import BackendName, Recompute, check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """The flags of `turnout bench`. Lists may hold several words, joined by commas."""

    shape: Sequence[str] | None = None
    mode: Sequence[str] | None = None
    provider: Sequence[str] | None = None
    tokens: int | None = None
    routing: Sequence[str] | None = None
    recompute: str = "none"
    backend: str = "auto"
    graph: bool = False
    repeats: int = 20
    device: str = "auto"
    csv: Path | None = None
    commit: str | None = None


def main(config: BenchConfig) -> dict[str, Any]:
    """Measure, print, append to the CSV; the rows, and who did not run and why.

    Raises:
        ValueError: a word that names nothing, or a CSV that can not be written.
        Unsupported: the back end that was named does not run on the device.
    """
    device = device_named(config.device)
    default = "qwen3-30b" if device.type == "cuda" else "tiny"
    shapes = [
        with_tokens(shape_named(name), config.tokens) for name in words(config.shape, default)
    ]
    modes = choices("mode", words(config.mode, ",".join(get_args(Mode))), Mode)
    routings = choices("routing", words(config.routing, "uniform"), Routing)
    check_choice("recompute", config.recompute, Recompute)
    check_choice("backend", config.backend, BackendName)
    if config.backend in sonic.NAMES:
        raise ValueError(
            f"--backend is {config.backend!r}; expected auto, torch, triton or hopper. SonicMoE "
            "reads another row order, so it is a provider: --provider turnout-sonic,sonicmoe"
        )
    if config.backend != "auto":
        check_possible(config.backend, "these shapes", [device_of(device)], [DTYPE])
    if config.repeats < 1:
        raise ValueError(f"repeats is {config.repeats}; expected at least 1")
    cases = [
        Case(
            shape=shape,
            mode=cast(Mode, mode),
            routing=cast(Routing, routing),
            providers=_providers(config.provider, shape),
            recompute=cast(Recompute, config.recompute),
        )
        for shape in shapes
        for routing in routings
        for mode in modes
    ]
    setting = Setting(
        device=device,
        commit=config.commit or __version__,
        backend=cast(BackendName, config.backend),
        repeats=config.repeats,
        graph=config.graph,
    )
    console, progress = Console(), Console(stderr=True)
    skipped = missing({name for case in cases for name in case.providers}, device)
    reasons: list[str | None] = []

    def on_row(row: Row, measured: Measured) -> None:
        if len(record.rows) > len(reasons):  # what could not be captured is no row
            reasons.append(measured.reason)
        progress.print(line(row, measured), soft_wrap=True, highlight=False)

    record = Record(config.csv)
    sweep(cases, setting, record, on_row)
    console.print(table(record.rows, reasons))
    for name, reason in skipped.items():
        console.print(f"{name} did not run: {reason}", soft_wrap=True, highlight=False)
    rows = zip(record.rows, reasons, strict=True)
    return {
        "dense_tflops": record.dense,
        "rows": [{**asdict(row), "reason": reason} for row, reason in rows],
        "missing": skipped,
    }


def table(rows: list[Row], reasons: list[str | None]) -> Table:
    """The rows as a table; memory only where it was counted."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    has_memory = any(row.saved_mb is not None for row in rows)
    for heading in ("shape", "T", "mode", "routing", "provider"):
        out.add_column(heading, no_wrap=True)
    memory = ("saved", "peak MiB") if has_memory else ()
    for heading in ("ms", "TFLOP/s", "dense", *memory, "error"):
        out.add_column(heading, justify="right")
    for row, reason in zip(rows, reasons, strict=True):
        numbers = [(row.ms, ".3f"), (row.tflops, ".3g"), (row.fraction, ".2f")]
        numbers += [(row.saved_mb, ".0f"), (row.peak_mb, ".0f")] if has_memory else []
        cells = [row.shape, str(row.tokens), row.mode, row.routing, row.provider]
        cells += [_number(*number) for number in [*numbers, (row.rel_err, ".1e")]]
        out.add_row(*cells, style=None if reason is None else "red")
    return out


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _providers(given: Sequence[str] | None, shape: Shape) -> tuple[str, ...]:
    if not given:
        return default_providers(shape.tokens)
    return tuple(provider_named(name).name for name in words(given, ""))
