"""`spec_of` and `route` against the live routers of transformers: every rule, no silent default."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from live_blocks import (
    OWN_ROUTER,
    ROUTED,
    answer,
    block_of,
    blocks_of,
    dense,
    has_linear_router,
    ids_of,
    num_selectable,
    tokens,
)
from torch import Tensor, nn
from torch.nn.functional import softplus

import turnout
from turnout import RouteSpec, Routing, Unsupported, route, spec_of
from turnout.integrations.routers import router_logits, router_of
from turnout.integrations.versions import newer_than
from turnout.testing import assert_matches

ROUTER_TOP_K = ("router", "top_k")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = 64


def ours_of(key: str, block: Any, x: Tensor, rule: tuple[RouteSpec, dict] | None = None) -> Routing:
    """Routing of a block in turnout; ZAYA's logits, which depend on other layers, are its own."""
    spec, tensors = spec_of(block) if rule is None else rule
    given = {}
    if hasattr(router_of(block), "tid2eid"):
        given = {"experts_TK": block.gate.tid2eid[ids_of(len(x)).reshape(-1)]}
    logits = (
        block.gate(x[None])[0].reshape(len(x), -1) if key == "zaya" else router_logits(block, x)
    )
    return route(logits, spec, **tensors, **given)


def skip_class(key: str, routing: Routing) -> tuple[Tensor, Tensor]:
    """Weights and experts; ZAYA's skip class is expert 0 with weight 0."""
    if key != "zaya":
        return routing.weights_TK, routing.experts_TK
    skip = routing.experts_TK == num_selectable(key) - 1
    return routing.weights_TK.masked_fill(skip, 0), routing.experts_TK.masked_fill(skip, 0)


