"""How many layers fit: parameters counted on the meta device, activations by formula.

Needed by a stock step, which needs the most (T tokens, S rows, G = 2F, bytes):

    weights      2 per parameter; 4 per parameter of an adapter
    training     12 per parameter of an adapter: gradient and AdamW's two moments
    fold         2 per parameter of the experts: PEFT's W + s * B A, kept for the backward pass
    experts      S * 2 * (2H + 2G): gathered input, up, activation and product, output
    attention    T * (8H + 4 per input and 8 per output feature of the adapted linear layers)
    recurrence   T * 52 per output feature of linear attention: 13 float32 copies, as plain PyTorch
                 keeps them (12.6 and 13.0 by the peaks of two runs without experts)
    once         the larger of one chunk of logits (16 per entry) and the two float32 copies of one
                 stack that the fold passes through

Without checkpointing, fold, experts, attention and recurrence count per layer; with it once, and
T * 2H per layer. For 6 layers of Qwen3-30B-A3B and 8192 tokens the formula gives 21.1 GiB above the
weights and 7.0 with checkpointing, where 17.9 and 4.4 were measured (step_h100.csv).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from turnout.bench.step_loss import CHUNK
from turnout.bench.step_models import RANK, StepModel, on_meta
from turnout.integrations.architectures import expert_modules

SPARE = 0.05  # of the free memory: fragments of the allocator, and what no formula has
_RECURRENCE = 13 * 4
_FEW, _MORE = 4, 8  # a multiple of every pattern of layers that a configuration repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Of one layer, but for the last three fields.

    Attributes:
        weights: parameters. experts: those of the routed experts. adapters: those of LoRA.
        per_row, per_token: bytes that the experts keep of a row, and attention of a token.
        hidden, top_k: H and K.
        words: by which the vocabulary grows, which is cut with the layers.
        outside, words_outside: parameters and words that no layer adds.
        stack: parameters of the largest expert stack.
    """

    weights: float
    experts: float
    adapters: float
    per_row: float
    per_token: float
    hidden: int
    top_k: int
    words: float
    outside: float
    words_outside: float
    stack: int


def count(shape: StepModel) -> Count:
    """Counts a configuration without allocating it."""
    few, more = _sums(shape, _FEW), _sums(shape, _MORE)
    layer = {name: (more[name] - few[name]) / (_MORE - _FEW) for name in few}
    config = shape.config(_FEW)
    hidden = config.hidden_size
    return Count(
        weights=layer["weights"],
        experts=layer["experts"],
        adapters=layer["adapters"],
        per_row=2 * (2 * hidden + 2 * layer["gate_up"]),
        per_token=layer["features"] + 8 * hidden,
        hidden=hidden,
        top_k=config.num_experts_per_tok,
        outside=few["weights"] - _FEW * layer["weights"],
        words_outside=few["words"] - _FEW * layer["words"],
        words=layer["words"],
        stack=int(layer["stack"]),
    )


def needed(counted: Count, layers: int, tokens: int, *, checkpointing: bool) -> float:
    """Bytes of a stock step: weights and everything above them."""
    c = counted
    kept = 2 * c.experts + tokens * (c.top_k * c.per_row + c.per_token)
    always = 2 * c.weights + 16 * c.adapters
    words = c.words_outside + layers * c.words
    once = max(16 * CHUNK * words, 8 * c.stack) + 2 * c.outside
    if checkpointing:
        return once + kept + layers * (always + tokens * 2 * c.hidden)
    return once + layers * (always + kept)


def layers_that_fit(shape: StepModel, tokens: int, free: int, *, checkpointing: bool) -> int:
    """The most layers of `shape` for which a stock step needs at most `free` bytes; at least one.

    One layer may not fit either; the row then says so.
    """
    counted = count(shape)
    room = free * (1 - SPARE)
    one, two = (needed(counted, n, tokens, checkpointing=checkpointing) for n in (1, 2))
    return max(1, min(shape.layers, 1 + math.floor((room - one) / (two - one))))


def _sums(shape: StepModel, layers: int) -> dict[str, float]:
    """Sums over a model of `layers` layers."""
    model = on_meta(shape, layers)
    sums = dict.fromkeys(("experts", "adapters", "gate_up", "features", "stack"), 0.0)
    sums["weights"] = sum(p.numel() for p in model.parameters())
    sums["words"] = model.config.vocab_size
    for _, experts, _ in expert_modules(model):
        stacks = [p for p in experts.parameters() if p.dim() == 3]
        sums["experts"] += sum(p.numel() for p in stacks)
        sums["adapters"] += sum(RANK * p.shape[0] * (p.shape[1] + p.shape[2]) for p in stacks)
        largest = max(stacks, key=lambda p: p.numel())
        sums["stack"] += largest.numel()
        sums["gate_up"] += largest.numel() / largest.shape[0] / shape.config(1).hidden_size
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in shape.targets:
            sums["adapters"] += RANK * (module.in_features + module.out_features)
            sums["features"] += 4 * module.in_features + 8 * module.out_features
        if name.rpartition(".")[2] == shape.recurrence:
            sums["features"] += _RECURRENCE * module.in_features
    return sums
