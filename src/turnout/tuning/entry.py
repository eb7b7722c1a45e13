"""One stored config: for which key and bucket of rows, on which device, and how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from turnout._version import __version__
from turnout.tuning.key import Config, Key, checked

Source = Literal["tuned", "user cache", "shipped", "analytic", "fixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search saw; times are medians in seconds.

    Attributes:
        winner_s, runner_up_s: of the config that was chosen and of the best other one (None: there
            was no other).
        incumbent_s: of the config that would have run without the search.
        default_s: of the analytic default; None if it fails.
        tried: candidates that were timed, the incumbent among them.
        pruned: that `turnout.tuning.space.fits` refused.
        failed: config and reason of those that did not run, or computed something else.
        seconds: of the whole search.
        times: every config that was timed.
    """

    winner_s: float
    runner_up_s: float | None
    incumbent_s: float
    default_s: float | None
    tried: int
    pruned: int
    failed: tuple[tuple[Config, str], ...]
    seconds: float
    times: tuple[tuple[Config, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "winner_s": self.winner_s,
            "runner_up_s": self.runner_up_s,
            "incumbent_s": self.incumbent_s,
            "default_s": self.default_s,
            "tried": self.tried,
            "pruned": self.pruned,
            "failed": [{"config": c.to_dict(), "reason": reason} for c, reason in self.failed],
            "seconds": self.seconds,
            "times": [{"config": c.to_dict(), "median_s": s} for c, s in self.times],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Search:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or of the wrong type.
        """
        return cls(
            winner_s=_seconds(values, "winner_s"),
            runner_up_s=_maybe(values, "runner_up_s"),
            incumbent_s=_seconds(values, "incumbent_s"),
            default_s=_maybe(values, "default_s"),
            tried=checked(values, "tried", int),
            pruned=checked(values, "pruned", int),
            failed=tuple(
                (config_of(one), checked(one, "reason", str)) for one in _dicts(values, "failed")
            ),
            seconds=_seconds(values, "seconds"),
            times=tuple(
                (config_of(one), _seconds(one, "median_s")) for one in _dicts(values, "times")
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A config for `key` at `rows` (a bucket) on `device`; `turnout` is the version that found it.

    `search` is None where it was not kept: shipped tables hold configs alone.
    """

    key: Key
    rows: int
    device: str
    config: Config
    search: Search | None = None
    turnout: str = __version__

    @property
    def place(self) -> tuple[Key, int, str]:
        """Entries with the same place replace each other."""
        return self.key, self.rows, self.device

    def to_dict(self) -> dict[str, Any]:
        found = self.key.to_dict() | {
            "rows": self.rows,
            "device": self.device,
            "config": self.config.to_dict(),
            "turnout": self.turnout,
        }
        return found | ({} if self.search is None else {"search": self.search.to_dict()})

    @classmethod
    def from_dict(cls, values: Any) -> Entry:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or of the wrong type, or the kernel is not known.
        """
        if not isinstance(values, dict):
            raise ValueError(f"an entry is {type(values).__name__}; expected an object")
        search = values.get("search")
        return cls(
            key=Key.from_dict(values),
            rows=checked(values, "rows", int),
            device=checked(values, "device", str),
            config=config_of(values),
            search=None if search is None else Search.from_dict(checked(values, "search", dict)),
            turnout=checked(values, "turnout", str),
        )


def config_of(values: Mapping[str, Any]) -> Config:
    """The config in `values["config"]`.

    Raises:
        ValueError: it is missing, or a value is no integer.
    """
    found = checked(values, "config", dict)
    return Config.of({str(name): checked(found, name, int) for name in found})


def _dicts(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = checked(values, name, list)
    for one in found:
        if not isinstance(one, dict):
            raise ValueError(f"{name} holds {one!r}; expected objects")
    return list(found)


def _maybe(values: Mapping[str, Any], name: str) -> float | None:
    return None if values.get(name) is None else _seconds(values, name)


def _seconds(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{name} is {value!r}; expected a number of seconds")
    return float(value)
