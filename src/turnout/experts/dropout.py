"""Dropout on the input of an expert's adapter, by a counter-based mask.

    keep[s, c] = hash(seed, tag, slot s, column c) >= p * 2^32        scale = 1 / (1 - p)

The mask is a pure function of the seed, so the backward pass and activation checkpointing rebuild
it instead of storing it, and every back end makes the same one. The seed is drawn on the device by
`torch.randint`, so checkpoint's RNG replay replays the mask. PEFT refuses dropout on experts
because its fold `W + s*B@A` has no input to mask; a split LoRA has.

Hash: two rounds of lowbias32 (Chris Wellons, "Prospecting for Hash Functions", 2018), on 32-bit
values held in int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True, slots=True)
class Dropout:
    """Probability, seed (one-element int64 tensor) and the projection's tag."""

    p: float
    seed: Tensor
    tag: int


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's generator, without a host sync."""
    return torch.randint(0, 2**31 - 1, (1,), device=device, dtype=torch.int64)


def _mix(value: Tensor) -> Tensor:
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK32
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK32
    return value ^ (value >> 16)


def mask(dropout: Dropout, slot_S: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(S, width) factors: 1 / (1 - p) where kept, 0 where dropped."""
    row = _mix((slot_S.long() + dropout.seed + dropout.tag * _GOLDEN) & _MASK32)
    column = (torch.arange(width, device=slot_S.device) * _GOLDEN) & _MASK32
    hashed = _mix((row[:, None] + column) & _MASK32)
    keep = hashed >= int(dropout.p * 2**32)
    return keep.to(dtype) / (1.0 - dropout.p)