def theirs_of(key: str, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return answer(key, block, x[None] if key == "zaya" else x) if key != "zaya" else zaya(block, x)


def zaya(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    _, weights, experts = block.gate(x[None])[:3]
    return weights.reshape(len(x), -1), experts.reshape(len(x), -1)


def same_sets(one: Tensor, two: Tensor) -> Tensor:
    """(T,) True where two (T, K) choices hold the same experts."""
    return (one.sort(-1).values == two.sort(-1).values).all(-1)


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ROUTED)
def test_float32_weights_sets_and_gradients_are_those_of_the_live_router(key):
    blocks = blocks_of(key)
    assert blocks
    for name, block in blocks.items():
        x = tokens(T).requires_grad_()
        ours, theirs = skip_class(key, ours_of(key, block, x)), theirs_of(key, block, x)
        assert same_sets(ours[1], theirs[1]).all(), name
        assert len(ours[1].unique()) > 3, "too few experts to tell rules apart"
        count = num_selectable(key)
        left, right = dense(*ours, count), dense(*theirs, count)
        torch.testing.assert_close(left, right, rtol=2e-6, atol=1e-6)
        if key != "zaya":
            assert_same_gradients(name, block, x, left, right)


def assert_same_gradients(name: str, block: Any, x: Tensor, ours: Tensor, theirs: Tensor) -> None:
    parameters = dict(router_of(block).named_parameters())
    leaves = {"x": x, **{n: p for n, p in parameters.items() if p.requires_grad}}
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    left, right = (
        torch.autograd.grad((w * weights).sum(), leaves.values(), allow_unused=True)
        for w in (ours, theirs)
    )
    assert any(g is not None and g.abs().sum() > 0 for g in right), name
    for leaf, got, expected in zip(leaves, left, right, strict=True):
        assert (got is None) == (expected is None), f"{name}: {leaf}"
        if expected is not None:
            error = (got - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error < 1e-5, f"{name}: the gradient of {leaf} is off by {error:.1e}"


def test_always_on_weights_are_those_of_the_live_router():
    block = block_of("inkling_text")
    x = tokens(T)
    gammas = block.gate(x)[3]
    torch.testing.assert_close(ours_of("inkling_text", block, x).always_TA, gammas)
    assert gammas.shape == (T, 2)


# Cast to the dtype of x by the model, after a float32 router; turnout keeps float32.
KEPT_WIDE = ["ernie4_5_moe", "ernie4_5_vl_moe_text"]
if newer_than("transformers", "5.17"):
    KEPT_WIDE.append("inkling_text")


@pytest.mark.parametrize("key", ROUTED)
def test_bfloat16_weights_are_as_good_as_the_live_routers_and_of_its_dtype(key):
    for name, block in blocks_of(key, torch.bfloat16).items():
        x = tokens(T, torch.bfloat16)
        routing = ours_of(key, block, x)
        experts, (weights, chosen) = skip_class(key, routing)[1], theirs_of(key, block, x)
        kept = torch.float32 if key in KEPT_WIDE else weights.dtype
        assert routing.weights_TK.dtype == kept, name
        same = same_sets(experts, chosen)
        assert same.float().mean() > 0.9, name
        assert_swapped_experts_tie(name, block, routing, chosen, same)
        assert same.all() or routing.logits_TE.dtype == torch.bfloat16, name
        if key == "zaya":
            continue
        spec, tensors = spec_of(block)
        exact = {n: t.double() for n, t in tensors.items()}
        order, back = experts.argsort(-1), chosen.argsort(-1)
        truth = route(routing.logits_TE.double(), spec, **exact, experts_TK=experts).weights_TK
        assert_matches(
            name,
            routing.weights_TK.gather(1, order)[same].to(weights.dtype),
            truth.gather(1, order)[same],
            weights.gather(1, back)[same],
        )


def assert_swapped_experts_tie(
    name: str, block: Any, routing: Routing, chosen: Tensor, same: Tensor
) -> None:
    """Where the sets differ, every expert that only one side chose has the same score."""
    spec, tensors = spec_of(block)
    z = routing.logits_TE[:, : routing.logits_TE.shape[1] - spec.n_always]
    scores = {"softmax": z.softmax(-1), "sigmoid": z.sigmoid(), "sqrtsoftplus": softplus(z).sqrt()}
    corrected = scores[spec.score].float() + tensors.get("bias_E", torch.zeros(()))
    for t in (~same).nonzero().reshape(-1).tolist():
        swapped = corrected[t, sorted({*routing.experts_TK[t].tolist()} ^ {*chosen[t].tolist()})]
        assert swapped.max() - swapped.min() <= 2.0**-7, f"{name}: token {t}, {swapped}"


# --- facts that only one architecture has --------------------------------------------------------


def test_a_scale_after_the_experts_is_read_and_not_applied_to_the_weights():
    for key, factor in (("minimax_m3_vl_text", None), ("step3p5", 3.0), ("laguna", 2.5)):
        block = block_of(key)
        spec = spec_of(block)[0]
        assert spec.output_scale == block.routed_scaling_factor
        assert factor is None or spec.output_scale == factor
        assert spec.scale == 1.0
        weights = ours_of(key, block, tokens(T)).weights_TK
        torch.testing.assert_close(weights.sum(-1), torch.ones(T))


@pytest.mark.parametrize(
    "key", ["qwen2_moe", "olmoe", "deepseek_v3", "mistral4", "lfm2_moe", "axk2"]
)
def test_a_model_that_does_not_renormalise_is_read_as_such(key):
    block = block_of(key)
    block.gate.norm_topk_prob = not block.gate.norm_topk_prob
    assert spec_of(block)[0].norm is block.gate.norm_topk_prob
    x = tokens(T)
    theirs = dense(*theirs_of(key, block, x), 8)
    ours = ours_of(key, block, x)
    torch.testing.assert_close(dense(ours.weights_TK, ours.experts_TK, 8), theirs)


def test_cohere2_sigmoid_and_deepseek_v2_greedy_and_dbrx_without_norm_are_read():
    for key, changes in (
        ("cohere2_moe", {"gate.expert_selection_fn": "sigmoid", "gate.norm_topk_prob": True}),
        ("cohere2_moe", {"gate.expert_selection_fn": "sigmoid", "gate.norm_topk_prob": False}),
        ("deepseek_v2", {"gate.topk_method": "greedy"}),
        ("axk2", {"gate.num_group": None}),
        ("lfm2_moe", {"gate.use_expert_bias": False}),
        ("dbrx", {"moe_normalize_expert_weights": None}),
        ("laguna", {"gate.router_logit_softcapping": 0.0}),
    ):
        block = block_of(key)
        before = spec_of(block)
        for path, value in changes.items():
            owner = block.gate if path.startswith("gate.") else block
            setattr(owner, path.rpartition(".")[2], value)
        assert spec_of(block)[0] != before[0] or spec_of(block)[1].keys() != before[1].keys(), key
        x = tokens(T)
        ours = ours_of(key, block, x)
        theirs = dense(*theirs_of(key, block, x), 8)
        torch.testing.assert_close(
            dense(ours.weights_TK, ours.experts_TK, 8), theirs, rtol=2e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("key", "level"),
    [
        ("lfm2_moe", -13.0),
        ("deepseek_v3", -46.0),
        ("hy_v3", -46.0),
        ("axk2", -46.0),
        ("afmoe", -46.0),
        ("minimax_m2", -46.0),
        ("laguna", -10.0),
    ],
)
def test_the_epsilon_is_that_of_the_model_where_scores_are_as_small(key, level):
    block, x = block_of(key), tokens(T)
    x[:, 0] = 1.0
    with torch.no_grad():
        weight = block.router.gate.weight if key == "afmoe" else block.gate.weight
        weight[:, 0] = level
    ours, theirs = ours_of(key, block, x), theirs_of(key, block, x)
    assert same_sets(ours.experts_TK, theirs[1]).all()
    left, right = dense(ours.weights_TK, ours.experts_TK, 8), dense(*theirs, 8)
    torch.testing.assert_close(left, right, rtol=2e-5, atol=1e-6)
    if key not in ("minimax_m2", "laguna"):
        whole = spec_of(block)[0].scale
        assert right.sum(-1).min() < 0.95 * whole, "the epsilon never mattered"


def test_ernies_norm_min_is_a_lower_bound_of_the_sum():
    block, x = block_of("ernie4_5_moe"), tokens(T)
    block.gate.norm_min = 0.6
    ours, theirs = ours_of("ernie4_5_moe", block, x), theirs_of("ernie4_5_moe", block, x)
    left, right = dense(ours.weights_TK, ours.experts_TK, 8), dense(*theirs, 8)
    torch.testing.assert_close(left, right)
    bounded = right.sum(-1) < 0.99
    assert bounded.any()
    assert not bounded.all()


@pytest.mark.parametrize("key", ["axk2", "deepseek_v3"])
def test_a_masked_expert_is_admitted_exactly_where_the_model_admits_it(key):
    """Every corrected score is negative: a fill of 0.0 prefers masked experts, -inf never does.

    Four of eight experts are masked and four are chosen, so no tie is left open.
    """
    block, x = block_of(key), tokens(T)
    block.gate.top_k = 4
    block.gate.e_score_correction_bias.add_(-3.0)
    ours, theirs = ours_of(key, block, x), theirs_of(key, block, x)
    torch.testing.assert_close(
        dense(ours.weights_TK, ours.experts_TK, 8), dense(*theirs, 8), rtol=2e-6, atol=1e-6
    )
    assert spec_of(block)[0].group_fill == (0.0 if key == "axk2" else -math.inf)


def test_the_spec_is_read_now_and_not_remembered():
    block = block_of("deepseek_v3")
    assert spec_of(block)[0].scale == 2.5
    block.gate.routed_scaling_factor = 7.0
    assert spec_of(block)[0].scale == 7.0
    assert spec_of(block)[1]["bias_E"] is block.gate.e_score_correction_bias


# --- no silent default ---------------------------------------------------------------------------

REMOVED = [
    ("qwen3_moe", "gate", "top_k"),
    ("qwen3_moe", "gate", "norm_topk_prob"),
    ("mixtral", "gate", "top_k"),
    ("gpt_oss", "router", "top_k"),
    ("deepseek_v3", "gate", "num_group"),
    ("deepseek_v3", "gate", "topk_group"),
    ("deepseek_v3", "gate", "norm_topk_prob"),
    ("deepseek_v3", "gate", "routed_scaling_factor"),
    ("deepseek_v3", "gate", "e_score_correction_bias"),
    ("mistral4", "gate", "num_group"),
    ("deepseek_v2", "gate", "topk_method"),
    ("minimax_m2", "", "e_score_correction_bias"),
    ("hy_v3", "", "e_score_correction_bias"),
    ("hy_v3", "gate", "router_scaling_factor"),
    ("lfm2_moe", "", "expert_bias"),
    ("lfm2_moe", "gate", "use_expert_bias"),
    ("afmoe", "", "expert_bias"),
    ("afmoe", "router", "route_scale"),
    ("laguna", "", "routed_scaling_factor"),
    ("laguna", "gate", "router_logit_softcapping"),
    ("minimax_m3_vl_text", "", "routed_scaling_factor"),
    ("step3p5", "", "routed_scaling_factor"),
    ("gemma4_text", "router", "per_expert_scale"),
    ("gemma4_text", "router.config", "top_k_experts"),
    ("aria_text", *(("config", "moe_topk") if has_linear_router("aria_text") else ROUTER_TOP_K)),
    ("deepseek_v4", "experts.config", "scoring_func"),
    ("ernie4_5_moe", "gate", "moe_statics"),
    ("ernie4_5_moe", "gate.moe_statics", "e_score_correction_bias"),
    ("inkling_text", "gate", "global_scale"),
    ("inkling_text", "gate", "n_shared_experts"),
    ("longcat_flash", "router", "e_score_correction_bias"),
    ("cohere2_moe", "gate", "expert_selection_fn"),
    ("jamba", *(("", "top_k") if has_linear_router("jamba") else ROUTER_TOP_K)),
    ("dbrx", "", "moe_normalize_expert_weights"),
    ("zaya", "gate", "balancing_biases"),
]


@pytest.mark.parametrize(("key", "path", "name"), REMOVED, ids=lambda v: v or "block")
def test_a_missing_attribute_is_an_error_that_names_module_and_attribute(key, path, name):
    owner = block = block_of(key)
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part)
    assert hasattr(owner, name)
    spec_of(block)
    if isinstance(owner, nn.Module):
        delattr(owner, name)
    else:
        holder = block.get_submodule(path.rpartition(".")[0])
        holder.config = without_attribute(owner, name)
    with pytest.raises(ValueError) as error:
        spec_of(block)
    assert type(owner).__name__ in str(error.value)
    assert repr(name) in str(error.value)


def without_attribute(config: Any, name: str) -> Any:
    """A config of the same class name that lost one attribute; the class itself has aliases."""
    bare = type(type(config).__name__, (), {})()
    vars(bare).update({n: v for n, v in vars(config).items() if n != name})
    assert name in vars(config)
    return bare


@pytest.mark.parametrize("key", ROUTED)
def test_no_attribute_has_a_silent_default(key):
    """Take each attribute of router and block away: the rule stays, or the loss is named."""
    block = block_of(key)
    rule = spec_of(block)
    for owner in (router_of(block), block):
        for store in (vars(owner), owner._parameters, owner._buffers):
            for name in [n for n in store if not n.startswith("_") and n != "training"]:
                value = store.pop(name)
                outcome = outcome_of(block)
                store[name] = value
                named = type(owner).__name__ in str(outcome) and repr(name) in str(outcome)
                kept = isinstance(outcome, tuple) and outcome[0] == rule[0]
                kept = kept and outcome[1].keys() == rule[1].keys()
                assert named or kept, f"without {type(owner).__name__}.{name}: {outcome}"


def outcome_of(block: Any) -> Any:
    try:
        return spec_of(block)
    except ValueError as error:
        return error


# --- the model's own routers ---------------------------------------------------------------------


@pytest.mark.parametrize("key", OWN_ROUTER)
def test_a_router_without_a_rule_is_unsupported_by_name(key):
    for block in blocks_of(key).values():
        with pytest.raises(Unsupported, match="keeps the model's own router"):
            spec_of(block)


def test_doge_is_unsupported_by_name():
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeCDMoE

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 16}
    block = DogeCDMoE(DogeConfig(**sizes, num_experts_per_tok=4, is_moe=True))
    with pytest.raises(Unsupported, match="product keys"):
        spec_of(block)


