"""The sort behind the fused router in Triton's interpreter: one launch, rows of a stable sort."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import turnout
from problems import random_problem
from turnout import RouteSpec, expert_mlp
from turnout.launch import recording
from turnout.ragged import counts, counts_of, kernels, sort_by_expert
from turnout.ragged.kernels import launch_sort
from turnout.routing import fused

SIGMOID = RouteSpec(top_k=4, score="sigmoid", n_group=4, topk_group=2, scale=2.5)


def logits_of(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def forget_launches() -> None:
    """They are remembered by sizes alone, with the number of blocks that there was then."""
    fused._plan.cache_clear()
    kernels._place_launch.cache_clear()


@pytest.fixture
def fresh_launches() -> Iterator[None]:
    forget_launches()
    yield
    forget_launches()


# At most `blocks` blocks: the programs of the router then work in several steps.
@pytest.mark.usefixtures("fresh_launches")
@pytest.mark.parametrize(
    ("blocks", "tokens", "experts", "tile_rows", "spec"),
    [
        (512, 270, 12, 64, SIGMOID),
        (3, 300, 12, 16, SIGMOID),
        (4, 180, 70, 16, RouteSpec(top_k=6)),
        (512, 40, 1000, 64, RouteSpec(top_k=32)),
        (2, 1100, 1, 128, RouteSpec(top_k=1)),
        (512, 200, 6, 128, RouteSpec(top_k=6, n_always=2)),
    ],
)
def test_one_launch_sorts_otherwise_than_three(
    blocks: int, tokens: int, experts: int, tile_rows: int, spec: RouteSpec
) -> None:
    with patch.object(counts, "BLOCKS", blocks):
        chosen = fused.route(logits_of(tokens, experts + spec.n_always), spec).experts_TK
        counted = counts_of(chosen, experts)
        assert counted is not None
        assert counted.shape[0] <= blocks
        got = launch_sort(chosen, experts, tile_rows, counted)
    expected = launch_sort(chosen, experts, tile_rows)
    for name in ("slot_S", "row_TK", "offsets", "tiles"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize(("tokens", "launches"), [(64, 2), (300, 2), (0, 0)])
def test_routing_and_sorting_take_more_than_two_launches(tokens: int, launches: int) -> None:
    names: list[str] = []
    with recording(lambda launch, tensors: names.append(launch.kernel.__name__)):
        experts = fused.route(logits_of(tokens, 12), SIGMOID).experts_TK
        sort_by_expert(experts, 12, counts_of(experts, 12))
    assert len(names) == launches, names


def test_the_expert_mlp_does_not_use_the_counts() -> None:
    problem = random_problem(tokens=300, num_experts=12, hidden=16, intermediate=16, rank_up=2)
    logits = logits_of(300, 12)
    spec = replace(SIGMOID, n_group=1, topk_group=1)
    routing = fused.route(logits, spec)
    names: list[str] = []
    weights = turnout.ExpertWeights(problem["gate_up"], problem["down"])
    with recording(lambda launch, tensors: names.append(launch.kernel.__name__)), torch.no_grad():
        got = expert_mlp(
            problem["x"],
            routing.experts_TK,
            routing.weights_TK,
            weights,
            problem.spec,
            backend="triton",
        )
    assert [name for name in names if name in SORTS] == ["_place_kernel"]
    expected = turnout.reference.expert_mlp(
        problem["x"], routing.experts_TK, routing.weights_TK, weights, problem.spec
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


SORTS = ("_sort_kernel", "_count_kernel", "_scan_kernel", "_scatter_kernel", "_place_kernel")


def test_counts_of_other_indices_are_believed() -> None:
    def fresh() -> Tensor:
        return fused.route(logits_of(300, 12), SIGMOID).experts_TK

    experts = fresh()
    assert counts_of(experts, 12) is not None
    assert counts_of(experts, 11) is None, "another number of experts"
    for changed in (experts.clone(), experts.view(-1, 4), experts[:200], copy.deepcopy(experts)):
        assert counts_of(changed, 12) is None
    experts.detach()[0, 0] = 12
    assert counts_of(experts, 12) is None, "written to through another view"
    experts = fresh()
    experts.data = experts.data.clone()
    assert counts_of(experts, 12) is None, "other memory"


def test_given_or_few_indices_are_counted() -> None:
    given = torch.zeros(300, 4, dtype=torch.int64)
    logits = logits_of(300, 12)
    assert counts_of(fused.route(logits, SIGMOID, experts_TK=given).experts_TK, 12) is None
    assert counts_of(fused.route(logits[:64], SIGMOID).experts_TK, 12) is None


def test_the_counts_of_inference_mode_are_kept() -> None:
    with torch.inference_mode():
        experts = fused.route(logits_of(300, 12), SIGMOID).experts_TK
        assert counts_of(experts, 12) is None, "a change could not be seen"
