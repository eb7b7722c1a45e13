"""Record which experts the routers chose, and replay that choice in another forward.

A record is a plain dict, for `torch.save` or safetensors: `"<router>/<call>"` to experts (T, K)
int32, with the router's name in the model (without PEFT's wrappers) and its calls numbered from 0.
In a replay only the choice is given: the weights are made of the current logits, and gradients flow
as usual.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from turnout.integrations import checkpoints
from turnout.integrations.router_forward import (
    METHOD,
    STATE,
    RouterState,
    is_swapped,
    restore,
    swap,
)
from turnout.integrations.router_places import Place, places
from turnout.integrations.router_swap import make_state
from turnout.specs import RouteSpec, Unsupported

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _in_backward() -> bool:
    """Autograd runs in this thread, so a call of a router is a recompute."""
    return bool(torch._C._current_graph_task_id() != -1)


def _all_places(model: nn.Module) -> list[Place]:
    found = list(places(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no router that turnout knows; expected a transformers "
            "model with routed experts. docs/support.md lists the architectures"
        )
    return found


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the experts of every router call in the block, from the routers' own outputs.

    Works on patched and unpatched models, in training and in `generate` (one call a step). The
    recompute of activation checkpointing is not a call. Nothing waits for the device; the tensors
    stay where the model is. Not for compiled code, whose hooks may not run.

    Args:
        model: a transformers model, or a PEFT model around one.

    Yields:
        The record, filled as the routers run: `"<router>/<call>"` to (T, K) int32, detached.

    Raises:
        ValueError: the model has no router.
        Unsupported: a router whose choice can not be read or given back, and why.
    """
    found = _all_places(model)
    record: dict[str, Tensor] = {}
    counts = dict.fromkeys((place.name for place in found), 0)
    for place in found:
        _refuse_own(place.name, "recorded", _reason(place))
    with _undone() as undo:
        for place in found:
            keep = partial(_keep, record, counts, place)
            for module in place.modules:
                if module is place.router:
                    undo.append(module.register_forward_hook(partial(_read_output, keep)).remove)
                else:
                    undo.append(_wrap_method(module, keep))
        yield record


@contextmanager
def _undone() -> Iterator[list[Any]]:
    """A list of functions that run at the end, last first."""
    undo: list[Any] = []
    try:
        yield undo
    finally:
        for function in reversed(undo):
            function()


def _reason(place: Place) -> str:
    """Why this router's choice can not be given back, without looking at its values."""
    if place.rule is None:
        return make_state(place, place.modules[0]).own
    return place.rule.output.own or place.rule.output.not_replayed


def _refuse_own(name: str, what: str, reason: str) -> None:
    if reason:
        raise Unsupported(
            f"{name} can not be {what}: {reason}; expected a router whose choice can be read and "
            "given back, see docs/support.md. Let this model choose again"
        )


def _keep(record: dict[str, Tensor], counts: dict[str, int], place: Place, out: Any) -> None:
    if _in_backward():
        return
    found = [t for t in out if not t.is_floating_point()]
    assert place.rule is not None
    if found:
        experts = found[0]
    else:  # Llama 4: dense scores, 0 where not chosen
        assert place.rule.output.parts == ("dz",)
        experts = out[0].topk(place.router.top_k, dim=-1).indices
    record[f"{place.name}/{counts[place.name]}"] = experts.detach().to(torch.int32)
    counts[place.name] += 1


def _read_output(keep: Any, _: nn.Module, __: Any, out: Any) -> None:
    keep(out)


def _wrap_method(module: Any, keep: Any) -> Any:
    """Look at what `route_tokens_to_experts` of this instance returns; the function that undoes."""
    before = vars(module).get(METHOD)
    function = getattr(module, METHOD)

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        keep(out)
        return out

    vars(module)[METHOD] = looked_at

    def undo() -> None:
        del vars(module)[METHOD]
        if before is not None:
            vars(module)[METHOD] = before

    return undo


@dataclass
class _Player:
    """The recorded calls of one router, given one by one.

    Attributes:
        name: the router. calls: (T, K) each. at: the next one.
    """

    name: str
    calls: list[Tensor]
    at: int = 0

    def take(self, z_TE: Tensor, spec: RouteSpec) -> Tensor:
        """The experts of this call, on the logits' device."""
        if _in_backward():
            raise Unsupported(
                f"{self.name} is recomputed in a backward pass, for a forward whose checkpoint "
                "replay_routing did not see; expected checkpoints of gradient_checkpointing_enable "
                "or CheckpointWrapper, and a forward inside replay_routing. Run both inside it"
            )
        if _in_unseen_checkpoint():
            raise Unsupported(
                f"{self.name} runs inside a torch.utils.checkpoint call that replay_routing did "
                "not see, so its recompute would choose experts again; expected checkpoints of "
                "gradient_checkpointing_enable or CheckpointWrapper. Use one of these"
            )
        if self.at >= len(self.calls):
            raise ValueError(
                f"the record has {len(self.calls)} calls of {self.name}; got call {self.at + 1}. "
                "Replay as many forwards as were recorded, in the same order"
            )
        experts = self.calls[self.at]
        where, count = f"{self.name}/{self.at}", z_TE.shape[1] - spec.n_always
        if experts.shape != (z_TE.shape[0], spec.top_k):
            raise ValueError(
                f"{where} has shape {tuple(experts.shape)}; expected ({z_TE.shape[0]}, "
                f"{spec.top_k}), tokens and experts per token. Replay the recorded tokens"
            )
        if experts.device.type == "cpu" and experts.numel():
            least, most = int(experts.min()), int(experts.max())
            if least < 0 or most >= count:
                raise ValueError(
                    f"{where} holds {least}..{most}; expected 0..{count - 1}. Is the record of "
                    "another model?"
                )
        self.at += 1
        return experts.to(device=z_TE.device, dtype=torch.int64)


