"""The weighted sum over the top-k, in a fixed order and without atomics.

    out[t] = sum over k = 0..K-1 of weights[t, k] * y[row(t, k)]

Sums are float32 or wider. With unit weights this is also the backward of the gather. Dropped slots
add nothing, whatever their weight.

Legend: T tokens, K experts per token, S = T*K rows, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from turnout.kernel_facts import power_of_2
from turnout.launch import Launch
from turnout.ragged import Ragged


def _bias_dots(dout_TH: Tensor, bias_EH: Tensor, experts_TK: Tensor, ragged: Ragged) -> Tensor:
    """(T, K) dot products <dout[t], bias[expert(t, k)]>, zero for dropped slots."""
    tokens, top_k = ragged.row_TK.shape
    wide = torch.promote_types(dout_TH.dtype, torch.float32)
    kept_TK = ragged.kept_TK
    experts_TK = torch.where(kept_TK, experts_TK, 0)
    out = dout_TH.new_zeros(tokens, top_k, dtype=wide)
    for k in range(top_k):
        out[:, k] = (bias_EH[experts_TK[:, k]].to(wide) * dout_TH.to(wide)).sum(1)
    return out.masked_fill_(~kept_TK, 0)


@dataclass(frozen=True, slots=True)
class SlotDots:
    """What the gradients of the routing weights are summed from.

        dweights[t, k] = sum of dot[row(t, k)] + <dout[t], bias[expert(t, k)]>; zero where dropped

    Attributes:
        dot_SP: <d, h> of each row, in P parts.
        dout_TH: gradient of the output.
        bias_EH: the down projection's, if it has one.
        experts_TK: expert of each slot.
        dtype: of the result.
    """

    dot_SP: Tensor
    dout_TH: Tensor
    bias_EH: Tensor | None
    experts_TK: Tensor
    dtype: torch.dtype


def combine(y_SH: Tensor, ragged: Ragged, weights_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(S, H) rows to (T, H) tokens in `dtype`; None stands for unit weights."""
    if ragged.tiles is not None and dtype != torch.float64:
        out, _ = _launch(ragged, y_SH, weights_TK, dtype, None)
        assert out is not None
        return out
    tokens, top_k = ragged.row_TK.shape
    wide = torch.promote_types(y_SH.dtype, torch.float32)
    kept_TK = ragged.kept_TK
    out = y_SH.new_zeros(tokens, y_SH.shape[1], dtype=wide)
    if not y_SH.shape[0]:
        return out.to(dtype)
    for k in range(top_k):
        rows = y_SH[ragged.row_TK[:, k]].to(wide)
        if weights_TK is not None:
            rows = rows * weights_TK[:, k, None].to(wide)
        out += rows.masked_fill_(~kept_TK[:, k, None], 0)
    return out.to(dtype)


def slot_dots(dots: SlotDots, ragged: Ragged) -> Tensor:
    """(T, K) gradients of the routing weights."""
    if ragged.tiles is not None and dots.dtype != torch.float64:
        _, dweights = _launch(ragged, None, None, dots.dtype, dots)
        assert dweights is not None
        return dweights
    out = ragged.by_slot(dots.dot_SP.sum(1))
    if dots.bias_EH is not None:
        out = out + _bias_dots(dots.dout_TH, dots.bias_EH, dots.experts_TK, ragged)
    return out.to(dots.dtype)


def combine_and_dots(y_SH: Tensor, ragged: Ragged, dots: SlotDots) -> tuple[Tensor, Tensor]:
    """`combine` with unit weights in y's dtype and `slot_dots`, on a GPU in one launch."""
    if ragged.tiles is not None and torch.float64 not in (y_SH.dtype, dots.dtype):
        out, dweights = _launch(ragged, y_SH, None, y_SH.dtype, dots)
        assert out is not None
        assert dweights is not None
        return out, dweights
    return combine(y_SH, ragged, None, y_SH.dtype), slot_dots(dots, ragged)


@lru_cache(maxsize=1024)
def _plan(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    parts: int,
    summed: bool,
    weighted: bool,
    biased: bool,
) -> Launch:
    from turnout.experts.triton_movement import combine_kernel

    block = min(2048, power_of_2(hidden))
    constants = {
        "HAS_SUM": summed,
        "HAS_DOTS": parts > 0,
        "HAS_WEIGHT": weighted,
        "HAS_BIAS": biased,
        "TOP_K": top_k,
        "PARTS": power_of_2(parts),
        "BLOCK_H": block,
    }
    grid = (tokens, -(-hidden // block) if summed else 1, 1)
    warps = 8 if block > 1024 else 4
    return Launch(combine_kernel, grid, (hidden, experts, parts), constants, warps)


def _launch(
    ragged: Ragged,
    y_SH: Tensor | None,
    weights_TK: Tensor | None,
    dtype: torch.dtype,
    dots: SlotDots | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The sums and the routing weights' gradients, each if it was asked for."""
    tokens, top_k = ragged.row_TK.shape
    device = ragged.row_TK.device
    out = dot_SP = dout_TH = bias_EH = experts_TK = dweights = None
    hidden = parts = 0
    if y_SH is not None:
        hidden = y_SH.shape[1]
        out = torch.empty(tokens, hidden, dtype=dtype, device=device)
    if dots is not None:
        dot_SP, dout_TH, bias_EH = dots.dot_SP, dots.dout_TH, dots.bias_EH
        hidden, parts = dout_TH.shape[1], dot_SP.shape[1]
        bias_EH = None if bias_EH is None else bias_EH.contiguous()
        dout_TH = dout_TH.contiguous()
        experts_TK = dots.experts_TK.contiguous()
        dweights = torch.empty(tokens, top_k, dtype=dots.dtype, device=device)
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    _plan(
        tokens,
        top_k,
        ragged.num_experts,
        hidden,
        parts,
        y_SH is not None,
        weights_TK is not None,
        bias_EH is not None,
    )(
        ragged.offsets,
        y_SH,
        ragged.row_TK,
        weights_TK,
        out,
        dot_SP,
        dout_TH,
        bias_EH,
        experts_TK,
        dweights,
    )
    return out, dweights


def row_dots(a_SH: Tensor, b_TH: Tensor, ragged: Ragged) -> Tensor:
    """(T, K) dot products <a[row(t, k)], b[t]>, zero for dropped slots."""
    tokens, top_k = ragged.row_TK.shape
    wide = torch.promote_types(a_SH.dtype, torch.float32)
    out = a_SH.new_zeros(tokens, top_k, dtype=wide)
    if not a_SH.shape[0]:
        return out
    for k in range(top_k):
        out[:, k] = (a_SH[ragged.row_TK[:, k]].to(wide) * b_TH.to(wide)).sum(1)
    return out.masked_fill_(~ragged.kept_TK, 0)
