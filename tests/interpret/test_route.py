"""The fused router in Triton's interpreter against the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from turnout import RouteSpec, route
from turnout.routing import fused, rules
from turnout.testing import assert_within, errors

INF = math.inf
SPECS: dict[str, RouteSpec] = {
    "softmax": RouteSpec(top_k=3),
    "softmax, not normalised": RouteSpec(top_k=3, norm=False),
    "softmax, groups": RouteSpec(top_k=3, n_group=4, topk_group=2, eps=1e-20, group_fill=0.0),
    "softmax, best of a group": RouteSpec(
        top_k=2, n_group=3, topk_group=2, group_score="max", norm=False, scale=16.0
    ),
    "sigmoid": RouteSpec(top_k=4, score="sigmoid"),
    "sigmoid, groups": RouteSpec(
        top_k=4, score="sigmoid", n_group=4, topk_group=2, eps=1e-20, scale=2.5
    ),
    "sigmoid, clamped": RouteSpec(top_k=2, score="sigmoid", eps=1.25, eps_mode="clamp"),
    "sigmoid, not normalised": RouteSpec(top_k=1, score="sigmoid", norm=False),
    "sqrtsoftplus": RouteSpec(top_k=3, score="sqrtsoftplus", scale=1.5),
    "softcap": RouteSpec(top_k=3, softcap=3.0, score="sigmoid", eps=0.25),
    "softcap, softmax": RouteSpec(top_k=3, softcap=3.0, norm=False),
    "sinks": RouteSpec(top_k=3, score="sigmoid", n_always=2),
    "sinks, softmax": RouteSpec(top_k=3, n_always=1, eps=1e-3),
    "sinks, not normalised": RouteSpec(top_k=2, n_always=1, norm=False),
    "all": RouteSpec(top_k=12, score="sigmoid"),
}
EXPERTS = 12


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def run(function: Any, logits: Tensor, spec: RouteSpec, **tensors: Tensor) -> dict[str, Tensor]:
    """Choice, weights, and the gradients of a random sum of the weights."""
    leaves = {"logits": logits.detach().clone().requires_grad_()}
    for name in ("expert_scale_E", "scale"):
        if name in tensors:
            leaves[name] = tensors[name].detach().clone().requires_grad_()
    rest = {n: t for n, t in tensors.items() if n not in leaves}
    options = {n: t for n, t in leaves.items() if n != "logits"}
    out = function(leaves["logits"], spec, **options, **rest)
    found = {"experts": out.experts_TK, "weights": out.weights_TK.detach()}
    loss = (out.weights_TK * randn(*out.weights_TK.shape, seed=7).to(out.weights_TK)).sum()
    if spec.n_always:
        found["always"] = out.always_TA.detach()
        loss = loss + (out.always_TA * randn(*out.always_TA.shape, seed=8).to(loss)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def tensors_of(spec: RouteSpec, which: str, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    if "bias" in which:
        found["bias_E"] = randn(EXPERTS, seed=1, dtype=dtype)
    if "scales" in which:
        found["expert_scale_E"] = randn(EXPERTS, seed=2, dtype=dtype)
        found["scale"] = randn(1, seed=3, dtype=dtype)
    return found


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def check(logits: Tensor, spec: RouteSpec, **tensors: Tensor) -> None:
    """Equal choice, and values by law 2; the worst maximum of four yardsticks counts."""
    got = run(fused.route, logits, spec, **tensors)
    assert torch.equal(got["experts"], rules.route(logits, spec, **tensors).experts_TK)
    yardsticks = []
    for seed in range(4):
        other = logits if not seed else 2 * randn(*logits.shape, seed=100 + seed)
        eager = run(rules.route, other, spec, **tensors)
        given = {**double(tensors), "experts_TK": eager["experts"]}
        yardsticks.append((eager, run(rules.route, other.double(), spec, **given)))
    eager, exact = yardsticks[0]
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        if name == "experts":
            continue
        if value.numel() == 1:  # one number has no typical error
            torch.testing.assert_close(value, exact[name].to(value), rtol=1e-5, atol=1e-6)
            continue
        found = [errors(one[name], true[name]) for one, true in yardsticks]
        allowed = max(worst for worst, _ in found), found[0][1]
        assert_within(name, value, exact[name], allowed)


@pytest.mark.parametrize("which", ["plain", "bias", "bias and scales"])
@pytest.mark.parametrize("name", SPECS)
def test_the_fused_router_is_another_rule(name: str, which: str) -> None:
    spec = SPECS[name]
    logits = 2 * randn(150, EXPERTS + spec.n_always)
    check(logits, spec, **tensors_of(spec, which, torch.float32))


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


NATIVE = ["softmax", "softmax, not normalised", "softmax, groups", "sigmoid", "sigmoid, groups"]


@pytest.mark.parametrize("which", ["plain", "bias"])
@pytest.mark.parametrize("name", NATIVE)
def test_a_rule_in_the_logits_dtype_ties_otherwise(name: str, which: str) -> None:
    """float16 scores tie often: every rounding of the rule decides who is chosen."""
    spec = replace(SPECS[name], score_dtype="logits", weights_dtype="logits")
    spec = replace(spec, eps=0.0 if spec.eps < 1e-6 else spec.eps)  # 1e-20 is 0 in float16
    logits = (2 * randn(300, EXPERTS)).half()
    tensors = tensors_of(spec, which, torch.float16)
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
