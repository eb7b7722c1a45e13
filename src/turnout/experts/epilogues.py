"""Activations between the two GEMMs of an expert, and their derivatives.

    activate(z_SG)          = h_SF
    activate_backward(z, d) = (h_SF, dz_SG) with dz = d h / d z * d

The formulas are those of `turnout.specs.Activation`. Callers pass float32 (or float64) and round
once. A clamp passes the gradient on its closed side, as `torch.clamp` does.

Legend: S rows, F intermediate, G = 2F gate and up (F without gate).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.specs import Activation

_GELU_TANH = math.sqrt(2.0 / math.pi)


def act(x: Tensor, activation: Activation) -> Tensor:
    """a(x), elementwise."""
    name = activation.act
    if name == "silu":
        return x * torch.sigmoid(activation.alpha * x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return x.relu()
    if name == "relu2":
        return x.relu().square()
    return x


def act_derivative(x: Tensor, activation: Activation) -> Tensor:
    """a'(x), elementwise."""
    name = activation.act
    if name == "silu":
        sigmoid = torch.sigmoid(activation.alpha * x)
        return sigmoid * (1 + activation.alpha * x * (1 - sigmoid))
    if name == "gelu":
        pdf = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2.0))) + x * pdf
    if name == "gelu_tanh":
        tanh = torch.tanh(_GELU_TANH * (x + 0.044715 * x**3))
        inner = _GELU_TANH * (1 + 3 * 0.044715 * x * x)
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner
    if name == "relu":
        return (x > 0).to(x.dtype)
    if name == "relu2":
        return 2 * x.clamp(min=0)
    return torch.ones_like(x)


def split(z_SG: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The gate and up halves of z, as views."""
    if activation.interleaved:
        return z_SG[..., 0::2], z_SG[..., 1::2]
    gate, up = z_SG.chunk(2, dim=-1)
    return gate, up


def activate(z_SG: Tensor, activation: Activation) -> Tensor:
    """h = a(z), or the gated form with its limits."""
    if not activation.gated:
        return act(z_SG, activation)
    gate, up = split(z_SG, activation)
    limit = activation.limit
    if limit is None:
        return act(gate, activation) * (up + activation.up_offset)
    if activation.limit_after:
        gated = act(gate, activation).clamp(max=limit)
    else:
        gated = act(gate.clamp(max=limit), activation)
    return gated * (up.clamp(-limit, limit) + activation.up_offset)


def activate_backward(z_SG: Tensor, dh_SF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(h, dz) from the pre-activation and the gradient of h."""
    if not activation.gated:
        return act(z_SG, activation), dh_SF * act_derivative(z_SG, activation)
    gate, up = split(z_SG, activation)
    limit = activation.limit
    if limit is None:
        gated, slope = act(gate, activation), act_derivative(gate, activation)
        passed_up, up_slope = up + activation.up_offset, None
    else:
        if activation.limit_after:
            raw = act(gate, activation)
            gated = raw.clamp(max=limit)
            slope = act_derivative(gate, activation) * (raw <= limit)
        else:
            inner = gate.clamp(max=limit)
            gated = act(inner, activation)
            slope = act_derivative(inner, activation) * (gate <= limit)
        passed_up = up.clamp(-limit, limit) + activation.up_offset
        up_slope = (up >= -limit) & (up <= limit)
    dgate = dh_SF * passed_up * slope
    dup = dh_SF * gated if up_slope is None else dh_SF * gated * up_slope
    dz = torch.empty_like(z_SG)
    dgate_view, dup_view = split(dz, activation)
    dgate_view.copy_(dgate)
    dup_view.copy_(dup)
    return gated * passed_up, dz
