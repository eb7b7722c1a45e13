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

On a GPU with Triton, load balancing is a launch per layer and one for its gradient (`balance.py`);
of equal probabilities the lowest index is chosen there. Elsewhere small layers are taken together,
so the number of operations grows with the size of the logits and not with the number of layers.

Legend: G groups (sequences), T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.routing import balance

PIECE = 4096  # rows that are worked on together
ELEMENTS = 2**22  # and logits, in the load-balancing loss


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


def _widened(logits_TE: Tensor) -> bool:
    """CUDA's autocast, on in the forward pass alone, takes softmax and logsumexp
    in float32; the CPU's does not.
    """
    return logits_TE.is_cuda and torch.is_autocast_enabled("cuda")


def _softmax(rows_TE: Tensor, wide: bool) -> Tensor:
    dtype = torch.promote_types(rows_TE.dtype, torch.float32) if wide else None
    return rows_TE.softmax(-1, dtype=dtype)


class _ProbabilitySums(torch.autograd.Function):
    """sum over t of softmax(z[g, t]): (G, T, E) to (G, E), float32 or wider."""

    @staticmethod
    def forward(ctx: Any, logits_GTE: Tensor) -> Tensor:
        groups, tokens, experts = logits_GTE.shape
        ctx.wide = _widened(logits_GTE)
        wide = torch.promote_types(logits_GTE.dtype, torch.float32)
        sums = logits_GTE.new_zeros(groups, experts, dtype=wide)
        for some, piece in _tiles(groups, tokens):
            sums[some] += _softmax(logits_GTE[some, piece], ctx.wide).to(wide).sum(1)
        ctx.save_for_backward(logits_GTE)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums_GE: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for some, piece in _tiles(*logits.shape[:2]):
            p = _softmax(logits[some, piece], ctx.wide).to(dsums_GE.dtype)
            dsums = dsums_GE[some, None]
            dlogits[some, piece] = p * (dsums - (p * dsums).sum(-1, keepdim=True))
        return dlogits


def _groups(logits: Sequence[Tensor]) -> Iterator[slice]:
    """The layers in runs of one dtype and at most ELEMENTS together, or of one layer."""
    first = held = 0
    for layer, z in enumerate(logits):
        alike = z.dtype == logits[first].dtype and z.device == logits[first].device
        if layer > first and not (alike and held + z.numel() <= ELEMENTS):
            yield slice(first, layer)
            first = layer
            held = 0
        held += z.numel()
    yield slice(first, len(logits))


def _joined(layers: Sequence[Tensor]) -> Tensor:
    return layers[0] if len(layers) == 1 else torch.cat(tuple(layers))


