"""What a grouped GEMM reads and returns: bundles of tensors, shared by every back end.

Legend: S rows, T tokens, E experts, N output width, G = 2F gate and up, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from turnout.experts.dropout import Dropout
from turnout.specs import Activation


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows of a GEMM: `rows[gather[row]]` (or `rows[row]`), times a weight and a dropout mask.

    Attributes:
        rows: (S, width), or (T, width) when `gather_S` is given.
        gather_S: row to index into `rows`.
        weight_S: a factor per row.
        dropout: mask on the elements, by slot and column.
    """

    rows: Tensor
    gather_S: Tensor | None = None
    weight_S: Tensor | None = None
    dropout: Dropout | None = None


@dataclass(frozen=True, slots=True)
class Tail:
    """The adapter's second factor: adds mask * scaling * xa[row] @ b[e]^T before the epilogue."""

    xa_SR: Tensor
    b_ENR: Tensor
    scaling: float
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
    """

    name: ClassVar[Literal["activate_backward"]] = "activate_backward"
    activation: Activation
    z_SG: Tensor
    weight_S: Tensor | None
    keep_h: bool


@dataclass(frozen=True, slots=True)
class RowsOut:
    """`out` is the product, h, or dz; the others are what the epilogue adds."""

    out: Tensor
    z_SG: Tensor | None = None
    dot_S: Tensor | None = None
    h_SF: Tensor | None = None
