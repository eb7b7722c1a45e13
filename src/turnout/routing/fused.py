"""Routing in one launch and its backward pass in one: the host side of `kernels.py`.

Saved for backward: the logits, the chosen experts and the scales, nothing else of size T*E. Scores
are computed in float32 (rounded after each operation where a rule scores in the logits' dtype).

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.device import device_of
from turnout.launch import INSTALLED, Launch, interpreting, power_of_2
from turnout.ragged import counts
from turnout.routing.rules import Routing
from turnout.specs import RouteSpec

NAME = "fused"
MOST_EXPERTS, MOST_CHOSEN = 1024, 32


def rejects(logits_TE: Tensor, spec: RouteSpec) -> str | None:
    """Why the kernel can not route these logits, or None."""
    if not INSTALLED:
        return "Triton is not installed"
    if not interpreting():
        if device_of(logits_TE.device).arch is None:
            return "needs an NVIDIA GPU"
        return "the fused router is checked in Triton's interpreter only, not yet on a GPU"
    if logits_TE.dtype == torch.float64:
        return "computes in float32, not in float64"
    if logits_TE.shape[1] - spec.n_always > MOST_EXPERTS:
        return f"takes up to {MOST_EXPERTS} experts, not {logits_TE.shape[1] - spec.n_always}"
    if spec.top_k > MOST_CHOSEN:
        return f"takes up to {MOST_CHOSEN} experts per token, not {spec.top_k}"
    return None


def route(
    logits_TE: Tensor,
    spec: RouteSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    scale: Tensor | None = None,
    experts_TK: Tensor | None = None,
) -> Routing:
    """`turnout.routing.rules.route`, unchecked, on what `rejects` does not reject."""
    _kernels()
    bias_E = None if bias_E is None else bias_E.detach()
    experts, weights, always, counted = _Route.apply(
        logits_TE, expert_scale_E, scale, bias_E, experts_TK, spec
    )
    if experts_TK is not None:
        experts = experts_TK.long()
    elif counted.numel():
        counts.attach(experts, logits_TE.shape[1] - spec.n_always, counted)
    return Routing(experts, weights, always if spec.n_always else None, logits_TE)


@cache
def _kernels() -> Any:
    """The device code: Triton is imported when the first kernel is asked for."""
    from turnout.routing import kernels

    return kernels


@lru_cache(maxsize=1024)
def _constants(spec: RouteSpec, num_experts: int, libdevice: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    block_e = counts.buckets(num_experts)
    return {
        "K": spec.top_k,
        "SCORE": spec.score,
        "NATIVE": spec.score_dtype == "logits",
        "CAP": spec.softcap > 0,
        "NORM": spec.norm,
        "LOG": spec.norm and spec.eps == 0.0 and spec.score != "sqrtsoftplus",
        "CLAMP": spec.eps_mode == "clamp",
        "HAS_ALWAYS": spec.n_always > 0,
        "LIBDEVICE": libdevice,
        "BLOCK_T": counts.tile_tokens(num_experts),
        "BLOCK_E": block_e,
        "BLOCK_A": power_of_2(max(spec.n_always, 1)),
        "BLOCK_K": power_of_2(spec.top_k),
    }


@lru_cache(maxsize=1024)
def _forward_launch(
    spec: RouteSpec,
    tokens: int,
    num_experts: int,
    stride: int,
    bias: bool,
    round_values: bool,
    expert_scale: bool,
    scale: bool,
    given: bool,
    count: bool,
    libdevice: bool,
) -> Launch:
    shared = _constants(spec, num_experts, libdevice)
    first = ("K", "SCORE", "NATIVE", "CAP")
    last = ("HAS_ALWAYS", "LIBDEVICE", "BLOCK_T", "BLOCK_E", "BLOCK_A", "BLOCK_K")
    constants = {
        **{name: shared[name] for name in first},
        "SIZE": num_experts // spec.n_group,
        "GROUPS": spec.n_group,
        "TOP_GROUPS": spec.topk_group,
        "GROUP_MAX": spec.group_score == "max",
        "FILL_ZERO": spec.group_fill == 0.0,
        **{name: shared[name] for name in ("NORM", "LOG", "CLAMP")},
        "HAS_BIAS": bias,
        "ROUND_VALUES": round_values,
        "HAS_EXPERT_SCALE": expert_scale,
        "HAS_SCALE": scale,
        "GIVEN": given,
        "COUNT": count,
        **{name: shared[name] for name in last},
        "BLOCK_G": power_of_2(spec.n_group),
        "BLOCK_TG": power_of_2(spec.topk_group),
    }
    steps = counts.block_tokens(tokens, num_experts) // shared["BLOCK_T"]
    numbers = (
        num_experts, spec.n_always, stride, spec.softcap, spec.eps, spec.scale, tokens, steps
    )  # fmt: skip
    grid = (-(-tokens // (steps * shared["BLOCK_T"])), 1, 1)
    return Launch(_kernels().route_kernel, grid, numbers, constants, 4)


@lru_cache(maxsize=1024)
def _backward_launch(
    spec: RouteSpec,
    tokens: int,
    num_experts: int,
    stride: int,
    expert_scale: bool,
    scale: bool,
    libdevice: bool,
) -> Launch:
    shared = _constants(spec, num_experts, libdevice)
    first = ("K", "SCORE", "NATIVE", "CAP", "NORM", "LOG", "CLAMP")
    last = ("HAS_ALWAYS", "LIBDEVICE", "BLOCK_T", "BLOCK_E", "BLOCK_A", "BLOCK_K")
    constants = {
        **{name: shared[name] for name in first},
        "HAS_EXPERT_SCALE": expert_scale,
        "HAS_SCALE": scale,
        **{name: shared[name] for name in last},
    }
    numbers = (num_experts, spec.n_always, stride, spec.softcap, spec.eps, spec.scale, tokens)
    grid = (-(-tokens // shared["BLOCK_T"]), 1, 1)
    return Launch(_kernels().route_backward_kernel, grid, numbers, constants, 4)


def _rows(logits_TE: Tensor) -> Tensor:
    return logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()


class _Route(torch.autograd.Function):
    """(logits, expert_scale, scale, bias, given experts, spec) to (experts, weights, always,
    counts); the last is empty where nothing is counted."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        expert_scale, scale, bias, given, spec = args
        tokens, num_experts = logits.shape[0], logits.shape[1] - spec.n_always
        rows = _rows(logits)
        dtype = torch.float32 if spec.weights_dtype == "float32" else logits.dtype
        weights = logits.new_empty(tokens, spec.top_k, dtype=dtype)
        always = logits.new_empty(tokens, spec.n_always, dtype=dtype)
        experts = logits.new_empty(tokens, spec.top_k, dtype=torch.int64)
        given = None if given is None else given.contiguous()
        count = given is None and counts.pays(tokens, spec.top_k)
        shape = counts.shape(tokens, num_experts) if count else (0,)
        counted = logits.new_empty(shape, dtype=torch.int32)
        native = spec.score_dtype == "logits" and logits.dtype != torch.float32
        rounds = native and (
            bias is None or torch.promote_types(logits.dtype, bias.dtype) == logits.dtype
        )
        if tokens:
            _forward_launch(
                spec,
                tokens,
                num_experts,
                rows.stride(0),
                bias is not None,
                rounds,
                expert_scale is not None,
                scale is not None,
                given is not None,
                count,
                not interpreting(),
            )(
                rows,
                None if bias is None else bias.contiguous(),
                None if expert_scale is None else expert_scale.contiguous(),
                scale,
                given,
                None if given is not None else experts,
                weights,
                always if spec.n_always else None,
                counted if count else None,
            )
        ctx.mark_non_differentiable(experts, counted)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, experts if given is None else given, expert_scale, scale)
        ctx.spec = spec
        return experts, weights, always, counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, dweights: Tensor | None, dalways: Tensor | None, __: Any) -> Any:
        logits, experts, expert_scale, scale = ctx.saved_tensors
        spec: RouteSpec = ctx.spec
        if dweights is None and dalways is None:
            return (None,) * 6
        tokens, num_experts = logits.shape[0], logits.shape[1] - spec.n_always
        rows, wide = _rows(logits), torch.float32
        if dweights is None:
            dweights = logits.new_zeros(tokens, spec.top_k)
        if dalways is None and spec.n_always:
            dalways = logits.new_zeros(tokens, spec.n_always)
        launch = _backward_launch(
            spec,
            max(tokens, 1),
            num_experts,
            rows.stride(0),
            expert_scale is not None,
            scale is not None,
            not interpreting(),
        )
        blocks = launch.grid[0]
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        dexpert = dscale = None
        if expert_scale is not None:
            dexpert = logits.new_zeros(blocks, num_experts, dtype=wide)
        if scale is not None:
            dscale = logits.new_zeros(blocks, dtype=wide)
        if tokens:
            launch(
                rows,
                experts,
                dweights.contiguous(),
                None if not spec.n_always or dalways is None else dalways.contiguous(),
                None if expert_scale is None else expert_scale.contiguous(),
                scale,
                dlogits,
                dexpert,
                dscale,
            )
        return (
            dlogits,
            None if dexpert is None else dexpert.sum(0).to(expert_scale.dtype),
            None if dscale is None else dscale.sum().to(scale.dtype).view(scale.shape),
            None,
            None,
            None,
        )
