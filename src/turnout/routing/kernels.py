"""Routing in one launch: device code. `fused.py` launches it, `rules.py` is the definition.

Selection works on keys of 64 bits: the score's bits in an order that integers share with floats
(NaN above all), then the index, reversed, so that the lowest index wins a tie. K times the largest
key is taken and struck out; no key is ever out of range.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _exp(x, LIBDEVICE: tl.constexpr):
    """CUDA's own e^x, so that scores have PyTorch's bits; the interpreter has NumPy's."""
    return libdevice.exp(x) if LIBDEVICE else tl.exp(x)


@triton.jit
def _log1p(x, LIBDEVICE: tl.constexpr):
    if LIBDEVICE:
        return libdevice.log1p(x)
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _tanh(x, LIBDEVICE: tl.constexpr):
    if LIBDEVICE:
        return libdevice.tanh(x)
    # expm1(y) = (u - 1) * y / log(u) with u = e^y, and tanh(x) = -expm1(-2x) / (2 + expm1(-2x))
    y = -2.0 * tl.abs(x)
    u = tl.exp(y)
    m = tl.where(u == 1.0, y, (u - 1.0) * (y / tl.where(u == 1.0, 1.0, tl.log(u))))
    m = tl.where(y < -0.7, u - 1.0, m)
    return tl.where(x < 0, 1.0, -1.0) * m / (2.0 + m)


@triton.jit
def _sigmoid(x, LIBDEVICE: tl.constexpr):
    return tl.div_rn(1.0 + tl.zeros_like(x), 1.0 + _exp(-x, LIBDEVICE))


