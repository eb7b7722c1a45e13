"""What ran: one event per distinct problem that was launched, and the devices and versions.

`choose` is asked when a launch is built, which happens once per problem, and its answer notes
itself when that launch first runs, so a step pays nothing for the record. `record` also reads every
other live autotuner of Triton in the process.
"""

from __future__ import annotations

import gc
import platform
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

from turnout._version import __version__
from turnout.device import Device, driver_version
from turnout.tuning import cache
from turnout.tuning.entry import Search, Source
from turnout.tuning.key import Ask, Config, Key, bucket_of, installed

FORMAT = 1
NUM_CTAS = 1  # no kernel here uses clusters


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One problem that was launched.

    Attributes:
        ask: the problem as it was first met; rows of the same bucket are the same problem.
        config: what it runs with, and where that came from.
        search: what the search for this config saw, if there was one that is still known.
    """

    ask: Ask
    config: Config
    source: Source
    search: Search | None

    @property
    def place(self) -> tuple[Key, int, str]:
        """Events with the same place are one problem; as `Entry.place`."""
        return self.ask.key, bucket_of(self.ask.rows), self.ask.device.name

    def note(self) -> None:
        """To the record: a launch calls it when it runs for the first time."""
        with _lock:
            _events[self.place] = self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the line of a report."""
        ask, search = self.ask, self.search
        problem = asdict(ask.problem)
        problem.pop("_hash")
        found: dict[str, Any] = {
            "event": "kernel",
            "kernel": ask.kernel,
            "device": ask.device.name,
            "key": {**ask.key.to_dict(), "rows": ask.rows, "bucket": bucket_of(ask.rows)},
            "problem": problem,
            "top_k": ask.top_k,
            "config": {**self.config.to_dict(), "num_ctas": NUM_CTAS},
            "source": self.source,
        }
        return found | {"search": None if search is None else search.to_dict()}


_events: dict[tuple[Key, int, str], Event] = {}
_lock = threading.Lock()  # backward passes run in threads of autograd


def choose(ask: Ask, default: Config) -> Event:
    """The stored config of a problem, else `default`. Times nothing, and records nothing yet."""
    stored = cache.store().find(ask)
    if stored is None:
        return Event(ask=ask, config=default, source="analytic", search=None)
    entry = stored.entry
    return Event(ask=ask, config=entry.config, source=stored.source, search=entry.search)


def fixed(ask: Ask, config: Config) -> Event:
    """The config of a problem whose kernel knows no other."""
    return Event(ask=ask, config=config, source="fixed", search=None)


def events() -> tuple[Event, ...]:
    """Of this process, in the order of the first launches."""
    with _lock:
        return tuple(_events.values())


def forget() -> None:
    """Starts over."""
    with _lock:
        _events.clear()


def record() -> list[dict[str, Any]]:
    """The lines of a report: a head, then kernels, then other libraries' autotuners."""
    found = events()
    others, num_single = autotuners()
    devices = {event.ask.device.name: event.ask.device for event in found}
    head = {
        "event": "head",
        "format": FORMAT,
        **versions(),
        "devices": [device_facts(device) for device in devices.values()],
        "single_config_autotuners": num_single,
    }
    return [head, *(event.to_dict() for event in found), *others]


def versions() -> dict[str, str | None]:
    """Of what decides how fast a kernel is; None is not installed, or no driver."""
    return {
        "turnout": __version__,
        "python": platform.python_version(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "driver": driver_version(),
    }


def device_facts(device: Device) -> dict[str, Any]:
    """What a report says of a device; sizes in bytes."""
    arch = device.arch
    return {
        "name": device.name,
        "compute_capability": None if arch is None else f"{arch // 10}.{arch % 10}",
        "memory_bytes": device.memory_bytes,
        "shared_memory_bytes": device.shared_memory,
        "num_sms": device.num_sms,
    }


def autotuners() -> tuple[list[dict[str, Any]], int]:
    """Every cached choice of every live Triton autotuner, and how many have a single config.

    Autotuners are found by their class through the garbage collector, so it does not matter under
    which name their module was loaded. One with a single config never fills its cache. The key's
    values carry the names that the autotuner declares; Triton appends dtypes of the tensors.
    """
    module = sys.modules.get("triton.runtime.autotuner")
    if module is None:
        return [], 0
    kind = module.Autotuner
    gc.collect()  # a dropped kernel is part of a cycle and lingers
    found: list[dict[str, Any]] = []
    num_single = 0
    for tuner in [one for one in gc.get_objects() if issubclass(type(one), kind)]:
        facts = vars(tuner)
        if not {"configs", "cache", "keys", "base_fn"} <= facts.keys():
            continue  # its making failed, and the error's traceback holds it
        if len(tuner.configs) < 2:
            num_single += 1
            continue
        choices = dict(tuner.cache).items()
        found += [_choice(tuner, *one) for one in choices if isinstance(one[1], module.Config)]
    found.sort(key=lambda one: (one["module"], one["kernel"], str(one["key"])))
    return found, num_single


def _choice(tuner: Any, key: tuple[Any, ...], config: Any) -> dict[str, Any]:
    """One cached choice."""
    values, dtypes = _split(key)
    names = list(tuner.keys)
    if len(values) > len(names):  # a declared key may be a dtype's name itself
        values, dtypes = key[: len(names)], key[len(names) :]
    # Triton leaves out declared names that the call did not pass; then it is not known which
    labels = names if len(values) == len(names) else [f"value_{i}" for i in range(len(values))]
    function = tuner.base_fn
    return {
        "event": "autotuner",
        "kernel": function.__name__,
        "module": str(function.__module__),
        "key": dict(zip(labels, map(_plain, values), strict=True)),
        "dtypes": [str(one) for one in dtypes],
        "config": {
            **{str(name): _plain(value) for name, value in config.kwargs.items()},
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "num_ctas": config.num_ctas,
        },
        "num_configs": len(tuner.configs),
        **_timing(tuner, config),
    }


def _split(key: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The declared values, and the dtypes that Triton appends."""
    end = len(key)
    while end and isinstance(key[end - 1], str) and key[end - 1].startswith("torch."):
        end -= 1
    return key[:end], key[end:]


def _timing(tuner: Any, config: Any) -> dict[str, float | None]:
    """Milliseconds of the winner: Triton keeps the times of the last key, so of a single one."""
    facts = vars(tuner)
    timings, seconds = facts.get("configs_timings"), facts.get("bench_time")
    is_last = timings and len(tuner.cache) == 1 and config in timings
    best = timings[config] if is_last else None
    median = best[0] if isinstance(best, list | tuple) else best
    return {"winner_ms": median, "bench_s": seconds if is_last else None}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
