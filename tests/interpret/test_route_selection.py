"""Who is chosen by the fused router, in Triton's interpreter, where its selection has corners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from route_cases import check, randn
from turnout import RouteSpec
from turnout.routing import fused, rules
from turnout.routing.network import merging, sorting

INF = math.inf


def exchange(values: Tensor, pairs: Any) -> Tensor:
    columns = list(values.unbind(-1))
    for i, j in pairs:
        a, b = columns[i], columns[j]
        columns[i], columns[j] = torch.maximum(a, b), torch.minimum(a, b)
    return torch.stack(columns, -1)


@pytest.mark.parametrize("n", [8, 16])
def test_a_network_leaves_something_out_of_order(n: int) -> None:
    """One that sorts all zeros and ones sorts everything (Knuth, 5.3.4)."""
    bits = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
    assert torch.equal(exchange(bits, sorting(n)), bits.sort(-1, descending=True).values)
    assert len(sorting(n)) == {8: 19, 16: 63}[n]
    ordered = bits.sort(-1, descending=True).values
    first, second = (ordered[torch.randperm(2**n)] for _ in range(2))
    larger = torch.maximum(first, second.flip(-1))
    expected = torch.cat([first, second], -1).sort(-1, descending=True).values[:, :n]
    assert torch.equal(exchange(larger, merging(n)), expected)


def assert_rule(logits: Tensor, spec: RouteSpec, **tensors: Tensor) -> None:
    got = fused.route(logits, spec, **tensors).experts_TK
    assert torch.equal(got, rules.route(logits, spec, **tensors).experts_TK)


@pytest.mark.parametrize("fill", [-INF, 0.0])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_an_expert_outside_of_the_best_groups_is_never_chosen(score: str, fill: float) -> None:
    """It is where all others are forbidden, or below 0; then the lowest index is."""
    spec = RouteSpec(
        top_k=5, score=score, n_group=4, topk_group=2, group_fill=fill, group_score="max"
    )
    logits = randn(140, 28)
    forbidden = torch.where(torch.arange(28) % 7 < 3, 0.0, -INF)
    assert_rule(logits, spec, bias_E=forbidden + randn(28, seed=1))
    assert_rule(logits, spec, bias_E=randn(28, seed=2) - 2)
    assert_rule(logits, spec, bias_E=torch.full((28,), -INF))


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "score"),
    [(15, 3, 2, "top2sum"), (12, 12, 5, "max"), (12, 4, 4, "top2sum"), (80, 2, 1, "top2sum")],
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_groups_of_a_size_are_wrong(
    kind: str, experts: int, groups: int, kept: int, score: str
) -> None:
    spec = RouteSpec(
        top_k=4, score=kind, n_group=groups, topk_group=kept, group_score=score, eps=1e-20
    )
    check(2 * randn(140, experts), spec, bias_E=randn(experts, seed=1))
    logits = torch.randint(-2, 3, (140, experts)).float()
    logits[::7, ::5] = math.nan
    assert_rule(logits, spec)


@pytest.mark.parametrize("top_k", [1, 8, 9])
def test_logits_of_16_bits_lose_one(top_k: int) -> None:
    """Any bits: NaN of both signs, infinities, subnormal numbers, ties."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (200, 70), generator=generator).to(torch.int16)
    bits[::2] = bits[::2, torch.randint(0, 9, (70,), generator=generator)]
    assert_rule(bits.view(torch.float16), RouteSpec(top_k=top_k))


def test_more_groups_than_the_kernel_keeps_are_not_refused() -> None:
    spec = RouteSpec(top_k=2, n_group=64, topk_group=40, group_score="max")
    assert "32 groups" in str(fused.rejects(randn(2, 64), spec))
