"""Device code that moves rows and adapters: what is not a product.

Legend: S rows, T tokens, E experts, H hidden, N and K widths, R LoRA rank. Every address is
computed in int64.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_kernel(
    source_ptr,
    out_ptr,
    E,
    N,
    K,
    stride_oe,
    stride_on,
    stride_ok,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copies source (E, K, N), contiguous, to out (E, N, K) whose innermost dim is the experts.

    Grid: (blocks of N, blocks of E, K). Cost: each element once. A Gram product that stored there
    itself would spend a sector on each element.
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)[:, None]
    k = tl.program_id(2).to(tl.int64)
    mask = (n < N) & (e < E)
    value = tl.load(source_ptr + (e * K + k) * N + n, mask=mask, other=0.0)
    place = e * stride_oe + n * stride_on + k * stride_ok
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _slot_dots(
    dot_ptr,
    row_ptr,
    dout_ptr,
    bias_ptr,
    experts_ptr,
    out_ptr,
    token,
    kept,
    parts,
    H,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[t, k] = sum of dot[row[t, k]] + <dout[t], bias[expert]>; zero where dropped."""
    part = tl.arange(0, PARTS)
    for k in range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k)
        used = row < kept
        total = tl.sum(tl.load(dot_ptr + row * parts + part, mask=used & (part < parts), other=0.0))
        if HAS_BIAS:
            expert = tl.load(experts_ptr + token * TOP_K + k, mask=used, other=0).to(tl.int64)
            acc = tl.zeros([BLOCK_H], dtype=tl.float32)
            for first in range(0, H, BLOCK_H):
                h = first + tl.arange(0, BLOCK_H)
                mask = used & (h < H)
                bias = tl.load(bias_ptr + expert * H + h, mask=mask, other=0.0).to(tl.float32)
                acc += bias * tl.load(dout_ptr + token * H + h, mask=mask, other=0.0)
            total += tl.sum(acc)
        tl.store(out_ptr + token * TOP_K + k, total.to(out_ptr.dtype.element_ty))