@pytest.mark.parametrize("power", [2, 2.0, 0.5])
def test_dbrx_with_another_norm_is_unsupported(power):
    block = block_of("dbrx")
    block.moe_normalize_expert_weights = power
    with pytest.raises(Unsupported, match=f"{power}-norm"):
        spec_of(block)


def test_an_unknown_value_of_a_choice_is_unsupported():
    for key, name, value in (
        ("cohere2_moe", "expert_selection_fn", "tanh"),
        ("deepseek_v2", "topk_method", "noaux_tc"),
    ):
        block = block_of(key)
        setattr(block.gate, name, value)
        with pytest.raises(Unsupported, match=value):
            spec_of(block)


def test_an_unknown_block_is_unsupported_and_a_module_without_router_is_refused():
    class Home(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4)

    with pytest.raises(Unsupported, match="Home"):
        spec_of(Home())
    with pytest.raises(ValueError, match="Linear has neither 'gate' nor 'router'"):
        spec_of(nn.Linear(8, 4))


def test_a_block_without_a_rule_does_not_borrow_that_of_its_attributes_names():
    """A bias on a softmax router: the class decides, not the bias."""
    block = block_of("qwen3_moe")
    block.gate.e_score_correction_bias = nn.Buffer(torch.randn(8))
    spec, tensors = spec_of(block)
    assert spec.score == "softmax"
    assert not tensors


