"""The router rule of each transformers architecture, read off the live modules.

`spec_of(block)` reads block, router and config. Nothing has a default: an attribute that is not
there is an error that names module and attribute. The rule is chosen by the router's class, never
by the presence of a bias. `router_logits` computes the logits that the rule is applied to, with the
adapters that PEFT put on the router.

phimoe (sparse mixer), switch and nllb (capacity), doge (product keys) and dbrx with a p-norm other
than 1 keep the model's own router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.integrations.architectures import class_key, keys_of, live
from turnout.integrations.versions import newer_than
from turnout.specs import RouteSpec, Score, Unsupported

# transformers after 5.17 (seen in 5.23) computes Inkling's routing in float32.
_NEWER = newer_than("transformers", "5.17")

Tensors = dict[str, Tensor]
Read = Callable[[Any, Any, Any], tuple[RouteSpec, Tensors]]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one router class makes logits and what it does with them.

    Attributes:
        read: (router, block, config) to spec and tensors.
        logits: `native` or `float32` linear on `router.weight` (plus `router.bias` if it has it),
            or the name of the linear submodule, or `self` when the router is the linear.
    """

    read: Read
    logits: str = "native"


def need(module: Any, name: str) -> Any:
    """`module.name`, or a `ValueError` that names both."""
    missing = object()
    value = getattr(module, name, missing)
    if value is missing:
        raise ValueError(
            f"{type(module).__name__} has no attribute {name!r}; expected it for the router rule "
            "of this architecture. Is this transformers release newer than turnout?"
        )
    return value


def _softmax(router: Any, norm: bool, weights: Literal["float32", "logits"]) -> RouteSpec:
    return RouteSpec(top_k=need(router, "top_k"), norm=norm, weights_dtype=weights)


