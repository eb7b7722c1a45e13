"""Where the routers of a model are, and what the kernel says to their logits.

Legend: E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnout.integrations.architectures import keys_of, layout_of, live
from turnout.integrations.router_rules import MODELS_OWN, Rule
from turnout.integrations.routers import find_rule, router_of, spec_of
from turnout.routing import fused


@dataclass(frozen=True, slots=True)
class Place:
    """One router of a model.

    Attributes:
        name: without the wrappers of PEFT and others.
        block: the MoE block; router: its live router.
        modules: what is swapped: the router and its `modules_to_save` copies, or what has
            `route_tokens_to_experts`. The live one is first.
        rule: None for a router that turnout does not know.
    """

    name: str
    block: Any
    router: Any
    modules: tuple[Any, ...]
    rule: Rule | None


_WRAPPERS = {"base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _plain(name: str, model: nn.Module) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    is_peft = hasattr(model, "peft_config") and parts[:2] == ["base_model", "model"]
    return ".".join(parts[2:] if is_peft else parts)


def places(model: nn.Module) -> Iterator[Place]:
    """Every router of the model, known or not, in model order."""
    for name, module in list(model.named_modules()):
        block: Any = module
        found = [n for n in ("gate", "router") if isinstance(getattr(block, n, None), nn.Module)]
        if not found:
            continue
        rule = find_rule(block)
        known = rule is not None or any(
            key in MODELS_OWN for key in [*keys_of(live(router_of(block))), *keys_of(block)]
        )
        if not known and not any(layout_of(live(child)) for child in block.children()):
            continue
        path = ".".join(filter(None, (_plain(name, model), found[0])))
        yield Place(path, block, live(router_of(block)), _modules(block, rule), rule)


def _modules(block: Any, rule: Rule | None) -> tuple[Any, ...]:
    method = "router" if rule is None else rule.output.method
    if method == "block":
        return (block,)
    if method == "experts":
        return (live(block.experts),)
    router = router_of(block)
    first = live(router)
    found = {id(first): first}
    while hasattr(router, "base_layer"):
        router = router.base_layer
    if hasattr(router, "modules_to_save") and hasattr(router, "original_module"):
        for copy in (router.original_module, *router.modules_to_save.values()):
            found[id(live(copy))] = live(copy)
    return tuple(found.values())


def logits_weight(place: Place) -> Tensor:
    """(E, H) the last weight that makes the logits; for zaya (E, router's width)."""
    router, kind = place.router, "" if place.rule is None else place.rule.logits
    inner = {"wg": "wg", "layer": "layer", "gate": "gate", "gemma4": "proj"}
    inner["classifier32"] = "classifier"
    if kind == "module":
        last = [p for p in router.router_mlp.parameters() if p.dim() == 2][-1]
        found: Tensor = last
        return found
    found = live(getattr(router, inner[kind]) if kind in inner else router).weight
    return found


def why_definition(place: Place) -> str:
    """Why the fused kernel can not route this layer's logits, or an empty string."""
    weight = logits_weight(place)
    assert place.rule is not None
    output = place.rule.output
    wide = place.rule.logits in ("float32", "classifier32") or output.wide_logits
    dtype = torch.float32 if wide else weight.dtype
    logits = torch.empty(0, weight.shape[0], dtype=dtype, device=weight.device)
    return fused.rejects(logits, spec_of(place.block)[0]) or ""