def _in_unseen_checkpoint() -> bool:
    """A non-reentrant checkpoint's forward is the innermost thing that watches saved tensors."""
    if checkpoints.is_followed() or not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    name = "" if hooks is None else getattr(hooks[0], "__qualname__", "")  # of torch 2.x
    return name.startswith("_checkpoint_hook.")


@contextmanager
def replay_routing(model: nn.Module, record: Mapping[str, Tensor]) -> Iterator[None]:
    """In the block, router call n of each layer takes the experts of `record["<router>/<n>"]`.

    weights = the router's rule on the current logits, at the given experts; logits, auxiliary
    losses and gradients as usual. A router that is not swapped by `patch(router="fused")` runs the
    definition of its rule in PyTorch for the time of the block. In compiled code the graph breaks
    at each router.

    With activation checkpointing (not reentrant) the recompute uses the same experts, also in a
    backward pass after the block.

    Args:
        model: a transformers model, or a PEFT model around one, patched or not.
        record: of `record_routing`, or made elsewhere: (T, K) of any integer dtype per router and
            call, T as the router sees tokens (batch and sequence flattened). Tensors on the CPU are
            checked and copied to the model's device.

    Raises:
        ValueError: other routers, calls, shapes or indices (on the CPU) than the model's; calls
            that were not used when the block ends.
        Unsupported: a router that can not be replayed; reentrant checkpointing, or a checkpoint
            that is not transformers' or `CheckpointWrapper`; `fullgraph=True`.
    """
    found = _all_places(model)
    calls = _calls(found, record)
    players = [_Player(place.name, calls[place.name]) for place in found]
    with _undone() as undo:
        for place, player in zip(found, players, strict=True):
            for module in place.modules:
                undo.append(_play(place, module, player))
        undo.append(partial(checkpoints.detach, model))
        undo.extend(handle.remove for handle in checkpoints.follow(model, strict=True))
        yield
        unused = [p for p in players if p.at < len(p.calls)]
        if unused:
            p = unused[0]
            raise ValueError(
                f"{len(unused)} routers did not use all of the record: {p.name} was called {p.at} "
                f"times; expected {len(p.calls)}. Replay as many forwards as were recorded"
            )


def _calls(found: list[Place], record: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Name to the tensors of its calls, checked against the model's routers."""
    calls: dict[str, dict[int, Tensor]] = {}
    for key, experts in record.items():
        name, slash, number = key.rpartition("/")
        if not slash or not number.isdecimal():
            raise ValueError(f"the record has key {key!r}; expected '<router>/<call>', call 0..")
        if not isinstance(experts, Tensor) or experts.dtype not in _INTEGERS:
            got = experts.dtype if isinstance(experts, Tensor) else type(experts).__name__
            raise ValueError(f"{key} of the record is {got}; expected a tensor of integers (T, K)")
        calls.setdefault(name, {})[int(number)] = experts
    names = [place.name for place in found]
    foreign = sorted(calls.keys() - set(names))
    if foreign or not calls:
        missing = [name for name in names if name not in calls]
        raise ValueError(
            f"the record has {len(calls)} routers; expected the model's {len(names)}. "
            f"Not in the model: {foreign[:3]}; not in the record: {missing[:3]}. Record the same "
            "model"
        )
    for name, numbered in calls.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(
                f"the record has calls {sorted(numbered)[:8]} of {name}; expected 0..n without gaps"
            )
    # a router without calls was not reached in the recorded forward
    return {name: [t for _, t in sorted(calls.get(name, {}).items())] for name in names}


def _play(place: Place, module: Any, player: _Player) -> Any:
    """Give the router a player, and if need be our forward; returns the function that undoes."""
    state: RouterState | None = vars(module).get(STATE)
    if state is not None and state.player is not None:
        raise ValueError("replay_routing inside replay_routing; expected one. Leave the first one")
    reason = _reason(place)
    swapped = is_swapped(module)
    if not reason and not swapped:
        state = make_state(place, module)
        reason = state.own
    _refuse_own(place.name, "replayed", reason)
    assert state is not None
    state.player = player
    if swapped:
        return partial(setattr, state, "player", None)
    before = {
        name: vars(module)[name] for name in (STATE, "forward", METHOD) if name in vars(module)
    }
    swap(module, state)
    return partial(_undo_swap, module, before)


def _undo_swap(module: Any, before: dict[str, Any]) -> None:
    restore(module)
    vars(module).update(before)
