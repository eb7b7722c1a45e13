"""What a patched step computes outside the experts: what the model's own block does, nothing more.

`expert_mlp` is a stand-in that allocates its results; the stock block without adapters has the same
stand-in for its experts. Operators are counted over forward and backward, without views and
allocations, which run nothing on a device.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hf_models import loss_of, tiny, with_lora
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import turnout
from turnout.experts import ops
from turnout.integrations.architectures import expert_modules
from turnout.verify.tiny import make_inputs, out_tensor

# Softmax; a bias on the router and clamped experts; groups and a shared expert; a gated one.
KEYS = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_moe_text", "olmoe", "glm4_moe")
NOTHING = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "view",
    "_unsafe_view",
    "transpose",
    "t",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "as_strided",
    "split",
    "promote_types",
}


class Operators(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NOTHING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Allocated(torch.autograd.Function):
    """Experts that compute nothing, with gradients of input and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights_TK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights_TK)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, weights_TK = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weights_TK)


def without_experts(module: Any, x: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return Allocated.apply(x, weights_TK)


def operators(model: Any, key: str) -> Counter[str]:
    """Of a forward and a backward pass; the embeddings have a gradient, as below adapters."""
    inputs = make_inputs(key)
    model.train().get_input_embeddings().weight.requires_grad_()

    def step() -> None:
        loss_of(out_tensor(model(**inputs, use_cache=False))).backward()

    step()  # what happens once
    model.zero_grad(set_to_none=True)
    with Operators() as counted:
        step()
    return counted.seen


@pytest.fixture
def allocating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_forward", ops._forward_fake)
    monkeypatch.setattr(ops, "_backward", ops._backward_fake)
    monkeypatch.setattr(ops, "reads_values", lambda experts: False)  # checked on a CPU only


@pytest.mark.usefixtures("allocating")
@pytest.mark.parametrize("key", KEYS)
def test_a_patched_model_with_adapters_computes_more_around_the_experts(key: str) -> None:
    stock = tiny(key, torch.bfloat16)
    stock.requires_grad_(False)
    for _, module, _ in expert_modules(stock):
        module.forward = partial(without_experts, module)
    expected = operators(stock, key)
    model = tiny(key, torch.bfloat16)
    turnout.patch(model)
    model = with_lora(model)
    got = operators(model, key)
    adapted = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    assert sum("experts" in name for name in adapted) >= 4
    assert got - expected == Counter()
    assert expected - got == Counter()
