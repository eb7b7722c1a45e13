"""The definition of routing, in plain PyTorch: logits (T, E) to experts and weights (T, K).

Every rule of `turnout.RouteSpec` is three steps: score, select, weigh. The choice is made under
`no_grad` on bias-corrected, group-masked scores; the weights are made of the uncorrected scores, so
the correction bias gets no gradient. Softmax without bias and groups chooses on the logits
themselves, so it is also topk, then softmax (gpt-oss), whatever the dtype.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts (logits are
(T, E + A)), S = T*K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.specs import RouteSpec


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided.

    Attributes:
        experts_TK: (T, K) int64, best first (given indices: in the order given).
        weights_TK: (T, K), dtype of `RouteSpec.weights_dtype`.
        always_TA: (T, A) weights of the always-on experts, or None.
        logits_TE: the logits that `route` was given.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    always_TA: Tensor | None = None
    logits_TE: Tensor | None = None

    def flat(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """SonicMoE's form: weights_S float32, token_S int32 ascending, expert_S int32, logits."""
        tokens, top_k = self.experts_TK.shape
        token_S = torch.arange(tokens, dtype=torch.int32, device=self.experts_TK.device)
        return (
            self.weights_TK.float().reshape(-1),
            token_S.repeat_interleave(top_k),
            self.experts_TK.to(torch.int32).reshape(-1),
            self.logits_TE,
        )


def score(z: Tensor, spec: RouteSpec) -> Tensor:
    """s = score(z), elementwise or softmax over the last dim, in z's dtype."""
    if spec.score == "softmax":
        return z.softmax(-1)
    if spec.score == "sigmoid":
        return z.sigmoid()
    return F.softplus(z).sqrt()


@torch.no_grad()
def top_indices(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dim, largest first; the lowest index wins a tie.

    Nothing is kept for backward, so a route with given experts saves the same tensors; and the
    indices of all values are not kept alive by those of the first k.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


@torch.no_grad()
def choice(z_TE: Tensor, s_TE: Tensor, spec: RouteSpec, bias_E: Tensor | None) -> Tensor:
    """(T, E) values whose top-k is chosen: mask(s + bias), or for plain softmax the logits."""
    if bias_E is None and spec.n_group == 1 and spec.score == "softmax":
        return z_TE
    values = s_TE if bias_E is None else s_TE + bias_E
    return _mask_groups(values, spec) if spec.n_group > 1 else values


def _mask_groups(values_TE: Tensor, spec: RouteSpec) -> Tensor:
    grouped = values_TE.unflatten(-1, (spec.n_group, -1))
    if spec.group_score == "max":
        group_TG = grouped.amax(-1)
    else:
        group_TG = grouped.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(group_TG, dtype=torch.bool)
    kept.scatter_(-1, top_indices(group_TG, spec.topk_group), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), spec.group_fill).flatten(-2)


def weigh(
    z_TE: Tensor, s_TE: Tensor, z_TA: Tensor, s_TA: Tensor, experts_TK: Tensor, spec: RouteSpec
) -> tuple[Tensor, Tensor]:
    """Weights of the chosen (T, K) and of the always-on experts (T, A), before any scale.

    Without eps the quotient is taken in log space, softmax over log(s): the same value, and no 0/0
    when every score underflows.
    """
    top_k = experts_TK.shape[-1]
    if spec.norm and spec.eps == 0.0 and spec.score != "sqrtsoftplus":
        z = torch.cat([z_TE.gather(-1, experts_TK), z_TA], dim=-1)
        if spec.score == "softmax":
            weights = z.softmax(-1)
        else:
            log_s = F.logsigmoid(z)
            weights = torch.exp(log_s - log_s.logsumexp(-1, keepdim=True))
        return weights[..., :top_k], weights[..., top_k:]
    chosen = s_TE.gather(-1, experts_TK)
    if not spec.norm:
        return chosen, s_TA
    den = chosen.sum(-1, keepdim=True) + s_TA.sum(-1, keepdim=True)
    den = den + spec.eps if spec.eps_mode == "add" else den.clamp(min=spec.eps)
    return chosen / den, s_TA / den


def route(
    logits_TE: Tensor,
    spec: RouteSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    scale: Tensor | None = None,
    experts_TK: Tensor | None = None,
) -> Routing:
    """weights = scale * expert_scale[chosen] * s[chosen] / den, unchecked. See `turnout.route`.

    float64 logits stay float64 where a spec says `float32`.
    """
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    z = logits_TE.to(wide) if spec.score_dtype == "float32" else logits_TE
    if spec.softcap > 0:
        z = torch.tanh(z / spec.softcap) * spec.softcap
    s = score(z, spec)
    num_experts = z.shape[-1] - spec.n_always
    z_TE, z_TA = z[..., :num_experts], z[..., num_experts:]
    s_TE, s_TA = s[..., :num_experts], s[..., num_experts:]
    if experts_TK is None:
        experts_TK = top_indices(choice(z_TE, s_TE, spec, bias_E), spec.top_k)
    else:
        experts_TK = experts_TK.long()
    weights, always = weigh(z_TE, s_TE, z_TA, s_TA, experts_TK, spec)
    factor = spec.scale if scale is None else spec.scale * scale.reshape(())
    weights, always = weights * factor, always * factor
    if expert_scale_E is not None:
        weights = weights * expert_scale_E[experts_TK]
    dtype = wide if spec.weights_dtype == "float32" else logits_TE.dtype
    return Routing(
        experts_TK,
        weights.to(dtype),
        always.to(dtype) if spec.n_always else None,
        logits_TE,
    )
