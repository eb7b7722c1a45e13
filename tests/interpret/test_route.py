"""The fused router in Triton's interpreter against the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from route_cases import EXPERTS, NATIVE, SPECS, check, native, randn, run, tensors_of
from turnout import RouteSpec, route
from turnout.routing import fused, rules

INF = math.inf


@pytest.mark.parametrize("which", ["plain", "bias", "bias and scales"])
@pytest.mark.parametrize("name", SPECS)
def test_the_fused_router_is_another_rule(name: str, which: str) -> None:
    spec = SPECS[name]
    logits = 2 * randn(150, EXPERTS + spec.n_always)
    check(logits, spec, **tensors_of(which, logits))


@pytest.mark.parametrize("name", ["softmax", "sigmoid, groups", "sinks", "softcap"])
def test_given_experts_are_chosen_again(name: str) -> None:
    spec = replace(SPECS[name], top_k=3)
    logits = randn(40, EXPERTS + spec.n_always)
    given = torch.rand(40, EXPERTS).argsort(1)[:, :3]
    check(logits, spec, experts_TK=given)
    check(logits, spec, experts_TK=given.int())


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sigmoid, groups", "softmax, groups"])
def test_a_tie_goes_to_a_higher_index(name: str) -> None:
    spec = SPECS[name]
    logits = torch.randint(-2, 3, (200, EXPERTS)).float() / 2
    logits[::5] = torch.where(logits[::5] == 0, -0.0, logits[::5])
    got = fused.route(logits, spec).experts_TK
    assert torch.equal(got, rules.route(logits, spec).experts_TK)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 8, 2), (1, 1, 1), (7, 60, 4), (5, 5, 5), (3, 1024, 32)]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_size_is_routed_wrong(score: str, tokens: int, experts: int, top_k: int) -> None:
    spec = RouteSpec(top_k=top_k, score=score)
    logits = randn(tokens, experts)
    got, expected = run(fused.route, logits, spec), run(rules.route, logits, spec)
    assert torch.equal(got["experts"], expected["experts"])
    for name in ("weights", "dlogits"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_nan_and_infinite_logits_lead_out_of_range() -> None:
    logits = randn(60, EXPERTS)
    logits[::3, 4] = math.nan
    logits[1::3, 5] = INF
    logits[2::3] = -INF
    for spec in SPECS.values():
        if not spec.n_always:
            experts = fused.route(logits, spec).experts_TK
            assert experts.min() >= 0
            assert experts.max() < EXPERTS
            assert all(len(set(row)) == spec.top_k for row in experts.tolist())
    first = fused.route(logits, RouteSpec(top_k=2)).experts_TK[::3, 0]
    assert (first == 4).all(), "NaN comes first, as in PyTorch's sort"


def test_strided_logits_are_read_as_if_they_were_not() -> None:
    wide = randn(30, 2 * EXPERTS)
    for logits in (wide[:, :EXPERTS], wide[:, ::2], randn(EXPERTS, 30).t()):
        check(logits, SPECS["sigmoid, groups"])


def test_a_bias_gets_a_gradient() -> None:
    bias = randn(EXPERTS).requires_grad_()
    out = fused.route(randn(9, EXPERTS).requires_grad_(), SPECS["sigmoid"], bias_E=bias)
    out.weights_TK.sum().backward()
    assert bias.grad is None


def test_what_the_kernel_lacks_is_not_said() -> None:
    logits = randn(4, 8)
    assert fused.rejects(logits, RouteSpec(top_k=2)) is None
    assert "float64" in str(fused.rejects(logits.double(), RouteSpec(top_k=2)))
    assert "1024" in str(fused.rejects(randn(2, 1025), RouteSpec(top_k=2)))
    assert "32" in str(fused.rejects(randn(2, 64), RouteSpec(top_k=33)))


@pytest.mark.parametrize("which", ["plain", "bias"])
@pytest.mark.parametrize("name", NATIVE)
def test_a_rule_in_the_logits_dtype_ties_otherwise(name: str, which: str) -> None:
    """float16 scores tie often: every rounding of the rule decides who is chosen."""
    spec = native(name)
    logits = (2 * randn(300, EXPERTS)).half()
    tensors = tensors_of(which, logits)
    got, rule = fused.route(logits, spec, **tensors), rules.route(logits, spec, **tensors)
    differ = (got.experts_TK != rule.experts_TK).any(1)
    assert differ.float().mean() <= 0.01, "one bit of exp may move a score across a rounding"
    same = ~differ
    torch.testing.assert_close(got.weights_TK[same], rule.weights_TK[same], rtol=4e-3, atol=1e-6)


def test_half_precision_logits_are_scored_in_half() -> None:
    logits = (3 * randn(200, EXPERTS)).half()
    for name in ("softmax", "sigmoid, groups"):
        got, rule = fused.route(logits, SPECS[name]), rules.route(logits, SPECS[name])
        assert torch.equal(got.experts_TK, rule.experts_TK)
        assert got.weights_TK.dtype == torch.float32
        torch.testing.assert_close(got.weights_TK, rule.weights_TK, rtol=1e-6, atol=1e-7)


def test_the_public_route_runs_the_rule_here() -> None:
    with patch.object(fused, "route", side_effect=fused.route) as kernel:
        route(randn(5, 8), RouteSpec(top_k=2))
        route(randn(5, 8).double(), RouteSpec(top_k=2))
    assert kernel.call_count == 1
