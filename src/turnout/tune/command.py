"""`turnout tune`: what its flags mean, its progress bar, and its table."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from turnout.compile_ahead import workers_kept
from turnout.device import device_of, visible_gpus
from turnout.kernel_facts import INSTALLED, interpreting
from turnout.specs import Unsupported, check_choice
from turnout.tune import together
from turnout.tune.recorded import launch, problems
from turnout.tune.roof import roof
from turnout.tune.work import Backend, Layer, Mode, layers_named, step
from turnout.tuning import cache, journal, report, show
from turnout.tuning.entry import Entry
from turnout.tuning.first_use import Tuner, tuning
from turnout.tuning.key import Ask, Config

Work = tuple[str, Callable[[], None]]
log = logging.getLogger("turnout.tuning")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """The flags of `turnout tune`, as they were given; None is the default that depends on others.

    Attributes:
        backend: `auto` searches what a training step launches here; `triton` every product, also
            those that another back end takes here.
        minutes: no further candidate is tried after that; None is no limit.
        record: the report to append to; None is in the cache folder.
    """

    shape: list[str] | None = None
    model: Path | None = None
    recorded: Path | None = None
    tokens: list[int] | None = None
    mode: list[str] | None = None
    rank: list[int] | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    minutes: float | None = None
    repeats: int = 30
    record: Path | None = None


def main(config: TuneConfig) -> dict[str, Any]:
    """Tunes what the flags name and returns the content of `--json`.

    Raises:
        ValueError: a flag that does not fit.
        Unsupported: no device that Triton's kernels run on.
    """
    device = _device(config.device)
    works = _works(config, device)
    console = Console(stderr=True)
    with together.tuned_by_one(config.minutes) as share:
        if share.is_first:
            result = _tune(config, works, device, console, share.entries)
        else:
            result = {
                "problems": [], "reused": 0, "broken": [], "no_memory": [], "out_of_time": False
            }  # fmt: skip
    if not share.is_first:
        return result | {"received": len(share.received)}
    _print(result, show.console())
    return result


def _tune(
    config: TuneConfig,
    works: Sequence[Work],
    device: torch.device,
    console: Console,
    entries: list[Entry],
) -> dict[str, Any]:
    report.forget()
    until = time.monotonic() + (math.inf if config.minutes is None else 60 * config.minutes)
    with _progress(len(works), console) as (on_work, on_trial):
        tuner = Tuner(
            seconds_left=None,
            until=until,
            keep_shipped=False,
            quick=max(1, config.repeats // 6),
            thorough=config.repeats,
            on_trial=on_trial,
        )
        try:
            with tuning(tuner), workers_kept():
                for name, run in works:
                    on_work(name)
                    tuner.is_out_of_time |= time.monotonic() > until
                    if tuner.is_out_of_time:
                        break
                    try:
                        run()
                    except torch.OutOfMemoryError:
                        tuner.no_memory.append(f"{name}: no memory to run it")
                        log.warning("%s", tuner.no_memory[-1])
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
        finally:
            entries += tuner.reused + tuner.entries
    path = config.record or _record_path()
    lines = report.record() + ([roof(device)] if device.type == "cuda" else [])
    written = _write(path, lines)
    searched = {entry.place for entry in tuner.entries}
    return {
        "problems": [event.to_dict() for event in report.events() if event.place in searched],
        "reused": len(tuner.reused),
        "broken": tuner.broken,
        "no_memory": tuner.no_memory,
        "fixed": sum(event.source == "fixed" for event in report.events()),
        "out_of_time": tuner.is_out_of_time,
        "default_over_tuned": _mean_ratio(tuner.entries),
        "cache": None if cache.cache_folder() is None else str(cache.cache_folder()),
        "record": str(path) if written else None,
    }


def _works(config: TuneConfig, device: torch.device) -> list[Work]:
    """What is run, in order, each with a name for the progress bar."""
    given = [n for n in ("shape", "model", "recorded") if getattr(config, n) is not None]
    if len(given) != 1:
        raise ValueError(
            f"got {', '.join('--' + name for name in given) or 'nothing to tune'}; expected one of "
            "--shape NAME, --model FOLDER, --recorded FILE"
        )
    if config.repeats < 1:
        raise ValueError(f"--repeats is {config.repeats}; expected at least 1")
    if config.minutes is not None and not config.minutes > 0:
        raise ValueError(f"--minutes is {config.minutes}; expected more than 0")
    if config.recorded is not None:
        found, faults = problems(journal.read(journal.find(config.recorded)), device)
        for fault in faults:
            log.warning("%s", fault)
        if not found:
            raise ValueError(f"{config.recorded} has no kernel of turnout; nothing to tune")
        return [
            (f"{'rows' if p.ragged == 'm' else 'gram'} {p.rows}", partial(launch, p, k, device))
            for p, k in found
        ]
    dtype = _dtype(config.dtype, device)
    check_choice("--backend", config.backend, Backend)
    backend = cast(Backend, config.backend)
    for rank in config.rank or []:
        if rank < 1:
            raise ValueError(f"--rank is {rank}; expected at least 1. Or --mode full, without any")
    modes = [mode for text in config.mode or ["lora"] for mode in text.split(",")]
    for mode in modes:
        check_choice("--mode", mode, Mode)
    works: list[Work] = []
    for layer in _layers(config):
        for tokens in config.tokens or [layer.tokens]:
            for mode in modes:
                for rank in (config.rank or [16]) if mode == "lora" else [0]:
                    what = f"{layer.name} T={tokens} {mode}{rank or ''}"
                    run = partial(
                        step, layer, tokens, cast(Mode, mode), rank, dtype, device, backend
                    )
                    works.append((what, run))
    return works


def _layers(config: TuneConfig) -> list[Layer]:
    for tokens in config.tokens or []:
        if tokens < 1:
            raise ValueError(f"--tokens is {tokens}; expected at least 1")
    if config.model is None:
        names = [name.strip() for text in config.shape or [] for name in text.split(",")]
        return [layer for name in dict.fromkeys(names) for layer in layers_named(name)]
    from turnout.integrations.expert_shapes import expert_shapes

    return [
        Layer(
            name=config.model.name,
            tokens=4096,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            experts=shape.experts,
            top_k=shape.top_k,
            spec=shape.spec,
            has_bias=shape.has_bias,
        )
        for shape in expert_shapes(config.model)
    ]


def _device(name: str) -> torch.device:
    """Where Triton runs: a GPU, or with its interpreter the CPU."""
    if INSTALLED:
        import triton  # noqa: F401  # says whether its interpreter is on
    if name == "auto":
        name = "cuda" if visible_gpus() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"--device is {name!r}; expected auto, cuda, cuda:N or cpu")
    device = torch.device(name)
    device_of(device)  # says so where that GPU is not there
    if device.type == "cpu" and not interpreting():
        raise Unsupported(
            "turnout tune times Triton kernels; this machine has no GPU to run them. Run it on the "
            "GPU machine, or set TRITON_INTERPRET=1 to see it work on the CPU (--shape tiny)"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype is {name!r}; expected auto, bfloat16, float16 or float32")
    found: torch.dtype = getattr(torch, name)
    return found


def _record_path() -> Path:
    folder = cache.cache_folder() or Path.cwd()
    return folder / "records" / journal.NAME


def _write(path: Path, lines: list[dict[str, Any]]) -> bool:
    try:
        journal.append(path, lines)
    except OSError as error:
        log.warning("the record is not written: %s", error)
        return False
    return True


def _mean_ratio(entries: Sequence[Entry]) -> float | None:
    """Geometric mean of the time of the analytic default over that of the winner."""
    logs = [
        math.log(entry.search.default_s / entry.search.winner_s)
        for entry in entries
        if entry.search is not None and entry.search.default_s and entry.search.winner_s
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None


@contextmanager
def _progress(
    count: int, console: Console
) -> Iterator[tuple[Callable[[str], None], Callable[[Ask, Config, int, int], None]]]:
    """Two bars on standard error: what is run, and the candidates of the problem at hand."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        works = progress.add_task("", total=count)
        trials = progress.add_task("", total=None)
        started = False

        def on_work(name: str) -> None:
            nonlocal started
            progress.update(works, description=name, advance=1 if started else 0)
            started = True

        def on_trial(ask: Ask, config: Config, number: int, total: int) -> None:
            p = ask.problem
            what = f"{ask.kernel} {p.rows} x {p.n} x {p.k}"
            progress.update(trials, description=what, completed=number, total=total)

        yield on_work, on_trial


def _print(result: dict[str, Any], console: Console) -> None:
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    if result["problems"]:
        console.print(show.kernels(result["problems"]))
    for event in result["problems"]:
        key = event["key"]
        for one in event["search"]["failed"]:
            config = show.short(one["config"])
            what = f"{event['kernel']} {key['rows']} x {key['n']} x {key['k']}"
            say(f"failed: {what} with {config}: {one['reason']}")
    for text in result["broken"]:
        say(f"broken: {text}")
    for text in result["no_memory"]:
        say(f"not tuned: {text}")
    say(f"{len(result['problems'])} problems tuned, {result['reused']} were in the cache already")
    if result["fixed"]:
        say(f"{result['fixed']} problems run in kernels of one config, so there is none to search")
    if result["default_over_tuned"] is not None:
        say(
            f"the analytic default takes {result['default_over_tuned']:.3f} times as long as what "
            "was chosen (geometric mean)"
        )
    if result["out_of_time"]:
        say("out of time: the same command goes on where this one stopped")
    say(f"cache: {result['cache']}")
    say(f"record: {result['record']}")
