"""The picture of a CSV of record: a bar per provider, a group per shape, a row of bars per mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from turnout.bench.providers import PROVIDERS
from turnout.bench.records import Row, latest
from turnout.bench.run import GRAPH
from turnout.bench.work import GRADIENTS
from turnout.shapes import SHAPES

TITLES = {
    "fwd": "forward",
    "full": "forward + backward, all weights train",
    "lora16": "forward + backward, LoRA of rank 16 on frozen experts",
}
COLOURS = {
    "turnout": "#d62728",
    "sonicmoe": "#1f4e79",
    "scattermoe": "#4f81bd",
    "axolotl": "#8fb4dc",
    "liger": "#7f9f7f",
    "split-lora": "#b8a13c",
    "grouped_mm": "#9a9a9a",
    "eager": "#d0d0d0",
}


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Speed as a fraction of the dense bf16 matmul, of the latest rows on the standard batches.

    The largest dense rate counts for all, also where several processes measured their own.

    Raises:
        ValueError: no such row has a time.
    """
    shown = [row for row in latest(rows) if _is_standard(row)]
    if not shown:
        raise ValueError(
            f"none of the {len(rows)} rows is of a named shape with its own tokens, uniform "
            "routing and a time; expected at least one. Run benchmarks/compare.py first."
        )
    dense = max(row.dense_tflops for row in shown)
    modes = [mode for mode in GRADIENTS if any(row.mode == mode for row in shown)]
    figure = Figure(figsize=(11, 0.6 + 2.7 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), squeeze=False)[:, 0]
    for axes, mode in zip(panels, modes, strict=True):
        _bars(axes, [row for row in shown if row.mode == mode], dense)
        axes.set_title(TITLES[mode], fontsize=10, loc="left")
    used = [name for name in _order() if any(row.provider == name for row in shown)]
    handles = {
        label: bar
        for axes in panels
        for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[name] for name in used],
        used,
        loc="outside upper center",
        ncols=len(used),
        fontsize=9,
        frameon=False,
    )
    last = shown[-1]
    figure.supxlabel(
        f"fraction of a dense bf16 matmul ({dense:.0f} TFLOP/s) on {last.device}, "
        f"torch {last.torch}, Triton {last.triton}, {last.commit}",
        fontsize=8,
    )
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the suffix, which says the format
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)


def _is_standard(row: Row) -> bool:
    tokens = {shape.name: shape.tokens for shape in SHAPES}
    return (
        row.tflops is not None
        and row.provider in PROVIDERS
        and not PROVIDERS[row.provider].backend  # the peer itself is there
        and not row.provider.endswith(GRAPH)
        and tokens.get(row.shape) == row.tokens
        and (row.routing, row.recompute) == ("uniform", "none")
    )


def _order() -> list[str]:
    return [*COLOURS, *(name for name in PROVIDERS if name not in COLOURS)]


def _bars(axes: Any, rows: list[Row], dense: float) -> None:
    """A group per shape; ours has its number above it."""
    shapes = [shape.name for shape in SHAPES if any(row.shape == shape.name for row in rows)]
    names = [name for name in _order() if any(row.provider == name for row in rows)]
    width = 0.84 / len(names)
    for place, name in enumerate(names):
        found = {row.shape: row for row in rows if row.provider == name}
        at = [shapes.index(shape) for shape in found]
        left = [x - 0.42 + width * (place + 0.5) for x in at]
        heights = [row.tflops / dense for row in found.values() if row.tflops is not None]
        bars = axes.bar(left, heights, width * 0.92, label=name, color=COLOURS.get(name, "#555555"))
        if name == "turnout":
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(shapes)), shapes, fontsize=9)
    axes.margins(x=0.01, y=0.12)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
