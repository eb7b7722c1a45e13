"""Tiny models of the golden adapters. No random numbers: every weight is a function of its name.

`TinyMoe` is one MoE layer with dense routing (every expert sees every token), so that every entry
of every expert weight reaches the output. The three storage orders of real models:

    out_in            gate_up (E, 2F, H), down (E, H, F)     qwen3_moe and most others
    in_out_declared   gate_up (E, H, 2F), down (E, F, H)     gpt_oss: `is_transposed` is True
    in_out            the same, without the attribute        llama4
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

EXPERTS = 3
TOKENS = 5
SIZES = {"narrow": (6, 4), "patterns": (6, 4), "square": (8, 4), "down": (4, 4)}  # H, F


def wave(name: str, shape: tuple[int, ...], scale: float = 0.5) -> Tensor:
    """scale * sin of an arithmetic progression whose phase and step come from `name`."""
    seed = zlib.crc32(name.encode())
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(seed % 1000 + steps * (1 + seed % 77 / 77))).float().reshape(shape)


class TinyExperts(nn.Module):
    def __init__(self, hidden: int, inter: int, storage: str) -> None:
        super().__init__()
        self.is_out_in = storage == "out_in"
        if storage == "in_out_declared":
            self.is_transposed = True
        up, down = (2 * inter, hidden), (hidden, inter)
        if not self.is_out_in:
            up, down = up[::-1], down[::-1]
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, *up))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, *down))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if self.is_out_in:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = torch.matmul(x, up).chunk(2, dim=-1)
        return torch.matmul(nn.functional.silu(gate) * value, down)


class TinyMlp(nn.Module):
    def __init__(self, hidden: int, inter: int, storage: str) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = TinyExperts(hidden, inter, storage)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.gate(x).softmax(-1)
        return torch.einsum("te,eth->th", mix, self.experts(x))


class TinyMoe(nn.Module):
    """x -> q_proj -> MoE -> logits."""

    def __init__(self, hidden: int, inter: int, storage: str) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = TinyMlp(hidden, inter, storage)
        fill(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.q_proj(x))


def tiny(case: str) -> TinyMoe:
    """The model of a case named `<storage>-<size>`."""
    storage, _, size = case.partition("-")
    return TinyMoe(*SIZES[size], storage)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter of `model` the wave of its name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(wave(name, tuple(parameter.shape)))


@torch.no_grad()
def fill_adapter(model: nn.Module) -> None:
    """Give every LoRA parameter of a PEFT `model` the wave of its name; nothing stays zero."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.copy_(wave(name, tuple(parameter.shape), scale=0.3))


def hf_model(model_type: str) -> nn.Module:
    """A one-layer transformers model with `wave` weights: qwen3_moe or gpt_oss."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **HF_SIZES[model_type])
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    fill(model)
    return model.eval()


_COMMON = {
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HF_SIZES: dict[str, dict[str, object]] = {
    "qwen3_moe": _COMMON
    | {"moe_intermediate_size": 10, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
