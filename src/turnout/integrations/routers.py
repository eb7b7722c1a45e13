"""The router of an MoE block: its rule read off the live modules, and its logits.

`spec_of(block)` reads block, router and config. `router_logits` computes the logits that the rule
is applied to, with the adapters that PEFT put on the router. The rules are in `router_rules.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turnout.integrations.architectures import keys_of, live
from turnout.integrations.router_outputs import exactly
from turnout.integrations.router_rules import BLOCK_RULES, MODELS_OWN, RULES, Rule
from turnout.specs import RouteSpec, Unsupported


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


def find_rule(block: Any) -> Rule | None:
    """The rule of a block's router by its class, or None."""
    router = live(router_of(block))
    table, owner = (BLOCK_RULES, block) if type(router) is nn.Linear else (RULES, router)
    return next((table[key] for key in keys_of(owner) if key in table), None)


def rule_of(block: Any) -> Rule:
    """The rule of a block's router.

    Raises:
        Unsupported: the router has no rule, or keeps the model's own.
    """
    rule = find_rule(block)
    if rule is not None:
        return rule
    router = live(router_of(block))
    for key in [*keys_of(router), *keys_of(block)]:
        if key in MODELS_OWN:
            raise Unsupported(
                f"{type(router).__name__} keeps the model's own router: {MODELS_OWN[key]}"
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
    return rule_of(block).read(router, block, config)


def router_logits(block: Any, x_TH: Tensor) -> Tensor:
    """(T, E) logits of a block's router for x (T, H), adapters on the router included.

    A PEFT adapter on the weight of a router that is not a Linear adds scaling * (x A^T) B^T; on a
    Linear inside the router it is applied by the Linear itself.
    """
    outer, rule = router_of(block), rule_of(block)
    router = live(outer)
    if rule.logits == "module":
        raise Unsupported(
            f"the logits of {type(router).__name__} depend on state beyond x; run the module"
        )
    if rule.logits == "self" and type(router) is nn.Linear:
        return outer(x_TH)
    logits = module_logits(rule, router, x_TH)
    if rule.logits in ("native", "float32", "self"):
        logits = logits + _lora(outer, x_TH).to(logits.dtype)
    return logits


def module_logits(rule: Rule, router: Any, x_TH: Tensor) -> Tensor:
    """(T, E) logits as the router module computes them from its own parameters, as they are now.

    During the forward of PEFT's `ParamWrapper` the weight is the folded one, adapter included.
    """
    kind = rule.logits
    if kind == "gemma4":
        x = router.norm(x_TH) * router.scale * router.scalar_root_size
        return router.proj(x)
    if kind == "classifier32":
        # the model reads the weight itself, so an adapter on the classifier has no effect there
        return F.linear(x_TH.float(), live(router.classifier).weight.float())
    if kind == "wg":
        wide = live(router.wg).weight.dtype == torch.float32
        return router.wg(x_TH.float() if wide else x_TH)
    if kind in ("layer", "gate"):
        return getattr(router, kind)(x_TH)
    bias = getattr(router, "bias", None)  # only some routers have one
    if kind == "float32":
        bias = None if bias is None else bias.float()
        with exactly(rule.output, x_TH):
            return F.linear(x_TH.float(), router.weight.float(), bias)
    return F.linear(x_TH.to(router.weight.dtype), router.weight, bias)


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
    return find_rule(module) is not None


def own_router(model: nn.Module) -> str:
    """Why the model keeps its own router, or an empty string."""
    for module in model.modules():
        for key in keys_of(module):
            if key in MODELS_OWN:
                return f"the model's own: {MODELS_OWN[key]}"
    return ""


def is_router(module: nn.Module) -> bool:
    """The module is a router of a class that turnout knows."""
    return any(key in RULES or key in MODELS_OWN for key in keys_of(module))


def adapted_router(model: nn.Module) -> str | None:
    """The name of a router that carries an adapter, itself or in a module inside it, or None."""
    for name, module in model.named_modules():
        parts: list[nn.Module] = []
        if is_router(live(module)):
            parts = [module]
        elif any(key in BLOCK_RULES for key in keys_of(module)):
            parts = [router_of(module)]
        if any(hasattr(inner, "lora_A") for part in parts for inner in part.modules()):
            return name
    return None
