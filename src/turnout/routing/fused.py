"""Routing in one launch and its backward pass in one: the host side of the router's kernels.

Saved for backward: the logits, the chosen experts and the scales, nothing else of size T*E. Scores
are computed in float32 (rounded after each operation where a rule scores in the logits' dtype).

A call costs the host about as much as the kernels cost the GPU. So what follows from a spec, shapes
and dtypes is computed once (`_Plan`), and autograd is asked only where a gradient is.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.device import device_of
from turnout.kernel_facts import INSTALLED, interpreting
from turnout.launch import Launch
from turnout.ragged import counts
from turnout.routing import config
from turnout.routing.config import Present, backward_rule, forward_rule
from turnout.routing.rules import Routing
from turnout.specs import RouteSpec

NAME = "fused"
MOST_EXPERTS, MOST_CHOSEN = 1024, 32


def rejects(logits_TE: Tensor, spec: RouteSpec) -> str | None:
    """Why the kernel can not route these logits, or None."""
    return _rejects(
        logits_TE.device, logits_TE.dtype, logits_TE.shape[1] - spec.n_always, spec, interpreting()
    )


@lru_cache(maxsize=1024)
def _rejects(
    device: torch.device, dtype: torch.dtype, num_experts: int, spec: RouteSpec, interprets: bool
) -> str | None:
    if not INSTALLED:
        return "Triton is not installed"
    if not interprets and device_of(device).arch is None:
        return "needs an NVIDIA GPU"
    if dtype == torch.float64:
        return "computes in float32, not in float64"
    if num_experts > MOST_EXPERTS:
        return f"takes up to {MOST_EXPERTS} experts, not {num_experts}"
    if spec.top_k > MOST_CHOSEN:
        return f"takes up to {MOST_CHOSEN} experts per token, not {spec.top_k}"
    if MOST_CHOSEN < spec.topk_group < spec.n_group:
        return f"takes up to {MOST_CHOSEN} groups per token, not {spec.topk_group}"
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
    _kernels()  # before anyone asks whether they are interpreted
    experts = experts_TK
    if experts is None:
        experts = logits_TE.new_empty(logits_TE.shape[0], spec.top_k, dtype=torch.int64)
    given = experts_TK is not None
    differentiable = torch.is_grad_enabled() and (
        logits_TE.requires_grad
        or (expert_scale_E is not None and expert_scale_E.requires_grad)
        or (scale is not None and scale.requires_grad)
    )
    run = _Route.apply if differentiable else _forward
    weights, always = run(logits_TE, expert_scale_E, scale, bias_E, experts, given, spec)
    return Routing(experts.long() if given else experts, weights, always, logits_TE)


@cache
def _kernels() -> tuple[Any, Any]:
    """The device code: Triton is imported when the first kernel is asked for."""
    from turnout.routing.kernels import route_kernel
    from turnout.routing.kernels_backward import route_backward_kernel

    return route_kernel, route_backward_kernel


class _Plan(NamedTuple):
    """What a call needs besides its tensors. Without tokens nothing is launched.

    Attributes:
        launch: the kernel.
        dtype: of the weights.
        shape: of the counts, or None.
    """

    launch: Launch | None
    dtype: torch.dtype
    shape: tuple[int, int] | None


@lru_cache(maxsize=1024)
def _plan(
    spec: RouteSpec,
    tokens: int,
    width: int,
    stride: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    expert_scale: torch.dtype | None,
    scale: torch.dtype | None,
    given: torch.dtype | None,
    libdevice: bool,
) -> _Plan:
    """For logits of this shape, stride and dtype; the others are dtypes, None of what is absent.

    With `given` the experts' dtype. All of it fixes every dtype that the kernel gets.
    """
    num_experts = width - spec.n_always
    present = Present(*[found is not None for found in (bias, expert_scale, scale, given)])
    weights_dtype = torch.float32 if spec.weights_dtype == "float32" else dtype
    if not tokens:
        return _Plan(None, weights_dtype, None)
    count = not present.experts and counts.pays(tokens, spec.top_k)
    rounds = spec.score_dtype == "logits" and dtype != torch.float32
    rounds = rounds and (bias is None or torch.promote_types(dtype, bias) == dtype)
    rule = forward_rule(spec, num_experts, dtype, present, rounds, count, libdevice)
    block = counts.block_tokens(tokens)
    numbers = (
        num_experts, spec.n_always, stride, spec.softcap, spec.eps, spec.scale, tokens,
        block // counts.TILE,
    )  # fmt: skip
    grid = (-(-tokens // block), 1, 1)
    launch = Launch(
        _kernels()[0], grid, numbers, {"RULE": rule}, counts.TILE // 32, same_dtypes=True
    )
    return _Plan(launch, weights_dtype, counts.shape(tokens, num_experts) if count else None)


@lru_cache(maxsize=1024)
def _backward_launch(
    spec: RouteSpec,
    shape: torch.Size,
    stride: int,
    expert_scale: bool,
    scale: bool,
    libdevice: bool,
) -> Launch:
    tokens, num_experts = shape[0], shape[1] - spec.n_always
    present = Present(expert_scale=expert_scale, scale=scale)
    rule = backward_rule(spec, num_experts, present, libdevice)
    numbers = (num_experts, spec.n_always, stride, spec.softcap, spec.eps, spec.scale, tokens)
    grid = (-(-tokens // rule.block_t), 1, 1)
    return Launch(_kernels()[1], grid, numbers, {"RULE": rule}, config.BACKWARD_WARPS)


def _rows(logits_TE: Tensor) -> tuple[Tensor, int]:
    """Logits with contiguous rows, and the step from row to row."""
    row_stride, stride = logits_TE.stride()
    if stride == 1:
        return logits_TE, row_stride
    rows = logits_TE.contiguous()
    return rows, rows.stride(0)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _forward(
    logits: Tensor,
    expert_scale: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    experts: Tensor,
    given: bool,
    spec: RouteSpec,
) -> tuple[Tensor, Tensor | None]:
    """Weights of the chosen and of the always-on experts. Writes `experts` unless they are given,
    and leaves their counts on them."""
    rows, stride = _rows(logits)
    tokens, width = rows.shape
    launch, dtype, counted_shape = _plan(
        spec,
        tokens,
        width,
        stride,
        rows.dtype,
        _dtype(bias),
        _dtype(expert_scale),
        _dtype(scale),
        experts.dtype if given else None,
        not interpreting(),
    )
    n_always = spec.n_always
    # sizes as separate arguments: PyTorch takes longer to read a tuple
    weights = rows.new_empty(tokens, spec.top_k, dtype=dtype)
    always = rows.new_empty(tokens, n_always, dtype=dtype) if n_always else None
    counted = None
    if counted_shape is not None:
        counted = rows.new_empty(*counted_shape, dtype=torch.int32)
    if launch is not None:
        launch(
            rows,
            _contiguous(bias),
            _contiguous(expert_scale),
            scale,
            experts.contiguous() if given else None,
            None if given else experts,
            weights,
            always,
            counted,
        )
    if counted is not None:
        counts.attach(experts, width - n_always, counted)
    return weights, always


class _Route(torch.autograd.Function):
    """`_forward`, differentiable in the logits and the scales."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        logits, expert_scale, scale, _, experts, _, spec = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, experts, expert_scale, scale)
        ctx.spec = spec
        return _forward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # the guard costs microseconds, and without a second derivative it guards nothing
        return (_guarded if torch.is_grad_enabled() else _backward)(ctx, *grads)


