"""loss.png and experts.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot_loss(
    path: Path,
    losses: Sequence[float],
    stock: Sequence[float] | None,
    heldout: tuple[float, float] | None,
) -> None:
    """Loss per step of the LoRA phase, stock PEFT's and the held-out losses where known."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, label="turnout", linewidth=2)
    if stock is not None:
        axes.plot(steps, stock, label="stock PEFT", linewidth=1, linestyle="--")
    if heldout is not None:
        lines = (("base", heldout[0], "gray"), ("LoRA", heldout[1], "green"))
        for which, value, color in lines:
            label = f"held out, {which}: {value:.3f}"
            axes.axhline(value, label=label, color=color, linewidth=1, linestyle=":")
    axes.set(xlabel="step", ylabel="loss", title="LoRA on attention and experts")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_experts(path: Path, counts: dict[str, list[int]]) -> None:
    """Each expert's part of its layer's tokens, times E: 1 is an even load."""
    if not counts:
        raise ValueError("counts is empty; expected the tokens of one layer at least")
    width = max(map(len, counts.values()))
    rows = []
    for tokens in counts.values():
        mean = max(sum(tokens) / len(tokens), 1e-9)
        # Layers may have different numbers of experts.
        rows.append([count / mean for count in tokens] + [float("nan")] * (width - len(tokens)))
    figure = Figure(figsize=(max(6.0, min(16.0, 2 + 0.35 * width)), 1.6 + 0.3 * len(rows)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    top = max(2.0, max(value for row in rows for value in row if value == value))
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    axes.set(xlabel="expert", title="tokens per expert, 1 = even load")
    axes.set_yticks(range(len(rows)), list(counts), fontsize=7)
    if width <= 32:
        axes.set_xticks(range(width))
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