# --- mutation: what is dropped is seen, and only where it is used --------------------------------


def names(text: str) -> set[str]:
    return set(text.split())


V3 = set(ROUTED) & names(
    "deepseek_v3 deepseek_v32 axk1 dots1 glm4_moe glm4_moe_lite glm4v_moe_text glm_moe_dsa "
    "glm5_next_text hy_v4 kimi_linear nemotron_h solar_open exaone_moe axk2"
)
USES = {
    "bias": V3
    | names("mimo_v2_flash ernie4_5_moe ernie4_5_vl_moe_text longcat_flash afmoe minimax_m2")
    | names("minimax_m3_vl_text step3p5 hy_v3 laguna lfm2_moe deepseek_v4 inkling_text zaya"),
    "groups": V3 | {"deepseek_v2", "mistral4"},
    "norm": set(ROUTED)
    - names("flex_olmo jamba deepseek_v2 deepseek_ocr2_text longcat_flash llama4_text zaya"),
    "scale": (V3 - {"nemotron_h"})
    | names("deepseek_v2 mistral4 longcat_flash afmoe hy_v3 lfm2_moe deepseek_v4 inkling_text")
    | {"openai_privacy_filter"},
    "expert scale": {"gemma4_text", "diffusion_gemma_text"},
    "softcap": {"laguna"},
}