def _backward(ctx: Any, dweights: Tensor | None, dalways: Tensor | None) -> Any:
    logits, experts, expert_scale, scale = ctx.saved_tensors
    spec: RouteSpec = ctx.spec
    if dweights is None and dalways is None:
        return (None,) * 7
    rows, stride = _rows(logits)
    tokens, width = shape = rows.shape
    if dweights is None:
        dweights = logits.new_zeros(tokens, spec.top_k)
    if dalways is None and spec.n_always:
        dalways = logits.new_zeros(tokens, spec.n_always)
    dlogits = rows.new_empty(tokens, width)
    dexpert = dscale = None
    if tokens:
        launch = _backward_launch(
            spec,
            shape,
            stride,
            expert_scale is not None,
            scale is not None,
            not interpreting(),
        )
        if expert_scale is not None:
            num_experts = width - spec.n_always
            dexpert = rows.new_empty(launch.grid[0], num_experts, dtype=torch.float32)
        if scale is not None:
            dscale = rows.new_empty(launch.grid[0], dtype=torch.float32)
        launch(
            rows,
            experts.contiguous(),
            dweights.contiguous(),
            _contiguous(dalways),
            _contiguous(expert_scale),
            scale,
            dlogits,
            dexpert,
            dscale,
        )
    return (
        dlogits,
        _summed(dexpert, expert_scale),
        _summed(dscale, scale),
        None,
        None,
        None,
        None,
    )


_guarded = once_differentiable(_backward)


def _summed(parts: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The blocks' parts of a scale's gradient, added up."""
    if like is None or parts is None:
        return None if like is None else torch.zeros_like(like)
    return parts.sum(0).to(like.dtype).view(like.shape)
