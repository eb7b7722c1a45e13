"""PEFT's expert adapters, handed to the kernels as factors instead of a folded weight stack.

PEFT wraps one parameter of the experts module in one `ParamWrapper`; its forward enters
`_activate_lora`, which folds W + scaling * B @ A into a full copy of the stack. `attach` gives each
wrapper *instance* an `_activate_lora` that puts (A, B, scaling) on the experts module for the time
of the call. PEFT's own checks (disabled, merged, mixed batches) run before it and stay in charge;
what the fused path can not express goes through PEFT's own method, and the report says so.

PEFT (0.19.1 and later) stores, for a stack used as (E, out, in): A (E*R, in), rows of one expert
together; B (out, R*E), column j*E + e. As views: a (E, R, in), b (out, R, E).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from turnout.experts.sonic import NAMES as SONIC
from turnout.experts.weights import Lora
from turnout.integrations.architectures import (
    Layout,
    Stock,
    expert_modules,
    foreign_parametrization,
    forward_in_front,
    get_path,
    live,
    other_forward,
    stack_holder,
)
from turnout.integrations.routers import adapted_router
from turnout.integrations.sonic import (
    guard_merging,
    merge_cost,
    refuse_adapters,
    refuse_fold,
    release_merging,
)
from turnout.integrations.state import LayerState, state_of
from turnout.specs import Unsupported

WARNED = "_turnout_router_warned"
_EXPERT_NAMES = ("gate_up_proj", "up_proj", "gate_proj", "down_proj")


def _param_wrapper() -> type | None:
    """PEFT's `ParamWrapper`, if the process uses PEFT at all."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return None if layer is None else getattr(layer, "ParamWrapper", None)  # since PEFT 0.17


@dataclass(frozen=True, slots=True)
class Adapted:
    """A `ParamWrapper` on a parameter of an experts module; `owner` is that module's layout."""

    name: str
    wrapper: Any
    owner: Layout | Stock


def adapted_stacks(model: nn.Module) -> list[Adapted]:
    """Every adapter on an expert stack, fused or not."""
    cls = _param_wrapper()
    if cls is None:
        return []
    owners: dict[int, Layout | Stock] = {}
    for _, module, layout in expert_modules(model):
        holder = stack_holder(module, layout) if isinstance(layout, Layout) else module
        for inner in (holder, *map(live, holder.children())):
            owners[id(inner)] = layout
    found = []
    for name, module in model.named_modules():
        if isinstance(module, cls):
            wrapper: Any = module
            owner = owners.get(id(wrapper.get_base_layer()))
            if owner is not None and _is_stack(wrapper.parameter_name, owner):
                found.append(Adapted(name, wrapper, owner))
    return found


def _is_stack(parameter: str, owner: Layout | Stock) -> bool:
    if isinstance(owner, Stock):
        return True
    return parameter in {path.rpartition(".")[2] for path in (owner.gate_up, owner.down)}


def adapter_paths(model: nn.Module) -> dict[str, str]:
    """What the next forward does with each adapted expert parameter, by wrapper and parameter."""
    paths = {}
    for found in adapted_stacks(model):
        taken = forward_in_front(model, found.name)
        path = f"not PEFT's: {taken}" if taken else _path(found.wrapper, found.owner)
        paths[f"{found.name} ({found.wrapper.parameter_name})"] = path
    return paths


def _path(wrapper: Any, owner: Layout | Stock) -> str:
    adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.merged:
        return "merged into the weights by PEFT"
    if wrapper.disable_adapters:
        return "disabled by PEFT"
    if not adapters:
        return "no active adapter"
    reason = _not_fused(wrapper, adapters, owner)
    state = state_of(wrapper.get_base_layer())
    is_sonic = state is not None and state.backend in SONIC
    if reason is not None:
        way = "raises" if is_sonic else "PEFT's own fold"
        return f"{way}: {reason}"
    taken = other_forward(wrapper.get_base_layer())
    if taken:
        return f"raises: {taken}"
    if state is not None and is_sonic:
        return merge_cost(wrapper.get_base_layer(), state.layout, [wrapper.parameter_name])
    return f"fused: adapter {adapters[0]!r}, rank {wrapper.r[adapters[0]]}"


def attach(model: nn.Module) -> None:
    """Give every expert wrapper below `model` the fused path. Doing it twice changes nothing.

    Raises:
        ValueError: adapters on the experts were asked for and none is there.
        Unsupported: an adapter on a stack that carries another parametrization.
    """
    found = adapted_stacks(model)
    for one in found:
        _refuse_parametrized(one.wrapper.get_base_layer(), one.wrapper.parameter_name)
        attach_chain(one.wrapper)
    _warn_about_router(model)
    if not found:
        _check_asked(model)


def attach_chain(wrapper: Any) -> None:
    """Give a wrapper, and those nested in it, the fused path where it applies."""
    state = state_of(live(wrapper))
    while "lora_A" in wrapper._modules:
        if state is not None and state.backend in SONIC:
            refuse_adapters(wrapper, state)
            guard_merging(wrapper)
        if state is not None and state.layout.fused_lora and "_activate_lora" not in vars(wrapper):
            wrapper._activate_lora = partial(_activate, wrapper)
        wrapper = wrapper.base_layer


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        release_merging(module)
        vars(module).pop("_activate_lora", None)
        vars(module).pop(WARNED, None)


