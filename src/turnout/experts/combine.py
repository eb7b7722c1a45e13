"""The weighted sum over the top-k, in a fixed order and without atomics.

    out[t] = sum over k = 0..K-1 of weights[t, k] * y[row(t, k)]

Sums are float32 or wider. With unit weights this is also the backward of the gather. Dropped slots
add nothing, whatever their weight.

Legend: T tokens, K experts per token, S = T*K rows, H hidden.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from turnout.experts.triton_launch import Launcher
from turnout.ragged import Ragged


def combine(y_SH: Tensor, ragged: Ragged, weights_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(S, H) rows to (T, H) tokens in `dtype`; None stands for unit weights."""
    tokens, top_k = ragged.row_TK.shape
    if ragged.tiles is not None and dtype != torch.float64:
        return _launch_combine(y_SH, ragged, weights_TK, dtype)
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


def _launch_combine(
    y_SH: Tensor, ragged: Ragged, weights_TK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (tokens, top_k), hidden = ragged.row_TK.shape, y_SH.shape[1]
    out = y_SH.new_empty(tokens, hidden, dtype=dtype)
    block = min(2048, 1 << max(0, hidden - 1).bit_length())
    arguments = (
        y_SH,
        ragged.row_TK,
        None if weights_TK is None else weights_TK.contiguous(),
        ragged.offsets,
        out,
        hidden,
        ragged.num_experts,
    )
    constants = {"TOP_K": top_k, "HAS_WEIGHT": weights_TK is not None, "BLOCK_H": block}
    grid = (tokens, -(-hidden // block), 1)
    launcher()(grid, arguments, constants, 4 if block <= 1024 else 8, 1, y_SH)
    return out


@cache
def launcher() -> Launcher:
    """Of `combine_kernel`."""
    from turnout.experts.triton_kernels import combine_kernel

    return Launcher(combine_kernel)


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


def bias_dots(dout_TH: Tensor, bias_EH: Tensor, experts_TK: Tensor, ragged: Ragged) -> Tensor:
    """(T, K) dot products <dout[t], bias[expert(t, k)]>, zero for dropped slots."""
    tokens, top_k = ragged.row_TK.shape
    wide = torch.promote_types(dout_TH.dtype, torch.float32)
    kept_TK = ragged.kept_TK
    experts_TK = torch.where(kept_TK, experts_TK, 0)
    out = dout_TH.new_zeros(tokens, top_k, dtype=wide)
    for k in range(top_k):
        out[:, k] = (bias_EH[experts_TK[:, k]].to(wide) * dout_TH.to(wide)).sum(1)
    return out.masked_fill_(~kept_TK, 0)
