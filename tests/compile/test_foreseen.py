"""What is compiled ahead of a step is what the step launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import DTYPES, LORA, MODELS, USUAL
from recording import chip, recording

from problems import random_problem, run
from turnout.launch import noting
from turnout.tuning import first_use


class Searches:
    """Somebody who tunes; here nothing runs, so a search would fail."""

    def __init__(self) -> None:
        self.asked = 0

    def wants(self, ask: object) -> bool:
        self.asked += 1
        return False


def test_tuning_waits_for_each_kernel_that_it_does_not_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sorting, packing, and all of Hopper's: most of the kernels of a step."""
    sizes, tuner, noted = MODELS["qwen3-30b"], Searches(), []
    tokens = USUAL * sizes["num_experts"] // sizes["top_k"]

    def ahead(key: object, device: torch.device, dry: Callable[[], object]) -> None:
        with noting(noted):
            dry()
        assert not tuner.asked, "a search was begun where nothing runs"

    monkeypatch.setattr(first_use, "_stack", [tuner])
    with recording(chip(90)):
        problem = random_problem(tokens=tokens, **(LORA | sizes | DTYPES["bf16-fp32-adapters"]))
        with patch("turnout.experts.ops.compile_ahead", ahead):
            run(problem, problem.trained_by_lora)
    assert len(noted) > 8
    assert tuner.asked


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("options", [{}, {"recompute": "gate_up"}, {"expert_dropout": 0.1}])
@pytest.mark.parametrize("trained", ["LoRA", "everything"])
@pytest.mark.parametrize("model", ["qwen3-30b", "gptoss-20b"])
def test_a_kernel_was_not_foreseen(
    model: str, trained: str, options: dict[str, Any], arch: int
) -> None:
    sizes = MODELS[model]
    tokens = USUAL * sizes["num_experts"] // sizes["top_k"]
    foreseen: list[set[str]] = []
    with recording(chip(arch)) as found:

        def ahead(key: object, device: torch.device, dry: Callable[[], object]) -> None:
            noted: list[Any] = []
            with noting(noted):
                dry()
            for launch, dtypes in noted:
                launch.compile(dtypes)
            foreseen.append(set(found))

        dtypes = DTYPES["bf16-fp32-adapters"]
        problem = random_problem(tokens=tokens, **(LORA | sizes | dtypes))
        needs = problem.trained_by_lora if trained == "LoRA" else None
        with patch("turnout.experts.ops.compile_ahead", ahead):
            run(problem, needs, **options)
    assert len(foreseen) == 1
    assert len(foreseen[0]) > 8
    assert set(found) == foreseen[0]
