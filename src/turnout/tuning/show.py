"""How events are shown: one table for `turnout tune` and `turnout report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Event = dict[str, Any]

_WIDE = 200  # columns, where nobody looks at a terminal
_SHORT = {"EXPERT_FIRST": "first", "num_warps": "w", "num_stages": "s", "GROUP": "group"}


def console() -> Console:
    """Standard output; wide where it is no terminal, so that tables are not folded."""
    return Console(width=None if sys.stdout.isatty() else _WIDE)


def kernels(events: Sequence[Event]) -> Table:
    """turnout's own kernels. Times are medians in ms: of the config, of the best other one, of what
    ran before the search, and of the analytic default."""
    out = table("kernel", "rows x N x K", "E", "R", "dtype", "what", "config", "from")
    out.columns[1].no_wrap = True
    for heading in ("ms", "next", "before", "default", "tried", "pruned", "failed", "s"):
        out.add_column(heading, justify="right")
    for event in events:
        key, search = inner(event, "key"), inner(event, "search")
        what = [str(key.get("epilogue"))] if key.get("epilogue") != "none" else []
        what += [str(name).removeprefix("activation_") for name in listed(key, "layout")]
        times = ("winner_s", "runner_up_s", "incumbent_s", "default_s")
        out.add_row(
            str(event.get("kernel")),
            f"{key.get('rows')} x {key.get('n')} x {key.get('k')}",
            str(key.get("experts")),
            str(key.get("rank") or ""),
            _dtypes(key),
            " ".join(what),
            short(inner(event, "config")),
            str(event.get("source")),
            *(milliseconds(search.get(name)) for name in times),
            *(str(search.get(name, "")) for name in ("tried", "pruned")),
            str(len(listed(search, "failed"))) if "failed" in search else "",
            number(search.get("seconds"), digits=1),
        )
    return out


def table(*headings: str) -> Table:
    """An empty table in the style of all."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in headings:
        out.add_column(heading)
    return out


def inner(event: Event, name: str) -> dict[str, Any]:
    """The object called `name` in an event; empty if there is none."""
    found = event.get(name)
    return found if isinstance(found, dict) else {}


def listed(event: Event, name: str) -> list[Any]:
    """The list called `name` in an event; empty if there is none."""
    found = event.get(name)
    return found if isinstance(found, list) else []


def short(config: dict[str, Any]) -> str:
    """A config in one line: `BN=128 BK=64 group=4 s=3 w=8`."""
    words = {
        _SHORT.get(name, name.replace("BLOCK_", "B")): value
        for name, value in config.items()
        if name != "num_ctas"
    }
    return " ".join(f"{name}={value}" for name, value in words.items())


def milliseconds(seconds: Any) -> str:
    """With three decimals; nothing for a time that was not taken."""
    return number(seconds, 1e3)


def number(value: Any, scale: float = 1.0, digits: int = 3) -> str:
    """`value * scale` in words; nothing where a file holds no number there."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{scale * value:.{digits}f}" if is_one else ""


def _dtypes(key: dict[str, Any]) -> str:
    dtype, weight = str(key.get("dtype")), str(key.get("weight_dtype"))
    return dtype if dtype == weight else f"{dtype}/{weight}"
