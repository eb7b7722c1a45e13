"""One provider's training step: forward, loss, backward, AdamW on the adapters.

first_s   the first step, with compilation
gate      its loss and gradients against a stock step from the same weights: `step_gate`
peak_mb   most memory allocated in a later step, less what was before the first: gradients,
          optimizer state and activations, without the weights of model and adapters
step_ms   median of `turnout.measure`
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from turnout.bench.run import MIB
from turnout.bench.step_gate import Gate, Sample
from turnout.bench.step_loss import next_token_loss
from turnout.bench.step_models import Built
from turnout.measure import seconds

LR = 1e-5
SLOW = 0.75  # seconds; steps slower than this are timed three times


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one provider did. Without a time, `note` says why."""

    step_ms: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    loss: float | None = None
    grad_err: float | None = None
    note: str = ""

    def or_faster(self, again: Measured) -> Measured:
        """The faster of two measurements, the first step of this one; a failure stands."""
        if self.step_ms is None:
            return self
        if again.step_ms is None:
            return again
        return replace(again if again.step_ms < self.step_ms else self, first_s=self.first_s)


def make_ids(vocabulary: int, tokens: int, sequence: int, device: torch.device) -> Tensor:
    """(tokens / sequence, sequence) random words: every row is full, nothing is padding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (tokens // sequence, sequence), generator=generator).to(device)


class Step:
    """A model, its batch and its optimizer."""

    def __init__(self, built: Built, ids: Tensor) -> None:
        self.built, self.ids = built, ids
        self.optimizer = torch.optim.AdamW(
            built.adapters.values(), lr=LR, weight_decay=0.0, fused=True
        )
        self.loss: Tensor | None = None

    def run(self) -> None:
        """One step. The gradients stay until the next one."""
        self.optimizer.zero_grad(set_to_none=True)
        hidden = self.built.decoder(input_ids=self.ids, use_cache=False).last_hidden_state
        loss = next_token_loss(hidden, self.built.head.weight, self.ids)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def sample(self) -> Sample:
        """Loss and gradients of the last step; the tensors are the step's own."""
        assert self.loss is not None
        grads = {
            name: parameter.grad
            for name, parameter in self.built.adapters.items()
            if parameter.grad is not None
        }
        return Sample(float(self.loss), grads)


def measure(step: Step, gate: Gate | None, *, repeats: int) -> Measured:
    """Gate, memory, time; a red gate ends it before the memory.

    Args:
        step: freshly built.
        gate: what the first step must agree with; None for a model that computes something else.
        repeats: timed steps; three where a step is slow.
    """
    device = step.ids.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    first = seconds(step.run, device=device, warmup=0, repeats=1).median
    assert step.loss is not None
    found = Measured(first_s=first, loss=float(step.loss))
    if gate is not None:
        grad_err, note = gate.judge(step.sample())
        found = replace(found, grad_err=grad_err, note=note or "")
        if note is not None:
            return found
    peak = _peak(step, before)
    once = seconds(step.run, device=device, warmup=1, repeats=1).median
    count = min(3, repeats) if once > SLOW else repeats
    timing = seconds(step.run, device=device, warmup=0, repeats=count)
    return replace(found, step_ms=timing.median * 1e3, peak_mb=peak)


def _peak(step: Step, before: int) -> float | None:
    """MiB in one step above `before`; None where no allocator counts."""
    device = step.ids.device
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step.run()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB
