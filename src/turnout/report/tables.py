"""The parts of `turnout report` that are not kernels, one function per kind of event."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from turnout.tuning.show import Event, inner, listed, number, short, table


def head(event: Event) -> Text:
    """Versions and devices of one run, in a few lines."""
    names = ("turnout", "torch", "triton", "driver", "python")
    versions = ", ".join(f"{name} {event[name]}" for name in names if event.get(name))
    lines = [versions]
    for device in (one for one in listed(event, "devices") if isinstance(one, dict)):
        facts = [str(device.get("name"))]
        if device.get("compute_capability"):
            shared = number(device.get("shared_memory_bytes"), 2**-10, 0)
            facts += [
                f"compute capability {device['compute_capability']}",
                f"{number(device.get('memory_bytes'), 2**-30, 0)} GiB",
                f"{device.get('num_sms')} multiprocessors",
                f"{shared} KiB of shared memory per block",
            ]
        lines.append(", ".join(facts))
    single = event.get("single_config_autotuners", 0)
    if single:
        lines.append(f"{single} autotuners of other libraries have a single config: nothing to say")
    return Text("\n".join(lines))


def autotuners(events: Sequence[Event]) -> Table:
    """Choices of other libraries' autotuners."""
    out = table("kernel", "module", "key", "config")
    out.add_column("ms", justify="right")
    for event in events:
        key = " ".join(f"{name}={value}" for name, value in inner(event, "key").items())
        out.add_row(
            str(event.get("kernel")),
            str(event.get("module")),
            key,
            short(inner(event, "config")),
            number(event.get("winner_ms")),
        )
    return out


def experts(event: Event) -> Table:
    """Load of the experts per layer at the last logging step."""
    out = table("layer")
    for heading in ("experts", "tokens", "busiest / mean", "idle", "dropped", "entropy"):
        out.add_column(heading, justify="right")
    for name in inner(event, "layers"):
        layer = inner(inner(event, "layers"), name)
        load = [count for count in listed(layer, "load") if isinstance(count, int)]
        total = sum(load)
        out.add_row(
            name,
            str(len(load)),
            str(layer.get("tokens", "")),
            number(max(load) * len(load) / total if total else 0.0, digits=2),
            str(sum(not count for count in load)),
            number(layer.get("dropped")),
            number(layer.get("entropy")),
        )
    return out