@triton.jit
def _round(x, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Where a rule computes in the logits' dtype, each of its operations rounds to it."""
    return x.to(DTYPE).to(tl.float32) if NATIVE else x


@triton.jit
def _capped(
    z,
    softcap,
    CAP: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    LIBDEVICE: tl.constexpr,
):
    if CAP:
        z = _round(_tanh(_round(z / softcap, DTYPE, NATIVE), LIBDEVICE), DTYPE, NATIVE)
        z = _round(z * softcap, DTYPE, NATIVE)
    return z


@triton.jit
def _pointwise(z, SCORE: tl.constexpr, LIBDEVICE: tl.constexpr):
    """Sigmoid, or sqrt(softplus)."""
    if SCORE == "sigmoid":
        return _sigmoid(z, LIBDEVICE)
    # a minimum would turn NaN into 20
    low = tl.where(z > 20.0, 20.0, z)
    soft = tl.where(z > 20.0, z, _log1p(_exp(low, LIBDEVICE), LIBDEVICE))
    return tl.sqrt_rn(soft)


@triton.jit
def _log_sigmoid(z, LIBDEVICE: tl.constexpr):
    return tl.minimum(z, 0.0) - _log1p(_exp(-tl.abs(z), LIBDEVICE), LIBDEVICE)


@triton.jit
def _ordered(x):
    """int64 that compares as the float32 does; 0.0 equals -0.0 and NaN is above infinity."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, key).to(tl.int64)


@triton.jit
def _keys(values, mask, index, BLOCK: tl.constexpr):
    """Keys whose maximum is the largest value with the lowest index; masked ones come last."""
    keys = _ordered(values) * 4294967296 + (BLOCK - 1 - index).to(tl.int64)
    return tl.where(mask, keys, -9223372036854775807)


@triton.jit
def _top(keys, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_T, BLOCK_K) indices of the K largest keys of each row, largest first; and the keys
    with those struck out."""
    place = tl.arange(0, BLOCK_K)[None, :]
    found = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in range(K):
        best = tl.max(keys, 1)
        index = (BLOCK - 1 - (best & 0xFFFFFFFF)).to(tl.int32)
        found = tl.where(place == k, index[:, None], found)
        keys = tl.where(keys == best[:, None], -9223372036854775807, keys)
    return found, keys


@triton.jit
def _mask_groups(
    values,
    mask_e,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_MAX: tl.constexpr,
    FILL_ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_TG: tl.constexpr,
):
    """The values, filled outside the best groups."""
    index = tl.arange(0, BLOCK_E)[None, :]
    group_of = index // SIZE
    groups = tl.arange(0, BLOCK_G)[None, :]
    group_scores = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    for g in range(GROUPS):
        inside = (group_of == g) & mask_e
        keys = _keys(values, inside, index, BLOCK_E)
        best = tl.max(keys, 1)
        first = tl.sum(tl.where(keys == best[:, None], values, 0.0), 1)
        if not GROUP_MAX:
            keys = tl.where(keys == best[:, None], -9223372036854775807, keys)
            second = tl.max(keys, 1)
            first += tl.sum(tl.where(keys == second[:, None], values, 0.0), 1)
            first = _round(first, DTYPE, ROUND)
        group_scores = tl.where(groups == g, first[:, None], group_scores)
    keys = _keys(group_scores, groups < GROUPS, groups, BLOCK_G)
    chosen, _ = _top(keys, TOP_GROUPS, BLOCK_G, BLOCK_T, BLOCK_TG)
    places = tl.arange(0, BLOCK_TG)[None, :]
    kept = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
    for k in range(TOP_GROUPS):
        group = tl.sum(tl.where(places == k, chosen, 0), 1)
        kept = kept | (group_of == group[:, None])
    return tl.where(kept, values, 0.0 if FILL_ZERO else float("-inf"))


@triton.jit
def _shares(
    z_c,
    z_a,
    mask_c,
    mask_a,
    highest,
    total,
    eps,
    SCORE: tl.constexpr,
    NORM: tl.constexpr,
    LOG: tl.constexpr,
    CLAMP: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    LIBDEVICE: tl.constexpr,
    HAS_ALWAYS: tl.constexpr,
):
    """Scores and weights before any scale of the chosen and the always-on; and the denominator."""
    if SCORE == "softmax":
        s_c = _round(_exp(z_c - highest[:, None], LIBDEVICE) / total[:, None], DTYPE, NATIVE)
        s_a = _round(_exp(z_a - highest[:, None], LIBDEVICE) / total[:, None], DTYPE, NATIVE)
    else:
        s_c = _round(_pointwise(z_c, SCORE, LIBDEVICE), DTYPE, NATIVE)
        s_a = _round(_pointwise(z_a, SCORE, LIBDEVICE), DTYPE, NATIVE)
    s_c, s_a = tl.where(mask_c, s_c, 0.0), tl.where(mask_a, s_a, 0.0)
    den = tl.full(highest.shape, 1.0, tl.float32)
    if LOG:
        # as softmax over the logarithms of the scores: no 0/0 when all of them underflow
        if SCORE == "softmax":
            l_c, l_a = z_c, z_a
        else:
            l_c = _round(_log_sigmoid(z_c, LIBDEVICE), DTYPE, NATIVE)
            l_a = _round(_log_sigmoid(z_a, LIBDEVICE), DTYPE, NATIVE)
        l_c, l_a = tl.where(mask_c, l_c, float("-inf")), tl.where(mask_a, l_a, float("-inf"))
        top = tl.maximum(tl.max(l_c, 1), tl.max(l_a, 1)) if HAS_ALWAYS else tl.max(l_c, 1)
        e_c = _exp(l_c - top[:, None], LIBDEVICE)
        e_a = _exp(l_a - top[:, None], LIBDEVICE)
        whole = tl.sum(e_c, 1) + (tl.sum(e_a, 1) if HAS_ALWAYS else 0.0)
        u_c, u_a = e_c / whole[:, None], e_a / whole[:, None]
    elif NORM:
        den = _round(tl.sum(s_c, 1), DTYPE, NATIVE)
        if HAS_ALWAYS:
            den = _round(den + _round(tl.sum(s_a, 1), DTYPE, NATIVE), DTYPE, NATIVE)
        den = tl.where(den < eps, eps, den) if CLAMP else _round(den + eps, DTYPE, NATIVE)
        u_c, u_a = s_c / den[:, None], s_a / den[:, None]
    else:
        u_c, u_a = s_c, s_a
    u_c = tl.where(mask_c, _round(u_c, DTYPE, NATIVE), 0.0)
    u_a = tl.where(mask_a, _round(u_a, DTYPE, NATIVE), 0.0)
    return s_c, s_a, u_c, u_a, den


@triton.jit
def _softmax_parts(z, mask, z_a, mask_a, LIBDEVICE: tl.constexpr, HAS_ALWAYS: tl.constexpr):
    """The largest logit of each row and the sum of e^(z - largest), the always-on ones included."""
    highest = tl.max(tl.where(mask, z, float("-inf")), 1)
    if HAS_ALWAYS:
        highest = tl.maximum(highest, tl.max(tl.where(mask_a, z_a, float("-inf")), 1))
    total = tl.sum(tl.where(mask, _exp(z - highest[:, None], LIBDEVICE), 0.0), 1)
    if HAS_ALWAYS:
        total += tl.sum(tl.where(mask_a, _exp(z_a - highest[:, None], LIBDEVICE), 0.0), 1)
    return highest, total


@triton.jit
def _row(
    logits_ptr,
    t,
    E,
    A,
    stride_t,
    T,
    softcap,
    SCORE: tl.constexpr,
    NATIVE: tl.constexpr,
    CAP: tl.constexpr,
    HAS_ALWAYS: tl.constexpr,
    LIBDEVICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Logits of tokens t as they lie and capped, selectable and always-on, their masks, and the
    parts of a softmax."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    mask_t = (t < T)[:, None]
    rows = logits_ptr + t[:, None] * stride_t
    index = tl.arange(0, BLOCK_E)[None, :]
    mask_e = (index < E) & mask_t
    a = tl.arange(0, BLOCK_A)[None, :]
    mask_a = (a < A) & mask_t
    raw = tl.load(rows + index, mask=mask_e, other=0.0).to(tl.float32)
    z = _capped(raw, softcap, CAP, dtype, NATIVE, LIBDEVICE)
    raw_a = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    if HAS_ALWAYS:
        raw_a = tl.load(rows + E + a, mask=mask_a, other=0.0).to(tl.float32)
    z_a = _capped(raw_a, softcap, CAP, dtype, NATIVE, LIBDEVICE)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = tl.full([BLOCK_T], 1.0, tl.float32)
    if SCORE == "softmax":
        highest, total = _softmax_parts(z, mask_e, z_a, mask_a, LIBDEVICE, HAS_ALWAYS)
    return raw, z, raw_a, z_a, mask_e, mask_a, highest, total


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
    K: tl.constexpr,
    SCORE: tl.constexpr,
    NATIVE: tl.constexpr,
    CAP: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUP_MAX: tl.constexpr,
    FILL_ZERO: tl.constexpr,
    NORM: tl.constexpr,
    LOG: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND_VALUES: tl.constexpr,
    HAS_EXPERT_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GIVEN: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_ALWAYS: tl.constexpr,
    LIBDEVICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_TG: tl.constexpr,
):
    """Computes experts and weights of steps * BLOCK_T tokens, as `RouteSpec` says; and how many of
    them go to each expert, which is what sorting them begins with.

    Grid: blocks of tokens. Assumes a row of logits fits the registers of a block (E to 1024).
    Cost: T (E + A) reads, T K (8 + 4) bytes written; K passes of comparisons over the row.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for step in range(steps):
        t = (block * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        _, z, _, z_a, mask_e, mask_a, highest, total = _row(
            logits_ptr,
            t,
            E,
            A,
            stride_t,
            T,
            softcap,
            SCORE,
            NATIVE,
            CAP,
            HAS_ALWAYS,
            LIBDEVICE,
            BLOCK_T,
            BLOCK_E,
            BLOCK_A,
        )
        rows = logits_ptr + t[:, None] * stride_t
        index = tl.arange(0, BLOCK_E)[None, :]
        a = tl.arange(0, BLOCK_A)[None, :]
        k = tl.arange(0, BLOCK_K)[None, :]
        mask_k = (k < K) & (t < T)[:, None]
        if GIVEN:
            given = tl.load(given_ptr + t[:, None] * K + k, mask=mask_k, other=0)
            # judged before an int64 is narrowed
            chosen = tl.where((given < 0) | (given >= E), -1, given).to(tl.int32)
        else:
            if SCORE == "softmax" and not HAS_BIAS and GROUPS == 1:
                values = z
            else:
                if SCORE == "softmax":
                    values = _exp(z - highest[:, None], LIBDEVICE)
                    values = tl.div_rn(values, total[:, None] + tl.zeros_like(z))
                else:
                    values = _pointwise(z, SCORE, LIBDEVICE)
                values = _round(values, dtype, NATIVE)
                if HAS_BIAS:
                    values += tl.load(bias_ptr + index, mask=index < E, other=0.0).to(tl.float32)
                    values = _round(values, dtype, ROUND_VALUES)
                if GROUPS > 1:
                    values = _mask_groups(
                        values,
                        mask_e,
                        SIZE,
                        GROUPS,
                        TOP_GROUPS,
                        GROUP_MAX,
                        FILL_ZERO,
                        dtype,
                        ROUND_VALUES,
                        BLOCK_T,
                        BLOCK_E,
                        BLOCK_G,
                        BLOCK_TG,
                    )
            # a row past the end takes part too, so that its indices stay in range
            keys = _keys(values, index < E, index, BLOCK_E)
            chosen, keys = _top(keys, K, BLOCK_E, BLOCK_T, BLOCK_K)
            tl.store(experts_ptr + t[:, None] * K + k, chosen.to(tl.int64), mask=mask_k)
            if COUNT:
                counts += tl.sum(((keys == -9223372036854775807) & mask_e).to(tl.int32), 0)
        mask_c = mask_k & (chosen >= 0) & (chosen < E)
        z_c = tl.load(rows + chosen, mask=mask_c, other=0.0).to(tl.float32)
        z_c = _capped(z_c, softcap, CAP, dtype, NATIVE, LIBDEVICE)
        _, _, u_c, u_a, _ = _shares(
            z_c,
            z_a,
            mask_c,
            mask_a,
            highest,
            total,
            eps,
            SCORE,
            NORM,
            LOG,
            CLAMP,
            dtype,
            NATIVE,
            LIBDEVICE,
            HAS_ALWAYS,
        )
        f = factor
        if HAS_SCALE:
            f = factor * tl.load(scale_ptr).to(tl.float32)
        w = _round(u_c * f, dtype, NATIVE)
        if HAS_EXPERT_SCALE:
            w *= tl.load(expert_scale_ptr + chosen, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(weights_ptr + t[:, None] * K + k, w.to(weights_ptr.dtype.element_ty), mask=mask_k)
        if HAS_ALWAYS:
            w_a = (u_a * f).to(always_ptr.dtype.element_ty)
            tl.store(always_ptr + t[:, None] * A + a, w_a, mask=mask_a)
    if COUNT:
        tl.store(counts_ptr + block * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    logits_ptr,
    experts_ptr,
    dweights_ptr,
    dalways_ptr,
    expert_scale_ptr,
    scale_ptr,
    dlogits_ptr,
    dexpert_ptr,
    dscale_ptr,
    E,
    A,
    stride_t,
    softcap,
    eps,
    factor,
    T,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    NATIVE: tl.constexpr,
    CAP: tl.constexpr,
    NORM: tl.constexpr,
    LOG: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_EXPERT_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ALWAYS: tl.constexpr,
    LIBDEVICE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes dlogits of BLOCK_T tokens, and this block's part of the scales' gradients.

    With g the weights' gradients, u = s / den and c the expert's scale:

        du = g * f * c        dc[e] = sum of g * f * u        df = sum of g * c * u
        ds = du / den - (sum of du * s) / den^2        (normalised; the second term with the clamp
                                                        inactive)
        dz = ds * s'(z), or for softmax s * (ds - sum of ds * s) over the whole row

    Grid: blocks of tokens. Cost: 2 T (E + A) elements. The sums over tokens are one row per block,
    to be added up: no atomics.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    z_raw, z, za_raw, z_a, mask_e, mask_a, highest, total = _row(
        logits_ptr,
        t,
        E,
        A,
        stride_t,
        T,
        softcap,
        SCORE,
        NATIVE,
        CAP,
        HAS_ALWAYS,
        LIBDEVICE,
        BLOCK_T,
        BLOCK_E,
        BLOCK_A,
    )
    rows = logits_ptr + t[:, None] * stride_t
    index = tl.arange(0, BLOCK_E)[None, :]
    a = tl.arange(0, BLOCK_A)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask_k = (k < K) & (t < T)[:, None]
    given = tl.load(experts_ptr + t[:, None] * K + k, mask=mask_k, other=0)
    chosen = tl.where((given < 0) | (given >= E), -1, given).to(tl.int32)
    mask_c = mask_k & (chosen >= 0) & (chosen < E)
    z_c = tl.load(rows + chosen, mask=mask_c, other=0.0).to(tl.float32)
    z_c = _capped(z_c, softcap, CAP, dtype, NATIVE, LIBDEVICE)
    s_c, s_a, u_c, u_a, den = _shares(
        z_c,
        z_a,
        mask_c,
        mask_a,
        highest,
        total,
        eps,
        SCORE,
        NORM,
        LOG,
        CLAMP,
        dtype,
        NATIVE,
        LIBDEVICE,
        HAS_ALWAYS,
    )
    g = tl.load(dweights_ptr + t[:, None] * K + k, mask=mask_c, other=0.0).to(tl.float32)
    g_a = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    if HAS_ALWAYS:
        g_a = tl.load(dalways_ptr + t[:, None] * A + a, mask=mask_a, other=0.0).to(tl.float32)
    f = factor
    if HAS_SCALE:
        f = factor * tl.load(scale_ptr).to(tl.float32)
    gc = g
    if HAS_EXPERT_SCALE:
        gc = g * tl.load(expert_scale_ptr + chosen, mask=mask_c, other=0.0).to(tl.float32)
    if HAS_SCALE:
        part = tl.sum(tl.sum(gc * u_c, 1) + tl.sum(g_a * u_a, 1), 0)
        tl.store(dscale_ptr + block, part * factor)
    du_c, du_a = gc * f, g_a * f
    if LOG:
        mean = tl.sum(du_c * u_c, 1) + tl.sum(du_a * u_a, 1)
        d_c = u_c * (du_c - mean[:, None])
        d_a = u_a * (du_a - mean[:, None])
        if SCORE == "sigmoid":
            d_c *= _sigmoid(-z_c, LIBDEVICE)
            d_a *= _sigmoid(-z_a, LIBDEVICE)
    else:
        if NORM:
            back = (tl.sum(du_c * s_c, 1) + tl.sum(du_a * s_a, 1)) / (den * den)
            if CLAMP:  # at the bound or below, the denominator is a constant
                back = tl.where(den > eps, back, 0.0)
            d_c = du_c / den[:, None] - back[:, None]
            d_a = du_a / den[:, None] - back[:, None]
        else:
            d_c, d_a = du_c, du_a
        d_c, d_a = tl.where(mask_c, d_c, 0.0), tl.where(mask_a, d_a, 0.0)
        if SCORE == "sigmoid":
            d_c, d_a = d_c * s_c * (1.0 - s_c), d_a * s_a * (1.0 - s_a)
        elif SCORE == "sqrtsoftplus":
            d_c *= _sigmoid(z_c, LIBDEVICE) * 0.5 / tl.maximum(s_c, 1e-30)
            d_a *= _sigmoid(z_a, LIBDEVICE) * 0.5 / tl.maximum(s_a, 1e-30)
    d_c, d_a = tl.where(mask_c, d_c, 0.0), tl.where(mask_a, d_a, 0.0)
    # spread the chosen over the row, one after the other
    dz = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    dc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for place in range(K):
        here = k == place
        expert = tl.sum(tl.where(here, chosen, 0), 1)
        hit = (index == expert[:, None]) & mask_e
        dz += tl.where(hit, tl.sum(tl.where(here, d_c, 0.0), 1)[:, None], 0.0)
        if HAS_EXPERT_SCALE:
            dc += tl.where(hit, tl.sum(tl.where(here, g * u_c, 0.0), 1)[:, None], 0.0)
    if HAS_EXPERT_SCALE:
        tl.store(
            dexpert_ptr + block * E + tl.arange(0, BLOCK_E),
            tl.sum(dc, 0) * f,
            mask=tl.arange(0, BLOCK_E) < E,
        )
    if SCORE == "softmax" and not LOG:
        s = tl.where(mask_e, _exp(z - highest[:, None], LIBDEVICE) / total[:, None], 0.0)
        mean = tl.sum(dz * s, 1) + tl.sum(d_a * s_a, 1)
        dz = s * (dz - mean[:, None])
        d_a = s_a * (d_a - mean[:, None])
    if CAP:
        slope = _tanh(z_raw / softcap, LIBDEVICE)
        dz *= 1.0 - slope * slope
        slope = _tanh(za_raw / softcap, LIBDEVICE)
        d_a *= 1.0 - slope * slope
    out = dlogits_ptr + t[:, None] * (E + A)
    tl.store(out + index, dz.to(dtype), mask=mask_e)
    if HAS_ALWAYS:
        tl.store(out + E + a, d_a.to(dtype), mask=mask_a)
