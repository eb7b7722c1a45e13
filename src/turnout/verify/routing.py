"""`turnout.route` against the live router of every MoE block: values, sets, gradient.

A live router is run again on the input it got in a real forward; turnout computes its logits and
routes them. Both become dense (T, E) weights. Tokens whose k-th and (k+1)-th choice (or group) are
closer than rounding are left out of the comparison: there the order is not defined by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turnout.integrations.architectures import class_key, live
from turnout.integrations.routers import has_rule, router_logits, router_of, spec_of
from turnout.routing import rules
from turnout.routing.ops import Routing, route
from turnout.specs import RouteSpec

Mutate = Callable[[RouteSpec, dict[str, Tensor]], tuple[RouteSpec, dict[str, Tensor]]]


@dataclass(frozen=True)
class Call:
    """One call of a router in a forward: its block and what it was given."""

    block: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Parity:
    """Largest errors over the blocks: relative to the largest weight, and of the router gradient.

    Different sets of experts count as an infinite `value`.
    """

    value: float
    grad: float
    rule: str


def blocks(model: nn.Module) -> Iterator[Any]:
    """Modules whose router has a rule in turnout."""
    for module in model.modules():
        if has_rule(module):
            yield module


def record(model: nn.Module, forward: Callable[[], Any]) -> list[Call]:
    """The router calls of one forward."""
    calls: list[Call] = []
    handles = []
    for block in blocks(model):

        def keep(_: nn.Module, args: Any, kwargs: Any, block: Any = block) -> None:
            detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            calls.append(Call(block, detached, dict(kwargs)))

        router = live(router_of(block))
        handles.append(router.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _dense(weights_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    out = weights_TK.new_zeros(weights_TK.shape[0], num_experts, dtype=torch.float32)
    return out.scatter_add(1, experts_TK.long(), weights_TK.float())


def live_weights(call: Call, out: Any, num_experts: int) -> Tensor:
    """The dense (T, E) weights of the model's own routing, from the router's output."""
    block, key = call.block, class_key(type(live(router_of(call.block))))
    if key == "llama4.Llama4Router":
        return out[0].float()
    if key == "jetmoe.JetMoeTopKGating":
        _, token_S, weight_S, sizes, _ = out
        experts = torch.arange(num_experts).repeat_interleave(torch.tensor(sizes))
        place = (token_S, experts.to(token_S.device))
        dense = weight_S.new_zeros(call.args[0].shape[0], num_experts, dtype=torch.float32)
        return dense.index_put(place, weight_S.float(), accumulate=True)
    if key == "dbrx.DbrxRouter":
        weights, experts = block.route_tokens_to_experts(out)
    elif class_key(type(block)) == "jamba.JambaSparseMoeBlock" and isinstance(out, Tensor):
        experts, weights = block.route_tokens_to_experts(call.args[0], out)
    elif class_key(type(block)) == "aria.AriaTextMoELayer" and isinstance(out, Tensor):
        experts, weights = live(block.experts).route_tokens_to_experts(out)
    else:
        experts = next(t for t in out if not t.is_floating_point())
        weights = next(t for t in out if t.is_floating_point() and t.shape == experts.shape)
    return _dense(weights, experts, num_experts)


def _stable(z: Tensor, spec: RouteSpec, tensors: dict[str, Tensor]) -> Tensor:
    """(T,) True where rounding can not change the choice."""
    tolerance = 1e-5 if z.dtype == torch.float32 or spec.score_dtype == "float32" else 2.0**-6
    z = z.float()
    if spec.softcap > 0:
        z = torch.tanh(z / spec.softcap) * spec.softcap
    s = rules.score(z, spec)
    count = z.shape[1] - spec.n_always
    values = rules.choice(z[:, :count], s[:, :count], spec, tensors.get("bias_E"))
    stable = _apart(values, spec.top_k, tolerance)
    if spec.n_group > 1:
        bias = tensors.get("bias_E")
        grouped = (s[:, :count] if bias is None else s[:, :count] + bias).unflatten(
            1, (spec.n_group, -1)
        )
        best = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2).values.sum(-1)
        stable &= _apart(best, spec.topk_group, tolerance)
    return stable


def _apart(values: Tensor, k: int, tolerance: float) -> Tensor:
    if k >= values.shape[1]:
        return torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    top = values.sort(dim=1, descending=True).values
    gap = top[:, k - 1] - top[:, k]
    return gap > tolerance * top[:, :1].abs().squeeze(1).clamp_min(tolerance)


def _ours(
    call: Call, out: Any, mutate: Mutate | None
) -> tuple[Routing, Tensor, RouteSpec, dict[str, Tensor]]:
    """Routing, logits, rule and tensors of turnout for a recorded call."""
    block = call.block
    spec, tensors = spec_of(block)
    if mutate is not None:
        spec, tensors = mutate(spec, tensors)
    router = live(router_of(block))
    if class_key(type(router)) == "zaya.ZayaRouter":
        logits = out[0]
    else:
        x = call.args[0]
        logits = router_logits(block, x.reshape(-1, x.shape[-1]))
    given = {}
    if hasattr(router, "tid2eid"):
        ids = call.args[1] if len(call.args) > 1 else call.kwargs["input_ids"]
        given = {"experts_TK": router.tid2eid[ids.reshape(-1)]}
    routing = route(logits, spec, **tensors, **given)
    return routing, logits, spec, tensors


def check(call: Call, mutate: Mutate | None = None) -> Parity:
    """Values, sets and router gradient of one recorded call."""
    router = live(router_of(call.block))
    with torch.enable_grad():
        out = router(*call.args, **call.kwargs)
        routing, logits, spec, tensors = _ours(call, out, mutate)
        count = logits.shape[1] - spec.n_always
        weights, experts = routing.weights_TK, routing.experts_TK
        if class_key(type(router)) == "zaya.ZayaRouter":  # the skip class: weight 0, expert 0
            skip = experts == count - 1
            weights, experts = weights.masked_fill(skip, 0), experts.masked_fill(skip, 0)
        ours = _dense(weights, experts, count)
        theirs = live_weights(call, out, count)
        stable = _stable(logits.detach(), spec, tensors)[:, None]
        same = bool((((ours != 0) == (theirs != 0)) | ~stable).all())
        difference = ((ours - theirs) * stable).abs().max() / theirs.abs().max()
        value = float(difference) if same else float("inf")
        if routing.always_TA is not None:
            difference = ((routing.always_TA - out[3]) * stable).abs().max() / out[3].abs().max()
            value = max(value, float(difference))
        grad = _gradient_error(router, ours * stable, theirs * stable)
    return Parity(value, grad, describe(spec, tensors))


def _gradient_error(router: nn.Module, ours: Tensor, theirs: Tensor) -> float:
    parameter = next(p for p in router.parameters() if p.dim() == 2)
    if not parameter.requires_grad:
        return 0.0
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(ours.shape, generator=generator).to(ours.device)
    grads = [
        torch.autograd.grad((w * cotangent).sum(), parameter, retain_graph=True)[0].float()
        for w in (ours, theirs)
    ]
    return float((grads[0] - grads[1]).norm() / grads[1].norm().clamp_min(1e-12))


def describe(spec: RouteSpec, tensors: dict[str, Tensor]) -> str:
    """The rule in a few words, for tables."""
    words: list[str] = [spec.score]
    if spec.softcap:
        words.append("softcap")
    if "bias_E" in tensors:
        words.append("bias")
    if spec.n_group > 1:
        words.append(f"groups ({spec.group_score})")
    if spec.norm:
        words.append("norm")
    if spec.scale != 1.0 or "scale" in tensors:
        words.append("scale")
    if "expert_scale_E" in tensors:
        words.append("expert scale")
    if spec.n_always:
        words.append("always-on")
    if spec.output_scale != 1.0:
        words.append("output scale")
    if spec.score_dtype == "logits":
        words.append("native dtype")
    return ", ".join(words)
