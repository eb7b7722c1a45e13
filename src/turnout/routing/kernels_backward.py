"""The gradient of routing in one launch: device code. `fused.py` launches it.

Legend: T tokens, K experts per token, E selectable experts, A always-on experts.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from turnout.routing.kernel_math import capped, exp, shares, sigmoid, tanh


@triton.jit
def _row(logits_ptr, t, E, A, stride_t, T, softcap, RULE: tl.constexpr):
    """Logits of tokens t as they lie and capped, selectable and always-on, their masks, and the
    parts of a softmax: the largest logit of each row and the sum of e^(z - largest)."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    LIBDEVICE: tl.constexpr = RULE.libdevice
    BLOCK_T: tl.constexpr = RULE.block_t
    BLOCK_A: tl.constexpr = RULE.block_a
    mask_t = (t < T)[:, None]
    rows = logits_ptr + t[:, None] * stride_t
    index = tl.arange(0, RULE.block_e)[None, :]
    mask_e = (index < E) & mask_t
    a = tl.arange(0, RULE.block_a)[None, :]
    mask_a = (a < A) & mask_t
    raw = tl.load(rows + index, mask=mask_e, other=0.0).to(tl.float32)
    z = capped(raw, softcap, dtype, RULE)
    raw_a = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    if RULE.always:
        raw_a = tl.load(rows + E + a, mask=mask_a, other=0.0).to(tl.float32)
    z_a = capped(raw_a, softcap, dtype, RULE)
    highest = tl.zeros([BLOCK_T], tl.float32)
    total = tl.full([BLOCK_T], 1.0, tl.float32)
    if RULE.score == "softmax":
        highest = tl.max(tl.where(mask_e, z, float("-inf")), 1)
        if RULE.always:
            highest = tl.maximum(highest, tl.max(tl.where(mask_a, z_a, float("-inf")), 1))
        total = tl.sum(tl.where(mask_e, exp(z - highest[:, None], LIBDEVICE), 0.0), 1)
        if RULE.always:
            total += tl.sum(tl.where(mask_a, exp(z_a - highest[:, None], LIBDEVICE), 0.0), 1)
    return raw, z, raw_a, z_a, mask_e, mask_a, highest, total


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
    RULE: tl.constexpr,
):
    """Computes dlogits of block_t tokens, and this block's part of the scales' gradients.

    With g the weights' gradients, u = s / den and c the expert's scale:

        du = g * f * c        dc[e] = sum of g * f * u        df = sum of g * c * u
        ds = du / den - (sum of du * s) / den^2        (normalised; the second term with the clamp
                                                        inactive)
        dz = ds * s'(z), or for softmax s * (ds - sum of ds * s) over the whole row

    Grid: blocks of tokens. Cost: 2 T (E + A) elements. The sums over tokens are one row per block,
    to be added up: no atomics.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    K: tl.constexpr = RULE.top_k
    BLOCK_T: tl.constexpr = RULE.block_t
    BLOCK_E: tl.constexpr = RULE.block_e
    BLOCK_A: tl.constexpr = RULE.block_a
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    z_raw, z, za_raw, z_a, mask_e, mask_a, highest, total = _row(
        logits_ptr, t, E, A, stride_t, T, softcap, RULE
    )
    rows = logits_ptr + t[:, None] * stride_t
    index = tl.arange(0, BLOCK_E)[None, :]
    a = tl.arange(0, BLOCK_A)[None, :]
    k = tl.arange(0, RULE.block_k)[None, :]
    mask_k = (k < K) & (t < T)[:, None]
    given = tl.load(experts_ptr + t[:, None] * K + k, mask=mask_k, other=0)
    chosen = tl.where((given < 0) | (given >= E), -1, given).to(tl.int32)
    mask_c = mask_k & (chosen >= 0) & (chosen < E)
    z_c = tl.load(rows + chosen, mask=mask_c, other=0.0).to(tl.float32)
    z_c = capped(z_c, softcap, dtype, RULE)
    s_c, s_a, u_c, u_a, den = shares(z_c, z_a, mask_c, mask_a, highest, total, eps, dtype, RULE)
    g = tl.load(dweights_ptr + t[:, None] * K + k, mask=mask_c, other=0.0).to(tl.float32)
    g_a = tl.zeros([BLOCK_T, BLOCK_A], tl.float32)
    if RULE.always:
        g_a = tl.load(dalways_ptr + t[:, None] * A + a, mask=mask_a, other=0.0).to(tl.float32)
    f = factor
    if RULE.scale:
        f = factor * tl.load(scale_ptr).to(tl.float32)
    gc = g
    if RULE.expert_scale:
        gc = g * tl.load(expert_scale_ptr + chosen, mask=mask_c, other=0.0).to(tl.float32)
    if RULE.scale:
        part = tl.sum(tl.sum(gc * u_c, 1) + tl.sum(g_a * u_a, 1), 0)
        tl.store(dscale_ptr + block, part * factor)
    du_c, du_a = gc * f, g_a * f
    if RULE.log:
        mean = tl.sum(du_c * u_c, 1) + tl.sum(du_a * u_a, 1)
        d_c = u_c * (du_c - mean[:, None])
        d_a = u_a * (du_a - mean[:, None])
        if RULE.score == "sigmoid":
            d_c *= sigmoid(-z_c, RULE.libdevice)
            d_a *= sigmoid(-z_a, RULE.libdevice)
    else:
        if RULE.norm:
            back = (tl.sum(du_c * s_c, 1) + tl.sum(du_a * s_a, 1)) / (den * den)
            if RULE.clamp:  # at the bound or below, the denominator is a constant
                back = tl.where(den > eps, back, 0.0)
            d_c = du_c / den[:, None] - back[:, None]
            d_a = du_a / den[:, None] - back[:, None]
        else:
            d_c, d_a = du_c, du_a
        d_c, d_a = tl.where(mask_c, d_c, 0.0), tl.where(mask_a, d_a, 0.0)
        if RULE.score == "sigmoid":
            d_c, d_a = d_c * s_c * (1.0 - s_c), d_a * s_a * (1.0 - s_a)
        elif RULE.score == "sqrtsoftplus":
            d_c *= sigmoid(z_c, RULE.libdevice) * 0.5 / tl.maximum(s_c, 1e-30)
            d_a *= sigmoid(z_a, RULE.libdevice) * 0.5 / tl.maximum(s_a, 1e-30)
    d_c, d_a = tl.where(mask_c, d_c, 0.0), tl.where(mask_a, d_a, 0.0)
    # spread the chosen over the row, one after the other
    dz = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    dc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for place in range(K):
        here = k == place
        expert = tl.sum(tl.where(here, chosen, 0), 1)
        hit = (index == expert[:, None]) & mask_e
        dz += tl.where(hit, tl.sum(tl.where(here, d_c, 0.0), 1)[:, None], 0.0)
        if RULE.expert_scale:
            dc += tl.where(hit, tl.sum(tl.where(here, g * u_c, 0.0), 1)[:, None], 0.0)
    if RULE.expert_scale:
        tl.store(
            dexpert_ptr + block * E + tl.arange(0, BLOCK_E),
            tl.sum(dc, 0) * f,
            mask=tl.arange(0, BLOCK_E) < E,
        )
    if RULE.score == "softmax" and not RULE.log:
        s = tl.where(mask_e, exp(z - highest[:, None], RULE.libdevice) / total[:, None], 0.0)
        mean = tl.sum(dz * s, 1) + tl.sum(d_a * s_a, 1)
        dz = s * (dz - mean[:, None])
        d_a = s_a * (d_a - mean[:, None])
    if RULE.cap:
        slope = tanh(z_raw / softcap, RULE.libdevice)
        dz *= 1.0 - slope * slope
        slope = tanh(za_raw / softcap, RULE.libdevice)
        d_a *= 1.0 - slope * slope
    out = dlogits_ptr + t[:, None] * (E + A)
    tl.store(out + index, dz.to(dtype), mask=mask_e)
    if RULE.always:
        tl.store(out + E + a, d_a.to(dtype), mask=mask_a)
