"""What the flags of the benchmarks have in common: lists of words, and a device by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from turnout.device import visible_gpus
from turnout.specs import check_choice


def words(given: Iterable[str] | None, default: str) -> list[str]:
    """Each word once; a flag may be given several times and hold commas."""
    parts = [part.strip() for text in given or [default] for part in text.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def choices(what: str, given: list[str], allowed: object) -> list[str]:
    """`given`, checked against a `Literal` type."""
    for word in given:
        check_choice(what, word, allowed)
    return given


def device_named(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        ValueError: torch knows no such device.
    """
    if name == "auto":
        return torch.device("cuda" if visible_gpus() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda. {error}") from None
