"""What the router's kernels are compiled for: one value per kernel.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from turnout.kernel_facts import power_of_2
from turnout.ragged import counts
from turnout.specs import RouteSpec

STEP = 32  # experts whose logits a thread asks for at a time
VECTOR_BYTES = 16  # of one load
BACKWARD_ELEMENTS = 4096  # of the logits that a program of the backward kernel holds
BACKWARD_WARPS = 4


class Present(NamedTuple):
    """Which tensors there are besides the logits."""

    bias: bool = False
    expert_scale: bool = False
    scale: bool = False
    experts: bool = False


class ForwardRule(NamedTuple):
    """The constexprs of `kernels.route_kernel`.

    Attributes:
        score, native, cap, norm, log, clamp, always: `RouteSpec`'s; `native` scores in the logits'
            dtype, `log` normalises in log space.
        bias, expert_scale, scale, given, counted: there are such tensors.
        plain: the choice is by the logits themselves.
        narrow: 32 bits hold a logit and an index.
        parts: the highest logit and the sum of a softmax are needed.
        rounds: the biased scores have the logits' dtype.
        size, groups, top_groups, group_max, fill_zero: of groups; one where none is left out.
        even: groups end where a step does.
        libdevice: CUDA's functions are there.
        top_k, width: K, and what a list of keys is long.
        step, load: experts per iteration and per load.
        block_t, block_a, buckets: tokens, always-on experts, columns of the counts.
    """

    score: str
    native: bool
    cap: bool
    norm: bool
    log: bool
    clamp: bool
    always: bool
    bias: bool
    expert_scale: bool
    scale: bool
    given: bool
    counted: bool
    plain: bool
    narrow: bool
    parts: bool
    rounds: bool
    size: int
    groups: int
    top_groups: int
    group_max: bool
    fill_zero: bool
    even: bool
    libdevice: bool
    top_k: int
    width: int
    step: int
    load: int
    block_t: int
    block_a: int
    buckets: int


class BackwardRule(NamedTuple):
    """The constexprs of `kernels_backward.route_backward_kernel`, named as the forward's."""

    score: str
    native: bool
    cap: bool
    norm: bool
    log: bool
    clamp: bool
    always: bool
    expert_scale: bool
    scale: bool
    libdevice: bool
    top_k: int
    block_t: int
    block_e: int
    block_a: int
    block_k: int


def _in_log_space(spec: RouteSpec) -> bool:
    return spec.norm and spec.eps == 0.0 and spec.score != "sqrtsoftplus"


def _half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1024)
def forward_rule(
    spec: RouteSpec,
    num_experts: int,
    dtype: torch.dtype,
    present: Present,
    rounds: bool,
    counted: bool,
    libdevice: bool,
) -> ForwardRule:
    """The rule for logits of this dtype."""
    plain = spec.score == "softmax" and not present.bias and spec.n_group == 1
    log = _in_log_space(spec)
    masked = spec.topk_group < spec.n_group
    size = num_experts // spec.n_group if masked else num_experts
    width = max(8, power_of_2(spec.top_k))
    step = max(width, min(STEP, power_of_2(size)))
    return ForwardRule(
        score=spec.score,
        native=spec.score_dtype == "logits",
        cap=spec.softcap > 0,
        norm=spec.norm,
        log=log,
        clamp=spec.eps_mode == "clamp",
        always=spec.n_always > 0,
        bias=present.bias,
        expert_scale=present.expert_scale,
        scale=present.scale,
        given=present.experts,
        counted=counted,
        plain=plain,
        narrow=plain and spec.softcap == 0 and _half(dtype),
        parts=spec.score == "softmax" and not (log and (plain or present.experts)),
        rounds=rounds,
        size=size if masked else 0,
        groups=spec.n_group if masked else 1,
        top_groups=spec.topk_group if masked else 1,
        group_max=spec.group_score == "max",
        fill_zero=spec.group_fill == 0.0,
        even=size % step == 0,
        libdevice=libdevice,
        top_k=spec.top_k,
        width=width,
        step=step,
        load=VECTOR_BYTES // dtype.itemsize,
        block_t=counts.TILE,
        block_a=power_of_2(max(spec.n_always, 1)),
        buckets=counts.buckets(num_experts),
    )


@lru_cache(maxsize=1024)
def backward_rule(
    spec: RouteSpec, num_experts: int, present: Present, libdevice: bool
) -> BackwardRule:
    """The rule of the gradient."""
    block_e = counts.buckets(num_experts)
    return BackwardRule(
        score=spec.score,
        native=spec.score_dtype == "logits",
        cap=spec.softcap > 0,
        norm=spec.norm,
        log=_in_log_space(spec),
        clamp=spec.eps_mode == "clamp",
        always=spec.n_always > 0,
        expert_scale=present.expert_scale,
        scale=present.scale,
        libdevice=libdevice,
        top_k=spec.top_k,
        block_t=max(1, min(64, BACKWARD_ELEMENTS // block_e)),
        block_e=block_e,
        block_a=power_of_2(max(spec.n_always, 1)),
        block_k=power_of_2(spec.top_k),
    )
