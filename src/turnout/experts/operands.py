"""What a grouped GEMM reads and returns: bundles of tensors, shared by every back end.

Legend: S rows, T tokens, E experts, N output width, G = 2F gate and up, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from turnout.experts.dropout import Dropout
from turnout.specs import Activation


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows of a GEMM: `rows[token of the row]` or `rows[row]`, times a weight and a dropout mask.

    Attributes:
        rows: (S, width), or (T, width) when they are read `by_token`.
        by_token: row r reads `rows[slot[r] // K]`.
        weight_TK: a factor per slot.
        dropout: mask on the elements, by slot and column.
    """

    rows: Tensor
    by_token: bool = False
    weight_TK: Tensor | None = None
    dropout: Dropout | None = None


@dataclass(frozen=True, slots=True)
class Factors:
    """An adapter as one pass reads it: x to `narrow` to (S, R), and that through `tail` to (S, N).

    Attributes:
        narrow_ERK: (E, R, K), any strides; R may be padded with zeros.
        tail_ENR: (E, N, R), any strides, R padded likewise.
        scaling: multiplies the intermediate.
        dtype: what the intermediate is computed and kept in.
    """

    narrow_ERK: Tensor
    tail_ENR: Tensor
    scaling: float
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Tail:
    """The adapter's second factor: adds mask * xa[row] @ b[e]^T before the epilogue."""

    xa_SR: Tensor
    b_ENR: Tensor
    dropout: Dropout | None = None


@dataclass(frozen=True, slots=True)
class Activate:
    """h = act(z); z is returned too when it is kept for the backward pass."""

    name: ClassVar[Literal["activate"]] = "activate"
    activation: Activation
    keep_z: bool


@dataclass(frozen=True, slots=True)
class ActivateBackward:
    """From the product d (the unweighted gradient of h) and z, in one pass:

    dz = w[row] * d * dh/dz        dot[row] = <d, h>        h = w[row] * act(z), when asked

    with w[row] = weight_TK[slot of the row].
    """

    name: ClassVar[Literal["activate_backward"]] = "activate_backward"
    activation: Activation
    z_SG: Tensor
    weight_TK: Tensor | None
    keep_h: bool


@dataclass(frozen=True, slots=True)
class RowsOut:
    """`out` is the product, h, or dz; the others are what the epilogue adds.

    `dot_SP` holds the dot products in P parts, to be added up.
    """

    out: Tensor
    z_SG: Tensor | None = None
    dot_SP: Tensor | None = None
    h_SF: Tensor | None = None
