"""The flags of `turnout bench --step`, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from turnout._version import __version__
from turnout.bench.step_models import StepModel, step_model
from turnout.bench.step_records import Provider, Switch
from turnout.bench.step_sweep import StepSetting, choose_layers
from turnout.bench.words import choices, device_named, words


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """The flags. Lists may hold several words, joined by commas."""

    shape: Sequence[str] | None = None
    provider: Sequence[str] | None = None
    layers: int | None = None
    tokens: int | None = None
    sequence: int | None = None
    vocabulary: int | None = None
    checkpointing: Sequence[str] | None = None
    attention: str | None = None
    repeats: int = 20
    rounds: int = 1
    device: str = "auto"
    csv: Path | None = None
    commit: str | None = None
    plot: Path | None = None
    judge: bool = False

    @property
    def label(self) -> str:
        """For the first column."""
        return self.commit or __version__


def planned(config: StepConfig) -> tuple[list[StepModel], StepSetting]:
    """What runs.

    Raises:
        ValueError: a word that names nothing, or a number that fits nothing.
    """
    device = device_named(config.device)
    default = "qwen3-30b" if device.type == "cuda" else "tiny"
    named = [step_model(name) for name in words(config.shape, default)]
    shapes = [replace(shape, words=config.vocabulary) for shape in named]
    providers = words(config.provider, ",".join(get_args(Provider)))
    modes = words(config.checkpointing, ",".join(get_args(Switch)))
    small = [shape.name for shape in shapes] == ["tiny"]
    setting = StepSetting(
        device=device,
        commit=config.label,
        providers=cast(Any, tuple(choices("provider", providers, Provider))),
        layers=config.layers,
        tokens=(64 if small else 8192) if config.tokens is None else config.tokens,
        sequence=(32 if small else 4096) if config.sequence is None else config.sequence,
        checkpointing=cast(Any, tuple(choices("checkpointing", modes, Switch))),
        attention=config.attention or "auto",
        repeats=config.repeats,
        rounds=config.rounds,
    )
    for name in ("tokens", "sequence", "repeats", "rounds"):
        if getattr(setting, name) < 1:
            raise ValueError(f"{name} is {getattr(setting, name)}; expected at least 1")
    if config.vocabulary is not None and config.vocabulary < 2:
        raise ValueError(f"vocabulary is {config.vocabulary}; expected at least 2 words")
    if setting.sequence < 2 or setting.tokens % setting.sequence:
        raise ValueError(
            f"tokens is {setting.tokens} and sequence is {setting.sequence}; expected full "
            "sequences of at least two tokens. Give --tokens a multiple of --sequence"
        )
    for shape in shapes:
        if setting.layers is not None and not 1 <= setting.layers <= shape.layers:
            raise ValueError(
                f"layers is {setting.layers}; expected 1 to {shape.layers}, what {shape.name} has"
            )
        if setting.layers is None and device.type != "cuda":
            choose_layers(shape, setting)  # raises if it can not be counted
    return shapes, setting


def check_files(config: StepConfig) -> None:
    """The picture has a folder, and judging has rows to read.

    Raises:
        ValueError: it has not.
    """
    if config.plot is not None and not config.plot.parent.is_dir():
        raise ValueError(
            f"--plot is {config.plot}; expected a file in a folder that exists. Create "
            f"{config.plot.parent} first or name another file."
        )
    if config.judge and (config.csv is None or not config.csv.is_file()):
        raise ValueError(
            f"--judge is given and --csv is {config.csv}; expected the CSV of an earlier run. "
            "Name it with --csv"
        )
