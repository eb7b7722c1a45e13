"""The roofline of the kernels that were launched.

    work       rows: 2 S N (K + R) FLOP          gram: 2 S N K FLOP
    traffic    rows: S K + S N + E N K elements  gram: S (N + K) + E N K, each once
    intensity  work / traffic                    rate: work / time of the chosen config

A kernel whose config was never timed has an intensity and no rate: a mark at the foot. The roofs
are those measured in the record (`turnout tune` on a GPU writes them), else there are none.

Legend: S rows, E experts, N output width, K contraction, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from turnout.tuning.key import checked

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_COLOURS = {"none": "#1f4e79", "activate": "#d62728", "activate_backward": "#b8a13c"}
_GRAM = "#7f9f7f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One kernel event. `tflops` is None where its config was never timed."""

    label: str
    colour: str
    flop: int
    intensity: float
    tflops: float | None


def point(event: dict[str, Any]) -> Point:
    """The point of a kernel event.

    Raises:
        ValueError: the event lacks a size, or its time is no number.
    """
    key = checked(event, "key", dict)
    s, e, n, k, r = (checked(key, name, int) for name in ("rows", "experts", "n", "k", "rank"))
    item = _BYTES.get(checked(key, "dtype", str), 2)
    weight_item = _BYTES.get(checked(key, "weight_dtype", str), 2)
    is_rows = checked(event, "kernel", str).endswith("rows")
    flop = 2 * s * n * (k + r)
    traffic = (s * k + s * n) * item + e * n * k * weight_item
    search = event.get("search")
    seconds = search.get("winner_s") if isinstance(search, dict) else None
    if seconds is not None:
        seconds = checked({"winner_s": seconds}, "winner_s", float)
    epilogue = checked(key, "epilogue", str)
    return Point(
        label=epilogue if is_rows and epilogue != "none" else "rows" if is_rows else "gram",
        colour=_COLOURS.get(epilogue, _COLOURS["none"]) if is_rows else _GRAM,
        flop=flop,
        intensity=flop / max(1, traffic),
        tflops=flop / seconds / 1e12 if seconds else None,
    )


def plot(path: Path, points: Sequence[Point], roof: dict[str, Any] | None) -> None:
    """Draws the points, and the roofs of a `roof` event.

    Raises:
        ValueError: no points, a roof without its numbers, or a file that can not be written.
    """
    if not points:
        raise ValueError("the report has no kernel of turnout, so there is nothing to draw")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    timed = [(p, p.tflops) for p in points if p.tflops is not None]
    low = min([rate for _, rate in timed], default=1.0) / 3
    most = max(p.flop for p in points)
    for p in points:
        rate, marker = (p.tflops, "o") if p.tflops is not None else (low, "|")
        size = 30 + 170 * p.flop / most
        axes.scatter([p.intensity], [rate], s=size, c=p.colour, marker=marker, alpha=0.8)
    for label, colour in dict.fromkeys((p.label, p.colour) for p in points):
        axes.scatter([], [], c=colour, label=label)
    if roof is not None:
        dense, copy = (checked(roof, name, float) for name in ("dense_tflops", "copy_gb_s"))
        copy /= 1e3
        edge = dense / copy
        first, last = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 2
        first, last = min(first, edge / 2), max(last, edge * 2)
        axes.plot([first, edge, last], [first * copy, dense, dense], color="gray", linewidth=1)
        axes.set_title(
            f"{roof.get('device')}: dense {dense:.0f} TFLOP/s, copy {copy:.2f} TB/s, measured"
        )
    elif timed:
        axes.set_title("no measured peaks in this record, so no roof")
    else:
        axes.set_title("no config of this run was ever timed: marks show intensity only")
    figure.legend(loc="outside right upper", title="size: FLOP")
    axes.grid(True, which="both", linewidth=0.3)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"--plot is {path}, which can not be written: {error}") from None
