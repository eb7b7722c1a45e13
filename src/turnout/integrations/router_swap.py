"""Which routers get the forward of `router_forward.py`, and why the others keep their own.

A module is swapped only if its own forward, run on four made-up tokens, returns the same tuple:
order, shapes, dtypes and values. transformers changed the order of two routers between 5.17 and
5.23, so a release is noticed and not trusted.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from turnout.integrations.architectures import keys_of, live
from turnout.integrations.router_forward import (
    METHOD,
    STATE,
    RouterState,
    block_route,
    facts_of,
    is_class_own,
    is_ours,
    router_forward,
    swap,
)
from turnout.integrations.router_outputs import Output, prepared
from turnout.integrations.router_places import Place, logits_weight, places
from turnout.integrations.router_rules import MODELS_OWN, Rule
from turnout.integrations.routers import spec_of
from turnout.specs import Unsupported


def swap_all(model: nn.Module, *, kernel: bool, cache: bool) -> None:
    """Swap every router that can be swapped; the others keep a state that says why not."""
    for place in places(model):
        for module in place.modules:
            swap(module, make_state(place, module, kernel=kernel, cache=cache))


def make_state(
    place: Place, module: Any, *, kernel: bool = False, cache: bool = False
) -> RouterState:
    """The state of one router, with `own` set if it has to keep its forward."""
    reason = _why_own(place, module)
    if reason:
        return RouterState(place.name, own=reason)
    assert place.rule is not None
    spec, _ = spec_of(place.block)
    ready = prepared(place.rule.output, spec)
    state = RouterState(
        place.name, place.rule, spec, ready, kernel=kernel, cache=cache, facts=facts_of(module)
    )
    state.parts = agreed_parts(place, module, state)
    if not state.parts:
        return RouterState(
            place.name,
            own=f"{type(module).__name__} of this transformers returns something else than turnout",
        )
    return state


def _why_own(place: Place, module: Any) -> str:
    if place.rule is None:
        for key in [*keys_of(place.router), *keys_of(place.block)]:
            if key in MODELS_OWN:
                return MODELS_OWN[key]
        return f"{type(place.router).__name__} has no rule in turnout"
    output = place.rule.output
    if output.own:
        return output.own
    name = "forward" if output.method == "router" else METHOD
    bound = vars(module).get(name)
    if bound is not None and not is_ours(bound) and not is_class_own(module, name):
        return f"the instance has a {name} of another library"
    try:
        spec_of(place.block)
    except Unsupported as error:
        return str(error)
    weight = logits_weight(place)
    plain = weight.dim() == 2 and weight.numel() > 0 and weight.is_floating_point()
    if hasattr(weight, "device_mesh") or not plain or weight.element_size() < 2:
        return "its weight is sharded, quantised or empty"
    return ""


@torch.no_grad()
def agreed_parts(place: Place, module: Any, state: RouterState) -> str:
    """The order in which both return the same on four made-up tokens, or an empty string."""
    rule = state.rule
    assert rule is not None
    args = _made_up(place, rule)
    modes = [(inner, inner.training) for inner in module.modules()]
    device = args[0].device.type
    try:
        module.eval()
        with torch.autocast(device if device != "meta" else "cpu", enabled=False):
            theirs = _own(module, rule.output, args)
            for parts in rule.output.parts:
                state.parts = parts
                if _same(_ours(module, state, args), theirs):
                    return parts
    finally:
        for inner, training in modes:
            inner.training = training
    return ""


def _own(module: Any, output: Output, args: tuple[Tensor, ...]) -> Any:
    if output.method == "router":
        return type(module).forward(module, *args)
    return getattr(type(module), METHOD)(module, *args)


def _ours(module: Any, state: RouterState, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    assert state.rule is not None
    before = vars(module).get(STATE)
    vars(module)[STATE] = state
    try:
        if state.rule.output.method == "router":
            return router_forward(module, *args)
        return block_route(module, *args)
    finally:
        vars(module).pop(STATE)
        if before is not None:
            vars(module)[STATE] = before


def _made_up(place: Place, rule: Rule) -> tuple[Tensor, ...]:
    """Arguments of the router, or of `route_tokens_to_experts`, for four tokens."""
    weight, router = logits_weight(place), place.router
    if rule.logits == "module":
        hidden = live(router.down_proj).in_features
    else:
        hidden = weight.shape[1]

    def noise(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        made = torch.randn(shape, generator=generator, device="cpu")
        return made.to(device=weight.device, dtype=dtype)

    if rule.output.method != "router":
        logits = noise(4, weight.shape[0])
        with_tokens = rule.output.method == "block" and rule.output.weights == "input"
        return (noise(4, hidden), logits) if with_tokens else (logits,)
    x = noise(1, 4, hidden) if rule.logits in ("gate", "module") else noise(4, hidden)
    if rule.output.extra == "bias":
        return x, noise(weight.shape[0], dtype=torch.float32) / 10
    if rule.output.extra == "ids":
        return x, torch.zeros(4, dtype=torch.long, device=weight.device)
    return (x,)


def _same(ours: tuple[Tensor, ...], theirs: Any) -> bool:
    """Equal shapes and dtypes, and in every row the same values, whatever their order."""
    if not isinstance(theirs, tuple) or len(ours) != len(theirs):
        return False
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in ours)
    limit = 2.0**-5 if half else 1e-4
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_meta or not a.is_floating_point():
            continue
        left, right = a.float().sort(-1).values, b.float().sort(-1).values
        if not torch.allclose(left, right, rtol=limit, atol=limit * float(right.abs().max())):
            return False
    return True
