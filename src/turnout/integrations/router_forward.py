"""The forward that a swapped router instance has: its logits, `turnout.route`, the same tuple.

What is swapped is the router's `forward`; where the block routes (jamba, dbrx, aria up to
transformers 5.17) its `route_tokens_to_experts`, which is then given the router's logits. Forward
hooks and PEFT's wrappers are around `forward`, so they stay as they are.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turnout.integrations import checkpoints
from turnout.integrations.architectures import get_path, other_forward
from turnout.integrations.router_outputs import Output, decide, exactly, pack
from turnout.integrations.router_rules import Rule
from turnout.integrations.routers import module_logits
from turnout.routing.rules import Routing
from turnout.specs import RouteSpec, Unsupported

STATE = "_turnout_router"
METHOD = "route_tokens_to_experts"
# What a rule is read from, on the module and on its config. A change after `patch` is an error.
_FACTS = (
    "top_k", "norm_topk_prob", "routed_scaling_factor", "router_scaling_factor", "route_scale",
    "num_group", "topk_group", "topk_method", "norm_min", "router_logit_softcapping",
    "expert_selection_fn", "use_expert_bias", "n_shared_experts", "moe_normalize_expert_weights",
)  # fmt: skip
_CONFIG_FACTS = ("moe_topk", "top_k_experts")


@dataclass
class RouterState:
    """What a swapped router carries in its `__dict__`, beside the forward.

    Attributes:
        name: of the router in the model, without wrappers.
        rule, spec: how its logits are made and routed. ready: `prepared` of both.
        parts: the tuple that it returns.
        kernel: `router="fused"`; False runs the definition in PyTorch.
        cache: the choice is kept for the recompute of activation checkpointing.
        facts: the values that `spec` was read from.
        own: why the module keeps its own forward, or an empty string.
        player: gives the recorded experts during `replay_routing`.
    """

    name: str
    rule: Rule | None = None
    spec: RouteSpec | None = None
    ready: RouteSpec | None = None
    parts: str = ""
    kernel: bool = True
    cache: bool = False
    facts: dict[str, Any] | None = None
    own: str = ""
    player: Any = None


def facts_of(module: Any) -> dict[str, Any]:
    """The values on a module and on its config that a rule is read from."""
    values = vars(module)
    found = {name: values[name] for name in _FACTS if name in values}
    config = vars(values["config"]) if "config" in values else {}
    return found | {f"config.{name}": config[name] for name in _CONFIG_FACTS if name in config}


def _check_facts(module: nn.Module, state: RouterState) -> None:
    now = facts_of(module)
    if now != state.facts:
        assert state.facts is not None
        changed = [n for n in now.keys() | state.facts if now.get(n) != state.facts.get(n)]
        got = ", ".join(f"{n}={now.get(n)!r}" for n in sorted(changed))
        raise ValueError(
            f"{state.name} has {got}; expected "
            + ", ".join(f"{n}={state.facts.get(n)!r}" for n in sorted(changed))
            + " as when its forward was swapped. Call turnout.patch(model) again after the change"
        )


def _route(
    module: nn.Module,
    state: RouterState,
    z: Tensor,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    experts_TK: Tensor | None = None,
) -> Routing:
    """`decide`, with the experts of a replay or of the forward that is recomputed."""
    rule, spec = state.rule, state.spec
    assert rule is not None
    assert spec is not None
    given = None
    if torch.compiler.is_compiling():
        if state.player is not None:
            raise Unsupported("a replay breaks the graph; compile without fullgraph=True for it")
    else:
        _check_facts(module, state)
        given = checkpoints.remembered(module)
        if given is None and state.player is not None:
            given = state.player.take(z, spec)
    keeps = given is not None or state.cache
    given = experts_TK if given is None else given
    options: dict[str, Any] = {"experts_TK": given, "kernel": state.kernel, "ready": state.ready}
    found = decide(rule.output, spec, z, dtype, tensors, **options)
    if keeps and not torch.compiler.is_compiling():
        checkpoints.remember(module, found.experts_TK)
    return found


def router_forward(
    module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    """In place of a router's forward: the same tuple, routed by `turnout.route`.

    Args:
        module: the router. hidden_states: (..., H).
        args, kwargs: the one further argument that some routers take: the correction bias, the
            input ids of a hash router, zaya's router states.
    """
    state: RouterState | None = vars(module).get(STATE)
    if state is None or state.own:  # unpatched below accelerate's hook, which kept this forward
        own: tuple[Tensor, ...] = type(module).forward(module, hidden_states, *args, **kwargs)
        return own
    rule = state.rule
    assert rule is not None
    extra = next((value for value in (*args, *kwargs.values())), None)
    with exactly(rule.output, hidden_states):
        if rule.output.extra == "state":
            return _with_state(module, state, hidden_states, extra)
        z = module_logits(rule, module, hidden_states.reshape(-1, hidden_states.shape[-1]))
        tensors, given = _tensors(module, rule.output, extra)
        routing = _route(module, state, z, hidden_states.dtype, tensors, given)
    return pack(state.parts, routing)


def _tensors(
    module: Any, output: Output, extra: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Keywords of `route`, and the experts of a hash router."""
    tensors = {name: get_path(module, path).reshape(-1) for name, path in output.tensors}
    if output.extra == "ids":
        assert extra is not None
        return tensors, module.tid2eid[extra.reshape(-1)].long()
    # lfm2_moe has a flag beside the argument, and ignores the argument without it
    if output.extra == "bias" and getattr(module, "use_expert_bias", True):
        assert extra is not None
        tensors["bias_E"] = extra
    return tensors, None


