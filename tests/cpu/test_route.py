"""`turnout.route`: who is chosen, what they weigh, what the gradient sees, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from naive_routing import naive_route
from torch import Tensor

import turnout
from turnout import RouteSpec, Routing, route
from turnout.reference import route as reference_route

INF = math.inf


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(routing: Routing, experts: int) -> Tensor:
    """(T, E) weights, zero where not chosen."""
    out = routing.weights_TK.new_zeros(len(routing.experts_TK), experts)
    return out.scatter_add(1, routing.experts_TK, routing.weights_TK)


def sets(experts_TK: Tensor) -> list[set[int]]:
    return [set(row) for row in experts_TK.tolist()]


def block_of(**facts) -> SimpleNamespace:
    """A block that carries its own routing facts, as model code before transformers 5 did."""
    return SimpleNamespace(**facts)


def spec_from(block: SimpleNamespace, score: str) -> RouteSpec:
    names = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
    carried = {name: getattr(block, name) for name in names if hasattr(block, name)}
    return getattr(RouteSpec, score)(block.top_k, **carried)


# --- softmax -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (60, 4), (128, 8), (5, 5), (1, 1)])
def test_softmax_weights_are_probabilities_of_the_top_k(experts, top_k, norm):
    logits = randn(33, experts)
    out = route(logits, spec_from(block_of(top_k=top_k, norm_topk_prob=norm), "softmax"))
    top = logits.softmax(-1).topk(top_k, dim=-1)
    expected = top.values / top.values.sum(-1, keepdim=True) if norm else top.values
    assert torch.equal(out.experts_TK, top.indices)
    torch.testing.assert_close(out.weights_TK, expected)
    if norm:
        torch.testing.assert_close(out.weights_TK.sum(-1), torch.ones(33))
    assert (out.weights_TK > 0).all()
    assert out.always_TA is None


def test_softmax_over_the_chosen_logits_is_the_normalised_rule():
    logits = randn(33, 16)
    out = route(logits, RouteSpec.softmax(4))
    torch.testing.assert_close(out.weights_TK, logits.topk(4, dim=-1).values.softmax(-1))


def test_softmax_groups_norm_and_scale_are_those_of_mistral4():
    block = block_of(
        top_k=2, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5
    )
    logits = randn(33, 16)
    out = route(logits, spec_from(block, "softmax"))
    p = logits.softmax(-1)
    group = p.view(33, 4, 4).topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros(33, 4).scatter(1, group.topk(2, dim=-1).indices, 1.0).bool()
    allowed = p.masked_fill(~kept.repeat_interleave(4, 1), 0.0)
    chosen = allowed.topk(2, dim=-1).indices
    w = p.gather(1, chosen)
    assert sets(out.experts_TK) == sets(chosen)
    torch.testing.assert_close(out.weights_TK, 2.5 * w / (w.sum(-1, keepdim=True) + 1e-20))
    assert sets(out.experts_TK) != sets(logits.topk(2).indices), "the groups never mattered"


# --- sigmoid -------------------------------------------------------------------------------------


def sigmoid_by_hand(logits: Tensor, block: SimpleNamespace) -> tuple[Tensor, Tensor]:
    s = logits.sigmoid()
    corrected = s + block.bias
    if block.n_group > 1:
        grouped = corrected.view(len(logits), block.n_group, -1)
        group = grouped.topk(2, dim=-1).values.sum(-1).topk(block.topk_group, dim=-1).indices
        kept = torch.zeros(len(logits), block.n_group).scatter(1, group, 1.0).bool()
        corrected = grouped.masked_fill(~kept[..., None], -INF).flatten(1)
    chosen = corrected.topk(block.top_k, dim=-1).indices
    w = s.gather(1, chosen)
    if block.norm_topk_prob:
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    return chosen, w * block.routed_scaling_factor


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3), (4, 4)])
@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (64, 6)])
def test_sigmoid_router_with_a_non_zero_bias_is_that_of_deepseek(
    experts, top_k, groups, norm, scale
):
    block = block_of(
        top_k=top_k,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=norm,
        routed_scaling_factor=scale,
        bias=randn(experts, seed=1) * 0.3,
    )
    logits = randn(33, experts)
    out = route(logits, spec_from(block, "sigmoid"), bias_E=block.bias)
    chosen, weights = sigmoid_by_hand(logits, block)
    assert torch.equal(out.experts_TK, chosen)
    torch.testing.assert_close(out.weights_TK, weights)
    assert sets(out.experts_TK) != sets(logits.topk(top_k).indices), "the bias never mattered"


def test_bias_chooses_and_never_weighs():
    logits = torch.tensor([[2.0, 1.0, -1.0, -2.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    out = route(logits, RouteSpec.sigmoid(2, norm_topk_prob=False), bias_E=bias)
    assert out.experts_TK.tolist() == [[3, 0]]
    torch.testing.assert_close(out.weights_TK, torch.tensor([[-2.0, 2.0]]).sigmoid())


def test_a_missing_bias_is_zero():
    logits = randn(33, 16)
    for spec in (RouteSpec.sigmoid(4), RouteSpec.sigmoid(4, n_group=4, topk_group=2)):
        with_zeros = route(logits, spec, bias_E=torch.zeros(16))
        without = route(logits, spec)
        assert torch.equal(without.experts_TK, with_zeros.experts_TK)
        assert torch.equal(without.weights_TK, with_zeros.weights_TK)


def test_a_missing_topk_group_masks_nothing():
    logits, bias = randn(33, 16), randn(16, seed=1)
    block = block_of(top_k=4, n_group=4)
    grouped = route(logits, spec_from(block, "sigmoid"), bias_E=bias)
    plain = route(logits, RouteSpec.sigmoid(4), bias_E=bias)
    assert torch.equal(grouped.experts_TK, plain.experts_TK)
    assert torch.equal(grouped.weights_TK, plain.weights_TK)


def test_doubling_the_scale_doubles_the_weights():
    logits = randn(33, 16)
    one = route(logits, RouteSpec.sigmoid(4))
    two = route(logits, RouteSpec.sigmoid(4, routed_scaling_factor=2.0))
    torch.testing.assert_close(two.weights_TK, 2 * one.weights_TK)
    torch.testing.assert_close(two.weights_TK.sum(-1), torch.full((33,), 2.0))


def test_the_score_decides_the_rule_and_not_the_presence_of_a_bias():
    logits, bias = randn(33, 8), randn(8, seed=1)
    soft = route(logits, RouteSpec(top_k=2, norm=False), bias_E=bias)
    p = logits.softmax(-1)
    torch.testing.assert_close(soft.weights_TK, p.gather(1, (p + bias).topk(2).indices))
    sigm = route(logits, RouteSpec(top_k=2, score="sigmoid", norm=False))
    torch.testing.assert_close(sigm.weights_TK, logits.topk(2).values.sigmoid())


# --- ties, group scores, masks -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_lowest_index_wins_a_tie(dtype, score, with_bias):
    experts = 61
    logits = torch.zeros(7, experts, dtype=dtype)
    logits[1, 40:] = 1.0
    logits[2, ::2] = -3.0
    logits[3, [60, 20, 10]] = 2.0
    logits[4, :] = -0.0
    spec = RouteSpec(top_k=4, score=score, score_dtype="logits")
    out = route(logits, spec, bias_E=torch.zeros(experts) if with_bias else None)
    first = [0, 1, 2, 3]
    expected = [first, [40, 41, 42, 43], [1, 3, 5, 7], [10, 20, 60, 0], first, first, first]
    assert out.experts_TK.tolist() == expected


def test_the_lowest_group_wins_a_tie():
    logits = torch.zeros(3, 12)
    logits[1, [3, 4, 9, 10]] = 1.0  # groups 1 and 3 of size 3 tie, both above the others
    logits[2, 11] = 1.0
    spec = RouteSpec.sigmoid(3, n_group=4, topk_group=1)
    assert route(logits, spec).experts_TK.tolist() == [[0, 1, 2], [3, 4, 5], [11, 9, 10]]


def test_score_dtype_decides_what_ties_in_bfloat16():
    """sigmoid(6.5) and sigmoid(6.75) are one bfloat16 number and two float32 numbers."""
    logits = torch.tensor([[-1.0, 6.5, 6.75]], dtype=torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16)
    native = RouteSpec(top_k=1, score="sigmoid", score_dtype="logits")
    wide = RouteSpec(top_k=1, score="sigmoid", score_dtype="float32")
    assert route(logits, native, bias_E=bias).experts_TK.item() == 1
    assert route(logits, wide, bias_E=bias).experts_TK.item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_scores_are_computed_in_the_dtype_of_the_logits(dtype):
    logits = randn(33, 8, dtype=dtype)
    spec = RouteSpec(
        top_k=2, score="sigmoid", score_dtype="logits", norm=False, weights_dtype="logits"
    )
    out = route(logits, spec)
    assert out.weights_TK.dtype == dtype
    assert torch.equal(out.weights_TK, logits.sigmoid().gather(1, out.experts_TK))
    wide = route(logits, RouteSpec(top_k=2, score="sigmoid", norm=False))
    assert torch.equal(wide.weights_TK, logits.float().sigmoid().gather(1, wide.experts_TK))
    assert not torch.equal(wide.weights_TK, out.weights_TK.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_dtype_is_float32_or_that_of_the_logits(dtype):
    logits = randn(5, 8, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert route(logits, RouteSpec(top_k=2)).weights_TK.dtype == wide
    assert route(logits, RouteSpec(top_k=2, score_dtype="logits")).weights_TK.dtype == wide
    both = RouteSpec(top_k=2, weights_dtype="logits", score="sigmoid", n_always=2)
    out = route(logits, both, scale=torch.ones(1), expert_scale_E=torch.ones(6))
    assert out.weights_TK.dtype == dtype
    assert out.always_TA.dtype == dtype


def test_the_two_group_scores_differ():
    logits = torch.tensor([[3.0, -9.0, -9.0, 2.0, 2.0, -9.0]])
    by_max = RouteSpec(top_k=1, score="sigmoid", n_group=2, group_score="max")
    by_sum = RouteSpec(top_k=1, score="sigmoid", n_group=2, group_score="top2sum")
    assert route(logits, by_max).experts_TK.item() == 0
    assert route(logits, by_sum).experts_TK.item() == 3


def test_zero_fill_admits_a_masked_expert_whose_rivals_have_negative_scores():
    logits = torch.tensor([[4.0, 3.0, -4.0, -4.0]])
    bias = torch.tensor([-0.9, -2.0, -3.0, -3.0])  # corrected: 0.08, -1.05, -2.98, -2.98
    spec = RouteSpec.sigmoid(2, n_group=2, topk_group=1, group_fill=0.0)
    assert route(logits, spec, bias_E=bias).experts_TK.tolist() == [[0, 2]]
    spec = RouteSpec.sigmoid(2, n_group=2, topk_group=1, group_fill=-INF)
    assert route(logits, spec, bias_E=bias).experts_TK.tolist() == [[0, 1]]


# --- epsilon, softcap, scales, always-on, given --------------------------------------------------


def test_epsilon_is_added_or_bounds_the_sum():
    logits = torch.tensor([[0.0, 0.0, -50.0, -50.0]])
    half = torch.tensor([[0.5, 0.5]])
    facts = {"top_k": 2, "score": "sigmoid", "eps": 0.25}
    added = route(logits, RouteSpec(**facts, eps_mode="add"))
    torch.testing.assert_close(added.weights_TK, half / 1.25)
    above = route(logits, RouteSpec(**facts, eps_mode="clamp"))
    torch.testing.assert_close(above.weights_TK, half)
    below = route(logits, RouteSpec(**{**facts, "eps": 4.0}, eps_mode="clamp"))
    torch.testing.assert_close(below.weights_TK, half / 4)


def test_no_nan_when_every_score_underflows():
    logits = torch.tensor([[-200.0, -201.0, -300.0]])
    out = route(logits, RouteSpec(top_k=2, score="sigmoid"))
    torch.testing.assert_close(out.weights_TK, torch.tensor([[0.0, -1.0]]).softmax(-1))
    with_eps = route(logits, RouteSpec.sigmoid(2))
    assert with_eps.weights_TK.tolist() == [[0.0, 0.0]]


def test_softcap_bends_the_weights():
    logits = randn(33, 8) * 5
    out = route(logits, RouteSpec(top_k=2, score="sigmoid", softcap=2.0, norm=False))
    capped = 2 * torch.tanh(logits / 2)
    torch.testing.assert_close(out.weights_TK, capped.sigmoid().gather(1, out.experts_TK))
    assert torch.equal(out.experts_TK, logits.topk(2).indices)
    assert out.logits_TE is logits


def test_expert_scale_multiplies_after_normalisation():
    logits, factor = randn(33, 8), randn(8, seed=1)
    out = route(logits, RouteSpec(top_k=2), expert_scale_E=factor)
    plain = route(logits, RouteSpec(top_k=2))
    assert torch.equal(out.experts_TK, plain.experts_TK)
    torch.testing.assert_close(out.weights_TK, plain.weights_TK * factor[plain.experts_TK])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_a_one_element_scale_never_changes_the_shape_of_the_weights(shape):
    logits = randn(33, 10)
    spec = RouteSpec(top_k=2, score="sigmoid", scale=8.0, n_always=2)
    out = route(logits, spec, scale=torch.full(shape, 0.5))
    plain = route(logits, spec)
    assert out.weights_TK.shape == (33, 2)
    assert out.always_TA.shape == (33, 2)
    torch.testing.assert_close(out.weights_TK, plain.weights_TK / 2)
    torch.testing.assert_close(out.always_TA, plain.always_TA / 2)


@pytest.mark.parametrize("shift", [0.0, -120.0])
def test_always_on_experts_share_the_normaliser_as_inkling_computes_it(shift):
    """Inkling's formula, also where every sigmoid underflows in float32."""
    logits, bias = randn(33, 10) + shift, randn(8, seed=1) * 0.1
    global_scale = torch.tensor([1.3])
    spec = RouteSpec(top_k=2, score="sigmoid", n_always=2, scale=8.0)
    out = route(logits, spec, bias_E=bias, scale=global_scale)
    chosen = (logits[:, :8].sigmoid() + bias).topk(2).indices
    logs = F.logsigmoid(torch.cat([logits[:, :8].gather(1, chosen), logits[:, 8:]], 1).double())
    expected = torch.exp(logs - logs.logsumexp(-1, keepdim=True)) * 8 * 1.3
    assert torch.equal(out.experts_TK, chosen)
    got = torch.cat([out.weights_TK, out.always_TA], 1)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-6)
    assert out.experts_TK.max() < 8


