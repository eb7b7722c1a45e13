"""The parts of `turnout report` that are not kernels, one function per kind of event."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from turnout.tuning.show import Event, inner, short, table


def head(event: Event) -> Text:
    """Versions and devices of one run, in a few lines."""
    names = ("turnout", "torch", "triton", "driver", "python")
    versions = ", ".join(f"{name} {event[name]}" for name in names if event.get(name))
    lines = [versions]
    for device in event.get("devices", []):
        facts = [str(device.get("name"))]
        if device.get("compute_capability"):
            gib = device.get("memory_bytes", 0) / 2**30
            kib = device.get("shared_memory_bytes", 0) / 2**10
            facts += [
                f"compute capability {device['compute_capability']}",
                f"{gib:.0f} GiB",
                f"{device.get('num_sms')} multiprocessors",
                f"{kib:.0f} KiB of shared memory per block",
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
        ms = event.get("winner_ms")
        out.add_row(
            str(event.get("kernel")),
            str(event.get("module")),
            key,
            short(inner(event, "config")),
            "" if ms is None else f"{ms:.3f}",
        )
    return out


def experts(event: Event) -> Table:
    """Load of the experts per layer at the last logging step."""
    out = table("layer")
    for heading in ("experts", "tokens", "busiest / mean", "idle", "dropped", "entropy"):
        out.add_column(heading, justify="right")
    for name, layer in inner(event, "layers").items():
        load = layer["load"]
        total = sum(load)
        busiest = max(load) * len(load) / total if total else 0.0
        entropy = layer.get("entropy")
        out.add_row(
            name,
            str(len(load)),
            str(layer.get("tokens", "")),
            f"{busiest:.2f}",
            str(sum(not count for count in load)),
            f"{layer['dropped']:.3f}",
            "" if entropy is None else f"{entropy:.3f}",
        )
    return out
