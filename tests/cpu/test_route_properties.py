"""`turnout.route` under random rules, its gradients, and the input it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_routing import naive_route
from torch import Tensor

from turnout import RouteSpec, Unsupported, route
from turnout.reference import route as reference_route

INF = math.inf


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, RouteSpec, dict[str, Tensor]]:
    """float64 logits, a rule that they can meet, and its tensors."""
    groups = draw(st.sampled_from([2, 1, 3, 4]))
    size = draw(st.integers(2, 6))
    experts = groups * size
    topk_group = draw(st.integers(1, groups))
    always = draw(st.sampled_from([0, 0, 1, 2]))
    tokens = draw(st.sampled_from([5, 9, 1, 0]))
    seed = draw(st.integers(0, 2**16))
    spec = RouteSpec(
        top_k=draw(st.integers(1, size * topk_group)),
        score=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        n_group=groups,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(["top2sum", "max"])),
        group_fill=draw(st.sampled_from([-INF, 0.0])),
        norm=draw(st.booleans()),
        eps=draw(st.sampled_from([0.0, 1e-20, 0.25])),
        eps_mode=draw(st.sampled_from(["add", "clamp"])),
        scale=draw(st.sampled_from([1.0, 2.5, -0.5])),
        n_always=always,
    )
    tensors = {}
    if draw(st.sampled_from([True, True, False])):  # negative ones let a fill of 0.0 admit
        shift = draw(st.sampled_from([-1.5, 0.0]))
        tensors["bias_E"] = randn(experts, seed=seed + 1) + shift
    if draw(st.booleans()):
        tensors["expert_scale_E"] = randn(experts, seed=seed + 2)
    if draw(st.booleans()):
        tensors["scale"] = randn(1, seed=seed + 3)
    return 2 * randn(tokens, experts + always, seed=seed), spec, tensors


@given(problems())
def test_agrees_with_a_loop_over_tokens(problem):
    logits, spec, tensors = problem
    out, truth = route(logits, spec, **tensors), naive_route(logits, spec, **tensors)
    assert out.experts_TK.tolist() == truth.experts
    shape = (len(logits), spec.top_k)
    exact = torch.tensor(truth.weights, dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(out.weights_TK, exact, rtol=1e-11, atol=1e-13)
    if spec.n_always:
        exact = torch.tensor(truth.always, dtype=torch.float64).reshape(-1, spec.n_always)
        torch.testing.assert_close(out.always_TA, exact, rtol=1e-11, atol=1e-13)
    else:
        assert out.always_TA is None


@given(problems(), st.integers(0, 999))
def test_given_experts_agree_with_a_loop_over_tokens(problem, seed):
    logits, spec, tensors = problem
    experts = logits.shape[1] - spec.n_always
    order = torch.rand(len(logits), experts, generator=torch.Generator().manual_seed(seed))
    tensors["experts_TK"] = order.argsort(-1)[:, : spec.top_k].to(torch.int32)
    out, truth = route(logits, spec, **tensors), naive_route(logits, spec, **tensors)
    assert out.experts_TK.tolist() == tensors["experts_TK"].tolist()
    exact = torch.tensor(truth.weights, dtype=torch.float64).reshape(len(logits), spec.top_k)
    torch.testing.assert_close(out.weights_TK, exact, rtol=1e-11, atol=1e-13)


@given(problems())
def test_experts_are_in_range_and_distinct_and_in_float32_too(problem):
    logits, spec, tensors = problem
    experts = logits.shape[1] - spec.n_always
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cast = {name: t.to(dtype) for name, t in tensors.items()}
        rows = route(logits.to(dtype), spec, **cast).experts_TK.tolist()
        for row in rows:
            assert len(set(row)) == spec.top_k
            assert all(0 <= e < experts for e in row)


@given(problems())
def test_normalised_weights_sum_to_the_scale(problem):
    logits, spec, tensors = problem
    tensors.pop("expert_scale_E", None)
    spec = replace(spec, norm=True, eps=1e-20)
    out = route(logits, spec, **tensors)
    total = out.weights_TK.sum(-1)
    if out.always_TA is not None:
        total = total + out.always_TA.sum(-1)
    expected = spec.scale * float(tensors.get("scale", torch.ones(1)))
    torch.testing.assert_close(total, torch.full_like(total, expected))


@given(problems(), st.randoms(use_true_random=False))
def test_renaming_the_experts_renames_the_choice(problem, random):
    """Groups are permuted as a whole and inside; float64 scores do not tie."""
    logits, spec, tensors = problem
    spec = replace(spec, group_fill=-INF)  # with 0.0 all masked experts tie
    experts = logits.shape[1] - spec.n_always
    size = experts // spec.n_group
    groups = random.sample(range(spec.n_group), spec.n_group)
    order = [g * size + i for g in groups for i in random.sample(range(size), size)]
    renamed = logits[:, order + list(range(experts, logits.shape[1]))]
    moved = {n: t if n == "scale" else t[order] for n, t in tensors.items()}
    one, two = route(logits, spec, **tensors), route(renamed, spec, **moved)
    assert torch.equal(one.experts_TK, torch.tensor(order)[two.experts_TK])
    torch.testing.assert_close(one.weights_TK, two.weights_TK, rtol=1e-11, atol=1e-13)


@given(problems(), st.randoms(use_true_random=False))
def test_a_token_does_not_see_its_neighbours(problem, random):
    logits, spec, tensors = problem
    order = random.sample(range(len(logits)), len(logits))
    whole, shuffled = route(logits, spec, **tensors), route(logits[order], spec, **tensors)
    assert torch.equal(whole.experts_TK[order], shuffled.experts_TK)
    torch.testing.assert_close(whole.weights_TK[order], shuffled.weights_TK, rtol=0, atol=1e-15)


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=5),
    st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 7),
)
def test_among_equal_logits_the_lowest_index_wins(rows, score, dtype, top_k):
    logits = torch.tensor(rows, dtype=dtype)
    spec = RouteSpec(top_k=top_k, score=score, score_dtype="logits")
    expected = [sorted(range(7), key=lambda e: (-row[e], e))[:top_k] for row in rows]
    assert route(logits, spec).experts_TK.tolist() == expected


@given(problems())
def test_the_reference_agrees_bit_for_bit(problem):
    logits, spec, tensors = problem
    one, two = route(logits, spec, **tensors), reference_route(logits, spec, **tensors)
    assert torch.equal(one.experts_TK, two.experts_TK)
    assert torch.equal(one.weights_TK, two.weights_TK)


# --- gradients -----------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "softmax": RouteSpec.softmax(2),
    "softmax-no-norm": RouteSpec.softmax(2, norm_topk_prob=False),
    "softmax-groups": RouteSpec.softmax(2, n_group=2, topk_group=1, routed_scaling_factor=2.5),
    "softmax-clamp": RouteSpec(top_k=2, eps=1e-12, eps_mode="clamp"),
    "sigmoid": RouteSpec.sigmoid(3, routed_scaling_factor=2.5),
    "sigmoid-no-norm": RouteSpec.sigmoid(3, norm_topk_prob=False),
    "sigmoid-groups": RouteSpec.sigmoid(2, n_group=2, topk_group=1),
    "sigmoid-eps-0": RouteSpec(top_k=3, score="sigmoid"),
    "sigmoid-softcap": RouteSpec(top_k=3, score="sigmoid", softcap=2.0),
    "sqrtsoftplus": RouteSpec(top_k=2, score="sqrtsoftplus", eps=1e-20, scale=1.5),
    "always-on": RouteSpec(top_k=2, score="sigmoid", n_always=2, scale=8.0),
    "all-chosen": RouteSpec(top_k=6, score="sigmoid", eps=0.1),
    "one-chosen": RouteSpec(top_k=1, score="softmax", norm=False),
}


def spaced_logits(tokens: int, experts: int) -> Tensor:
    """Every two logits of a row differ by at least 4 / E, so no step of gradcheck swaps two."""
    generator = torch.Generator().manual_seed(5)
    ladder = torch.linspace(-2, 2, experts, dtype=torch.float64)
    return torch.stack(
        [ladder[torch.randperm(experts, generator=generator)] for _ in range(tokens)]
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_logits_and_scales_are_those_of_finite_differences(name):
    spec = DIFFERENTIABLE[name]
    logits = spaced_logits(4, 6 + spec.n_always).requires_grad_()
    factor = (1 + 0.3 * randn(6, seed=1)).requires_grad_()
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    bias = randn(6, seed=2) * 0.01

    def weights(z: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        out = route(z, spec, bias_E=bias, expert_scale_E=f, scale=g)
        return (out.weights_TK, *([] if out.always_TA is None else [out.always_TA]))

    assert torch.autograd.gradcheck(weights, (logits, factor, scale))


def test_given_experts_have_a_gradient():
    given_TK = torch.tensor([[0, 5], [3, 1]], dtype=torch.int32)
    spec = RouteSpec(top_k=2, score="sqrtsoftplus", eps=1e-20)
    logits = spaced_logits(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: route(z, spec, experts_TK=given_TK).weights_TK, (logits,)
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_bias_never_gets_a_gradient_and_the_scales_do(name):
    spec = DIFFERENTIABLE[name]
    logits = spaced_logits(4, 6 + spec.n_always).requires_grad_()
    bias = randn(6, seed=2).requires_grad_()
    factor = randn(6, seed=1).requires_grad_()
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    out = route(logits, spec, bias_E=bias, expert_scale_E=factor, scale=scale)
    assert not out.experts_TK.requires_grad
    out.weights_TK.square().sum().backward()
    assert bias.grad is None
    assert logits.grad.abs().sum() > 0 or spec.top_k == 6
    assert scale.grad.abs() > 0
    hit = torch.zeros(6, dtype=torch.bool)
    hit[out.experts_TK.reshape(-1)] = True
    assert torch.equal(factor.grad != 0, hit)


def test_only_a_bias_with_a_gradient_gives_no_graph():
    bias = torch.zeros(8, requires_grad=True)
    out = route(torch.randn(3, 8), RouteSpec.sigmoid(2), bias_E=bias)
    assert not out.weights_TK.requires_grad


# --- bad input -----------------------------------------------------------------------------------

GOOD = {"logits_TE": torch.zeros(4, 8), "spec": RouteSpec(top_k=2)}
INDICES = torch.zeros(4, 2, dtype=torch.int64)


def bad(name: str, value: object, *words: str, **others: object) -> object:
    return pytest.param({**GOOD, **others, name: value}, (name.split("_TE")[0], *words))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        bad("logits_TE", torch.zeros(2, 4, 8), "(2, 4, 8)", "(T, E)", "expected"),
        bad("logits_TE", torch.zeros(8), "(8,)", "(T, E)"),
        bad("logits_TE", torch.zeros(4, 8, dtype=torch.int64), "torch.int64", "float"),
        bad("logits_TE", torch.zeros(4, 8, dtype=torch.complex64), "torch.complex64", "float"),
        bad("logits_TE", torch.zeros(4, 1), "top_k=2", "1"),
        bad("logits_TE", torch.zeros(4, 0), "top_k=2", "0"),
        bad("bias_E", torch.zeros(7), "(7,)", "(8,)"),
        bad("bias_E", torch.zeros(1, 8), "(1, 8)", "(8,)"),
        bad("bias_E", torch.zeros(8, dtype=torch.int64), "torch.int64"),
        bad("bias_E", torch.zeros(8, dtype=torch.complex64), "torch.complex64"),
        bad("bias_E", torch.zeros(8, device="meta"), "meta", "cpu"),
        bad("expert_scale_E", torch.ones(9), "(9,)", "(8,)"),
        bad("expert_scale_E", torch.ones(8, dtype=torch.int64), "torch.int64"),
        bad("expert_scale_E", torch.ones(8, device="meta"), "meta", "cpu"),
        bad("scale", torch.ones(2), "(2,)", "one element"),
        bad("scale", torch.ones(1, dtype=torch.int64), "torch.int64"),
        bad("scale", torch.ones(1, device="meta"), "meta", "cpu"),
        bad("experts_TK", INDICES.float(), "torch.float32", "int32 or int64"),
        bad("experts_TK", INDICES.to(torch.int16), "torch.int16", "int32 or int64"),
        bad("experts_TK", INDICES.bool(), "torch.bool", "int32 or int64"),
        bad("experts_TK", INDICES[:3], "(3, 2)", "(4, 2)"),
        bad("experts_TK", INDICES[:, :1], "(4, 1)", "(4, 2)"),
        bad("experts_TK", INDICES + 8, "8..8", "0..7"),
        bad("experts_TK", INDICES - 1, "-1..-1", "0..7"),
        bad("experts_TK", INDICES.to("meta"), "meta", "cpu"),
    ],
)
def test_a_bad_tensor_is_refused_by_name_with_what_came_and_what_was_expected(arguments, words):
    with pytest.raises(ValueError) as error:
        route(**arguments)
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (RouteSpec(top_k=9), ("top_k=9", "8")),
        (RouteSpec(top_k=8, n_always=1), ("top_k=8", "7")),
        (RouteSpec(top_k=1, n_always=8), ("top_k=1", "0")),
        (RouteSpec(top_k=1, n_always=9), ("top_k=1",)),
        (RouteSpec(top_k=2, n_group=3), ("8", "n_group=3")),
        (RouteSpec(top_k=2, n_group=16), ("8", "n_group=16")),
        (RouteSpec(top_k=3, n_group=4), ("top_k=3", "1 of 4 groups of 2")),
        (RouteSpec(top_k=1, n_group=8), ("top2sum", "2", "group_score='max'")),
    ],
)
def test_a_rule_that_eight_experts_can_not_meet_is_refused(spec, words):
    with pytest.raises(ValueError) as error:
        route(torch.zeros(4, 8), spec)
    for word in words:
        assert word in str(error.value), error.value


def test_what_is_legal_is_not_refused():
    for spec in (
        RouteSpec(top_k=8),
        RouteSpec(top_k=2, n_group=4),
        RouteSpec(top_k=1, n_group=8, group_score="max"),
        RouteSpec(top_k=8, n_group=8, topk_group=8, group_score="max"),
        RouteSpec(top_k=1, n_always=7),
    ):
        assert route(torch.zeros(4, 8), spec).weights_TK.shape == (4, spec.top_k)
    assert not issubclass(Unsupported, ValueError)
    assert (
        route(torch.zeros(4, 8), RouteSpec(top_k=2), experts_TK=INDICES + 7).experts_TK.max() == 7
    )