def test_always_on_experts_weigh_their_score_without_normalisation():
    logits = randn(33, 5)
    out = route(logits, RouteSpec(top_k=2, score="sigmoid", n_always=1, norm=False, scale=3.0))
    torch.testing.assert_close(out.always_TA, 3 * logits[:, 4:].sigmoid())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_given_experts_are_kept_and_weighed_as_usual(dtype):
    logits = randn(33, 8)
    given = torch.stack([torch.randperm(8)[:2] for _ in range(33)]).to(dtype)
    spec = RouteSpec(top_k=2, score="sqrtsoftplus", eps=1e-20, scale=1.5)
    out = route(logits, spec, experts_TK=given, bias_E=randn(8, seed=1))
    s = F.softplus(logits).sqrt().gather(1, given.long())
    assert torch.equal(out.experts_TK, given.long())
    torch.testing.assert_close(out.weights_TK, 1.5 * s / s.sum(-1, keepdim=True))


def test_flat_is_float32_weights_and_int32_indices_in_token_order():
    logits = randn(33, 8, dtype=torch.bfloat16)
    out = route(logits, RouteSpec(top_k=3, weights_dtype="logits"))
    weights, token, expert, kept = out.flat()
    assert (weights.dtype, token.dtype, expert.dtype) == (torch.float32, torch.int32, torch.int32)
    assert weights.shape == token.shape == expert.shape == (99,)
    assert token.tolist() == [t for t in range(33) for _ in range(3)]
    for s in range(99):
        t, k = divmod(s, 3)
        assert expert[s] == out.experts_TK[t, k]
        assert weights[s] == out.weights_TK[t, k].float()
    assert kept is logits


