"""`turnout report`: reads a report, prints it, and draws its roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from turnout.report import tables
from turnout.tuning import journal, show
from turnout.tuning.journal import Journal
from turnout.tuning.key import FIXED, TILES


def main(place: Path, plot: Path | None = None) -> dict[str, Any]:
    """Prints the report of a run and returns its events by kind.

    Args:
        place: the report, or the folder of the run.
        plot: where to draw the roofline (PNG, PDF or SVG).

    Raises:
        ValueError: no report there, one of another format, or a picture that can not be made.
    """
    found = journal.read(journal.find(place))
    if plot is not None:
        _check_plot(plot)
    show.console().print(_shown(found))
    if plot is not None:
        _draw(found, plot)
    return {
        "path": str(found.path),
        "faults": list(found.faults),
        "heads": found.of("head"),
        "kernels": found.last("kernel"),
        "autotuners": found.last("autotuner"),
        "roofs": found.of("roof"),
        "experts": found.of("experts"),
    }


def _shown(found: Journal) -> RenderableType:
    parts: list[RenderableType] = [Text(fault, style="yellow") for fault in found.faults]
    parts += [tables.head(found.of("head")[-1]), Text()]
    num_runs = len(found.of("head"))
    if num_runs > 1:
        parts += [Text(f"The last of {num_runs} runs in {found.path.name}:"), Text()]
    kernels = found.last("kernel")
    gone = sorted({str(event.get("kernel")) for event in kernels} - {*TILES, *FIXED})
    if gone:
        text = f"kernels that this version does not have: {', '.join(gone)}"
        parts.append(Text(text, style="yellow"))
    if kernels:
        parts += [show.kernels(kernels), Text()]
    else:
        parts.append(Text("No kernel of turnout ran, so no config was chosen."))
    if found.last("autotuner"):
        parts += [tables.autotuners(found.last("autotuner")), Text()]
    loads = found.of("experts")
    if loads:
        parts.append(Text(f"Load of the experts at step {loads[-1].get('step')}"))
        parts.append(tables.experts(loads[-1]))
    return Group(*parts)


def _check_plot(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--plot is {path}; expected a file in a folder that exists")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot is {path}; expected a name that ends in .png, .pdf or .svg")


def _draw(found: Journal, path: Path) -> None:
    from turnout.report.roofline import plot, point

    events = [event for event in found.last("kernel") if event.get("kernel") in (*TILES, *FIXED)]
    roofs = found.of("roof")
    plot(path, [point(event) for event in events], roofs[-1] if roofs else None)