@triton.jit
def combine_kernel(
    offsets_ptr,
    y_ptr,
    row_ptr,
    weight_ptr,
    out_ptr,
    dot_ptr,
    dout_ptr,
    bias_ptr,
    experts_ptr,
    dweight_ptr,
    H,
    E,
    parts,
    HAS_SUM: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Computes out[t] = sum over k of weight[t, k] * y[row[t, k]], k in order, in float32, and the
    routing weights' gradients from their dot products; either or both.

    Grid: (tokens, column blocks). Assumes PARTS >= parts. Dropped slots (row past the kept rows)
    add nothing. Cost: S H reads, T H writes; S parts reads.
    """
    token = tl.program_id(0).to(tl.int64)
    kept = tl.load(offsets_ptr + E)
    if HAS_SUM:
        h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        mask_h = h < H
        acc = tl.zeros([BLOCK_H], dtype=tl.float32)
        for k in range(TOP_K):
            row = tl.load(row_ptr + token * TOP_K + k)
            value = tl.load(y_ptr + row * H + h, mask=mask_h & (row < kept), other=0.0)
            value = value.to(tl.float32)
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + token * TOP_K + k).to(tl.float32)
                value = value * tl.where(row < kept, weight, 0.0)
            acc += value
        tl.store(out_ptr + token * H + h, acc.to(out_ptr.dtype.element_ty), mask=mask_h)
    if HAS_DOTS and tl.program_id(1) == 0:
        _slot_dots(
            dot_ptr,
            row_ptr,
            dout_ptr,
            bias_ptr,
            experts_ptr,
            dweight_ptr,
            token,
            kept,
            parts,
            H,
            TOP_K,
            PARTS,
            HAS_BIAS,
            BLOCK_H,
        )


@triton.jit
def _pack_adapter(
    pid,
    a_ptr,
    b_ptr,
    a_out_ptr,
    b_out_ptr,
    E,
    R,
    num_in,
    num_out,
    stride_ae,
    stride_ar,
    stride_ai,
    stride_bo,
    stride_br,
    stride_be,
    RANK: tl.constexpr,
    A_RANK_LAST: tl.constexpr,
    B_RANK_LAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    blocks_in, blocks_out = tl.cdiv(num_in, BLOCK_I), tl.cdiv(num_out, BLOCK_O)
    if pid < E * blocks_in:
        expert = (pid // blocks_in).to(tl.int64)
        i = ((pid % blocks_in) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
        for first in range(0, RANK, 16):
            r = (first + tl.arange(0, 16)).to(tl.int64)
            mask_i = (i < num_in)[None, :]
            place = expert * stride_ae + r[:, None] * stride_ar + i[None, :] * stride_ai
            value = tl.load(a_ptr + place, mask=(r < R)[:, None] & mask_i, other=0.0)
            if A_RANK_LAST:
                at = (expert * num_in + i[None, :]) * RANK + r[:, None]
            else:
                at = (expert * RANK + r[:, None]) * num_in + i[None, :]
            tl.store(a_out_ptr + at, value.to(a_out_ptr.dtype.element_ty), mask=mask_i)
    else:
        pid -= E * blocks_in
        o = ((pid % blocks_out) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)[None, :, None]
        e = ((pid // blocks_out) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)[:, None, None]
        for first in range(0, RANK, BLOCK_R):
            r = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[None, None, :]
            mask = (o < num_out) & (e < E)
            place = o * stride_bo + r * stride_br + e * stride_be
            value = tl.load(b_ptr + place, mask=mask & (r < R), other=0.0)
            at = (e * num_out + o) * RANK + r if B_RANK_LAST else (e * RANK + r) * num_out + o
            tl.store(b_out_ptr + at, value.to(b_out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pack_kernel(
    a_ptr,
    b_ptr,
    a_out_ptr,
    b_out_ptr,
    a2_ptr,
    b2_ptr,
    a2_out_ptr,
    b2_out_ptr,
    E,
    programs,
    R,
    num_in,
    num_out,
    stride_ae,
    stride_ar,
    stride_ai,
    stride_bo,
    stride_br,
    stride_be,
    R2,
    num_in2,
    num_out2,
    stride_ae2,
    stride_ar2,
    stride_ai2,
    stride_bo2,
    stride_br2,
    stride_be2,
    RANK: tl.constexpr,
    A_RANK_LAST: tl.constexpr,
    B_RANK_LAST: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    RANK2: tl.constexpr,
    A_RANK_LAST2: tl.constexpr,
    B_RANK_LAST2: tl.constexpr,
    BLOCK_I2: tl.constexpr,
    BLOCK_O2: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    BLOCK_E2: tl.constexpr,
):
    """Copies adapters, A (E, R, I) and B (O, R, E), to (E, RANK, .) or (E, ., RANK), zero-padded.

    Grid: for each of one or two adapters (the second is absent where RANK2 is 0) experts * blocks
    of I, then blocks of O * blocks of E; `programs` are the first's. Cost: each element once.
    """
    pid = tl.program_id(0)
    if pid < programs:
        _pack_adapter(
            pid,
            a_ptr,
            b_ptr,
            a_out_ptr,
            b_out_ptr,
            E,
            R,
            num_in,
            num_out,
            stride_ae,
            stride_ar,
            stride_ai,
            stride_bo,
            stride_br,
            stride_be,
            RANK,
            A_RANK_LAST,
            B_RANK_LAST,
            BLOCK_I,
            BLOCK_O,
            BLOCK_R,
            BLOCK_E,
        )
    elif RANK2 > 0:
        _pack_adapter(
            pid - programs,
            a2_ptr,
            b2_ptr,
            a2_out_ptr,
            b2_out_ptr,
            E,
            R2,
            num_in2,
            num_out2,
            stride_ae2,
            stride_ar2,
            stride_ai2,
            stride_bo2,
            stride_br2,
            stride_be2,
            RANK2,
            A_RANK_LAST2,
            B_RANK_LAST2,
            BLOCK_I2,
            BLOCK_O2,
            BLOCK_R2,
            BLOCK_E2,
        )
