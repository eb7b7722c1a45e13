"""transformers' experts functions on `turnout.expert_mlp`. The last file that knows Hugging Face.

Importing this module registers `turnout` with transformers' `ExpertsInterface`, so
`experts_implementation="turnout"` works; `turnout.patch` does more (adapters, options, a report,
and the architectures that transformers' interface does not reach).
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from turnout.experts.ops import expert_mlp
from turnout.experts.sonic import for_sonic
from turnout.experts.weights import ExpertWeights, LoraWeights
from turnout.integrations.architectures import Layout, Stock, get_path, layout_of
from turnout.integrations.state import ATTRIBUTE, LayerState, state_of
from turnout.specs import Unsupported

NAME = "turnout"


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """out[t] = sum over k of weights[t, k] * expert(x[t], index[t, k]), as transformers calls it.

    Args:
        module: an experts module, patched or reached by `experts_implementation="turnout"`.
        hidden_states: (T, H); top_k_index: (T, K) in 0..E; top_k_weights: (T, K).

    Raises:
        Unsupported: an unknown layout or gate, quantised, DTensor or ZeRO-3 weights.
    """
    state = state_of(module) or _register(module)
    if not state.patched and parametrize.is_parametrized(module):
        _warn_of_fold(module)
    return run(module, state, hidden_states, top_k_index, top_k_weights)


def run(
    module: Any,
    state: LayerState,
    x: Tensor,
    experts: Tensor,
    weights_TK: Tensor,
    num_experts: int | None = None,
) -> Tensor:
    """`expert_mlp` on the module's own tensors and the adapters that PEFT deposited.

    `num_experts` leaves out stacked experts past that number.
    """
    layout = state.layout
    weights = stacks(module, layout)
    if num_experts is not None:
        weights = replace(weights, gate_up=weights.gate_up[:num_experts])
    state.lora_read = True
    up = state.lora.get(layout.gate_up)
    if up is not None and state.interleaved is not None:
        up = for_sonic(up)
    return expert_mlp(
        x,
        experts,
        weights_TK,
        weights,
        layout.spec,
        lora=LoraWeights(up, state.lora.get(layout.down)),
        recompute=state.recompute,
        backend=state.backend,
        expert_dropout=state.expert_dropout if module.training else 0.0,
    )


def stacks(module: nn.Module, layout: Layout) -> ExpertWeights:
    """The module's own tensors as they lie.

    Raises:
        Unsupported: DTensor, ZeRO-3 or quantised weights.
    """
    found = ExpertWeights(
        get_path(module, layout.gate_up),
        get_path(module, layout.down),
        None if layout.gate_up_bias is None else get_path(module, layout.gate_up_bias),
        None if layout.down_bias is None else get_path(module, layout.down_bias),
    )
    for name, weight in ((layout.gate_up, found.gate_up), (layout.down, found.down)):
        if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") or weight.numel() == 0:
            kind = (
                "a DTensor" if hasattr(weight, "device_mesh") else "empty or partitioned (ZeRO-3)"
            )
            raise Unsupported(
                f"{name} of {type(module).__name__} is {kind}; expected a local tensor. Sharded "
                "experts are not supported in this version: use DDP, or unshard the experts"
            )
        if weight.element_size() < 2 or not weight.is_floating_point():
            raise Unsupported(
                f"{name} of {type(module).__name__} is {weight.dtype}; quantised experts are not "
                "supported. Load the model in bfloat16"
            )
    return found


def _register(module: nn.Module) -> LayerState:
    """State for a module that was never patched: adapters come through PEFT's own fold."""
    layout = layout_of(module)
    if not isinstance(layout, Layout):
        reason = layout.detail if isinstance(layout, Stock) else "its class is not known"
        raise Unsupported(
            f"{type(module).__name__} can not run with experts_implementation='turnout': {reason}. "
            "Use turnout.patch(model), which leaves such layers stock, or 'grouped_mm'"
        )
    state = LayerState(layout=layout)
    vars(module)[ATTRIBUTE] = state
    return state


_warned: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _warn_of_fold(module: Any) -> None:
    """One warning per model; the layers of a model share its config."""
    if id(module.config) in _warned:
        return
    _warned[id(module.config)] = module.config
    warnings.warn(
        "LoRA on the experts is applied by PEFT's own fold, which builds a full copy of every "
        "expert stack, because experts_implementation='turnout' was set without "
        "turnout.patch(model). Call turnout.patch(model) to fuse it",
        stacklevel=2,
    )


def longcat_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """LongCat's experts: indices past the routed experts are identity experts, y += w * x."""
    state = state_of(module)
    assert state is not None
    routed = module.num_routed_experts
    identity = top_k_index >= routed
    experts = top_k_index.masked_fill(identity, routed)
    out = run(module, state, hidden_states, experts, top_k_weights, num_experts=routed)
    kept = top_k_weights.masked_fill(~identity, 0).sum(-1, keepdim=True)
    return out + (kept * hidden_states).to(out.dtype)


def llama4_block_forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4's block: the weight multiplies the expert's input; only chosen experts run.

    Scores are 0 where not chosen, so they say what the router chose.
    """
    hidden_states = hidden_states.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(hidden_states)
    experts_TK = torch.topk(scores_TE, block.top_k, dim=1).indices
    out = block.shared_expert(hidden_states)
    routed = block.experts(hidden_states, experts_TK, scores_TE.gather(1, experts_TK))
    return out + routed, logits_TE


def aria_forward(module: Any, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
    """Aria's experts, given the logits; adapters on fc1 or fc2 keep the model's own code."""
    state = state_of(module)
    assert state is not None
    if hasattr(module.fc1, "base_layer") or hasattr(module.fc2, "base_layer"):
        out: Tensor = type(module).forward(module, hidden_states, router_logits)
        return out
    experts_TK, weights_TK = module.route_tokens_to_experts(router_logits)
    return run(module, state, hidden_states, experts_TK, weights_TK)


def jetmoe_forward(block: Any, layer_input: Tensor) -> Tensor:
    """JetMoE's block; adapters on the two projections keep the model's own code."""
    state = state_of(block)
    assert state is not None
    if hasattr(block.input_linear, "base_layer") or hasattr(block.output_linear, "base_layer"):
        out: Tensor = type(block).forward(block, layer_input)
        return out
    x = layer_input.reshape(-1, layer_input.shape[-1])
    logits = block.router(x)[-1]
    top = logits.topk(block.router.top_k, dim=1)
    weights_TK = F.softmax(top.values, dim=1).type_as(x)
    routed = run(block, state, x, top.indices, weights_TK)
    return routed.view(layer_input.shape) + block.bias


FORWARDS = {
    "forward": experts_forward,
    "longcat": longcat_forward,
    "llama4_block": llama4_block_forward,
    "aria": aria_forward,
    "jetmoe": jetmoe_forward,
}


def bind(module: nn.Module, forward: Any) -> None:
    """Give one instance a forward; a partial survives deepcopy and pickle with the module."""
    module.forward = partial(forward, module)


def register() -> None:
    """Make `experts_implementation="turnout"` known to transformers; importing this does it."""
    defaults = use_experts_implementation.__kwdefaults__ or {}
    interface = defaults.get("experts_interface", ALL_EXPERTS_FUNCTIONS)
    for registry in {id(r): r for r in (ALL_EXPERTS_FUNCTIONS, interface)}.values():
        type(registry).register(NAME, experts_forward)


register()
