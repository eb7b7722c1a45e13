"""The work that is timed: random weights, adapters, inputs and routing of a shape, and its FLOPs.

    y[t] = sum over k of w[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]),   e = experts[t, k]

bf16 inputs of unit scale, bf16 weights of standard deviation 0.02, adapters of rank 16 in PEFT's
storage: float32, A (E, R, in) and B (out, R, E), standard deviation 0.02, scaling 2.

Modes: `fwd` no gradients; `full` forward and backward, gradients of x, the routing weights and both
weights; `lora16` the weights frozen, gradients of x, the routing weights and the four adapters.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate,
G = 2F gate and up, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from turnout.shapes import Shape
from turnout.specs import ExpertSpec

Mode = Literal["fwd", "full", "lora16"]
Routing = Literal["uniform", "zipf1.2", "half-empty"]

RANK = 16
SCALING = 2.0
STD = 0.02
DTYPE = torch.bfloat16
SPEC = ExpertSpec()  # silu, gate and up in two halves

ADAPTERS = ("a_up", "b_up", "a_down", "b_down")
GRADIENTS: dict[Mode, tuple[str, ...]] = {
    "fwd": (),
    "full": ("x", "weights_TK", "gate_up", "down"),
    "lora16": ("x", "weights_TK", *ADAPTERS),
}


@dataclass(frozen=True, slots=True)
class Leaves:
    """The inputs of one call. The adapters are None outside of `lora16`."""

    x: Tensor  # (T, H)
    weights_TK: Tensor
    gate_up: Tensor  # (E, G, H)
    down: Tensor  # (E, H, F)
    a_up: Tensor | None = None  # (E, R, H) float32
    b_up: Tensor | None = None  # (G, R, E) float32
    a_down: Tensor | None = None  # (E, R, F) float32
    b_down: Tensor | None = None  # (H, R, E) float32

    @property
    def adapters(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """All four, or None."""
        if self.a_up is None or self.b_up is None or self.a_down is None or self.b_down is None:
            return None
        return self.a_up, self.b_up, self.a_down, self.b_down


@dataclass(frozen=True, slots=True)
class Weights:
    """What belongs to a shape whatever its tokens: weights and adapters."""

    gate_up: Tensor
    down: Tensor
    a_up: Tensor
    b_up: Tensor
    a_down: Tensor
    b_down: Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """One batch for the experts."""

    shape: Shape
    routing: Routing
    weights: Weights
    x_TH: Tensor
    experts_TK: Tensor  # int64
    weights_TK: Tensor
    dout_TH: Tensor

    def leaves(self, mode: Mode) -> Leaves:
        """Fresh leaves on the same storage, those of the mode with `requires_grad`."""
        tensors = {"x": self.x_TH, "weights_TK": self.weights_TK}
        for field in fields(Weights):
            if mode == "lora16" or field.name not in ADAPTERS:
                tensors[field.name] = getattr(self.weights, field.name)
        return Leaves(
            **{n: t.detach().requires_grad_(n in GRADIENTS[mode]) for n, t in tensors.items()}
        )


def make_weights(shape: Shape, device: torch.device, seed: int = 0) -> Weights:
    """Random weights and adapters, drawn expert by expert: no stack exists in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, hidden, inner = shape.experts, shape.hidden, shape.intermediate

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator) * STD

    gate_up = torch.empty(experts, 2 * inner, hidden, device=device, dtype=DTYPE)
    down = torch.empty(experts, hidden, inner, device=device, dtype=DTYPE)
    for expert in range(experts):
        gate_up[expert] = normal(2 * inner, hidden)
        down[expert] = normal(hidden, inner)
    return Weights(
        gate_up,
        down,
        normal(experts, RANK, hidden),
        normal(2 * inner, RANK, experts),
        normal(experts, RANK, inner),
        normal(hidden, RANK, experts),
    )


def make_work(shape: Shape, weights: Weights, routing: Routing = "uniform", seed: int = 0) -> Work:
    """A random batch. `uniform`: top-k of normal logits.

    `zipf1.2`: Gumbel top-k without replacement, p ~ rank^-1.2, expert ids shuffled. `half-empty`:
    uniform over a random half of the experts.

    Raises:
        ValueError: `half-empty`, and half of the experts are fewer than `top_k`.
    """
    device = weights.gate_up.device
    generator = torch.Generator(device).manual_seed(seed + 1)
    x, dout = (
        torch.randn(shape.tokens, shape.hidden, device=device, generator=generator).to(DTYPE)
        for _ in range(2)
    )
    logits = _logits(shape, routing, device, generator)
    scores, experts = logits.softmax(-1).topk(shape.top_k, -1)
    weights_TK = (scores / scores.sum(-1, keepdim=True)).to(DTYPE)
    return Work(shape, routing, weights, x, experts, weights_TK, dout)


def _logits(
    shape: Shape, routing: Routing, device: torch.device, generator: torch.Generator
) -> Tensor:
    size = shape.tokens, shape.experts
    logits = torch.randn(*size, device=device, generator=generator)
    if routing == "uniform":
        return logits
    order = torch.randperm(shape.experts, device=device, generator=generator)
    if routing == "zipf1.2":
        uniform = torch.rand(*size, device=device, generator=generator).clamp_(1e-9, 1 - 1e-7)
        ranks = torch.arange(1, shape.experts + 1, device=device)
        return (-1.2 * ranks.log())[order] - torch.log(-torch.log(uniform))
    used = shape.experts // 2
    if used < shape.top_k:
        raise ValueError(
            f"routing is 'half-empty' with {shape.experts} experts and top_k {shape.top_k}; "
            f"expected half of the experts, {used}, to be at least top_k. Use 'uniform'"
        )
    return logits.index_fill_(1, order[used:], float("-inf"))


def flops(shape: Shape, mode: Mode) -> int:
    """FLOPs that the mathematics needs; what a provider computes beyond that does not count."""
    base = 2 * shape.rows * 3 * shape.hidden * shape.intermediate
    lora = 2 * shape.rows * RANK * (2 * shape.hidden + 3 * shape.intermediate)
    return {"fwd": base, "full": 3 * base, "lora16": 2 * base + 3 * lora}[mode]
