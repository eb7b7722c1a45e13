"""What the load-balancing loss asks of a layer's logits, and its gradient: device code.

`balance.py` launches it, `losses.py` is the definition.

Legend: T tokens, K experts per token, E experts.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from turnout.routing.kernel_math import exp, quotient

INDICES: tl.constexpr = tl.constexpr(1023)  # of a key's lowest bits


@triton.jit
def _scores(logits_ptr, t, index, E, stride_t, T, NARROW: tl.constexpr, LIBDEVICE: tl.constexpr):
    """softmax(z) of the rows t, with NARROW rounded to the logits' dtype; 0 beyond E."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    # a row past the end is read as the last
    rows = logits_ptr + tl.minimum(t, T - 1)[:, None] * stride_t
    z = tl.load(rows + index, mask=index < E, other=float("-inf")).to(tl.float32)
    e = exp(z - tl.max(z, 1)[:, None], LIBDEVICE)
    p = quotient(e, tl.sum(e, 1)[:, None], LIBDEVICE)
    return p.to(dtype).to(tl.float32) if NARROW else p


@triton.jit
def _weights(weight_ptr, t, T, WEIGHTED: tl.constexpr):
    """Of the tokens t, 0 past the end."""
    if WEIGHTED:
        return tl.load(weight_ptr + t, mask=t < T, other=0.0)
    else:
        return (t < T).to(tl.float32)


@triton.jit(do_not_specialize=["T", "steps"])
def balance_kernel(
    logits_ptr,
    weight_ptr,
    parts_ptr,
    E,
    stride_t,
    T,
    steps,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NARROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LIBDEVICE: tl.constexpr,
):
    """parts[b, 0, e] = sum over t of w[t] * [t chose e], parts[b, 1, e] = sum of w[t] * p[t, e].

    For the steps * BLOCK_T tokens of block b. A token chooses the K largest p, and of equal ones
    the lowest index.

    Grid: blocks of tokens. Assumes E to 1024 and T of 1 and more.
    Cost: T E reads; K comparisons of every score.
    """
    block = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_E)[None, :]
    chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for step in range(steps):
        t = (block * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        p = _scores(logits_ptr, t, index, E, stride_t, T, NARROW, LIBDEVICE)
        w = _weights(weight_ptr, t, T, WEIGHTED)[:, None]
        # keys differ: the bits of a score, which is not negative, then the index, reversed
        bits = tl.where(p != p, 0x7FFFFFFF, p.to(tl.int32, bitcast=True))
        if NARROW:  # of 16 bits, the lowest are zero
            key = tl.where(index < E, (bits & ~INDICES) | (index ^ INDICES), -1)
        else:
            wide = (bits.to(tl.int64) << 32) | (index ^ INDICES).to(tl.int64)
            key = tl.where(index < E, wide, -1)
        last = tl.max(key, 1)[:, None]
        for _ in range(TOP_K - 1):
            last = tl.max(tl.where(key < last, key, -1), 1)[:, None]
        chosen += tl.where(key >= last, w, 0.0)
        sums += p * w
    out = parts_ptr + block * 2 * BLOCK_E + tl.arange(0, BLOCK_E)
    tl.store(out, tl.sum(chosen, 0))
    tl.store(out + BLOCK_E, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["T"])
def balance_backward_kernel(
    logits_ptr,
    weight_ptr,
    dsums_ptr,
    dlogits_ptr,
    E,
    stride_t,
    T,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NARROW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LIBDEVICE: tl.constexpr,
):
    """dz[t, e] = w[t] * p[t, e] * (dsums[e] - sum over i of p[t, i] * dsums[i]).

    Grid: blocks of BLOCK_T tokens. Assumes as above. Cost: T E reads, T E written.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    index = tl.arange(0, BLOCK_E)[None, :]
    p = _scores(logits_ptr, t, index, E, stride_t, T, NARROW, LIBDEVICE)
    w = _weights(weight_ptr, t, T, WEIGHTED)[:, None]
    dsums = tl.load(dsums_ptr + index, mask=index < E, other=0.0)
    dz = p * (dsums - tl.sum(p * dsums, 1)[:, None]) * w
    mask = (index < E) & (t < T)[:, None]
    tl.store(dlogits_ptr + t[:, None] * E + index, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)
