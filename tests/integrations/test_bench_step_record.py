"""README's picture of whole steps, its commands and the record: the same cases and providers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from step_cases import turnout

from turnout.bench import step_command
from turnout.bench.step_plan import StepConfig, planned
from turnout.bench.step_records import read
from turnout.bench.step_sweep import choose_layers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = ROOT / "benchmarks" / "results" / "step_h100.csv"
PICTURE = "fc2cb28"  # the commit below docs/img/step_h100.png


def test_readmes_commands_draw_another_picture_than_the_one_above_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[StepConfig] = []

    def note(config: StepConfig) -> dict[str, Any]:
        given.append(config)
        return {"rows": [], "failed": 0, "missing": {}, "demands": []}

    monkeypatch.setattr(step_command, "main", note)
    commands = re.findall(r"^turnout (bench --step .*)$", README, flags=re.M)
    for command in commands:
        assert turnout(monkeypatch, *shlex.split(command)) == 0
    found = set()
    for config in given:
        shapes, setting = planned(config)
        for shape in shapes:
            layers = choose_layers(shape, setting)
            sizes = (shape.name, layers, shape.config(layers).vocab_size)
            sizes = (*sizes, setting.tokens, setting.sequence)
            found |= {(*sizes, m, p) for m in setting.checkpointing for p in setting.providers}
    drawn = {(*row.case, row.provider) for row in read(RECORD) if row.commit == PICTURE}
    assert found == drawn
    assert {config.plot for config in given[-1:]} != {None}, "the last one draws"
    assert len({(config.csv, config.commit) for config in given}) == 1, "one record, one label"
