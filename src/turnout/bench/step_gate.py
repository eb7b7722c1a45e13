"""Before a time counts: the first step agrees with a stock step from the same weights.

Both are bfloat16, so they differ. Every rounding is up to 2^-9, and where two experts are nearly
tied a rounding changes which one is chosen. Measured on small models on a CPU: with 4 layers stock
differs from its own float32 step by 5e-4 in the loss and by 8 % in the gradients (RMS over all
adapters; 18 % in the worst one); turnout differs from stock by at most 3e-4, 7 % and 21 % with 2,
4 and 16 layers. Hence the limits, with room for what is larger:

    loss           2e-3 of stock's
    all gradients  RMS of the difference at most 0.35 of stock's
    each gradient  RMS at most 0.6, and its part along stock's between 0.8 and 1.25 of stock's

The loss alone says little: with random weights it is near log(vocabulary) whatever the experts do.
The gradients do: a missing adapter, scaling or sign, or another expert's gradient, is off by half
or more in its tensor. Nothing finer is claimed here; `turnout verify` and the gate of
`turnout bench` compare with float32 and float64.

Where a stock step does not run even with checkpointing (for want of memory, mostly), turnout's own
`torch` back end, plain PyTorch, is the reference, and the row's `gate` says `torch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LOSS, TOTAL, EACH = 2e-3, 0.35, 0.6
LEAST, MOST = 0.8, 1.25


@dataclass(frozen=True, slots=True)
class Sample:
    """Loss and gradients by name of one step."""

    loss: float
    grads: dict[str, Tensor]

    def on_cpu(self) -> Sample:
        """A copy that no GPU has to keep."""
        return Sample(self.loss, {name: grad.cpu() for name, grad in self.grads.items()})


@dataclass(frozen=True, slots=True)
class Gate:
    """The first step of stock, or of what stands in for it.

    Attributes:
        reference: that step.
        name: `stock`; `torch` for turnout's plain PyTorch back end, where stock does not run.
    """

    reference: Sample
    name: str = "stock"

    def judge(self, got: Sample) -> tuple[float, str | None]:
        """(RMS difference of all gradients as a fraction of stock's, why it is red or None)."""
        want = self.reference
        if not math.isfinite(got.loss) or abs(got.loss - want.loss) > LOSS * abs(want.loss):
            return math.nan, (
                f"the loss is {got.loss:.5f}; expected {want.loss:.5f}, as stock's, "
                f"within {LOSS:g} of it"
            )
        if set(got.grads) != set(want.grads):
            odd = sorted(set(got.grads) ^ set(want.grads))
            return math.nan, f"gradients differ in who has one: {odd[0]} and {len(odd) - 1} more"
        difference = total = 0.0
        reason = None
        for name, kept in want.grads.items():
            grad = got.grads[name]
            exact = kept.to(grad.device)
            square = float(exact.double().square().sum())
            error = float((grad.double() - exact.double()).square().sum())
            along = float((grad.double() * exact.double()).sum())
            difference, total = difference + error, total + square
            reason = reason or _red(name, error, along, square)
        rms = math.sqrt(difference / total) if total else math.inf
        if reason is None and not rms <= TOTAL:
            reason = f"all gradients: RMS difference {rms:.2f} of stock's; expected at most {TOTAL}"
        return rms, reason


def _red(name: str, error: float, along: float, square: float) -> str | None:
    if square == 0:
        return None if error == 0 else f"{name}: has a gradient, stock's is zero"
    rms, scale = math.sqrt(error / square), along / square
    if rms <= EACH and LEAST <= scale <= MOST:
        return None
    return (
        f"{name}: gradient differs by RMS {rms:.2f} of stock's and has {scale:.2f} of it; "
        f"expected at most {EACH}, and {LEAST} to {MOST}"
    )