def factors(wrapper: Any, adapter: str, layout: Layout) -> Lora:
    """One adapter's A and B as views in the form of `Lora`; gradients reach PEFT's parameters.

    PEFT swaps the roles of the last two dims unless the module declares `is_transposed`. Where that
    does not fit the storage (Llama 4 stores (E, in, out) and declares nothing), its A touches the
    output and its B the input, so the factors change places.
    """
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    a_ERI, b_ORE = a.view(experts, -1, a.shape[-1]), b.view(b.shape[0], -1, experts)
    if wrapper._did_swap_in_out_features == layout.spec.transposed:
        a_ERI, b_ORE = b_ORE.permute(2, 1, 0), a_ERI.permute(2, 1, 0)
    return Lora(a_ERI, b_ORE, float(wrapper.scaling[adapter]))


def for_routed_experts(lora: Lora, num_experts: int) -> Lora:
    """Without the rows of experts that have no weights (LongCat's identity experts)."""
    if lora.a_ERI.shape[0] == num_experts:
        return lora
    return Lora(lora.a_ERI[:num_experts], lora.b_ORE[:, :, :num_experts], lora.scaling)


def _not_fused(wrapper: Any, adapters: list[str], owner: Layout | Stock) -> str | None:
    """Why PEFT's own method has to run, or None."""
    if isinstance(owner, Stock):
        return f"the layer stays stock ({owner.reason})"
    if not owner.fused_lora:
        return "this architecture keeps each stack in a module of its own"
    base = wrapper.get_base_layer()
    state = state_of(base)
    if state is None or not state.patched:
        return "the model is not patched"
    if len(adapters) > 1:
        dropped = ", expert_dropout is not applied" if state.expert_dropout else ""
        return f"{len(adapters)} adapters are active{dropped}"
    if owner.call == "interface" and base.config._experts_implementation != "turnout":
        return f"experts_implementation is {base.config._experts_implementation!r}"
    return None


def _refuse_parametrized(base: nn.Module, name: str) -> None:
    found = foreign_parametrization(base, name)
    if found:
        raise Unsupported(
            f"{name} of {type(base).__name__} carries a parametrization ({found}) and a LoRA "
            "adapter; PEFT adds the delta again at each forward there. Load it in bfloat16"
        )


@contextmanager
def _activate(wrapper: Any, active_adapters: list[str]) -> Iterator[None]:
    """In place of `ParamWrapper._activate_lora`: deposit the factors, fold nothing."""
    adapters = [name for name in (active_adapters or []) if name in wrapper.lora_A]
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    state: LayerState | None = state_of(base)
    reason = _not_fused(wrapper, adapters, state.layout) if adapters and state else None
    if reason is not None and state is not None and state.interleaved is not None:
        refuse_fold(wrapper, reason)
    if not adapters or state is None or reason is not None:
        with type(wrapper)._activate_lora(wrapper, active_adapters):
            yield
        return
    if parametrize.is_parametrized(base, name):
        _refuse_parametrized(base, name)
    lora = factors(wrapper, adapters[0], state.layout)
    num_experts = get_path(base, state.layout.down).shape[0]
    state.lora[name] = for_routed_experts(lora, num_experts)
    state.lora_read = False
    try:
        yield
        if not state.lora_read:
            raise RuntimeError(
                f"the experts {type(base).__name__} ran without turnout, so the adapter on {name} "
                "was not applied. Call turnout.unpatch(model), or turnout.patch(model) again"
            )
    finally:
        state.lora.pop(name, None)


def _configs(model: nn.Module) -> dict[str, Any]:
    """PEFT configs by adapter name; PEFT leaves them on the model it adapts."""
    for module in (model, *model.modules()):
        configs = vars(module).get("peft_config")
        if isinstance(configs, dict):
            return configs
    return {}


def _check_asked(model: nn.Module) -> None:
    """`ValueError` if a config names expert parameters although no expert is adapted."""
    for name, config in _configs(model).items():
        targets = sorted(getattr(config, "target_parameters", None) or [])  # LoRA configs only
        asked = [t for t in targets if t.rpartition(".")[2] in _EXPERT_NAMES and "experts" in t]
        if asked:
            raise ValueError(
                f"adapter {name!r} asks for {asked} but no expert parameter of a patched layer is "
                "adapted; expected target_parameters=turnout.lora_targets(model)"
            )
        leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "lora_A")}
        named = sorted(leaves.intersection(_EXPERT_NAMES))
        if named:
            warnings.warn(
                f"adapter {name!r} adapts {named} of shared or dense MLPs only: no routed expert "
                "is adapted. For the experts, pass target_parameters=turnout.lora_targets(model)",
                stacklevel=2,
            )


def _warn_about_router(model: nn.Module) -> None:
    """One warning per model when an adapter sits on a router; `all-linear` puts it there."""
    if any(WARNED in vars(module) for module in model.modules()):
        return
    name = adapted_router(model)
    if name is None:
        return
    vars(model)[WARNED] = True
    warnings.warn(
        f"the router {name} is adapted. target_modules='all-linear' does that; if it is not meant, "
        "pass target_parameters=turnout.lora_targets(model) and name the attention modules in "
        "target_modules",
        stacklevel=2,
    )
