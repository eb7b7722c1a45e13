"""Models of transformers on the GPU: OLMoE at two sizes, single blocks, and `turnout verify`.

The truth is the model's own eager code and PEFT's own fold, in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, MEMORY
from transformers import OlmoeConfig, OlmoeForCausalLM

import turnout
from turnout.verify import checks, tiny, verify_types
from turnout.verify.run import FORWARD, GRADIENT, SHORT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("architecture", SHORT)
def test_an_architecture_is_red_on_a_gpu(architecture: str) -> None:
    """A sample; `turnout verify --all --device cuda` checks every one."""
    (row,) = verify_types([architecture], device=DEVICE.type)
    assert row.status == "ok", row.reason
    assert row.forward_err is not None
    assert row.grad_err is not None
    assert row.bf16_err is not None


# The sizes of axolotl's OLMoE tests.
SMALL = {"hidden_size": 128, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}
FULL = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}


def olmoe(sizes: dict[str, int]) -> Any:
    """One layer in float32, random weights of unit gain, on the device from the start."""
    config = OlmoeConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
        initializer_range=sizes["hidden_size"] ** -0.5,
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return OlmoeForCausalLM(config).eval()


def token_ids(batch: int = 2, length: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 128, (batch, length), generator=generator).to(DEVICE)}


def assert_parity(model: Any) -> None:
    inputs = token_ids()
    theirs = checks.run(model, inputs)
    nudged = checks.run(model, inputs, nudge=2.0**-23)
    ours, _ = checks.patched_pass(model, inputs)
    assert checks.output_error(ours, theirs) <= FORWARD
    assert checks.gradient_error(ours, theirs, nudged) <= GRADIENT


@pytest.mark.parametrize("adapters", ["none", "experts", "router", "experts and router"])
def test_a_small_olmoe_is_another_model(adapters: str) -> None:
    """48 is not 128: a layout or an A-for-B mistake can not pass unnoticed."""
    assert_parity(adapted(olmoe(SMALL), adapters))


@MEMORY["medium"]
@pytest.mark.parametrize("adapters", ["none", "experts and router"])
def test_a_full_olmoe_layer_is_another_model(adapters: str) -> None:
    model = olmoe(FULL)
    for name, parameter in model.named_parameters():  # the gradients of stacks are judged above
        parameter.requires_grad_("experts" not in name)
    assert_parity(adapted(model, adapters))


def adapted(model: Any, adapters: str) -> Any:
    targets = turnout.lora_targets(model) if "experts" in adapters else []
    if "router" in adapters:
        targets = [*targets, "mlp.gate.weight"]
    return checks.with_adapters(model, targets) if targets else model


# Softmax and a gated shared expert; sigmoid with groups, a bias and shared experts; sigmoid, bias.
BLOCKS = ("qwen2_moe", "deepseek_v3", "minimax_m2", "glm4_moe")


@pytest.mark.parametrize("adapters", ["none", "experts"])
@pytest.mark.parametrize("key", BLOCKS)
def test_a_block_with_its_shared_expert_is_another_block(key: str, adapters: str) -> None:
    """Its output and the gradients of x and of all that trains, shared expert included."""
    model = adapted(tiny.build(key).to(DEVICE), adapters)
    block = next(m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gate"))
    leaves = [p for p in block.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    x, dout = (torch.randn(2, 40, tiny.H, generator=generator).to(DEVICE) for _ in range(2))
    leaves = [x.requires_grad_(), *leaves]
    found = block(x)
    expected = (found[0] if isinstance(found, tuple) else found).view_as(x)
    got = turnout.block_forward(block, x)
    for a, b in zip(
        (got, *torch.autograd.grad(got, leaves, dout)),
        (expected, *torch.autograd.grad(expected, leaves, dout)),
        strict=True,
    ):
        assert (a - b).norm() <= 1e-5 * b.norm(), tuple(b.shape)
