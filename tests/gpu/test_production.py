"""Shapes of real models in bfloat16 with float32 adapters of rank 16: values, gradients, bits.

The definition in float64 gives the output and all gradients but those of the stacks; these are
compared for a few experts, on the part of the problem that those experts compute. Tensors of this
size have a typical error, so one yardstick is enough.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import (
    DEVICE,
    MEMORY,
    MODELS,
    REPLAYED,
    model_problem,
    step_of,
    waits_are_errors,
    zipf,
)
from torch import Tensor

from problems import Problem, assert_same, judge, output_gradient, restricted, run

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
STACKS = ("gate_up", "down")
# About 128 rows an expert, as in training; Mixtral has few experts and many weights.
TOKENS = {
    "qwen3-30b": 2048,
    "olmoe": 1024,
    "sonic-readme": 2048,
    "mixtral": 512,
    "gpt-oss-20b": 1024,
}
# The shapes of the benchmarks: a model and its tokens.
DESIGN = {
    "qwen3-30b": ("qwen3-30b", 16384),
    "olmoe": ("olmoe", 16384),
    "mixtral": ("mixtral", 8192),
    "gptoss-20b": ("gpt-oss-20b", 16384),
    "sonic-readme": ("sonic-readme", 32768),
    "small-t": ("qwen3-30b", 512),
}
LARGE = ("mixtral", "sonic-readme")
REPEATS = 50
FLUSH = 2**28  # bytes; larger than any L2 cache
CASES = [
    pytest.param(model, marks=MEMORY["large" if model in LARGE else "medium"]) for model in MODELS
]


def production(model: str) -> Problem:
    problem = model_problem(model, TOKENS[model])
    return zipf(problem) if model in ("qwen3-30b", "mixtral") else problem


def sample(problem: Problem) -> Tensor:
    """The experts with the most and the fewest rows, and the last one."""
    counts = torch.bincount(problem.experts.flatten(), minlength=problem.num_experts)
    few = [int(counts.argmax()), int(counts.argmin()), problem.num_experts - 1]
    return torch.tensor(sorted(set(few)), device=problem.experts.device)


@pytest.mark.parametrize("model", CASES)
def test_a_production_shape_is_more_than_twice_as_wrong_as_eager(model: str) -> None:
    problem = production(model)
    dout = output_gradient(problem)
    got = run(problem, dout=dout)
    assert_same(run(problem, dout=dout), got)
    assert_same(run(problem, dout=dout, recompute="gate_up"), got)
    needs = tuple(name for name in problem.leaves if name not in STACKS)
    judge({name: got[name] for name in ("out", *needs)}, [(problem, dout)], needs)
    few = sample(problem)
    part = {name: got[name][few] for name in STACKS}
    judge(part, [(restricted(problem, few), dout)], STACKS)


@MEMORY["medium"]
def test_two_runs_of_lora_training_differ_with_dropout() -> None:
    problem = zipf(model_problem("qwen3-30b", 4096))
    dout = output_gradient(problem)

    def seeded(**options: Any) -> dict[str, Any]:
        torch.manual_seed(3)
        return run(problem, problem.trained_by_lora, dout=dout, expert_dropout=0.1, **options)

    first = seeded()
    assert_same(seeded(), first)
    assert_same(seeded(recompute="gate_up"), first)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("trained", ["LoRA", "full"])
@pytest.mark.parametrize("shape", [pytest.param(name, marks=MEMORY["large"]) for name in DESIGN])
def test_one_of_many_steps_differs_or_waits(shape: str, trained: str) -> None:
    """Every second one with a cold cache: a missing wait shows where loads take their time."""
    problem = model_problem(*DESIGN[shape])
    names = problem.trained_by_lora if trained == "LoRA" else tuple(problem.leaves)
    step = step_of(problem, names)
    expected = [tensor.clone() for tensor in step()]
    with waits_are_errors():
        for _ in range(REPLAYED):
            step()
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)
    for number in range(REPEATS):
        if number % 2:
            flush.zero_()
        same = [torch.equal(*pair) for pair in zip(step(), expected, strict=True)]
        assert all(same), f"step {number} differs in {[n for n, s in enumerate(same) if not s]}"
