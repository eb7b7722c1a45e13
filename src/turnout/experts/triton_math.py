"""Activations, their derivatives and the dropout mask as jit functions, for every Triton kernel.

The formulas are those of `turnout.specs.Activation`; `epilogues.py` is the same in PyTorch. All are
float32 in and out. Constants are constexprs: ACT, ALPHA, LIMIT (-1 is none), AFTER, UP_OFFSET;
EXACT says that results stay float32. Where they are rounded to 16 bits, the hardware's exponential
and reciprocal (2^-21 relative) are used as they are.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from turnout.kernel_facts import interpreting

INTERPRETED = tl.constexpr(interpreting())  # no hardware


@triton.jit
def _clamp(x, low, high):
    """x in low..high; a NaN stays one, as in PyTorch."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(x, low, propagate_nan=nan), high, propagate_nan=nan)


@triton.jit
def _below(x, high):
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp2(x):
    """2^x as the hardware has it."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x):
    """1 / x as the hardware has it."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x; EXACT: for x in -100..80 (clamped) to about 1 ulp: the hardware has 2^t alone, so the
    rounding of t = x * log2(e) is made up for."""
    log2e: tl.constexpr = 1.4426950408889634
    if not (EXACT or INTERPRETED):
        return _exp2(x * log2e)
    x = _clamp(x, -100.0, 80.0)
    log2e_low: tl.constexpr = 1.925963033500e-08
    t = x * log2e
    rest = tl.fma(x, log2e, -t) + x * log2e_low
    power = tl.exp2(t)
    return tl.fma(power, rest * 0.6931471805599453, power)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x); EXACT: the quotient refined by one Newton step."""
    below = 1.0 + _exp(-x, EXACT)
    if not (EXACT or INTERPRETED):
        return _reciprocal(below)
    inverse = 1.0 / below
    refined = tl.fma(inverse, tl.fma(-below, inverse, 1.0), inverse)
    return tl.where(x < -80.0, 0.0, refined)  # where e^-x was clamped


@triton.jit
def act(x, ACT: tl.constexpr, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """a(x)."""
    if ACT == "silu":
        return x * _sigmoid(ALPHA * x, EXACT)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * _sigmoid(2.0 * inner, EXACT)
    elif ACT == "relu":
        return _relu(x)
    elif ACT == "relu2":
        positive = _relu(x)
        return positive * positive
    else:
        return x


@triton.jit
def act_and_slope(x, ACT: tl.constexpr, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """(a(x), a'(x))."""
    if ACT == "silu":
        s = _sigmoid(ALPHA * x, EXACT)
        a = x * s
        return a, s + ALPHA * a * (1.0 - s)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * _exp(-0.5 * x * x, EXACT) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s = _sigmoid(2.0 * inner, EXACT)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        a = x * s
        return a, s + a * 2.0 * (1.0 - s) * slope
    elif ACT == "relu":
        return _relu(x), tl.where(x > 0, 1.0, 0.0)
    elif ACT == "relu2":
        positive = _relu(x)
        return positive * positive, 2.0 * positive
    else:
        return x, x * 0.0 + 1.0


@triton.jit
def _plus(x, OFFSET: tl.constexpr):
    """x + OFFSET; nothing is added where that is 0, which no compiler leaves out: -0 + 0 is 0."""
    return x if OFFSET == 0 else x + OFFSET


@triton.jit
def glu(
    gate,
    up,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    AFTER: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    EXACT: tl.constexpr,
):
    """h of the gated form."""
    if LIMIT >= 0:
        up = _clamp(up, -LIMIT, LIMIT)
        if AFTER:
            return _below(act(gate, ACT, ALPHA, EXACT), LIMIT) * _plus(up, UP_OFFSET)
        gate = _below(gate, LIMIT)
    return act(gate, ACT, ALPHA, EXACT) * _plus(up, UP_OFFSET)


@triton.jit
def glu_backward(
    gate,
    up,
    d,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    AFTER: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(h, dgate, dup) from the gradient d of h."""
    if LIMIT >= 0:
        inside = (up >= -LIMIT) & (up <= LIMIT)
        passed = _plus(_clamp(up, -LIMIT, LIMIT), UP_OFFSET)
        if AFTER:
            raw, slope = act_and_slope(gate, ACT, ALPHA, EXACT)
            gated = _below(raw, LIMIT)
            slope = tl.where(raw <= LIMIT, slope, 0.0)
        else:
            gated, slope = act_and_slope(_below(gate, LIMIT), ACT, ALPHA, EXACT)
            slope = tl.where(gate <= LIMIT, slope, 0.0)
        return gated * passed, d * passed * slope, tl.where(inside, d * gated, 0.0)
    passed = _plus(up, UP_OFFSET)
    gated, slope = act_and_slope(gate, ACT, ALPHA, EXACT)
    return gated * passed, d * passed * slope, d * gated


@triton.jit
def _mix(value):
    value = value ^ (value >> 16)
    value = value * 0x7FEB352D
    value = value ^ (value >> 15)
    value = value * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def dropout_factor(slot, column, seed, TAG: tl.constexpr, threshold, keep_scale):
    """The mask of `turnout.experts.dropout.mask` at [slot, column]: 0 or 1 / (1 - p)."""
    key = (slot + seed).to(tl.uint32)
    if TAG:
        key += 0x9E3779B9
    spread = column.to(tl.uint32) * 0x9E3779B9
    hashed = _mix(_mix(key)[:, None] + spread[None, :])
    return tl.where(hashed >= threshold.to(tl.uint32), keep_scale, 0.0)
