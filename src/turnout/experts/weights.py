"""Bundles of expert tensors, and the checks that their shapes agree.

Legend: E experts, H hidden, F intermediate, G = 2F gate and up (F without gate), R LoRA rank,
I/O input and output width of one projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.specs import ExpertSpec


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of E experts.

    Attributes:
        gate_up: (E, G, H), or (E, H, G) when the spec says `transposed`.
        down: (E, H, F), or (E, F, H).
        gate_up_bias: (E, G) or None.
        down_bias: (E, H) or None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """One low-rank update per expert: y += scaling * (x @ a[e]^T) @ b[:, :, e]^T.

    PEFT's storage as views: `lora_A.weight` (E*R, I) viewed as (E, R, I), `lora_B.weight` (O, R*E)
    viewed as (O, R, E). Strides are free.

    Attributes:
        a_ERI: (E, R, I).
        b_ORE: (O, R, E).
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA.
    """

    a_ERI: Tensor
    b_ORE: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a_ERI.shape[1]


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """The adapters of the two projections; either may be absent, ranks may differ."""

    gate_up: Lora | None = None
    down: Lora | None = None


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes read off a checked bundle."""

    experts: int
    hidden: int
    intermediate: int
    gate_up: int


def gate_up_EGH(weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    """`gate_up` viewed as (E, G, H), whatever its storage."""
    return weights.gate_up.transpose(1, 2) if spec.transposed else weights.gate_up


def down_EHF(weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    """`down` viewed as (E, H, F), whatever its storage."""
    return weights.down.transpose(1, 2) if spec.transposed else weights.down


def alternating(tensor: Tensor, dim: int) -> Tensor:
    """Rows gate 0, up 0, gate 1, ... of rows gate 0, gate 1, ..., up 0, ..., a contiguous copy."""
    gate, up = tensor.chunk(2, dim)
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


def halves(tensor: Tensor, dim: int) -> Tensor:
    """The inverse of `alternating`."""
    pairs = tensor.unflatten(dim, (-1, 2))
    return torch.cat((pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)), dim)


def check_weights(weights: ExpertWeights, spec: ExpertSpec) -> Dims:
    """The sizes of a bundle.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the spec.
    """
    for name in ("gate_up", "down"):
        tensor = getattr(weights, name)
        if tensor.dim() != 3 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected a 3-D "
                "float tensor, experts first"
            )
    experts, gate_up, hidden = gate_up_EGH(weights, spec).shape
    width = 2 if spec.activation.gated else 1
    intermediate = gate_up // width
    expected = (experts, hidden, intermediate)
    got = tuple(down_EHF(weights, spec).shape)
    if gate_up % width or got != expected or experts < 1:
        layout = "(E, H, G) and (E, F, H)" if spec.transposed else "(E, G, H) and (E, H, F)"
        raise ValueError(
            f"gate_up {tuple(weights.gate_up.shape)} and down {tuple(weights.down.shape)} do not "
            f"fit each other; expected {layout} with G = {width} * F. Is the other layout meant? "
            "See ExpertSpec.transposed"
        )
    dims = Dims(experts, hidden, intermediate, gate_up)
    _check_bias("gate_up_bias", weights.gate_up_bias, (experts, gate_up))
    _check_bias("down_bias", weights.down_bias, (experts, hidden))
    for name in ("down", "gate_up_bias", "down_bias"):
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        if tensor.dtype != weights.gate_up.dtype or tensor.device != weights.gate_up.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; expected {weights.gate_up.dtype} on "
                f"{weights.gate_up.device} as gate_up"
            )
    return dims


def _check_bias(name: str, bias: Tensor | None, expected: tuple[int, int]) -> None:
    if bias is not None and tuple(bias.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(bias.shape)}; expected {expected}")


def check_lora(lora: LoraWeights, dims: Dims, weights: ExpertWeights) -> None:
    """Raise `ValueError` unless the adapters fit the projections they are meant for."""
    sizes = {"gate_up": (dims.hidden, dims.gate_up), "down": (dims.intermediate, dims.hidden)}
    for name, (inputs, outputs) in sizes.items():
        one: Lora | None = getattr(lora, name)
        if one is None:
            continue
        a, b = one.a_ERI, one.b_ORE
        if a.dim() != 3 or b.dim() != 3:
            raise ValueError(
                f"lora.{name} has a {tuple(a.shape)} and b {tuple(b.shape)}; expected 3-D tensors "
                "a (E, R, I) and b (O, R, E)"
            )
        rank = a.shape[1]
        if tuple(a.shape) != (dims.experts, rank, inputs) or tuple(b.shape) != (
            outputs,
            rank,
            dims.experts,
        ):
            raise ValueError(
                f"lora.{name} has a {tuple(a.shape)} and b {tuple(b.shape)}; expected a (E, R, I) "
                f"= ({dims.experts}, R, {inputs}) and b (O, R, E) = ({outputs}, R, {dims.experts})"
            )
        if rank < 1:
            raise ValueError(f"lora.{name} has rank {rank}; expected at least 1")
        for part, tensor in (("a", a), ("b", b)):
            if not tensor.is_floating_point() or tensor.device != weights.gate_up.device:
                raise ValueError(
                    f"lora.{name}.{part} is {tensor.dtype} on {tensor.device}; expected a float "
                    f"tensor on {weights.gate_up.device}"
                )
