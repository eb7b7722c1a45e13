"""The Hopper kernels on a Hopper GPU, against the definition and against the portable kernels.

Shapes have at least 192 rows per expert and a hidden size of whole 64s, or the portable kernels
would run; `launched` says that they did not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, HOPPER, MODELS, SHAPES, model_problem, zipf

from problems import GPT_OSS, Problem, assert_same, check, random_problem, run, spaced
from turnout import Activation
from turnout.device import device_of
from turnout.launch import recording

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or device_of(DEVICE).arch != 90, reason="needs an sm_90 GPU"
)
OWN = ("turnout.experts.hopper_kernels", "turnout.experts.hopper_gram")
BASE = SHAPES[HOPPER]
CASES: dict[str, dict[str, Any]] = {
    "even": {"hidden": 256, "intermediate": 256},
    "column tiles that no width divides": {},
    "no adapters": {"rank_up": 0, "rank_down": 0},
    "ranks of several steps": {"rank_up": 128, "rank_down": 33},
    "gpt-oss": {"activation": GPT_OSS, "transposed": True, "bias": True},
    "transposed, side by side": {"transposed": True},
    "not gated": {"activation": Activation(act="relu2", gated=False), "bias": True},
    "clamped after": {"activation": Activation(limit=0.5, limit_after=True)},
    "weight on the input": {"weight_on_input": True},
    "one expert": {"num_experts": 1, "top_k": 1},
}


def make(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Problem:
    options = BASE | {"dtype": dtype, "lora_dtype": torch.float32} | changes
    return random_problem(seed=seed, device=DEVICE, **options)


def launched(problem: Problem, **options: Any) -> list[str]:
    """Modules and names of the kernels of a forward and a backward pass."""
    names: list[str] = []  # listeners hear their own thread, so backward has to run in it

    def heard(launch: Any, tensors: Any) -> None:
        names.append(f"{launch.kernel.__module__}.{launch.kernel.__name__}")

    with recording(heard), torch.autograd.set_multithreading_enabled(False):
        run(problem, backend="hopper", **options)
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_product_is_more_than_twice_as_wrong_as_eager(case: str, dtype: torch.dtype) -> None:
    found = launched(make(dtype=dtype, **CASES[case]))
    assert sum(name.startswith(OWN) for name in found) >= 3, found
    check(partial(make, dtype=dtype, **CASES[case]), backend="hopper")


def test_the_wide_products_of_a_training_step_run_elsewhere() -> None:
    problem = make(hidden=256, intermediate=256)
    found = [name for name in launched(problem) if name.startswith(OWN)]
    assert sum(name.endswith("rows_kernel") for name in found) == 4, found
    assert sum(name.endswith("gram_kernel") for name in found) == 2, found


@pytest.mark.parametrize("how", ["one", "empty", "dropped"])
def test_rows_of_other_experts_are_read(how: str) -> None:
    """Memory that nobody wrote is NaN here: behind the kept rows it must not be touched."""

    def skewed(seed: int) -> Problem:
        problem = make(seed, tokens=1000)
        experts = problem.experts.clone()
        if how == "one":
            experts[:] = 3
        elif how == "empty":
            experts[experts == 2] = 1
            experts[experts == 4] = 0
        else:
            experts[::3] = problem.num_experts
        return problem.changed(experts=experts)

    check(skewed, backend="hopper")


def test_gaps_between_rows_are_read() -> None:
    problem = make()
    gaps = problem.changed(x=spaced(problem["x"]))
    assert_same(run(gaps, backend="hopper"), run(problem, backend="hopper"))
    assert launched(gaps) == launched(problem)


def test_recomputing_or_freezing_changes_the_numbers() -> None:
    problem = make()
    whole = run(problem, backend="hopper")
    assert_same(run(problem, backend="hopper", recompute="gate_up"), whole)
    lora = run(problem, problem.trained_by_lora, backend="hopper")
    assert_same(lora, {n: whole[n] if n in {"out", *lora} and v is not None else None
                       for n, v in lora.items()})  # fmt: skip


def test_replayed_runs_differ() -> None:
    problem = make()
    first = run(problem, backend="hopper")
    for _ in range(4):
        assert_same(run(problem, backend="hopper"), first)


@pytest.mark.parametrize("model", MODELS)
def test_a_models_layer_differs_from_the_portable_kernels(model: str) -> None:
    problem = model_problem(model, 4096 if model != "mixtral" else 1024)
    problem = zipf(problem)
    needs = problem.trained_by_lora
    one, other = (run(problem, needs, backend=name) for name in ("hopper", "triton"))
    for name in ("out", *needs):
        a, b = one[name], other[name]
        assert a is not None
        assert b is not None
        difference = (a.double() - b.double()).norm() / b.double().norm()
        assert difference < 2e-2, f"{name}: {difference:.1e}"


def test_a_graph_of_it_gives_other_numbers() -> None:
    problem = make()
    expected = problem.call(backend="hopper")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                problem.call(backend="hopper")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = problem.call(backend="hopper")
        graph.replay()
    assert torch.equal(out, expected)
