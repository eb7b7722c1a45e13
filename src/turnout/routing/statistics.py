"""What one watches of a router while it trains, as tensors, without waiting for the device.

    load[e]  = tokens that chose expert e
    entropy  = mean over tokens of -sum over e of p[e] * log p[e], p = softmax(z)
    dropped  = share of the choices that go to no expert (an index outside 0..E-1)

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.routing.losses import pieces


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """Of one layer and one batch.

    Attributes:
        load_E: (E,) int64.
        dropped: scalar, float32; 0 without tokens.
        entropy: scalar, float32, in nats; None without logits.
    """

    load_E: Tensor
    dropped: Tensor
    entropy: Tensor | None


@torch.no_grad()
def routing_statistics(
    experts_TK: Tensor,
    num_experts: int,
    *,
    logits_TE: Tensor | None = None,
    mask: Tensor | None = None,
) -> RoutingStatistics:
    """Load, dropped share and entropy of a routing; see the module's docstring.

    Args:
        experts_TK: (T, K) int32 or int64.
        num_experts: E.
        logits_TE: router logits, for the entropy.
        mask: (T,) or (batch, sequence); tokens where it is 0 or False do not count.

    Raises:
        ValueError: a shape that does not fit.
    """
    tokens, top_k = experts_TK.shape
    counted_T = None if mask is None else mask.reshape(-1) != 0
    if counted_T is not None and counted_T.numel() != tokens:
        raise ValueError(f"mask has {counted_T.numel()} tokens; expected {tokens} as experts_TK")
    if logits_TE is not None and logits_TE.shape[0] != tokens:
        raise ValueError(
            f"logits_TE has shape {tuple(logits_TE.shape)}; expected ({tokens}, E) as experts_TK"
        )
    inside = (experts_TK >= 0) & (experts_TK < num_experts)
    if counted_T is not None:
        inside = inside & counted_T[:, None]
    load = experts_TK.new_zeros(num_experts, dtype=torch.int64)
    chosen = torch.where(inside, experts_TK, 0).long()
    load.scatter_add_(0, chosen.reshape(-1), inside.reshape(-1).long())
    if counted_T is None:
        rows = load.new_ones(()) * tokens
    else:
        rows = counted_T.sum()
    choices = rows.float() * top_k
    dropped = (choices - inside.sum()) / choices.clamp(min=1)
    return RoutingStatistics(load, dropped, _entropy(logits_TE, counted_T, rows))


def _entropy(logits_TE: Tensor | None, counted_T: Tensor | None, rows: Tensor) -> Tensor | None:
    if logits_TE is None:
        return None
    total = logits_TE.new_zeros((), dtype=torch.float32)
    for piece in pieces(logits_TE.shape[0]):
        log_p = logits_TE[piece].float().log_softmax(-1)
        each = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
        total += (each if counted_T is None else torch.where(counted_T[piece], each, 0.0)).sum()
    return total / rows.clamp(min=1)
