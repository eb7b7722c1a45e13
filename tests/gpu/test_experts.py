"""The expert MLP on a GPU: Triton kernels against the definition, and the laws that bind a GPU.

`make test-gpu`, or `PYTHONPATH=src python -m pytest tests/gpu` with what the machine has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import turnout
from problems import (
    GPT_OSS,
    Problem,
    assert_same,
    check,
    output_gradient,
    random_problem,
    run,
)
from turnout import Activation
from turnout.ragged import sort_by_expert
from turnout.testing import poison_empty

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES: dict[str, dict[str, Any]] = {
    "T257-E8-K2-H515": {"tokens": 257, "num_experts": 8, "hidden": 515, "intermediate": 131},
    "T600-E16-K4-R33": {"tokens": 600, "num_experts": 16, "top_k": 4, "rank_up": 33},
    "T1000-E4": {"tokens": 1000, "num_experts": 4, "hidden": 512, "intermediate": 384},
    "E1-K1": {"tokens": 130, "num_experts": 1, "top_k": 1, "hidden": 128},
    "R256": {"tokens": 130, "hidden": 128, "intermediate": 256, "rank_up": 256, "rank_down": 256},
    "gpt-oss": {"activation": GPT_OSS, "transposed": True, "bias": True, "hidden": 96},
    "not-gated": {"activation": Activation(act="relu2", gated=False), "bias": True},
    "llama4": {"weight_on_input": True, "transposed": True, "top_k": 1},
}
LORA = {"lora_dtype": torch.float32}


def on_gpu(problem: Problem) -> Problem:
    moved = problem.mapped(lambda t: t.cuda())
    return replace(moved, experts=problem.experts.cuda())


def make(name: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    return on_gpu(random_problem(seed=seed, dtype=dtype, **LORA, **SHAPES[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_is_twice_as_wrong_as_eager(shape: str, dtype: str) -> None:
    with poison_empty():
        check(lambda seed: make(shape, DTYPES[dtype], seed), backend="triton")


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_two_runs_differ(recompute: str) -> None:
    problem = make("T600-E16-K4-R33", torch.bfloat16)
    assert_same(run(problem, recompute=recompute), run(problem, recompute=recompute))


def test_recompute_changes_bits() -> None:
    problem = make("T1000-E4", torch.bfloat16)
    assert_same(run(problem), run(problem, recompute="gate_up"))


def test_forward_or_backward_waits_for_the_device() -> None:
    problem = make("T600-E16-K4-R33", torch.bfloat16)
    dout = output_gradient(problem)
    run(problem, dout=dout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(problem, dout=dout)
        run(problem, problem.trained_by_lora, dout=dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_replays_something_else() -> None:
    problem = make("T600-E16-K4-R33", torch.bfloat16)
    leaves = [t.requires_grad_() for t in problem.leaves.values()]
    dout = output_gradient(problem)

    def step() -> tuple[torch.Tensor, ...]:
        out = problem.call()
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.fill_(float("nan"))
    graph.replay()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_another_stream_reads_too_early() -> None:
    problem = make("T1000-E4", torch.bfloat16)
    expected = run(problem)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run(problem)
    torch.cuda.synchronize()
    assert_same(got, expected)


def test_compiled_is_not_eager() -> None:
    problem = make("T600-E16-K4-R33", torch.bfloat16)
    compiled = torch.compile(lambda: problem.call(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), problem.call())


def test_dropped_slots_are_computed() -> None:
    problem = make("T600-E16-K4-R33", torch.float32)
    experts = problem.experts.clone()
    experts[::3, 0] = problem.num_experts
    problem = replace(problem, experts=experts)
    with poison_empty():
        got = run(problem)
    for name, value in run(problem.double(), function=turnout.reference.expert_mlp).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-3, atol=1e-3)


def test_no_tokens_fail() -> None:
    problem = on_gpu(random_problem(tokens=0, dtype=torch.bfloat16))
    got = run(problem)
    assert got["out"].shape == (0, 24)
    assert all(not value.any() for name, value in got.items())


def test_dropout_masks_differ_from_the_definitions() -> None:
    problem = make("T600-E16-K4-R33", torch.float32)

    def seeded(**options: Any) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(3)
        return run(problem, expert_dropout=0.3, **options)

    got, expected = seeded(), seeded(function=turnout.reference.expert_mlp)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(5000, 8, 128), (777, 32, 1024)])
def test_the_sort_is_not_stable(tokens: int, top_k: int, num_experts: int) -> None:
    experts = torch.randint(-1, num_experts + 2, (tokens, top_k), device="cuda")
    ragged = sort_by_expert(experts, num_experts)
    other = sort_by_expert(experts.cpu(), num_experts)
    assert torch.equal(ragged.slot_S.cpu(), other.slot_S)
    assert torch.equal(ragged.row_TK.cpu(), other.row_TK)
    assert torch.equal(ragged.offsets.cpu(), other.offsets)


def test_rows_past_2_31_elements_are_addressed_in_32_bits() -> None:
    tokens, top_k, hidden = 131_080, 8, 2056  # S * H = 2.156e9
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    experts = torch.randint(4, (tokens, top_k), device="cuda")
    weights = torch.rand(tokens, top_k, device="cuda").bfloat16()
    gate_up = torch.randn(4, 32, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    down = torch.randn(4, hidden, 16, device="cuda", dtype=torch.bfloat16) / 4
    stacks = turnout.ExpertWeights(gate_up, down)
    with torch.no_grad():
        got = turnout.expert_mlp(x, experts, weights, stacks, turnout.ExpertSpec())
        last = slice(tokens - 64, tokens)
        expected = turnout.reference.expert_mlp(
            x[last].double(),
            experts[last],
            weights[last].double(),
            turnout.ExpertWeights(gate_up.double(), down.double()),
            turnout.ExpertSpec(),
        )
    error = (got[last].double() - expected).norm() / expected.norm()
    assert error < 1e-2
