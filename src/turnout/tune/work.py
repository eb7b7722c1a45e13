"""What is run so that its kernels are tuned: one training step of an expert layer, random data.

Which problems a step has (products, layouts, dtypes) is decided by the same code that trains, so
nothing about them is written down here.

Legend: T tokens, K experts per token, E experts, H hidden, F intermediate, G = 2F gate and up,
R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.experts.ops import expert_mlp
from turnout.experts.weights import ExpertWeights, Lora, LoraWeights
from turnout.shapes import Shape, shape_named
from turnout.specs import Activation, ExpertSpec

Mode = Literal["lora", "full"]
Backend = Literal["auto", "triton"]  # the others have no configs to search
STD = 0.02
PLAIN = ExpertSpec()  # silu, gate and up in two halves

# Where the model's own layout differs from the plain one of the benchmarks, both are tuned.
_OWN = {
    "gptoss-20b": (
        ExpertSpec(
            activation=Activation(alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True),
            transposed=True,
        ),
        True,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The experts of one layer: sizes, formula, and whether both projections have biases."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    spec: ExpertSpec = PLAIN
    has_bias: bool = False


def layers_named(name: str) -> list[Layer]:
    """The layers of a named shape.

    Raises:
        ValueError: there is no such shape.
    """
    shape = shape_named(name)
    layers = [_plain(shape)]
    if name in _OWN:
        spec, has_bias = _OWN[name]
        layers.append(_plain(shape, spec, has_bias))
    return layers


def _plain(shape: Shape, spec: ExpertSpec = PLAIN, has_bias: bool = False) -> Layer:
    return Layer(
        name=shape.name,
        tokens=shape.tokens,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        experts=shape.experts,
        top_k=shape.top_k,
        spec=spec,
        has_bias=has_bias,
    )


def step(
    layer: Layer,
    tokens: int,
    mode: Mode,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend = "auto",
) -> None:
    """Forward and backward once. With `auto` each product goes where a training step has it.

    `lora`: base weights frozen, adapters of that rank in float32 and PEFT's storage. `full`: base
    weights train, no adapters.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = STD, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, device=device, generator=generator, dtype=kind).mul_(scale)

    experts, hidden, inner = layer.experts, layer.hidden, layer.intermediate
    wide = inner * 2 if layer.spec.activation.gated else inner
    up, down = (experts, wide, hidden), (experts, hidden, inner)
    if layer.spec.transposed:
        up, down = (experts, hidden, wide), (experts, inner, hidden)
    weights = ExpertWeights(
        normal(*up),
        normal(*down),
        normal(experts, wide) if layer.has_bias else None,
        normal(experts, hidden) if layer.has_bias else None,
    )
    float32 = torch.float32
    lora = LoraWeights()
    trained = [weights.gate_up, weights.down]
    if mode == "lora":
        factors = [
            normal(experts, rank, hidden, kind=float32),
            normal(wide, rank, experts, kind=float32),
            normal(experts, rank, inner, kind=float32),
            normal(hidden, rank, experts, kind=float32),
        ]
        lora = LoraWeights(Lora(factors[0], factors[1], 2.0), Lora(factors[2], factors[3], 2.0))
        trained = factors
    logits = torch.randn(tokens, experts, device=device, generator=generator)
    scores, chosen = logits.softmax(-1).topk(layer.top_k, -1)
    weights_TK = (scores / scores.sum(-1, keepdim=True)).to(dtype)
    x = normal(tokens, hidden, scale=1.0)
    leaves = [x, weights_TK, *trained]
    for leaf in leaves:
        leaf.requires_grad_()
    out = expert_mlp(x, chosen, weights_TK, weights, layer.spec, lora=lora, backend=backend)
    torch.autograd.grad(out, leaves, normal(tokens, hidden, scale=1.0))