def without(what: str, spec: RouteSpec, tensors: dict[str, Tensor]) -> tuple[RouteSpec, dict]:
    tensor_of = {"bias": "bias_E", "expert scale": "expert_scale_E", "scale": "scale"}
    kept = {n: t for n, t in tensors.items() if n != tensor_of.get(what)}
    change = {
        "groups": {"n_group": 1, "topk_group": 1},
        "norm": {"norm": False},
        "scale": {"scale": 1.0},
        "softcap": {"softcap": 0.0},
    }
    return replace(spec, **change.get(what, {})), kept


@cache
def answers(key: str) -> list[tuple[Tensor, Tensor, Any]]:
    """Logits, dense weights of the live router, and the block, of each block."""
    found = []
    for block in blocks_of(key).values():
        x, count = tokens(T), num_selectable(key)
        logits = ours_of(key, block, x).logits_TE
        found.append((logits, dense(*theirs_of(key, block, x), count), block))
    return found


def is_parity(key: str, what: str) -> bool:
    """Values and sets of every block agree with the live router, one fact left out."""
    for logits, theirs, block in answers(key):
        spec, tensors = without(what, *spec_of(block))
        given = {}
        if hasattr(router_of(block), "tid2eid"):
            given = {"experts_TK": block.gate.tid2eid[ids_of(T).reshape(-1)]}
        ours = skip_class(key, route(logits, spec, **tensors, **given))
        if (dense(*ours, num_selectable(key)) - theirs).abs().max() > 1e-4:
            return False
    return True


@torch.no_grad()
@pytest.mark.parametrize("what", [*USES, "nothing"])
def test_dropping_a_fact_turns_exactly_the_architectures_red_that_use_it(what):
    red = {key for key in ROUTED if not is_parity(key, what)}
    assert red == USES.get(what, set())


def test_the_package_exports_the_reader():
    assert turnout.spec_of is spec_of
