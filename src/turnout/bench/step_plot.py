"""The picture of whole steps: a bar per provider, split into what nobody can remove and the MoE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from matplotlib.figure import Figure

from turnout.bench.step_records import OURS, PEERS, StepRow, latest

REST, PARTS = "#c8c8c8", {"turnout": "#d62728", "turnout-fused": "#a01c1d"}
OTHERS = "#4f81bd"
ORDER = ("eager", "stock", *PEERS, *OURS)
CLIP = 1.6  # a bar longer than this many of stock's is cut, with its number beside it


def plot(path: Path, rows: Sequence[StepRow]) -> None:
    """Draws the latest rows that have an MoE part, a panel per case.

    Raises:
        ValueError: there is none.
    """
    shown = [row for row in latest(rows) if row.moe_ms is not None and row.provider in ORDER]
    if not shown:
        raise ValueError(
            f"none of the {len(rows)} rows has an MoE part; expected at least one. Run turnout "
            "bench --step with the providers identity and turnout first."
        )
    cases = list(dict.fromkeys(row.case for row in shown))
    figure = Figure(figsize=(9, 0.9 + 1.5 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), squeeze=False)[:, 0]
    for axes, case in zip(panels, cases, strict=True):
        _bars(axes, [row for row in latest(rows) if row.case == case])
        axes.set_title(
            f"{case.shape}, {case.layers} layers, {case.vocabulary} words, {case.tokens} tokens in "
            f"sequences of {case.sequence}, checkpointing {case.checkpointing}",
            fontsize=9,
            loc="left",
        )
    last = shown[-1]
    figure.supxlabel(
        "milliseconds per step: grey with every MoE block as identity, coloured the MoE part\n"
        f"{last.device}, torch {last.torch}, transformers {last.transformers}, PEFT {last.peft}, "
        f"{last.commit}",
        fontsize=8,
    )
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the suffix, which says the format
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)


def _bars(axes: Any, rows: list[StepRow]) -> None:
    """Bars from top to bottom in `ORDER`; what did not fit has its note instead."""
    by_name = {row.provider: row for row in rows}
    names = [name for name in ORDER if name in by_name]
    times = [r.step_ms for r in rows if r.step_ms is not None and r.provider != "eager"]
    times = times or [r.step_ms for r in rows if r.step_ms is not None]
    end = CLIP * max(times)
    for place, name in enumerate(names):
        row = by_name[name]
        if row.step_ms is None or row.moe_ms is None:
            reason = shorten(row.note or "no identity step", 90, placeholder=" ...")
            axes.text(0.0, place, f" {reason}", va="center", fontsize=8)
            continue
        rest = row.step_ms - row.moe_ms
        axes.barh(place, rest, color=REST)
        axes.barh(place, row.moe_ms, left=rest, color=PARTS.get(name, OTHERS))
        text = f" {row.step_ms:.0f} ms, MoE {row.moe_ms:.0f}"
        at = min(row.step_ms, end * 0.8)
        colour = "white" if row.step_ms > end * 0.8 else "black"
        axes.text(at, place, text, va="center", fontsize=8, color=colour)
    axes.set_xlim(0, end)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
