"""One MoE block through our code: router, experts, shared expert.

The shared expert is always the model's own module; turnout only finds it and applies its gate.

Legend: T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from turnout.integrations import peft
from turnout.integrations.architectures import Layout, class_key, layout_of, live
from turnout.integrations.router_outputs import decide
from turnout.integrations.router_rules import need
from turnout.integrations.routers import router_logits, rule_of, spec_of
from turnout.integrations.state import LayerState, state_of
from turnout.integrations.transformers import run
from turnout.specs import Unsupported

SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")

_UNSUPPORTED = {
    "zaya.ZayaSparseMoeBlock": "its router carries state from layer to layer",
    "ernie4_5_vl_moe.Ernie4_5_VLMoeMoeBlock": "it splits tokens by modality; pass text_moe",
    "gemma4.Gemma4TextDecoderLayer": "the layer has no MoE block of its own",
    "diffusion_gemma.DiffusionGemmaEncoderTextLayer": "the layer has no MoE block of its own",
    "diffusion_gemma.DiffusionGemmaDecoderTextLayer": "the layer has no MoE block of its own",
}
_JITTER = ("jitter_noise", "input_jitter_noise")


def shared_expert_output(block: Any, x: Tensor) -> Tensor | None:
    """The shared expert's output: module(x), times sigmoid(shared_expert_gate(x)) if it is gated.

    The first of `shared_expert`, `shared_experts`, `shared_mlp` that the block has and that is not
    None; the module itself runs, adapters and hooks included.

    Args:
        block: any object with those attributes; x: what the block is given.

    Returns:
        A tensor of the module's output shape, or None without a shared expert.
    """
    for name in SHARED_NAMES:
        shared = getattr(block, name, None)
        if shared is None:
            continue
        out: Tensor = shared(x)
        gate = getattr(block, "shared_expert_gate", None)
        return out if gate is None else torch.sigmoid(gate(x)) * out
    return None


def block_forward(block: Any, x: Tensor) -> Tensor:
    """experts(x, route(router(x))) * output_scale + shared expert, of one transformers MoE block.

    Router logits, routing and experts run in turnout, whether or not the model is patched, with the
    PEFT adapters that are on them; the shared expert is the model's own.

    Args:
        block: an MoE block; x: (..., H).

    Returns:
        What the block's forward returns first, in x's shape.

    Raises:
        Unsupported: the block needs more than x, has no rule or known layout, uses jitter noise in
            training, or several expert adapters are active.
        ValueError: an attribute that the rule needs is not there.
    """
    key = class_key(type(block))
    if key in _UNSUPPORTED:
        raise Unsupported(f"block_forward can not run {type(block).__name__}: {_UNSUPPORTED[key]}")
    for name in _JITTER:
        if getattr(block, name, 0) and block.training:
            raise Unsupported(
                f"{type(block).__name__} uses {name} in training; run the block itself"
            )
    spec, tensors = spec_of(block)
    if hasattr(live(need(block, "gate" if hasattr(block, "gate") else "router")), "tid2eid"):
        raise Unsupported(f"{type(block).__name__} routes by input ids; run the block itself")
    x_TH = x.reshape(-1, x.shape[-1])
    output = rule_of(block).output
    routing = decide(output, spec, router_logits(block, x_TH), x.dtype, tensors)
    rows = block.fc1_latent_proj(x_TH) if key == "nemotron_h.NemotronHMoE" else x_TH
    routed = _experts(block, rows, routing.experts_TK, routing.weights_TK)
    if key == "nemotron_h.NemotronHMoE":
        routed = block.fc2_latent_proj(routed)
    if spec.output_scale != 1.0:
        routed = routed * spec.output_scale
    out = routed.view(x.shape)
    if key == "inkling.InklingMoE":
        assert routing.always_TA is not None
        return out + block.shared_experts(x, gammas=routing.always_TA.to(x.dtype))
    if key == "jetmoe.JetMoeMoE":
        return out + block.bias
    return _add_shared(block, key, out, x)


def _add_shared(block: Any, key: str, out: Tensor, x: Tensor) -> Tensor:
    shared = shared_expert_output(block, x)
    if shared is None:
        return out
    if key == "hy_v3.HYV3MoE" and block.enable_moe_fp32_combine:
        return (out.float() + shared.float()).to(x.dtype)
    out = out + shared.view(out.shape)
    if key == "cohere2_moe.Cohere2MoeSparseMoeBlock":
        strategy = block.shared_expert_combination_strategy
        if strategy not in ("sum", "average"):
            raise ValueError(
                f"shared_expert_combination_strategy is {strategy!r}; expected 'sum' or 'average'"
            )
        return out / 2 if strategy == "average" else out
    if key == "axk1.AXK1MoE":
        return block.post_mlp_layernorm(out)
    return out


def _experts(block: Any, x: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The routed experts of a block, adapters included, without calling the module."""
    holder = block if layout_of(block) is not None else need(block, "experts")
    module = live(holder)
    layout = layout_of(module)
    if not isinstance(layout, Layout):
        reason = "its class is not known" if layout is None else layout.detail
        raise Unsupported(f"the experts of {type(block).__name__} stay stock: {reason}")
    tensors = live(block.experts) if layout.call == "llama4_block" else module
    patched = state_of(tensors)
    state = LayerState(layout) if patched is None else replace(patched, lora={})
    wrapped = block.experts if layout.call == "llama4_block" else holder
    state.lora.update(_adapters(wrapped, tensors, layout))
    if layout.call == "longcat":
        routed = tensors.num_routed_experts
        identity = experts_TK >= routed
        out = run(tensors, state, x, experts_TK.masked_fill(identity, routed), weights_TK, routed)
        return out + weights_TK.masked_fill(~identity, 0).sum(-1, keepdim=True).to(x.dtype) * x
    return run(tensors, state, x, experts_TK, weights_TK)


def _adapters(wrapper: Any, module: Any, layout: Layout) -> dict[str, Any]:
    """The factors of the active adapter of each wrapped stack of `module`."""
    if not layout.fused_lora:
        heads = (layout.gate_up.partition(".")[0], layout.down.partition(".")[0])
        if any(hasattr(getattr(module, head), "lora_A") for head in heads):
            raise Unsupported(
                f"block_forward does not take an adapter on {' or '.join(heads)} of "
                f"{type(module).__name__}; run the block itself"
            )
        return {}
    found = {}
    num_experts = getattr(module, layout.down).shape[0]
    while hasattr(wrapper, "base_layer"):
        if not wrapper.disable_adapters and not wrapper.merged:
            active = [a for a in wrapper.active_adapters if a in wrapper.lora_A]
            if len(active) > 1:
                raise Unsupported(f"adapters {active} on the experts; block_forward takes one")
            for name in active:
                lora = peft.factors(wrapper, name, layout)
                found[wrapper.parameter_name] = peft.for_routed_experts(lora, num_experts)
        wrapper = wrapper.base_layer
    return found
