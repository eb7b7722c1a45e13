"""Device code of the portable grouped GEMM. `gemm_triton.py` launches it.

Legend: S rows, T tokens, E experts, M rows of a tile, N output width, K contraction, R LoRA rank
(padded), F intermediate. Every address is computed in int64.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from turnout.experts.triton_math import act, act_and_slope, dropout_factor, glu, glu_backward


@triton.jit
def _columns(pid_n, HALF, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr):
    """Columns of w of one tile. Paired: gate and up columns alternate, f and HALF + f."""
    if PAIRED:
        j = tl.arange(0, BLOCK_N)
        return pid_n * (BLOCK_N // 2) + j // 2 + (j % 2) * HALF
    return pid_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["num_tiles", "threshold"])
def rows_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    xa_ptr,
    b_ptr,
    z_ptr,
    h_ptr,
    dot_ptr,
    weight_ptr,
    slot_ptr,
    seed_ptr,
    tiles_ptr,
    offsets_ptr,
    N,
    K,
    R,
    HALF,
    stride_am,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    stride_br,
    stride_om,
    num_n,
    scale,
    threshold,
    keep_scale,
    num_tiles,
    EPILOGUE: tl.constexpr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    KEEP_Z: tl.constexpr,
    KEEP_H: tl.constexpr,
    DROP_INPUT: tl.constexpr,
    DROP_TAIL: tl.constexpr,
    TAG: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    AFTER: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    N_MAJOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes EPILOGUE(scale * a[row] @ w[e]^T + bias[e] + xa[row] @ b[e]^T) for one tile.

    Grid: (row tiles * column tiles), in groups of GROUP row tiles with the row fastest: programs
    that run together share a few column tiles of few experts' weights, which then stay in L2.
    Assumes: rows of one tile belong to one expert; xa carries the scaling; R is a multiple of 16.
    Cost: 2 S N (K + R) FLOPs; S K + E N K + S N elements, each once if L2 holds an expert.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * num_n)
    in_group = pid % (GROUP * num_n)
    rows_in_group = tl.minimum(GROUP, num_tiles - group * GROUP)
    tile, pid_n = group * GROUP + in_group % rows_in_group, in_group // rows_in_group
    expert = tl.load(tiles_ptr + tile)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + num_tiles + tile)
    last = tl.load(offsets_ptr + expert + 1)
    row = first + tl.arange(0, BLOCK_M)
    mask_m = row < last
    row64 = row.to(tl.int64)
    if GATHER:
        source = tl.load(slot_ptr + row64, mask=mask_m, other=0) // TOP_K
    else:
        source = tl.where(mask_m, row64, 0)
    expert64 = expert.to(tl.int64)
    column = _columns(pid_n, HALF, BLOCK_N, PAIRED)
    if PAIRED:
        mask_n = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N) // 2 < HALF
    else:
        mask_n = column < N
    # along a contiguous N the columns stay as they are, so that loads are wide, and are masked
    safe_n = column.to(tl.int64) if EVEN_N or N_MAJOR else tl.where(mask_n, column, 0).to(tl.int64)
    guard_n: tl.constexpr = N_MAJOR and not EVEN_N
    offs_k = tl.arange(0, BLOCK_K)

    a_rows = a_ptr + source[:, None] * stride_am
    w_rows = w_ptr + expert64 * stride_we + safe_n[None, :] * stride_wn
    steps = tl.cdiv(K, BLOCK_K)
    in_loop: tl.constexpr = HAS_TAIL and not DROP_TAIL and b_ptr.dtype == w_ptr.dtype
    if in_loop:
        xa_rows = xa_ptr + tl.where(mask_m, row64, 0)[:, None] * R
        b_rows = b_ptr + expert64 * stride_be + safe_n[None, :] * stride_bn
        main_steps = steps
        steps += tl.cdiv(R, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(steps):
        if in_loop:
            in_tail = step >= main_steps
            k = tl.where(in_tail, step - main_steps, step) * BLOCK_K + offs_k
            mask_k = k < tl.where(in_tail, R, K)
            mask_w = mask_k[:, None] & mask_n[None, :] if guard_n else mask_k[:, None]
            k64 = k.to(tl.int64)
            a_place = tl.where(in_tail, xa_rows, a_rows) + k64[None, :]
            stride_k = tl.where(in_tail, stride_br, stride_wk)
            w_place = tl.where(in_tail, b_rows, w_rows) + (k64 * stride_k)[:, None]
            a = tl.load(a_place, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_place, mask=mask_w, other=0.0)
        else:
            k = step * BLOCK_K + offs_k
            k64 = k.to(tl.int64)
            w_place = w_rows + (k64 * stride_wk)[:, None]
            if EVEN_K:
                a = tl.load(a_rows + k64[None, :])
                w = (
                    tl.load(w_place, mask=mask_n[None, :], other=0.0)
                    if guard_n
                    else tl.load(w_place)
                )
            else:
                mask_k = (k < K)[:, None]
                mask_w = mask_k & mask_n[None, :] if guard_n else mask_k
                a = tl.load(a_rows + k64[None, :], mask=(k < K)[None, :], other=0.0)
                w = tl.load(w_place, mask=mask_w, other=0.0)
        if DROP_INPUT:
            slot = tl.load(slot_ptr + row64, mask=mask_m, other=0)
            seed = tl.load(seed_ptr)
            a = (a * dropout_factor(slot, k, seed, TAG, threshold, keep_scale)).to(a.dtype)
        if PRECISION == "ieee":
            # a sum per step keeps float32 chains short; `acc +=` would be folded into the dot
            part = tl.dot(a, w.to(a.dtype), input_precision=PRECISION)
            acc = tl.fma(part, tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32), acc)
        else:
            acc = tl.dot(a, w.to(a.dtype), acc, input_precision=PRECISION)
    if HAS_TAIL and not in_loop:
        update = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for r in range(0, R, 16):
            offs_r = (r + tl.arange(0, 16)).to(tl.int64)
            xa = tl.load(xa_ptr + tl.where(mask_m, row64, 0)[:, None] * R + offs_r[None, :])
            b_base = b_ptr + expert64 * stride_be + safe_n[None, :] * stride_bn
            b = tl.load(b_base + offs_r[:, None] * stride_br, mask=mask_n[None, :], other=0.0)
            update = tl.dot(xa, b.to(xa.dtype), update, input_precision=PRECISION)
        if DROP_TAIL:
            slot = tl.load(slot_ptr + row64, mask=mask_m, other=0)
            seed = tl.load(seed_ptr)
            update *= dropout_factor(slot, column, seed, TAG, threshold, keep_scale)
        acc += update
    if HAS_SCALE:
        acc *= scale
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert64 * N + safe_n, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]

    mask = mask_m[:, None] & mask_n[None, :]
    if EPILOGUE == "none":
        place = row64[:, None] * stride_om + column.to(tl.int64)[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)
    elif EPILOGUE == "activate":
        EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
        if GATED:
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
            h = glu(gate, up, ACT, ALPHA, LIMIT, AFTER, UP_OFFSET, EXACT)
            f = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            mask_f = mask_m[:, None] & (f < HALF)[None, :]
            place = row64[:, None] * stride_om + f.to(tl.int64)[None, :]
            tl.store(out_ptr + place, h.to(out_ptr.dtype.element_ty), mask=mask_f)
            if KEEP_Z:
                if INTERLEAVED:
                    at = row64[:, None] * N + column.to(tl.int64)[None, :]
                    tl.store(z_ptr + at, acc.to(z_ptr.dtype.element_ty), mask=mask)
                else:
                    at = row64[:, None] * N + f.to(tl.int64)[None, :]
                    tl.store(z_ptr + at, gate.to(z_ptr.dtype.element_ty), mask=mask_f)
                    tl.store(z_ptr + at + HALF, up.to(z_ptr.dtype.element_ty), mask=mask_f)
        else:
            place = row64[:, None] * stride_om + column.to(tl.int64)[None, :]
            h = act(acc, ACT, ALPHA, EXACT).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, h, mask=mask)
            if KEEP_Z:
                tl.store(z_ptr + place, acc.to(z_ptr.dtype.element_ty), mask=mask)
    else:
        # in parts, so that z, h and dz of all columns are not live at once
        dot = tl.zeros([BLOCK_M], dtype=tl.float32)
        weight = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
        if HAS_WEIGHT:
            slot = tl.load(slot_ptr + row64, mask=mask_m, other=0)
            weight = tl.load(weight_ptr + slot, mask=mask_m, other=0.0).to(tl.float32)
        parts: tl.constexpr = 4 if not INTERLEAVED or BLOCK_N < 128 else BLOCK_N // 16
        width: tl.constexpr = BLOCK_N // parts
        for part in tl.static_range(parts):
            dot += _store_backward(
                _part(acc, part, parts, BLOCK_M, BLOCK_N),
                pid_n * BLOCK_N + part * width,
                row64,
                mask_m,
                weight[:, None],
                z_ptr,
                out_ptr,
                h_ptr,
                N,
                ACT,
                ALPHA,
                LIMIT,
                AFTER,
                UP_OFFSET,
                GATED,
                INTERLEAVED,
                KEEP_H,
                BLOCK_M,
                width,
            )
        tl.store(dot_ptr + row64 * num_n + pid_n, dot, mask=mask_m)


@triton.jit
def _part(x, AT: tl.constexpr, OF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Part AT of the columns, which are cut into OF (a power of two) of equal width."""
    if OF == 1:
        return x
    else:
        halves = tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        if AT < OF // 2:
            return _part(left, AT, OF // 2, BLOCK_M, BLOCK_N // 2)
        else:
            return _part(right, AT - OF // 2, OF // 2, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _store_backward(
    d,
    first,
    row64,
    mask_m,
    weight,
    z_ptr,
    out_ptr,
    h_ptr,
    N,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    AFTER: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores dz and h of these columns from d, the gradient of h; returns the row sums of d * h."""
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    column = first + tl.arange(0, WIDTH)
    mask = mask_m[:, None] & (column < N)[None, :]
    at = row64[:, None] * N + column[None, :]
    if GATED:
        if INTERLEAVED:
            # gate and up lie side by side: one wide load or store, split in registers
            both = 2 * first + tl.arange(0, 2 * WIDTH)
            z_at = row64[:, None] * (2 * N) + both[None, :]
            mask_z = mask_m[:, None] & (both < 2 * N)[None, :]
            z = tl.load(z_ptr + z_at, mask=mask_z, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(z, [BLOCK_M, WIDTH, 2]))
        else:
            z_at = row64[:, None] * (2 * N) + column[None, :]
            gate = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(z_ptr + z_at + N, mask=mask, other=0.0).to(tl.float32)
        dw = d * weight
        h, dgate, dup = glu_backward(gate, up, dw, ACT, ALPHA, LIMIT, AFTER, UP_OFFSET, EXACT)
        if INTERLEAVED:
            dz = tl.reshape(tl.join(dgate, dup), [BLOCK_M, 2 * WIDTH])
            tl.store(out_ptr + z_at, dz.to(out_ptr.dtype.element_ty), mask=mask_z)
        else:
            tl.store(out_ptr + z_at, dgate.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + z_at + N, dup.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        h, slope = act_and_slope(z, ACT, ALPHA, EXACT)
        dz = d * weight * slope
        tl.store(out_ptr + at, dz.to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP_H:
        tl.store(h_ptr + at, (h * weight).to(h_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, d * h, 0.0), 1)


@triton.jit(do_not_specialize=["threshold"])
def gram_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    weight_a_ptr,
    weight_b_ptr,
    slot_ptr,
    seed_ptr,
    offsets_ptr,
    N,
    K,
    stride_am,
    stride_bm,
    stride_oe,
    stride_on,
    stride_ok,
    num_n,
    num_k,
    E,
    threshold,
    keep_scale,
    EXPERT_FIRST: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    WEIGHT_A: tl.constexpr,
    WEIGHT_B: tl.constexpr,
    DROP_B: tl.constexpr,
    TAG: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Computes out[e, n, k] = sum over the rows of e of a[row, n] * b[row, k], one tile.

    Grid: (experts * n tiles * k tiles), the expert fastest (EXPERT_FIRST) where gathered rows are
    then shared in L2, else slowest, where the tiles of one expert share its rows. The row loop is
    sequential, so the sum has a fixed order.
    Cost: 2 S N K FLOPs; S (N * k tiles + K * n tiles) + E N K elements.
    """
    pid = tl.program_id(0)
    if EXPERT_FIRST:
        expert, tile = pid % E, pid // E
    else:
        expert, tile = pid // (num_k * num_n), pid % (num_k * num_n)
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    n = (tile // num_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % num_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = n < N, k < K
    n64, k64 = n.to(tl.int64), k.to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask_m = row < last
        row64 = row.to(tl.int64)
        if GATHER_A or GATHER_B or WEIGHT_A or WEIGHT_B or DROP_B:
            slot = tl.load(slot_ptr + row64, mask=mask_m, other=0)
        row_a = slot // TOP_K if GATHER_A else row64
        row_b = slot // TOP_K if GATHER_B else row64
        a = tl.load(
            a_ptr + row_a[:, None] * stride_am + n64[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + row_b[:, None] * stride_bm + k64[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        if WEIGHT_A:
            weight = tl.load(weight_a_ptr + slot, mask=mask_m, other=0.0).to(tl.float32)
            a = (a * weight[:, None]).to(a.dtype)
        if WEIGHT_B:
            weight = tl.load(weight_b_ptr + slot, mask=mask_m, other=0.0).to(tl.float32)
            b = (b * weight[:, None]).to(b.dtype)
        if DROP_B:
            seed = tl.load(seed_ptr)
            b = (b * dropout_factor(slot, k, seed, TAG, threshold, keep_scale)).to(b.dtype)
        if PRECISION == "ieee":
            part = tl.dot(tl.trans(a), b.to(a.dtype), input_precision=PRECISION)
            acc = tl.fma(part, tl.full([BLOCK_N, BLOCK_K], 1.0, tl.float32), acc)
        else:
            acc = tl.dot(tl.trans(a), b.to(a.dtype), acc, input_precision=PRECISION)
    place = expert.to(tl.int64) * stride_oe + n64[:, None] * stride_on + k64[None, :] * stride_ok
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, value, mask=mask_n[:, None] & mask_k[None, :])
