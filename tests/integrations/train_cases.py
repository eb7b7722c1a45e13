"""The small runs that the tests of `turnout train` share; the fixtures are in conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turnout.train import TrainConfig

SMALL = {"seq_len": 32, "batch": 4, "steps": 6, "lr": 5e-3, "rank": 4}


def config(checkpoint: Path, text: Path, out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model=checkpoint, data=text, out=out, **{**SMALL, **options})