def _with_state(
    module: Any, state: RouterState, x: Tensor, carried: Tensor | None
) -> tuple[Tensor, ...]:
    """zaya: the router's hidden states go on to the next layer; the last expert is a skip."""
    hidden = module.down_proj(x)
    if module.use_eda and carried is not None:
        hidden = hidden + carried * module.router_states_scale
    z = module.router_mlp(hidden).reshape(-1, module.num_router_classes)
    assert state.rule is not None
    tensors, _ = _tensors(module, state.rule.output, None)
    found = _route(module, state, z, x.dtype, tensors)
    skip = found.experts_TK == module.config.num_experts
    experts, weights = found.experts_TK.masked_fill(skip, 0), found.weights_TK.masked_fill(skip, 0)
    after = hidden[:, -x.shape[1] :].clone()
    return pack(state.parts, Routing(experts, weights, None, found.logits_TE), after)


def block_route(module: Any, *args: Tensor) -> tuple[Tensor, ...]:
    """In place of `route_tokens_to_experts(..., router_logits)`."""
    state: RouterState = vars(module)[STATE]
    return pack(state.parts, _route(module, state, args[-1], args[0].dtype, {}))


def swap_state(module: nn.Module) -> RouterState | None:
    """The state of a router that `patch` looked at, or None."""
    state = vars(module).get(STATE)
    assert state is None or isinstance(state, RouterState)
    return state


def is_swapped(module: nn.Module) -> bool:
    """The module runs one of the forwards of this file."""
    state = swap_state(module)
    return state is not None and not state.own and not lost_forward(module)


def is_ours(bound: Any) -> bool:
    """A forward of this file, or a wrapper that names it: accelerate's hooks."""
    inner = None if bound is None else inspect.unwrap(bound)
    return isinstance(inner, partial) and inner.func in (router_forward, block_route)


def is_class_own(module: nn.Module, name: str) -> bool:
    """The instance has the function of its class; `kernels` binds it where it has no layer."""
    function = getattr(vars(module)[name], "__func__", None)  # of a bound method, kernels 0.16
    return function is not None and function is getattr(type(module), name)


def lost_forward(module: nn.Module) -> str:
    """What a module that was given a forward of this file runs instead, or an empty string."""
    rule = vars(module)[STATE].rule
    name = METHOD if rule is not None and rule.output.method != "router" else "forward"
    bound = vars(module).get(name)
    if is_ours(bound):
        return ""
    if bound is None or is_class_own(module, name):
        return f"its own {name} was put back, as use_kernels does; call turnout.patch(model) again"
    return other_forward(module) or f"the instance has a {name} of another library"


def swap(module: Any, state: RouterState) -> None:
    """Give the module the state, and unless the state says why not, the forward."""
    vars(module)[STATE] = state
    if state.own:
        return
    assert state.rule is not None
    if state.rule.output.method == "router":
        bound = vars(module).get("forward")
        if not is_ours(bound) or inspect.unwrap(bound) is bound:  # a wrapper of ours stays
            module.forward = partial(router_forward, module)
    else:
        vars(module)[METHOD] = partial(block_route, module)


def restore(module: nn.Module) -> None:
    """Undo `swap`; any other module stays as it is."""
    vars(module).pop(STATE, None)
    for name, function in (("forward", router_forward), (METHOD, block_route)):
        bound = vars(module).get(name)
        if isinstance(bound, partial) and bound.func is function:
            del vars(module)[name]
