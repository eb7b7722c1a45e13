"""`route`: validate once, then run the rule.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnout.library import reads_values
from turnout.routing import fused, rules
from turnout.routing.rules import Routing
from turnout.specs import RouteSpec

__all__ = ["Routing", "route"]


def route(
    logits_TE: Tensor,
    spec: RouteSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    scale: Tensor | None = None,
    experts_TK: Tensor | None = None,
) -> Routing:
    """weights = scale * expert_scale[chosen] * s[chosen] / den, chosen = top-k of mask(s + bias).

    The rule is `RouteSpec`'s; the definition is `turnout.routing.rules`, checked against the
    routers of transformers by `turnout verify`. It runs as one kernel where
    `turnout.routing.fused.rejects` has no reason against it, else as the definition.

    Args:
        logits_TE: (T, E + n_always) router logits, any float dtype.
        spec: the rule.
        bias_E: (E,) correction bias: decides the choice only, never differentiated. None is zero.
        expert_scale_E: (E,) factor on the weight of each expert (Gemma 4), differentiated.
        scale: 0-dim or one-element factor on all weights (Inkling), differentiated; multiplies
            `spec.scale`.
        experts_TK: (T, K) int32 or int64 experts chosen elsewhere (hash routing, replay): nothing
            is selected, the weights are made as usual.

    Returns:
        `Routing` with experts (T, K) int64, best first, the lowest index first on a tie.

    Raises:
        ValueError: wrong shape, dtype or device; a spec that can not be met with E experts; given
            indices out of range (checked on the CPU, and elsewhere with PyTorch's anomaly detection
            on); NaN in the logits (checked with anomaly detection on).
    """
    _check(logits_TE, spec, bias_E, expert_scale_E, scale, experts_TK)
    is_fused = not torch.compiler.is_compiling() and fused.rejects(logits_TE, spec) is None
    run = fused.route if is_fused else rules.route
    return run(
        logits_TE,
        spec,
        bias_E=bias_E,
        expert_scale_E=expert_scale_E,
        scale=scale,
        experts_TK=experts_TK,
    )


def _check(
    logits: Tensor,
    spec: RouteSpec,
    bias: Tensor | None,
    expert_scale: Tensor | None,
    scale: Tensor | None,
    experts: Tensor | None,
) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits_TE has shape {tuple(logits.shape)} and dtype {logits.dtype}; expected a float "
            "tensor (T, E). Flatten batch and sequence first"
        )
    num_experts = logits.shape[1] - spec.n_always
    n_group = spec.n_group
    if num_experts % n_group:
        raise ValueError(
            f"{num_experts} experts do not split into n_group={spec.n_group} equal groups"
        )
    size = num_experts // n_group
    if n_group > 1 and spec.group_score == "top2sum" and size < 2:
        raise ValueError(
            f"group_score='top2sum' needs 2 experts a group; got {size}. Use group_score='max'"
        )
    if spec.top_k > size * spec.topk_group:
        raise ValueError(
            f"top_k={spec.top_k} experts can not be chosen from {size * spec.topk_group} "
            f"({spec.topk_group} of {spec.n_group} groups of {size}); check logits_TE and the spec"
        )
    if bias is not None:
        _check_tensor("bias_E", bias, logits.device, num_experts)
    if expert_scale is not None:
        _check_tensor("expert_scale_E", expert_scale, logits.device, num_experts)
    if scale is not None:
        _check_tensor("scale", scale, logits.device, num_experts)
    if experts is not None:
        _check_tensor("experts_TK", experts, logits.device, num_experts)
        _check_given(experts, logits.shape[0], num_experts, spec)
    refuse_nan(logits)


def refuse_nan(logits: Tensor) -> None:
    """With PyTorch's anomaly detection on, an error for NaN; else nothing, and no wait."""
    if torch.compiler.is_compiling() or not torch.is_anomaly_enabled():
        return
    if reads_values(logits) and logits.isnan().any():
        rows = logits.isnan().any(1).nonzero().flatten()
        raise ValueError(
            f"logits_TE has NaN in {len(rows)} of {logits.shape[0]} rows, first in row "
            f"{int(rows[0])}; expected numbers. Look for what made them in the layers before"
        )


def _check_tensor(name: str, tensor: Tensor, device: torch.device, num_experts: int) -> None:
    if name.endswith("_E") and tensor.shape != (num_experts,):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected ({num_experts},), one per expert"
        )
    if name == "scale" and tensor.numel() != 1:
        raise ValueError(f"scale has shape {tuple(tensor.shape)}; expected one element")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device} as the logits")
    if name != "experts_TK" and not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a float dtype")


def _check_given(experts: Tensor, tokens: int, num_experts: int, spec: RouteSpec) -> None:
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts_TK has dtype {experts.dtype}; expected int32 or int64")
    if experts.shape != (tokens, spec.top_k):
        raise ValueError(
            f"experts_TK has shape {tuple(experts.shape)}; expected ({tokens}, {spec.top_k})"
        )
    if not reads_values(experts):
        return
    if experts.numel() and (experts.min() < 0 or experts.max() >= num_experts):
        raise ValueError(
            f"experts_TK holds {int(experts.min())}..{int(experts.max())}; expected 0.."
            f"{num_experts - 1}"
        )