def test_flat_of_no_token_is_empty():
    weights, token, expert, _ = route(torch.zeros(0, 8), RouteSpec(top_k=2)).flat()
    assert weights.shape == token.shape == expert.shape == (0,)
    assert token.dtype == torch.int32


# --- shapes and dtypes ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 257])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_number_of_tokens(tokens, groups):
    logits = randn(tokens, 9).requires_grad_()
    spec = RouteSpec.sigmoid(2, n_group=groups, topk_group=1)
    out = route(logits, spec, bias_E=randn(9, seed=1))
    assert out.experts_TK.shape == out.weights_TK.shape == (tokens, 2)
    assert out.experts_TK.dtype == torch.int64
    out.weights_TK.sum().backward()
    assert logits.grad.shape == (tokens, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_half_precision_logits_keep_the_values_of_float64(dtype, score):
    logits = randn(33, 12, dtype=dtype)
    out = route(logits, RouteSpec(top_k=3, score=score, eps=1e-6))
    truth = naive_route(logits.double(), RouteSpec(top_k=3, score=score, eps=1e-6))
    assert out.experts_TK.tolist() == truth.experts
    torch.testing.assert_close(out.weights_TK.double(), torch.tensor(truth.weights).double())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("groups", [1, 4])
def test_non_finite_logits_neither_hang_nor_leave_the_range(bad, groups):
    logits = randn(9, 16)
    logits[0] = bad
    logits[1, 3] = bad
    for spec in (RouteSpec.softmax(4, n_group=groups), RouteSpec.sigmoid(4, n_group=groups)):
        out = route(logits, spec)
        assert out.experts_TK.min() >= 0
        assert out.experts_TK.max() < 16
        assert all(len(row) == 4 for row in sets(out.experts_TK))
        clean = route(logits[2:], spec)
        assert torch.equal(out.weights_TK[2:], clean.weights_TK), "one row spoiled another"


def test_strided_logits_route_like_contiguous_ones():
    wide = randn(16, 33).T
    spec = RouteSpec.sigmoid(4, n_group=4, topk_group=2)
    bias = randn(32, seed=1)[::2]
    out, same = route(wide, spec, bias_E=bias), route(wide.clone(), spec, bias_E=bias.clone())
    assert torch.equal(out.experts_TK, same.experts_TK)
    assert torch.equal(out.weights_TK, same.weights_TK)


def test_the_inputs_are_not_written_to():
    tensors = {
        "bias_E": randn(8, seed=1),
        "expert_scale_E": randn(8, seed=2),
        "scale": torch.tensor([2.0]),
    }
    logits = randn(33, 9)
    before = [t.clone() for t in (logits, *tensors.values())]
    spec = RouteSpec.sigmoid(2, n_group=2, topk_group=1)
    route(logits, replace(spec, n_always=1), **tensors)
    for now, then in zip((logits, *tensors.values()), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_is_the_same_function(dtype):
    bias, factor = randn(16, seed=1) * 0.1, randn(16, seed=2)
    for spec, tensors, extra in (
        (RouteSpec.softmax(4), {}, 0),
        (RouteSpec.sigmoid(4, n_group=4, topk_group=2), {"bias_E": bias}, 0),
        (RouteSpec(top_k=4, score_dtype="logits", weights_dtype="logits"), {}, 0),
        (RouteSpec(top_k=4, score="sigmoid", n_always=2), {"expert_scale_E": factor}, 2),
        (RouteSpec(top_k=1, score="sqrtsoftplus"), {"scale": torch.tensor(2.0)}, 0),
    ):
        logits = randn(33, 16 + extra, dtype=dtype)
        ours, theirs = route(logits, spec, **tensors), reference_route(logits, spec, **tensors)
        for name in ("experts_TK", "weights_TK", "always_TA"):
            left, right = getattr(ours, name), getattr(theirs, name)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)
    assert turnout.reference.route is reference_route


def test_nan_logits_pass_in_anomaly_detection() -> None:
    logits = randn(5, 8)
    logits[3, 2] = math.nan
    assert route(logits, RouteSpec(top_k=2)).experts_TK.max() < 8
    with torch.autograd.set_detect_anomaly(True):
        route(randn(5, 8), RouteSpec(top_k=2))
        with pytest.raises(ValueError, match="NaN in 1 of 5 rows, first in row 3"):
            route(logits, RouteSpec(top_k=2))
