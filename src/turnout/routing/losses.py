"""Auxiliary losses of MoE training, without the memory that their originals take.

    load balancing   E * sum over e of f[e] * P[e]
    Switch           E^2 * mean over groups and e of f[g, e] * P[g, e]
    router z         mean of logsumexp(z)^2

f is the share of tokens that chose an expert (no gradient), P the mean of softmax(z). Equal in
value and gradient to `load_balancing_loss_func` of transformers' Mixtral (and of all that copy it)
and to `load_balancing_loss_func` and `router_z_loss_func` of its Switch. The originals keep the
softmax of every layer, and Switch a one-hot of (T, K, E), for the backward pass; here rows are
taken in pieces, so that beyond the logits and their gradient only O(T*K + E) is kept. Nothing waits
for the device.

Legend: G groups (sequences), T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 4096  # rows that are worked on together


def pieces(rows: int) -> Iterator[slice]:
    """The rows in runs of at most PIECE."""
    for first in range(0, rows, PIECE):
        yield slice(first, min(first + PIECE, rows))


def _tiles(groups: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """The rows of all groups in tiles of at most PIECE: of several short groups, or of one."""
    step = max(1, PIECE // max(tokens, 1))
    for first in range(0, groups, step):
        for piece in pieces(tokens):
            yield slice(first, min(first + step, groups)), piece


class _ProbabilitySums(torch.autograd.Function):
    """sum over t of weight[t] * softmax(z[g, t]): (G, T, E) to (G, E), float32 or wider."""

    @staticmethod
    def forward(ctx: Any, logits_GTE: Tensor, weight_T: Tensor | None) -> Tensor:
        groups, tokens, experts = logits_GTE.shape
        wide = torch.promote_types(logits_GTE.dtype, torch.float32)
        sums = logits_GTE.new_zeros(groups, experts, dtype=wide)
        for some, piece in _tiles(groups, tokens):
            p = logits_GTE[some, piece].softmax(-1).to(wide)
            if weight_T is not None:
                p = p * weight_T[piece, None].to(wide)
            sums[some] += p.sum(1)
        ctx.save_for_backward(logits_GTE, weight_T)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums_GE: Tensor) -> tuple[Tensor, None]:
        logits, weight_T = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for some, piece in _tiles(*logits.shape[:2]):
            p, dsums = logits[some, piece].softmax(-1).to(dsums_GE.dtype), dsums_GE[some, None]
            dz = p * (dsums - (p * dsums).sum(-1, keepdim=True))
            if weight_T is not None:
                dz *= weight_T[piece, None].to(dz.dtype)
            dlogits[some, piece] = dz.to(dlogits.dtype)
        return dlogits, None


def _chosen_counts(
    logits_TE: Tensor, top_k: int, experts_TK: Tensor | None, weight_T: Tensor | None
) -> Tensor:
    """(E,) weighted count of the tokens that chose each expert."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    kind = torch.int64 if weight_T is None else wide
    counts = logits_TE.new_zeros(logits_TE.shape[1], dtype=kind)
    for piece in pieces(logits_TE.shape[0]):
        if experts_TK is None:
            chosen = logits_TE[piece].detach().softmax(-1).topk(top_k, dim=-1).indices
        else:
            chosen = experts_TK[piece].long()
        one = counts.new_ones(chosen.shape)
        if weight_T is not None:
            one = weight_T[piece, None].to(wide).expand_as(chosen)
        # whole numbers add up exactly, in any order
        counts.scatter_add_(0, chosen.reshape(-1), one.reshape(-1))
    return counts.to(wide)


def _check_logits(logits: Sequence[Tensor], top_k: int) -> None:
    if isinstance(logits, Tensor) or not len(logits):
        raise ValueError(
            f"logits is {type(logits).__name__}; expected the router logits (T, E) of at least one "
            "layer, as a sequence. For one layer pass (logits,)"
        )
    for layer, z in enumerate(logits):
        if z.dim() != 2 or not z.is_floating_point() or z.shape[1] != logits[0].shape[1]:
            raise ValueError(
                f"logits[{layer}] has shape {tuple(z.shape)} and dtype {z.dtype}; expected a float "
                f"tensor (T, {logits[0].shape[-1]}) as the first layer's"
            )
    if not 1 <= top_k <= logits[0].shape[1]:
        raise ValueError(f"top_k is {top_k}; expected 1 to {logits[0].shape[1]}, the experts")


