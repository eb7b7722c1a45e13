"""Routing in one launch: device code. `fused.py` launches it, `rules.py` is the definition.

A thread has a token, its whole row of logits, and the best keys of what it has read (`network.py`).
A key is a number of 64 bits: the value's bits in an order that integers share with floats (NaN
above all), then the index, reversed, so that the lowest index wins a tie. Logits of 16 bits leave
room for the index in 32.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from turnout.routing.kernel_math import capped, exp, pointwise, quotient, rounded, shares
from turnout.routing.network import columns, exchanged, inserted, merged, sorting, tile_of

INDICES: tl.constexpr = tl.constexpr(1023)  # of a key's lowest bits
LOWEST: tl.constexpr = tl.constexpr(-2147483648)  # below the bits of every value


@triton.jit
def _ordered(x):
    """int32 that compares as the float32 does; 0.0 equals -0.0 and NaN is above infinity."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _key(ordered, index, NARROW: tl.constexpr):
    """The order of the value, then that of the index, the lowest first."""
    if NARROW:  # of 16 bits, the lowest are the same for all values of a sign
        key = (ordered & ~INDICES) | (index ^ INDICES)
    else:
        key = (ordered.to(tl.int64) << 32) | (index ^ INDICES).to(tl.int64)
    return key


@triton.jit
def _none(N: tl.constexpr, BLOCK_T: tl.constexpr, NARROW: tl.constexpr):
    """A list of keys below all others."""
    if NARROW:
        return (tl.full([BLOCK_T], LOWEST, tl.int32),) * N
    else:
        return (tl.full([BLOCK_T], LOWEST, tl.int64) << 32,) * N


@triton.jit
def _raw(rows, first, done, size, RULE: tl.constexpr):
    """The next `step` of `size` logits from index `first` (BLOCK_T,) on, as they lie: tiles that
    each thread loads at once."""
    STEP: tl.constexpr = RULE.step
    LOAD: tl.constexpr = RULE.load
    raw = ()
    for piece in tl.static_range(0, STEP, LOAD):
        inside = done + piece + tl.arange(0, LOAD)[None, :]
        raw = raw + (tl.load(rows + (first[:, None] + inside), mask=inside < size, other=0.0),)
    return raw


@triton.jit
def _values(raw, index, mask, bias_ptr, softcap, highest, total, RULE: tl.constexpr):
    """What the choice compares of a tile: the logits, or the scores and their bias."""
    values = capped(raw.to(tl.float32), softcap, raw.dtype, RULE)
    if not RULE.plain:
        if RULE.score == "softmax":
            values = exp(values - highest[:, None], RULE.libdevice)
            values = quotient(values, total[:, None], RULE.libdevice)
        else:
            values = pointwise(values, RULE)
        values = rounded(values, raw.dtype, RULE.native)
        if RULE.bias:
            values += tl.load(bias_ptr + index, mask=mask, other=0.0).to(tl.float32)
            values = rounded(values, raw.dtype, RULE.rounds)
    return values