def _runs(rows_TE: Tensor) -> Iterator[slice]:
    """The rows in runs of at most ELEMENTS."""
    step = max(1, ELEMENTS // rows_TE.shape[1])
    for first in range(0, rows_TE.shape[0], step):
        yield slice(first, min(first + step, rows_TE.shape[0]))


class _Balance(torch.autograd.Function):
    """(E,) weighted counts of the tokens that chose each expert and (E,) sums of softmax(z).

    Over all layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        top_k: int,
        weight_T: Tensor | None,
        experts: Sequence[Tensor] | None,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight_T, *logits)
        ctx.set_materialize_grads(False)
        ctx.wide = _widened(logits[0])
        ctx.in_kernels = experts is None and balance.takes(logits, top_k)
        if ctx.in_kernels:
            counts, sums = balance.sums(logits, top_k, weight_T, ctx.wide)
            ctx.mark_non_differentiable(counts)
            return counts, sums
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        sums = logits[0].new_zeros(logits[0].shape[1], dtype=wide)
        # whole numbers add up exactly, in any order
        counts = torch.zeros_like(sums, dtype=torch.int64 if weight_T is None else wide)
        one = counts.new_ones(())
        for group in _groups(logits):
            rows = _joined(logits[group])
            weight = _repeated(weight_T, rows)
            for run in _runs(rows):
                p = _softmax(rows[run], ctx.wide)
                if experts is None:
                    chosen = p.topk(top_k, dim=-1).indices
                else:
                    chosen = _joined(experts[group])[run].long()
                counted = one if weight is None else weight[run, None]
                counts.scatter_add_(0, chosen.flatten(), counted.expand_as(chosen).flatten())
                sums += p.sum(0, dtype=wide) if weight is None else (p * weight[run, None]).sum(0)
        counts = counts.to(wide)
        ctx.mark_non_differentiable(counts)
        return counts, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, dsums_E: Tensor) -> tuple[Tensor | None, ...]:
        weight_T, *logits = ctx.saved_tensors
        if ctx.in_kernels and balance.takes(logits, 1):
            return None, None, None, *balance.gradients(logits, weight_T, dsums_E, ctx.wide)
        found: list[Tensor] = []
        for group in _groups(logits):
            rows = _joined(logits[group])
            weight = _repeated(weight_T, rows)
            drows = torch.empty_like(rows)
            for run in _runs(rows):
                p = _softmax(rows[run], ctx.wide).to(dsums_E.dtype)
                weighted = p * dsums_E
                dz = weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
                drows[run] = dz if weight is None else dz.mul_(weight[run, None])
            found += drows.split([z.shape[0] for z in logits[group]])
        return None, None, None, *found


def _repeated(weight_T: Tensor | None, rows_TE: Tensor) -> Tensor | None:
    """The weights of the tokens for each of the layers that were joined."""
    if weight_T is None or weight_T.numel() == rows_TE.shape[0]:
        return weight_T
    return weight_T.repeat(rows_TE.shape[0] // weight_T.numel())


def _check_mask(mask: Tensor, logits: Sequence[Tensor]) -> None:
    for layer, z in enumerate(logits):
        if mask.numel() != z.shape[0]:
            raise ValueError(
                f"mask has {mask.numel()} tokens; expected {z.shape[0]}, as logits[{layer}]"
            )
    if mask.device != logits[0].device:
        raise ValueError(
            f"mask is on {mask.device}; expected {logits[0].device}, as the logits. Pass "
            "mask.to(logits[0].device)"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "mask wants a gradient; expected plain weights, as the loss has a gradient of the "
            "logits alone. Pass mask.detach()"
        )


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
            layer, on the logits' device, without a gradient.
        experts: (T, K) indices of each layer, counted instead of a top-k.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: a shape or a mask that does not fit.

    Source: Switch Transformer, arXiv:2101.03961, equations 4 to 6; `load_balancing_loss_func` of
    transformers' `modeling_mixtral`.
    """
    _check_logits(logits, top_k)
    num_experts = logits[0].shape[1]
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    weight_T = None
    if mask is not None:
        _check_mask(mask, logits)
        weight_T = mask.reshape(-1).to(wide)
    counts, sums = _Balance.apply(top_k, weight_T, experts, *logits)
    rows: Tensor | int = sum(z.shape[0] for z in logits)
    if weight_T is not None:
        rows = weight_T.sum() * len(logits)
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
    means = _ProbabilitySums.apply(logits_GTE) / tokens
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
        ctx.wide = _widened(logits_TE)
        wide = torch.promote_types(logits_TE.dtype, torch.float32) if ctx.wide else logits_TE.dtype
        z = logits_TE.new_empty(logits_TE.shape[0], dtype=wide)
        for piece in pieces(logits_TE.shape[0]):
            z[piece] = logits_TE[piece].to(wide).logsumexp(-1)
        ctx.save_for_backward(logits_TE, z)
        return z.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Tensor:
        logits, z = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for piece in pieces(logits.shape[0]):
            p = _softmax(logits[piece], ctx.wide)
            dlogits[piece] = p * (2 * z[piece] * dloss)[:, None]
        return dlogits


def router_z_loss(logits: Tensor) -> Tensor:
    """mean over the tokens of logsumexp(z)^2, logits (..., E).

    Source: ST-MoE, arXiv:2202.08906; `router_z_loss_func` of transformers'
    `modeling_switch_transformers`.
    """
    rows = logits.flatten(0, -2)
    return _ZLoss.apply(rows) / rows.shape[0]