def _mixtral(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    return _softmax(router, True, "float32"), {}


def _qwen(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    return _softmax(router, bool(need(router, "norm_topk_prob")), "logits"), {}


def _always_normalised(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    return _softmax(router, True, "logits"), {}


def _jamba(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    return RouteSpec(top_k=need(block, "top_k"), norm=False, weights_dtype="logits"), {}


def _jamba_router(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    return _softmax(router, False, "logits"), {}


def _native_softmax(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(top_k=need(router, "top_k"), score_dtype="logits", weights_dtype="logits")
    return spec, {}


def _aria(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(top_k=need(config, "moe_topk"), score_dtype="logits", weights_dtype="logits")
    return spec, {}


def _dbrx(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    power = need(block, "moe_normalize_expert_weights")
    if power not in (None, 1, 1.0):
        raise Unsupported(
            f"dbrx normalises with the {power}-norm; turnout has p = 1 or none. The model's own "
            "router runs"
        )
    spec = RouteSpec(
        top_k=need(block, "top_k"),
        norm=power is not None,
        score_dtype="logits",
        weights_dtype="logits",
    )
    return spec, {}


def _gemma4(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(top_k=need(need(router, "config"), "top_k_experts"))
    return spec, {"expert_scale_E": need(router, "per_expert_scale")}


def _ernie(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"), eps=float(need(router, "norm_min")), eps_mode="clamp"
    )
    bias = need(need(router, "moe_statics"), "e_score_correction_bias")
    return spec, {"bias_E": bias.reshape(-1)}


def _privacy_filter(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    top_k = need(router, "top_k")
    factor = float(need(block, "num_experts"))
    return RouteSpec(top_k=top_k, scale=1.0 / top_k, output_scale=factor), {}


def _cohere2(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    name = need(router, "expert_selection_fn")
    if name not in ("softmax", "sigmoid"):
        raise Unsupported(f"cohere2_moe with expert_selection_fn={name!r} has no rule here")
    norm = True if name == "softmax" else bool(need(router, "norm_topk_prob"))
    spec = RouteSpec(top_k=need(router, "top_k"), score=name, norm=norm, weights_dtype="logits")
    return spec, {}


def _groups(router: Any) -> dict[str, int]:
    return {"n_group": need(router, "num_group"), "topk_group": need(router, "topk_group")}


def _deepseek_v2(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    method = need(router, "topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise Unsupported(f"deepseek_v2 with topk_method={method!r} has no rule here")
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        norm=False,
        scale=float(need(router, "routed_scaling_factor")),
        group_score="max",
        group_fill=0.0,
        **(_groups(router) if method == "group_limited_greedy" else {}),  # type: ignore[arg-type]
    )
    return spec, {}


def _mistral4(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score_dtype="logits",
        weights_dtype="logits",
        norm=bool(need(router, "norm_topk_prob")),
        eps=1e-20,
        scale=float(need(router, "routed_scaling_factor")),
        group_fill=0.0,
        **_groups(router),  # type: ignore[arg-type]
    )
    return spec, {}


def _deepseek_v3(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        norm=bool(need(router, "norm_topk_prob")),
        eps=1e-20,
        scale=float(need(router, "routed_scaling_factor")),
        **_groups(router),  # type: ignore[arg-type]
    )
    return spec, {"bias_E": need(router, "e_score_correction_bias")}


def _axk2(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        norm=bool(need(router, "norm_topk_prob")),
        eps=1e-20,
        scale=float(need(router, "routed_scaling_factor")),
        group_fill=0.0,
        **({} if need(router, "num_group") is None else _groups(router)),  # type: ignore[arg-type]
    )
    return spec, {"bias_E": need(router, "e_score_correction_bias")}


def _longcat(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        norm=False,
        scale=float(need(router, "routed_scaling_factor")),
    )
    return spec, {"bias_E": need(router, "e_score_correction_bias")}


def _minimax_m2(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(top_k=need(router, "top_k"), score="sigmoid")
    return spec, {"bias_E": need(block, "e_score_correction_bias")}


def _scaled_by_block(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        output_scale=float(need(block, "routed_scaling_factor")),
    )
    return spec, {"bias_E": need(router, "e_score_correction_bias")}


def _laguna(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        softcap=float(need(router, "router_logit_softcapping")),
        weights_dtype="logits",
        output_scale=float(need(block, "routed_scaling_factor")),
    )
    return spec, {"bias_E": need(router, "e_score_correction_bias")}


def _hy_v3(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        eps=1e-20,
        scale=float(need(router, "router_scaling_factor")),
    )
    return spec, {"bias_E": need(block, "e_score_correction_bias")}


def _afmoe(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        eps=1e-20,
        scale=float(need(router, "route_scale")),
    )
    return spec, {"bias_E": need(block, "expert_bias")}


def _lfm2(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        score_dtype="logits",
        weights_dtype="logits",
        norm=bool(need(router, "norm_topk_prob")),
        eps=1e-6,
        scale=float(need(router, "routed_scaling_factor")),
    )
    tensors = {"bias_E": need(block, "expert_bias")} if need(router, "use_expert_bias") else {}
    return spec, tensors


_DEEPSEEK_V4_SCORES: dict[str, Score] = {"sqrtsoftplus": "sqrtsoftplus", "sigmoid": "sigmoid"}


def _deepseek_v4(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    name = need(config, "scoring_func")
    if name not in _DEEPSEEK_V4_SCORES:
        raise Unsupported(f"deepseek_v4 with scoring_func={name!r} has no rule here")
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score=_DEEPSEEK_V4_SCORES[name],
        score_dtype="logits",
        weights_dtype="logits",
        eps=1e-20,
        scale=float(need(router, "routed_scaling_factor")),
    )
    if class_key(type(router)) == "deepseek_v4.DeepseekV4HashRouter":
        return spec, {}
    return spec, {"bias_E": need(router, "e_score_correction_bias")}


def _inkling(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"),
        score="sigmoid",
        score_dtype="float32" if _NEWER else "logits",
        weights_dtype="logits",
        n_always=need(router, "n_shared_experts"),
        scale=float(need(router, "route_scale")),
    )
    tensors = {
        "bias_E": need(router, "e_score_correction_bias"),
        "scale": need(router, "global_scale"),
    }
    return spec, tensors


def _llama4(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"), score="sigmoid", norm=False, weights_dtype="logits"
    )
    return spec, {}


def _zaya(router: Any, block: Any, config: Any) -> tuple[RouteSpec, Tensors]:
    spec = RouteSpec(
        top_k=need(router, "top_k"), norm=False, score_dtype="logits", weights_dtype="logits"
    )
    return spec, {"bias_E": need(router, "balancing_biases")}


def _rules(read: Read, names: str, logits: str = "native") -> dict[str, Rule]:
    return {name: Rule(read, logits) for name in names.split()}


# By the class of the router.
_RULES: dict[str, Rule] = {
    **_rules(_mixtral, "mixtral.MixtralTopKRouter minimax.MiniMaxTopKRouter"),
    **_rules(
        _qwen,
        "qwen2_moe.Qwen2MoeTopKRouter qwen3_moe.Qwen3MoeTopKRouter qwen3_next.Qwen3NextTopKRouter "
        "qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter "
        "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter qwen4_exp.Qwen4ExpTextTopKRouter "
        "olmoe.OlmoeTopKRouter flex_olmo.FlexOlmoTopKRouter mellum.MellumTopKRouter",
    ),
    **_rules(
        _always_normalised,
        "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter qwen3_5_moe.Qwen3_5MoeTopKRouter "
        "granitemoe.GraniteMoeTopKRouter granitemoe_swa.GraniteMoeSWATopKRouter "
        "granitemoeshared.GraniteMoeSharedTopKRouter "
        "granitemoehybrid.GraniteMoeHybridTopKRouter",
    ),
    **_rules(_always_normalised, "hunyuan_v1_moe.HunYuanMoEV1Gate", "wg"),
    **_rules(_always_normalised, "jetmoe.JetMoeTopKGating", "layer"),
    **_rules(_native_softmax, "gpt_oss.GptOssTopKRouter aria.AriaTextTopKRouter"),
    **_rules(_jamba_router, "jamba.JambaTopKRouter"),
    **_rules(_dbrx, "dbrx.DbrxRouter", "layer"),
    **_rules(_gemma4, "gemma4.Gemma4TextRouter diffusion_gemma.DiffusionGemmaTextRouter", "gemma4"),
    **_rules(
        _ernie,
        "ernie4_5_moe.Ernie4_5_MoeTopKRouter ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter",
        "float32",
    ),
    **_rules(_privacy_filter, "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter", "float32"),
    **_rules(_cohere2, "cohere2_moe.Cohere2MoeTopKRouter"),
    **_rules(
        _deepseek_v2,
        "deepseek_v2.DeepseekV2TopkRouter deepseek_ocr2.DeepseekOcr2TextTopkRouter",
        "float32",
    ),
    **_rules(_mistral4, "mistral4.Mistral4TopkRouter"),
    **_rules(
        _deepseek_v3,
        "deepseek_v3.DeepseekV3TopkRouter deepseek_v32.DeepseekV32TopkRouter axk1.AXK1TopkRouter "
        "dots1.Dots1TopkRouter glm4_moe.Glm4MoeTopkRouter glm4_moe_lite.Glm4MoeLiteTopkRouter "
        "glm4v_moe.Glm4vMoeTextTopkRouter glm_moe_dsa.GlmMoeDsaTopkRouter "
        "glm5_next.Glm5NextTextTopkRouter hy_v4.HYV4TopkRouter kimi_linear.KimiLinearTopkRouter "
        "solar_open.SolarOpenTopkRouter exaone_moe.ExaoneMoeTopkRouter "
        "mimo_v2_flash.MiMoV2FlashTopkRouter nemotron_h.NemotronHTopkRouter",
        "float32",
    ),
    **_rules(_axk2, "axk2.AXK2TopkRouter", "float32"),
    **_rules(_longcat, "longcat_flash.LongcatFlashTopkRouter", "classifier32"),
    **_rules(_minimax_m2, "minimax_m2.MiniMaxM2TopKRouter"),
    **_rules(_scaled_by_block, "minimax_m3_vl.MiniMaxM3VLTopKRouter step3p7.Step3p7TopKRouter"),
    **_rules(_laguna, "laguna.LagunaTopKRouter"),
    **_rules(_hy_v3, "hy_v3.HYV3TopKRouter", "float32"),
    **_rules(_afmoe, "afmoe.AfmoeTokenChoiceRouter", "gate"),
    **_rules(_lfm2, "lfm2_moe.Lfm2MoeTopKRouter"),
    **_rules(_deepseek_v4, "deepseek_v4.DeepseekV4TopKRouter deepseek_v4.DeepseekV4HashRouter"),
    **_rules(_inkling, "inkling.InklingTopkRouter", "float32" if _NEWER else "native"),
    **_rules(_llama4, "llama4.Llama4Router", "self"),
    **_rules(_zaya, "zaya.ZayaRouter", "module"),
}

# By the class of the block, where the router is a bare Linear.
_BLOCK_RULES: dict[str, Rule] = {
    **_rules(_jamba, "jamba.JambaSparseMoeBlock", "self"),
    **_rules(_aria, "aria.AriaTextMoELayer", "self"),
}

_MODELS_OWN = {
    "phimoe.PhimoeTopKRouter": "sparse mixer: stochastic in training, with an autograd of its own",
    "switch_transformers.SwitchTransformersTop1Router": "top-1 with expert capacity",
    "nllb_moe.NllbMoeTop2Router": "top-2 with capacity and dropped tokens",
    "doge.DogeCDMoE": "product keys",
}


def router_of(block: Any) -> Any:
    """The router attribute of a block, PEFT's wrapper included.

    Raises:
        ValueError: the block has neither `gate` nor `router`.
    """
    for name in ("gate", "router", "router_gate"):
        router = getattr(block, name, None)
        if router is not None:
            return router
    raise ValueError(
        f"{type(block).__name__} has neither 'gate' nor 'router'; expected an MoE block (for "
        "Gemma 4 the decoder layer)"
    )


def _find_rule(block: Any) -> Rule | None:
    router = live(router_of(block))
    table, owner = (_BLOCK_RULES, block) if type(router) is nn.Linear else (_RULES, router)
    return next((table[key] for key in keys_of(owner) if key in table), None)


def _rule(block: Any) -> Rule:
    rule = _find_rule(block)
    if rule is not None:
        return rule
    router = live(router_of(block))
    for key in [*keys_of(router), *keys_of(block)]:
        if key in _MODELS_OWN:
            raise Unsupported(
                f"{type(router).__name__} keeps the model's own router: {_MODELS_OWN[key]}"
            )
    raise Unsupported(
        f"{type(block).__name__} with router {type(router).__name__} has no rule in turnout; build "
        "one with RouteSpec, RouteSpec.softmax or RouteSpec.sigmoid and call turnout.route"
    )


def spec_of(block: Any) -> tuple[RouteSpec, dict[str, Tensor]]:
    """The router rule of an MoE block, and the tensors it needs.

    Use as `route(logits, spec, **tensors)`. A hash router's experts are not among the tensors: they
    depend on the input ids.

    Args:
        block: the MoE block of a transformers model (Gemma 4: the decoder layer).

    Returns:
        `RouteSpec`, and a dict of keyword arguments of `route`: `bias_E`, `expert_scale_E`,
        `scale`.

    Raises:
        ValueError: an attribute that the rule needs is not there.
        Unsupported: the router has no rule, or keeps the model's own.
    """
    router = live(router_of(block))
    config = getattr(router, "config", None) or getattr(block, "config", None)
    if config is None:
        config = getattr(live(getattr(block, "experts", None)), "config", None)
    return _rule(block).read(router, block, config)


def router_logits(block: Any, x_TH: Tensor) -> Tensor:
    """(T, E) logits of a block's router for x (T, H), adapters on the router included.

    A PEFT adapter on the weight of a router that is not a Linear adds scaling * (x A^T) B^T; on a
    Linear inside the router it is applied by the Linear itself.
    """
    outer = router_of(block)
    kind, router = _rule(block).logits, live(outer)
    if kind == "module":
        raise Unsupported(
            f"the logits of {type(router).__name__} depend on state beyond x; run the module"
        )
    if kind == "gemma4":
        x = router.norm(x_TH) * router.scale * router.scalar_root_size
        return router.proj(x)
    if kind == "classifier32":
        classifier = router.classifier
        # the model reads the weight itself, so an adapter on the classifier has no effect there
        return F.linear(x_TH.float(), live(classifier).weight.float())
    if kind == "wg":
        wide = live(router.wg).weight.dtype == torch.float32
        return router.wg(x_TH.float() if wide else x_TH)
    if kind in ("layer", "gate"):
        return getattr(router, kind)(x_TH)
    if kind == "self" and type(router) is nn.Linear:
        return outer(x_TH)
    bias = getattr(router, "bias", None)  # only some routers have one
    if kind == "float32":
        bias = None if bias is None else bias.float()
        logits = F.linear(x_TH.float(), router.weight.float(), bias)
    else:
        logits = F.linear(x_TH.to(router.weight.dtype), router.weight, bias)
    return logits + _lora(outer, x_TH).to(logits.dtype)


def _lora(wrapper: Any, x_TH: Tensor) -> Tensor:
    """Sum over the active adapters of a wrapped router weight; zero without any."""
    delta = x_TH.new_zeros(())
    while hasattr(wrapper, "base_layer"):
        if not wrapper.disable_adapters and not wrapper.merged:
            for name in wrapper.active_adapters:
                if name in wrapper.lora_A:
                    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
                    update = (x_TH.to(a.dtype) @ a.T) @ b.T
                    delta = delta + wrapper.scaling[name] * update
        wrapper = wrapper.base_layer
    return delta


def has_rule(module: nn.Module) -> bool:
    """The module is an MoE block whose router has a rule here."""
    routers = [getattr(module, name, None) for name in ("gate", "router")]  # a block has one
    if not any(isinstance(router, nn.Module) for router in routers):
        return False
    return _find_rule(module) is not None


def own_router(model: nn.Module) -> str:
    """Why the model keeps its own router, or an empty string."""
    for module in model.modules():
        for key in keys_of(module):
            if key in _MODELS_OWN:
                return f"the model's own: {_MODELS_OWN[key]}"
    return ""


def is_router(module: nn.Module) -> bool:
    """The module is a router of a class that turnout knows."""
    return any(key in _RULES or key in _MODELS_OWN for key in keys_of(module))


def adapted_router(model: nn.Module) -> str | None:
    """The name of a router that carries an adapter, itself or in a module inside it, or None."""
    for name, module in model.named_modules():
        parts: list[nn.Module] = []
        if is_router(live(module)):
            parts = [module]
        elif any(key in _BLOCK_RULES for key in keys_of(module)):
            parts = [router_of(module)]
        if any(hasattr(inner, "lora_A") for part in parts for inner in part.modules()):
            return name
    return None
