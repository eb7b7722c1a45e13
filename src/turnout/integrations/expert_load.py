"""Load of the experts while a model trains, from forward hooks on its routers.

Nothing waits for the device until `take` is called: each hook adds the statistics of
`turnout.routing.statistics` to tensors on the device.

Not counted: evaluation, the second forward of activation checkpointing, other processes' tokens,
Aria, whose experts module routes inside, and padding, where the model is given an `attention_mask`
(batch, sequence) by name and a router sees as many tokens as it has.

Under `torch.compile` each hook runs outside the graphs: counters that change would be compiled
again and again.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turnout.integrations.architectures import layout_of, live
from turnout.integrations.router_places import Place, logits_weight, places
from turnout.integrations.routers import spec_of
from turnout.routing.statistics import routing_statistics


@dataclass
class Padding:
    """The mask (batch, sequence) of the forward that runs, if it has one; 0 is padding."""

    mask: Tensor | None = None

    def of(self, experts_TK: Tensor) -> Tensor | None:
        """(T,) of a router's tokens, or None: no mask, or that of other tokens."""
        if self.mask is None or self.mask.numel() != experts_TK.shape[0]:
            return None
        return self.mask.reshape(-1).to(experts_TK.device)


@dataclass
class LayerLoad:
    """What one router chose since the last `take`.

    Attributes:
        num_experts: E. padding: of all layers.
        tokens: T, summed over the calls; choices: T*K.
        load_E: tokens per expert; dropped: choices of no expert; entropy: summed over tokens.
    """

    num_experts: int
    padding: Padding
    tokens: Tensor | None = None
    choices: Tensor | None = None
    load_E: Tensor | None = None
    dropped: Tensor | None = None
    entropy: Tensor | None = None

    def add(self, experts_TK: Tensor, logits_TE: Tensor | None) -> None:
        """Adds one call, without waiting."""
        experts_TK = experts_TK.detach().reshape(-1, experts_TK.shape[-1])
        if logits_TE is not None:
            logits_TE = logits_TE.detach().reshape(-1, logits_TE.shape[-1])
        rows, top_k = experts_TK.shape
        mask = self.padding.of(experts_TK)
        found = routing_statistics(experts_TK, self.num_experts, logits_TE=logits_TE, mask=mask)
        tokens = found.load_E.new_full((), rows) if mask is None else (mask != 0).sum()
        self.tokens = _plus(self.tokens, tokens)
        self.choices = _plus(self.choices, tokens * top_k)
        self.load_E = _plus(self.load_E, found.load_E)
        self.dropped = _plus(self.dropped, found.dropped * (tokens * top_k))
        if found.entropy is not None:
            self.entropy = _plus(self.entropy, found.entropy * tokens)

    def take(self) -> dict[str, Any]:
        """Plain values since the last time; waits for the device once."""
        sums = (self.load_E, self.tokens, self.choices, self.dropped, self.entropy)
        parts = [t.double().reshape(-1) for t in sums if t is not None]
        values = torch.cat(parts).tolist()
        load, (tokens, choices, dropped, *entropy) = (
            values[: self.num_experts],
            values[self.num_experts :],
        )
        self.load_E = self.tokens = self.choices = self.dropped = self.entropy = None
        return {
            "load": [int(count) for count in load],
            "tokens": int(tokens),
            "dropped": dropped / max(1, choices),
            "entropy": entropy[0] / max(1, tokens) if entropy else None,
        }


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.to(more.device) + more


class ExpertLoad:
    """Hooks on the routers of a model; `detach` takes them away."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, LayerLoad] = {}
        self._padding = Padding()
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(partial(_keep_mask, self._padding), with_kwargs=True),
            model.register_forward_hook(partial(_drop_mask, self._padding), always_call=True),
        ]
        for place in places(model):
            if place.rule is not None:
                self._hook(place)

    def take(self) -> dict[str, dict[str, Any]]:
        """Load, tokens, dropped share and entropy (None without logits) of the layers that ran."""
        found = {n: layer.take() for n, layer in self.layers.items() if layer.load_E is not None}
        return {name: taken for name, taken in found.items() if taken["tokens"]}

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, place: Place) -> None:
        layer = LayerLoad(logits_weight(place).shape[0] - _always(place), self._padding)
        assert place.rule is not None
        parts = place.rule.output.parts
        if place.rule.output.method == "router":
            for module in place.modules:
                hook = partial(_read_router, layer, parts, getattr(place.router, "top_k", None))
                self._handles.append(module.register_forward_hook(hook))
        else:
            experts = [live(m) for m in place.block.children() if layout_of(live(m)) is not None]
            for module in experts:
                hook = partial(_read_experts, layer)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                self._handles.append(handle)
        self.layers[place.name] = layer


@torch.compiler.disable
def _keep_mask(padding: Padding, _: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    padding.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@torch.compiler.disable
def _drop_mask(padding: Padding, *_: Any) -> None:
    padding.mask = None


def _always(place: Place) -> int:
    """Always-on experts have logits and can not be chosen."""
    return spec_of(place.block)[0].n_always


def _is_counted(module: nn.Module) -> bool:
    """In training and not a recompute: autograd runs then."""
    return module.training and bool(torch._C._current_graph_task_id() == -1)


@torch.compiler.disable
def _read_router(
    layer: LayerLoad,
    parts: tuple[str, ...],
    top_k: int | None,
    module: nn.Module,
    _: Any,
    out: Any,
) -> None:
    """The tuple of a router: its order is in `router_outputs`, where releases differ the one in
    which the integers are the experts.

    Llama 4 (transformers 5) returns no indices: dense weights, 0 where an expert is not chosen.
    """
    fitting = [one for one in parts if _is_order(one, out)]
    if not fitting or not _is_counted(module):
        return
    order = fitting[0]
    logits = out[order.index("z")] if "z" in order else None
    if logits is not None and logits.shape[-1] != layer.num_experts:
        logits = None  # with always-on experts among them
    if "i" in order:
        layer.add(out[order.index("i")], logits)
    elif "d" in order and top_k is not None:
        layer.add(out[order.index("d")].topk(top_k, dim=-1).indices, logits)


def _is_order(letters: str, out: Any) -> bool:
    if len(letters) != len(out):
        return False
    pairs = zip(letters, out, strict=True)
    return all((letter == "i") != tensor.is_floating_point() for letter, tensor in pairs)


@torch.compiler.disable
def _read_experts(layer: LayerLoad, module: nn.Module, args: Any, kwargs: Any) -> None:
    """The integer (T, K) tensor among the arguments of an experts module."""
    if not _is_counted(module):
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            layer.add(value, None)
            return
