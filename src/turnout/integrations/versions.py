"""The oldest transformers and PEFT that turnout works with."""

from __future__ import annotations

import sys
from importlib import metadata

MINIMUM = {"transformers": "5.16.1", "peft": "0.19.1"}


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def too_old(package: str) -> str | None:
    """A sentence when the installed package is older than turnout needs, else None."""
    installed = metadata.version(package)
    if _numbers(installed) >= _numbers(MINIMUM[package]):
        return None
    return (
        f"{package} is {installed}; expected {MINIMUM[package]} or newer. "
        f"pip install -U '{package}>={MINIMUM[package]}'"
    )


def newer_than(package: str, version: str) -> bool:
    """The installed package has a higher major or minor version."""
    return _numbers(metadata.version(package))[:2] > _numbers(version)[:2]


def check_versions() -> None:
    """Raise `ValueError` if transformers, or a PEFT that the process uses, is too old."""
    for package in MINIMUM:
        if package == "transformers" or package in sys.modules:
            problem = too_old(package)
            if problem is not None:
                raise ValueError(problem)
