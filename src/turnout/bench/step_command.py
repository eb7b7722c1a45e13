"""`turnout bench --step`: a line per row, a table, the demands."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from turnout.bench.musts import show
from turnout.bench.step_musts import musts
from turnout.bench.step_peers import missing
from turnout.bench.step_plan import StepConfig, check_files, planned
from turnout.bench.step_records import StepRecord, StepRow, read
from turnout.bench.step_sweep import line, sweep


def main(config: StepConfig) -> dict[str, Any]:
    """Measure, print, append to the CSV, judge, draw; the rows, the demands, and who did not run.

    With `judge` nothing runs: demands and picture are of the rows of `commit` in the CSV.

    Raises:
        ValueError: a flag that fits nothing, or a file that can not be written.
    """
    check_files(config)
    console, progress = Console(), Console(stderr=True)
    rows: list[StepRow] = []
    skipped: dict[str, str] = {}
    if not config.judge:
        shapes, setting = planned(config)
        skipped = missing(setting.providers, setting.device)
        setting = replace(
            setting, providers=tuple(name for name in setting.providers if name not in skipped)
        )
        record = StepRecord(config.csv)

        def on_row(row: StepRow) -> None:
            progress.print(line(row), soft_wrap=True, highlight=False)

        sweep(shapes, setting, record, on_row)
        rows = record.rows
        console.print(table(rows))
        for name, reason in skipped.items():
            console.print(f"{name} did not run: {reason}", soft_wrap=True, highlight=False)
    judged = rows
    if config.csv is not None:
        judged = [row for row in read(config.csv) if row.commit == config.label]
    demands = musts(judged)
    console.print(show(demands), soft_wrap=True, highlight=False)
    if config.plot is not None:
        from turnout.bench.step_plot import plot

        plot(config.plot, judged)
        console.print(f"wrote {config.plot}", soft_wrap=True, highlight=False)
    return {
        "rows": [asdict(row) for row in (judged if config.judge else rows)],
        "failed": sum(row.failed for row in rows),
        "missing": skipped,
        "demands": [{**asdict(must), "passed": must.passed} for must in demands],
    }


def table(rows: list[StepRow]) -> Table:
    """The rows as a table; memory only where it was counted."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    has_memory = any(row.peak_mb is not None for row in rows)
    for heading in ("shape", "T", "ckpt", "provider"):
        out.add_column(heading, no_wrap=True)
    memory = ("peak MiB",) if has_memory else ()
    for heading in ("step ms", "MoE ms", "tok/s", *memory, "first", "error"):
        out.add_column(heading, justify="right", no_wrap=True)
    has_notes = any(row.note for row in rows)
    if has_notes:
        out.add_column("note")
    for row in rows:
        numbers = [(row.step_ms, ".2f"), (row.moe_ms, ".2f"), (row.tokens_per_s, ".0f")]
        numbers += [(row.peak_mb, ".0f")] if has_memory else []
        numbers += [(row.first_s, ".1f"), (row.grad_err, ".3f")]
        shape = f"{row.shape} x{row.layers}"  # layers
        cells = [shape, str(row.tokens), row.checkpointing, row.provider]
        cells += ["" if value is None else format(value, form) for value, form in numbers]
        out.add_row(*cells, *([row.note] if has_notes else []), style="red" if row.failed else None)
    return out
