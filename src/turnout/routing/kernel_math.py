"""Scores and weights of tiles of logits: device code of both of the router's kernels.

Everything is float32, rounded to the logits' dtype after each operation where a rule scores in it.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def exp(x, LIBDEVICE: tl.constexpr):
    """CUDA's own e^x, so that scores have PyTorch's bits; the interpreter has NumPy's."""
    return libdevice.exp(x) if LIBDEVICE else tl.exp(x)


@triton.jit
def _log1p(x, LIBDEVICE: tl.constexpr):
    if LIBDEVICE:
        return libdevice.log1p(x)
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def tanh(x, LIBDEVICE: tl.constexpr):
    """CUDA's own hyperbolic tangent."""
    if LIBDEVICE:
        return libdevice.tanh(x)
    # expm1(y) = (u - 1) * y / log(u) with u = e^y, and tanh(x) = -expm1(-2x) / (2 + expm1(-2x))
    y = -2.0 * tl.abs(x)
    u = tl.exp(y)
    m = tl.where(u == 1.0, y, (u - 1.0) * (y / tl.where(u == 1.0, 1.0, tl.log(u))))
    m = tl.where(y < -0.7, u - 1.0, m)
    return tl.where(x < 0, 1.0, -1.0) * m / (2.0 + m)


@triton.jit
def _reciprocal(d):
    """1 / d, rounded as IEEE 754 does, for 2^-2 <= d < 2^126 or infinite or NaN.

    As `rcp.rn`, without its branch for other numbers: a branch per number leaves a thread nothing
    to do while it waits.
    """
    r = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [d], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.where(d < float("inf"), tl.fma(r, tl.fma(-d, r, 1.0), r), r)


@triton.jit
def sigmoid(x, LIBDEVICE: tl.constexpr):
    """1 / (1 + e^-x)."""
    if LIBDEVICE:
        # a quarter of the denominator, so that its reciprocal is no subnormal number
        return _reciprocal(tl.fma(libdevice.exp(-x), 0.25, 0.25)) * 0.25
    return tl.div_rn(1.0 + tl.zeros_like(x), 1.0 + tl.exp(-x))


@triton.jit
def quotient(a, b, LIBDEVICE: tl.constexpr):
    """a / b for a column b of 1 or more: one division a row, the rest without a branch.

    The quotient by the reciprocal is one bit off at most; its remainder, which is exact, says so.
    """
    if LIBDEVICE:
        r = _reciprocal(b)
        q = a * r
        return tl.fma(tl.fma(-q, b, a), r, q)
    return tl.div_rn(a, b + tl.zeros_like(a))


@triton.jit
def rounded(x, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Where a rule computes in the logits' dtype, each of its operations rounds to it."""
    return x.to(DTYPE).to(tl.float32) if NATIVE else x


@triton.jit
def capped(z, softcap, DTYPE: tl.constexpr, RULE: tl.constexpr):
    """softcap * tanh(z / softcap)."""
    if RULE.cap:
        z = rounded(z / softcap, DTYPE, RULE.native)
        z = rounded(tanh(z, RULE.libdevice), DTYPE, RULE.native)
        z = rounded(z * softcap, DTYPE, RULE.native)
    return z


@triton.jit
def pointwise(z, RULE: tl.constexpr):
    """Sigmoid, or sqrt(softplus)."""
    if RULE.score == "sigmoid":
        return sigmoid(z, RULE.libdevice)
    # a minimum would turn NaN into 20
    low = tl.where(z > 20.0, 20.0, z)
    soft = tl.where(z > 20.0, z, _log1p(exp(low, RULE.libdevice), RULE.libdevice))
    return tl.sqrt_rn(soft)


@triton.jit
def _log_sigmoid(z, LIBDEVICE: tl.constexpr):
    return tl.minimum(z, 0.0) - _log1p(exp(-tl.abs(z), LIBDEVICE), LIBDEVICE)


@triton.jit
def shares(
    z_c, z_a, mask_c, mask_a, highest, total, eps, DTYPE: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """Scores and weights before any scale of the chosen and the always-on; and the denominator.

    `highest` and `total` are the parts of a softmax over the whole row.
    """
    LIBDEVICE: tl.constexpr = RULE.libdevice
    NATIVE: tl.constexpr = RULE.native
    if RULE.score == "softmax":
        s_c = rounded(exp(z_c - highest[:, None], LIBDEVICE) / total[:, None], DTYPE, NATIVE)
        s_a = rounded(exp(z_a - highest[:, None], LIBDEVICE) / total[:, None], DTYPE, NATIVE)
    else:
        s_c = rounded(pointwise(z_c, RULE), DTYPE, NATIVE)
        s_a = rounded(pointwise(z_a, RULE), DTYPE, NATIVE)
    s_c, s_a = tl.where(mask_c, s_c, 0.0), tl.where(mask_a, s_a, 0.0)
    den = tl.full(highest.shape, 1.0, tl.float32)
    if RULE.log:
        # as softmax over the logarithms of the scores: no 0/0 when all of them underflow
        if RULE.score == "softmax":
            l_c, l_a = z_c, z_a
        else:
            l_c = rounded(_log_sigmoid(z_c, LIBDEVICE), DTYPE, NATIVE)
            l_a = rounded(_log_sigmoid(z_a, LIBDEVICE), DTYPE, NATIVE)
        l_c, l_a = tl.where(mask_c, l_c, float("-inf")), tl.where(mask_a, l_a, float("-inf"))
        top = tl.maximum(tl.max(l_c, 1), tl.max(l_a, 1)) if RULE.always else tl.max(l_c, 1)
        e_c = exp(l_c - top[:, None], LIBDEVICE)
        e_a = exp(l_a - top[:, None], LIBDEVICE)
        whole = tl.sum(e_c, 1) + (tl.sum(e_a, 1) if RULE.always else 0.0)
        u_c, u_a = e_c / whole[:, None], e_a / whole[:, None]
    elif RULE.norm:
        den = rounded(tl.sum(s_c, 1), DTYPE, NATIVE)
        if RULE.always:
            den = rounded(den + rounded(tl.sum(s_a, 1), DTYPE, NATIVE), DTYPE, NATIVE)
        den = tl.where(den < eps, eps, den) if RULE.clamp else rounded(den + eps, DTYPE, NATIVE)
        u_c, u_a = s_c / den[:, None], s_a / den[:, None]
    else:
        u_c, u_a = s_c, s_a
    u_c = tl.where(mask_c, rounded(u_c, DTYPE, NATIVE), 0.0)
    u_a = tl.where(mask_a, rounded(u_a, DTYPE, NATIVE), 0.0)
    return s_c, s_a, u_c, u_a, den