def load_balancing_loss(
    logits: Sequence[Tensor],
    top_k: int,
    *,
    mask: Tensor | None = None,
    experts: Sequence[Tensor] | None = None,
) -> Tensor:
    """E * sum over e of f[e] * P[e], over the tokens of all layers together.

    Args:
        logits: router logits (T, E) of each layer.
        top_k: K; the K largest probabilities count as chosen.
        mask: (T,) or (batch, sequence) weights of the tokens, 0 for padding; the same for each
            layer.
        experts: (T, K) indices of each layer, counted instead of a top-k.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: a shape that does not fit.

    Source: Switch Transformer, arXiv:2101.03961, equations 4 to 6; `load_balancing_loss_func` of
    transformers' `modeling_mixtral`.
    """
    _check_logits(logits, top_k)
    weight_T = None if mask is None else mask.reshape(-1)
    if weight_T is not None and any(weight_T.numel() != z.shape[0] for z in logits):
        raise ValueError(
            f"mask has {weight_T.numel()} tokens; expected {logits[0].shape[0]} as each layer"
        )
    num_experts = logits[0].shape[1]
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    counts, sums = (logits[0].new_zeros(num_experts, dtype=wide) for _ in range(2))
    for layer, z in enumerate(logits):
        given = None if experts is None else experts[layer]
        counts = counts + _chosen_counts(z, top_k, given, weight_T)
        sums = sums + _ProbabilitySums.apply(z.unsqueeze(0), weight_T)[0]
    rows: Tensor | int = sum(z.shape[0] for z in logits)
    if weight_T is not None:
        rows = weight_T.to(wide).sum() * len(logits)
    return (counts / rows * (sums / rows)).sum() * num_experts


def switch_load_balancing_loss(logits_GTE: Tensor, experts_GTK: Tensor) -> Tensor:
    """E^2 * mean over groups and experts of f[g, e] * P[g, e].

    Args:
        logits_GTE: router logits of one layer, (batch, sequence, E).
        experts_GTK: chosen experts, (batch, sequence) or (batch, sequence, K); an expert that is
            chosen twice by a token counts once.

    Raises:
        ValueError: a shape that does not fit.

    Source: Switch Transformer, arXiv:2101.03961; `load_balancing_loss_func` of transformers'
    `modeling_switch_transformers`, which is given the probabilities.
    """
    if logits_GTE.dim() != 3 or experts_GTK.shape[:2] != logits_GTE.shape[:2]:
        raise ValueError(
            f"logits_GTE has shape {tuple(logits_GTE.shape)} and experts_GTK "
            f"{tuple(experts_GTK.shape)}; expected (batch, sequence, E) and (batch, sequence, K)"
        )
    groups, tokens, num_experts = logits_GTE.shape
    means = _ProbabilitySums.apply(logits_GTE, None) / tokens
    chosen = experts_GTK.reshape(groups, tokens, -1).long().sort(-1).values
    first = torch.ones_like(chosen)
    first[..., 1:] = (chosen[..., 1:] != chosen[..., :-1]).long()
    counts = chosen.new_zeros(groups, num_experts)
    counts.scatter_add_(1, chosen.flatten(1), first.flatten(1))
    shares = counts.to(means.dtype) / tokens
    return (shares * means).mean() * num_experts**2


class _ZLoss(torch.autograd.Function):
    """Sum over the rows of logsumexp(z)^2."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        z = logits_TE.new_empty(logits_TE.shape[0])
        for piece in pieces(logits_TE.shape[0]):
            z[piece] = logits_TE[piece].logsumexp(-1)
        ctx.save_for_backward(logits_TE, z)
        return z.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Tensor:
        logits, z = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for piece in pieces(logits.shape[0]):
            dlogits[piece] = logits[piece].softmax(-1) * (2 * z[piece] * dloss)[:, None]
        return dlogits


def router_z_loss(logits: Tensor) -> Tensor:
    """mean over the tokens of logsumexp(z)^2, logits (..., E).

    Source: ST-MoE, arXiv:2202.08906; `router_z_loss_func` of transformers'
    `modeling_switch_transformers`.
    """
    rows = logits.flatten(0, -2)
    return _ZLoss.apply(rows) / rows.shape[0]
