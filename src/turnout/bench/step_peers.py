"""Peers of `turnout bench --step`: the same model with another library's experts.

    axolotl         its scattermoe experts function and its short way around PEFT's fold: LoRA fused
    liger           its experts forward on each instance, on PEFT's fold, as its own patch does
    turnout-sonic   SonicMoE as turnout's back end, `backend="sonic-merged"`: on merged weights

Each is given what its own integration gives it, bound to the instances of one model, so that the
models of the other providers stay as they are. What stays is the name `scattermoe` among the
experts functions of transformers. A peer's package is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from turnout import Unsupported, patch
from turnout.bench.providers import load, needs, provider_named
from turnout.integrations.architectures import Layout, expert_modules
from turnout.specs import ExpertSpec

_AXOLOTL = "axolotl.integrations.kernels.libs.scattermoe_lora"
_OPS = "peer_axolotl"  # the namespace of its operators, as in `turnout.bench.providers`
_LIGER = "liger_kernel.transformers.swiglu"
SCATTERMOE = "scattermoe"


def _nothing(model: nn.Module) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Peer:
    """How a model gets the experts of one library.

    Attributes:
        missing: None if it can run on this device, else the reason in words.
        before: called with the model before PEFT adapts it; raises `Unsupported` for experts that
            the library does not have.
        after: called with the adapted model.
    """

    missing: Callable[[torch.device], str | None]
    before: Callable[[nn.Module], None] = _nothing
    after: Callable[[nn.Module], None] = _nothing


def missing(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Those of `names` that can not run here, and why."""
    reasons = {name: PEERS[name].missing(device) for name in names if name in PEERS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _use_scattermoe(model: Any) -> None:
    forward = load(f"{_AXOLOTL}.experts", _OPS).scattermoe_experts_forward
    defaults = use_experts_implementation.__kwdefaults__ or {}
    interface = defaults.get("experts_interface", ALL_EXPERTS_FUNCTIONS)
    for registry in (ALL_EXPERTS_FUNCTIONS, interface):
        type(registry).register(SCATTERMOE, forward)
    model.config._experts_implementation = SCATTERMOE  # the layers' config is the same object


def _fuse_scattermoe(model: nn.Module) -> None:
    """Its forward of PEFT's wrapper, on the instances instead of the class."""
    module = load(f"{_AXOLOTL}.experts_lora_fastpath", _OPS)
    stock = ParamWrapper.forward
    try:
        module.patch_paramwrapper_fastpath()
        forward = ParamWrapper.forward
    finally:
        ParamWrapper.forward = stock
    assert forward is not stock
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            wrapper.forward = partial(forward, wrapper)


def _use_liger(model: nn.Module) -> None:
    forward = import_module(_LIGER).LigerExperts.forward
    for name, experts, layout in expert_modules(model):
        if not isinstance(layout, Layout) or _like_liger(layout) != layout:
            raise Unsupported(
                f"{name}: Liger's experts are silu(gate) * up on stacks (E, 2F, H) without bias; "
                "leave the provider out for this shape"
            )
        experts.forward = partial(forward, experts)


def _like_liger(layout: Layout) -> Layout:
    return replace(layout, spec=ExpertSpec(), gate_up_bias=None, down_bias=None, call="interface")


def _use_sonic(model: nn.Module) -> None:
    patch(model, backend="sonic-merged")


PEERS = {
    "axolotl": Peer(needs(f"{_AXOLOTL}.experts", ops=_OPS), _use_scattermoe, _fuse_scattermoe),
    "liger": Peer(needs(_LIGER), _use_liger),
    "turnout-sonic": Peer(provider_named("turnout-sonic").missing, after=_use_sonic),
}