@triton.jit
def _best(
    best, rows, first, size, bias_ptr, softcap, highest, total, RULE: tl.constexpr
):  # fmt: skip
    """The list with what is better among `size` experts from index `first` (BLOCK_T,) on.

    Cost: for W experts a sort, W maxima and a merge.
    """
    W: tl.constexpr = RULE.width
    STEP: tl.constexpr = RULE.step
    LOAD: tl.constexpr = RULE.load
    raw = _raw(rows, first, 0, size, RULE)
    for done in range(0, size, STEP):
        ahead = _raw(rows, first, done + STEP, size, RULE)  # here when it is their turn
        keys = ()
        for i in tl.static_range(STEP // LOAD):
            inside = done + i * LOAD + tl.arange(0, LOAD)[None, :]
            index = first[:, None] + inside
            values = _values(raw[i], index, inside < size, bias_ptr, softcap, highest, total, RULE)
            ordered = _ordered(values)
            if not RULE.even:
                ordered = tl.where(inside < size, ordered, LOWEST)
            keys = keys + columns(_key(ordered, index, RULE.narrow))
        for i in tl.static_range(0, STEP, W):
            best = merged(best, exchanged(keys[i : i + W], sorting(W)), W)
        raw = ahead
    return best


@triton.jit
def _larger(a, b):
    """NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _two_best(best, second):
    """The largest and the second largest of each row, from those of each column."""
    T: tl.constexpr = best.shape[0]
    n: tl.constexpr = best.shape[1]
    if n == 1:
        return tl.reshape(best, [T]), tl.reshape(second, [T])
    else:
        a, b = tl.split(tl.reshape(best, [T, n // 2, 2]))
        c, d = tl.split(tl.reshape(second, [T, n // 2, 2]))
        return _two_best(_larger(a, b), _larger(_smaller(a, b), _larger(c, d)))


@triton.jit
def _group_score(
    rows, first, bias_ptr, softcap, highest, total, DTYPE: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """The sum of the two best of a group (or its best), ordered."""
    STEP: tl.constexpr = RULE.step
    LOAD: tl.constexpr = RULE.load
    best = tl.full([first.shape[0], LOAD], float("-inf"), tl.float32)
    second = tl.full([first.shape[0], LOAD], float("-inf"), tl.float32)
    for done in range(0, RULE.size, STEP):
        raw = _raw(rows, first, done, RULE.size, RULE)
        for i in tl.static_range(STEP // LOAD):
            inside = done + i * LOAD + tl.arange(0, LOAD)[None, :]
            index = first[:, None] + inside
            values = _values(
                raw[i], index, inside < RULE.size, bias_ptr, softcap, highest, total, RULE
            )
            if not RULE.even:
                values = tl.where(inside < RULE.size, values, float("-inf"))
            second = _larger(second, _smaller(best, values))
            best = _larger(best, values)
    best, second = _two_best(best, second)
    score = best if RULE.group_max else rounded(best + second, DTYPE, RULE.rounds)
    return _ordered(score)


@triton.jit
def _in_best_groups(
    rows, bias_ptr, softcap, highest, total, DTYPE: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """The list of the best experts, where those outside of the best groups have the value 0 or
    -inf. Scores are computed twice: a row of them has no place to stay."""
    N: tl.constexpr = RULE.top_groups
    W: tl.constexpr = RULE.width
    ours = tl.zeros([rows.shape[0]], tl.int32)
    groups = _none(N, rows.shape[0], False)
    for g in range(RULE.groups):
        score = _group_score(
            rows, ours + g * RULE.size, bias_ptr, softcap, highest, total, DTYPE, RULE
        )
        groups = inserted(groups, _key(score, ours + g, False), N)
    kept = ()
    for i in tl.static_range(N):
        kept = kept + ((groups[i] & INDICES).to(tl.int32) ^ INDICES,)
    best = _none(W, rows.shape[0], False)
    for _ in range(N):
        best = _best(
            best, rows, kept[0] * RULE.size, RULE.size, bias_ptr, softcap, highest, total, RULE
        )
        kept = kept[1:] + (kept[0],)
    # Those outside are looked at where they may be chosen, which is almost never: of each group
    # the first, in whose order their keys fall.
    fill = _ordered(ours.to(tl.float32) + (0.0 if RULE.fill_zero else float("-inf")))
    if tl.max((best[RULE.top_k - 1] < _key(fill, ours, False)).to(tl.int32), 0) > 0:
        for g in range(RULE.groups):
            outside = ours == 0
            for i in tl.static_range(N):
                outside = outside & (kept[i] != g)
            keys = ()
            for i in tl.static_range(W):
                key = _key(
                    tl.where(outside & (i < RULE.size), fill, LOWEST),
                    ours + g * RULE.size + i,
                    False,
                )
                keys = keys + (key,)
            best = merged(best, keys, W)
    return best


@triton.jit
def _softmax_parts(rows, width, softcap, DTYPE: tl.constexpr, RULE: tl.constexpr):
    """The largest of `width` logits of each row and the sum of e^(z - largest)."""
    ours = tl.zeros([rows.shape[0]], tl.int32)
    STEP: tl.constexpr = RULE.step
    LOAD: tl.constexpr = RULE.load
    highest = tl.full([rows.shape[0], LOAD], float("-inf"), tl.float32)
    for done in range(0, width, STEP):
        raw = _raw(rows, ours, done, width, RULE)
        for i in tl.static_range(STEP // LOAD):
            inside = done + i * LOAD + tl.arange(0, LOAD)[None, :]
            z = capped(raw[i].to(tl.float32), softcap, DTYPE, RULE)
            highest = tl.maximum(highest, tl.where(inside < width, z, float("-inf")))
    highest = tl.max(highest, 1)
    total = tl.zeros([rows.shape[0], LOAD], tl.float32)
    for done in range(0, width, STEP):
        raw = _raw(rows, ours, done, width, RULE)
        for i in tl.static_range(STEP // LOAD):
            inside = done + i * LOAD + tl.arange(0, LOAD)[None, :]
            z = capped(raw[i].to(tl.float32), softcap, DTYPE, RULE)
            e = exp(z - highest[:, None], RULE.libdevice)
            total += tl.where(inside < width, e, 0.0)
    return highest, tl.sum(total, 1)


@triton.jit(do_not_specialize=["T", "steps"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    expert_scale_ptr,
    scale_ptr,
    given_ptr,
    experts_ptr,
    weights_ptr,
    always_ptr,
    counts_ptr,
    E,
    A,
    stride_t,
    softcap,
    eps,
    factor,
    T,
    steps,
    RULE: tl.constexpr,
):
    """Computes experts and weights of steps * block_t tokens, as `RouteSpec` says; and how many of
    them go to each expert, which is what sorting them begins with.

    Grid: blocks of tokens. Assumes E to 1024, T of 1 and more.
    Cost: T (E + A) reads, T K (8 + 4) bytes written; for 8 experts of a token about 31 exchanges
    of keys (K to 8).
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    K: tl.constexpr = RULE.top_k
    W: tl.constexpr = RULE.width
    BLOCK_T: tl.constexpr = RULE.block_t
    BLOCK_A: tl.constexpr = RULE.block_a
    BUCKETS: tl.constexpr = RULE.buckets
    block = tl.program_id(0).to(tl.int64)
    counts = tl.zeros([BUCKETS], tl.int32)
    for step in range(steps):
        t = (block * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        # a row past the end is read as the last, so that its indices stay in range
        rows = logits_ptr + tl.minimum(t, T - 1)[:, None] * stride_t
        highest = tl.zeros([BLOCK_T], tl.float32)
        total = tl.full([BLOCK_T], 1.0, tl.float32)
        if RULE.parts:
            highest, total = _softmax_parts(rows, E + A, softcap, dtype, RULE)
        k = tl.arange(0, W)[None, :]
        mask_k = (k < K) & (t < T)[:, None]
        if RULE.given:
            given = tl.load(given_ptr + t[:, None] * K + k, mask=mask_k, other=0)
            # judged before an int64 is narrowed
            chosen = tl.where((given < 0) | (given >= E), -1, given).to(tl.int32)
        else:
            if RULE.groups > 1:
                best = _in_best_groups(rows, bias_ptr, softcap, highest, total, dtype, RULE)
            else:
                best = _best(
                    _none(W, BLOCK_T, RULE.narrow),
                    rows,
                    tl.zeros([BLOCK_T], tl.int32),
                    E,
                    bias_ptr,
                    softcap,
                    highest,
                    total,
                    RULE,
                )
            chosen = (tile_of(best, W) & INDICES).to(tl.int32) ^ INDICES
            tl.store(experts_ptr + t[:, None] * K + k, chosen.to(tl.int64), mask=mask_k)
            if RULE.counted:
                SLOTS: tl.constexpr = BLOCK_T * W
                counts += tl.histogram(
                    tl.reshape(chosen, [SLOTS]), BUCKETS, mask=tl.reshape(mask_k, [SLOTS])
                )
        mask_c = mask_k & (chosen >= 0) & (chosen < E)
        z_c = tl.load(rows + chosen, mask=mask_c, other=0.0).to(tl.float32)
        z_c = capped(z_c, softcap, dtype, RULE)
        a = tl.arange(0, BLOCK_A)[None, :]
        mask_a = (a < A) & (t < T)[:, None]
        z_a = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
        if RULE.always:
            z_a = tl.load(rows + E + a, mask=mask_a, other=0.0).to(tl.float32)
            z_a = capped(z_a, softcap, dtype, RULE)
        _, _, u_c, u_a, _ = shares(z_c, z_a, mask_c, mask_a, highest, total, eps, dtype, RULE)
        f = factor
        if RULE.scale:
            f = factor * tl.load(scale_ptr).to(tl.float32)
        w = rounded(u_c * f, dtype, RULE.native)
        if RULE.expert_scale:
            w *= tl.load(expert_scale_ptr + chosen, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(weights_ptr + t[:, None] * K + k, w.to(weights_ptr.dtype.element_ty), mask=mask_k)
        if RULE.always:
            w_a = (u_a * f).to(always_ptr.dtype.element_ty)
            tl.store(always_ptr + t[:, None] * A + a, w_a, mask=mask_a)
    if RULE.counted:
        tl.store(counts_ptr + block * BUCKETS + tl.arange(0, BUCKETS), counts)
