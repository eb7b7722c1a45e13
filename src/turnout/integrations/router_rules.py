"""The router rule of each router class of transformers: how to read it, and what it returns.

Nothing has a default: an attribute that is not there is an error that names module and attribute.
The rule is chosen by the router's class, never by the presence of a bias.

phimoe (sparse mixer), switch and nllb (capacity), doge (product keys) and dbrx with a p-norm other
than 1 keep the model's own router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from turnout.integrations.architectures import class_key
from turnout.integrations.router_outputs import BIAS, Output
from turnout.integrations.versions import newer_than
from turnout.specs import RouteSpec, Score, Unsupported

# transformers after 5.17 (seen in 5.23) computes Inkling's routing in float32.
_NEWER = newer_than("transformers", "5.17")

Tensors = dict[str, Tensor]
Read = Callable[[Any, Any, Any], tuple[RouteSpec, Tensors]]


_PLAIN = Output()


@dataclass(frozen=True, slots=True)
class Rule:
    """How one router class makes logits and what it does with them.

    Attributes:
        read: (router, block, config) to spec and tensors.
        logits: `native` or `float32` linear on `router.weight` (plus `router.bias` if it has it),
            or the name of the linear submodule, or `self` when the router is the linear.
        output: what the router's forward returns.
    """

    read: Read
    logits: str = "native"
    output: Output = _PLAIN


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


def _rules(
    read: Read, names: str, logits: str = "native", output: Output = _PLAIN
) -> dict[str, Rule]:
    return {name: Rule(read, logits, output) for name in names.split()}


# By the class of the router.
RULES: dict[str, Rule] = {
    **_rules(
        _mixtral,
        "mixtral.MixtralTopKRouter minimax.MiniMaxTopKRouter",
        output=Output(weights="float32"),
    ),
    **_rules(
        _qwen,
        "qwen2_moe.Qwen2MoeTopKRouter qwen3_moe.Qwen3MoeTopKRouter qwen3_next.Qwen3NextTopKRouter "
        "qwen3_omni_moe.Qwen3OmniMoeThinkerTextTopKRouter "
        "qwen3_omni_moe.Qwen3OmniMoeTalkerTextTopKRouter qwen4_exp.Qwen4ExpTextTopKRouter "
        "olmoe.OlmoeTopKRouter flex_olmo.FlexOlmoTopKRouter mellum.MellumTopKRouter",
    ),
    **_rules(
        _always_normalised,
        "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter qwen3_5_moe.Qwen3_5MoeTopKRouter",
    ),
    **_rules(
        _always_normalised,
        "granitemoe.GraniteMoeTopKRouter granitemoe_swa.GraniteMoeSWATopKRouter "
        "granitemoeshared.GraniteMoeSharedTopKRouter "
        "granitemoehybrid.GraniteMoeHybridTopKRouter",
        output=Output(parts=("zwi", "iwz"), weights="input", wide_logits=True),
    ),
    **_rules(_always_normalised, "hunyuan_v1_moe.HunYuanMoEV1Gate", "wg"),
    **_rules(
        _always_normalised,
        "jetmoe.JetMoeTopKGating",
        "layer",
        Output(
            weights="input",
            wide_logits=True,
            own="it returns the tokens sorted by expert, and counts on the host",
        ),
    ),
    **_rules(_native_softmax, "gpt_oss.GptOssTopKRouter"),
    **_rules(_native_softmax, "aria.AriaTextTopKRouter", output=Output(weights="autocast")),
    **_rules(_jamba_router, "jamba.JambaTopKRouter", output=Output(weights="input")),
    **_rules(_dbrx, "dbrx.DbrxRouter", "layer", Output(parts=("wi",), method="block")),
    **_rules(
        _gemma4,
        "gemma4.Gemma4TextRouter diffusion_gemma.DiffusionGemmaTextRouter",
        "gemma4",
        Output(
            parts=("pwi",), weights="float32", tensors=(("expert_scale_E", "per_expert_scale"),)
        ),
    ),
    **_rules(
        _ernie,
        "ernie4_5_moe.Ernie4_5_MoeTopKRouter ernie4_5_vl_moe.Ernie4_5_VLMoeMoeTopKRouter",
        "float32",
        Output(
            weights="input",
            exact=True,
            tensors=(("bias_E", "moe_statics.e_score_correction_bias"),),
        ),
    ),
    **_rules(
        _privacy_filter,
        "openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
        "float32",
        Output(native=True),
    ),
    **_rules(
        _cohere2, "cohere2_moe.Cohere2MoeTopKRouter", output=Output(weights="input", on_logits=True)
    ),
    **_rules(
        _deepseek_v2,
        "deepseek_v2.DeepseekV2TopkRouter deepseek_ocr2.DeepseekOcr2TextTopkRouter",
        "float32",
        Output(weights="float32"),
    ),
    **_rules(_mistral4, "mistral4.Mistral4TopkRouter", output=Output(weights="autocast")),
    **_rules(
        _deepseek_v3,
        "deepseek_v3.DeepseekV3TopkRouter deepseek_v32.DeepseekV32TopkRouter axk1.AXK1TopkRouter "
        "dots1.Dots1TopkRouter glm4_moe.Glm4MoeTopkRouter glm4_moe_lite.Glm4MoeLiteTopkRouter "
        "glm4v_moe.Glm4vMoeTextTopkRouter glm_moe_dsa.GlmMoeDsaTopkRouter "
        "glm5_next.Glm5NextTextTopkRouter hy_v4.HYV4TopkRouter kimi_linear.KimiLinearTopkRouter "
        "solar_open.SolarOpenTopkRouter exaone_moe.ExaoneMoeTopkRouter "
        "mimo_v2_flash.MiMoV2FlashTopkRouter nemotron_h.NemotronHTopkRouter",
        "float32",
        Output(native=True, tensors=BIAS),
    ),
    **_rules(_axk2, "axk2.AXK2TopkRouter", "float32", Output(native=True, tensors=BIAS)),
    **_rules(
        _longcat,
        "longcat_flash.LongcatFlashTopkRouter",
        "classifier32",
        Output(parts=("zwi", "wi"), native=True, tensors=BIAS),
    ),
    **_rules(
        _minimax_m2,
        "minimax_m2.MiniMaxM2TopKRouter",
        output=Output(weights="float32", extra="bias"),
    ),
    **_rules(
        _scaled_by_block,
        "minimax_m3_vl.MiniMaxM3VLTopKRouter step3p7.Step3p7TopKRouter",
        output=Output(weights="float32", tensors=BIAS),
    ),
    **_rules(
        _laguna,
        "laguna.LagunaTopKRouter",
        output=Output(weights="input", wide_logits=True, tensors=BIAS),
    ),
    **_rules(
        _hy_v3,
        "hy_v3.HYV3TopKRouter",
        "float32",
        Output(weights="autocast", native=True, extra="bias"),
    ),
    **_rules(
        _afmoe,
        "afmoe.AfmoeTokenChoiceRouter",
        "gate",
        Output(weights="float32", wide_logits=True, extra="bias"),
    ),
    **_rules(_lfm2, "lfm2_moe.Lfm2MoeTopKRouter", output=Output(weights="autocast", extra="bias")),
    **_rules(
        _deepseek_v4,
        "deepseek_v4.DeepseekV4TopKRouter",
        output=Output(weights="autocast", tensors=BIAS),
    ),
    **_rules(
        _deepseek_v4,
        "deepseek_v4.DeepseekV4HashRouter",
        output=Output(weights="autocast", extra="ids"),
    ),
    **_rules(
        _inkling,
        "inkling.InklingTopkRouter",
        "float32" if _NEWER else "native",
        Output(
            parts=("zwia",),
            weights="input" if _NEWER else "autocast",
            exact=_NEWER,
            tensors=(*BIAS, ("scale", "global_scale")),
        ),
    ),
    **_rules(_llama4, "llama4.Llama4Router", "self", output=Output(parts=("dz",), on_logits=True)),
    **_rules(
        _zaya,
        "zaya.ZayaRouter",
        "module",
        Output(
            parts=("zwis",),
            weights="autocast",
            extra="state",
            tensors=(("bias_E", "balancing_biases"),),
            not_replayed="it returns expert 0 for tokens that skip the layer",
        ),
    ),
}

# By the class of the block, where the router is a bare Linear.
BLOCK_RULES: dict[str, Rule] = {
    **_rules(
        _jamba,
        "jamba.JambaSparseMoeBlock",
        "self",
        Output(parts=("iw",), weights="input", method="block"),
    ),
    **_rules(
        _aria,
        "aria.AriaTextMoELayer",
        "self",
        Output(parts=("iw",), weights="autocast", method="experts"),
    ),
}

MODELS_OWN = {
    "phimoe.PhimoeTopKRouter": "sparse mixer: stochastic in training, with an autograd of its own",
    "switch_transformers.SwitchTransformersTop1Router": "top-1 with expert capacity",
    "nllb_moe.NllbMoeTop2Router": "top-2 with capacity and dropped tokens",
    "doge.DogeCDMoE": "product keys",
}
