"""Adapters on a router: turnout's logits hold what the model's own router computes under PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_blocks import (
    answer,
    dense,
    find_blocks,
    has_linear_router,
    model_of,
    num_selectable,
    tokens,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor

from turnout import route, spec_of
from turnout.integrations.routers import router_logits, router_of

T = 32

# The router's weight is a parameter: PEFT wraps the router in a ParamWrapper.
PARAMETERS = {
    "qwen3_moe": "gate.weight",
    "deepseek_v3": "gate.weight",
    "gpt_oss": "router.weight",
    "mistral4": "gate.weight",
    "minimax_m2": "gate.weight",
    "llama4_text": "router.weight",
    "granitemoe": "router.weight",
    "ernie4_5_moe": "gate.weight",
    "inkling_text": "gate.weight",
    "laguna": "gate.weight",
}
# The router is a Linear, or holds one: PEFT wraps the Linear.
LINEARS = {
    "jamba": "router",
    "aria_text": "router",
    "hunyuan_v1_moe": "gate.wg",
    "jetmoe": "router.layer",
    "gemma4_text": "router.proj",
    "afmoe": "router.gate",
    "dbrx": "router.layer",
}


for _key in ("jamba", "aria_text"):
    if not has_linear_router(_key):
        PARAMETERS[_key] = f"{LINEARS.pop(_key)}.weight"


def adapted(key: str, **options: Any) -> Any:
    """A PEFT model with random A and B on the router."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return get_peft_model(model_of(key), LoraConfig(**options)).eval()


def on_router(key: str, **options: Any) -> Any:
    if key in PARAMETERS:
        return adapted(key, target_parameters=[PARAMETERS[key]], target_modules=[], **options)
    return adapted(key, target_modules=[LINEARS[key]], **options)


def first_block(model: Any) -> Any:
    return next(iter(find_blocks(model).values()))


def ours(key: str, block: Any, x: Tensor) -> Tensor:
    spec, tensors = spec_of(block)
    out = route(router_logits(block, x), spec, **tensors)
    return dense(out.weights_TK, out.experts_TK, num_selectable(key))


def theirs(key: str, block: Any, x: Tensor) -> Tensor:
    return dense(*answer(key, block, x), num_selectable(key))


def assert_parity(key: str, block: Any, x: Tensor) -> None:
    torch.testing.assert_close(ours(key, block, x), theirs(key, block, x), rtol=2e-6, atol=2e-6)


def adapters_of(block: Any) -> dict[str, Tensor]:
    return {n: p for n, p in router_of(block).named_parameters() if "lora_" in n}


@pytest.mark.parametrize("key", [*PARAMETERS, *LINEARS])
def test_lora_on_the_router_routes_as_pefts_own_forward_does(key):
    block, x = first_block(on_router(key)), tokens(T)
    with_adapter = theirs(key, block, x)
    got = ours(key, block, x)
    torch.testing.assert_close(got, with_adapter, rtol=2e-6, atol=2e-6)
    base = theirs(key, first_block(model_of(key)), x)
    assert (with_adapter - base).abs().max() > 1e-3, "the adapter changed nothing"
    assert adapters_of(block)
    cotangent = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    for (name, p), left, right in zip(
        adapters_of(block).items(),
        torch.autograd.grad((got * cotangent).sum(), adapters_of(block).values()),
        torch.autograd.grad((with_adapter * cotangent).sum(), adapters_of(block).values()),
        strict=True,
    ):
        assert right.abs().sum() > 0, name
        assert (left - right).norm() < 1e-5 * right.norm(), f"{name} {tuple(p.shape)}"


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "jamba", "gemma4_text"])
def test_a_disabled_adapter_is_not_applied(key):
    model, x = on_router(key), tokens(T)
    block = first_block(model)
    base = theirs(key, first_block(model_of(key)), x)
    with model.disable_adapter():
        torch.testing.assert_close(ours(key, block, x), base, rtol=2e-6, atol=2e-6)
    assert (ours(key, block, x) - base).abs().max() > 1e-3


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "jamba", "hunyuan_v1_moe"])
def test_a_merged_adapter_is_not_applied_twice(key):
    model, x = on_router(key), tokens(T)
    block = first_block(model)
    before = theirs(key, block, x)
    model.merge_adapter()
    torch.testing.assert_close(ours(key, block, x), before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(ours(key, block, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "key", [k for k in ("jamba", "aria_text", "hunyuan_v1_moe", "gemma4_text") if k in LINEARS]
)
def test_two_active_adapters_on_a_router_add_up(key):
    model, x = on_router(key), tokens(T)
    torch.manual_seed(2)
    second = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=[LINEARS[key]])
    model.add_adapter("second", second)
    block = first_block(model)
    one = theirs(key, block, x)
    model.base_model.set_adapter(["default", "second"])
    assert (theirs(key, block, x) - one).abs().max() > 1e-3
    assert_parity(key, block, x)


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_rank_stabilised_scaling_reaches_the_router(key):
    block = first_block(on_router(key, use_rslora=True))
    assert router_of(block).scaling["default"] == 8 / 2
    assert_parity(key, block, tokens(T))


LINEAR_OPTIONS = {
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("option", LINEAR_OPTIONS)
@pytest.mark.parametrize(
    "key", [k for k in ("jamba", "aria_text", "hunyuan_v1_moe", "dbrx") if k in LINEARS]
)
def test_no_option_of_lora_on_a_linear_router_is_left_out(key, option):
    model, x = on_router(key, **LINEAR_OPTIONS[option]), tokens(T)
    block = first_block(model)
    with torch.no_grad():
        for name, p in router_of(block).named_parameters():
            if "lora_magnitude" in name or ("lora_B" in name and name.endswith("bias")):
                p.copy_(p + torch.rand(p.shape, generator=torch.Generator().manual_seed(4)))
    router_of(block).train(option == "dropout")
    torch.manual_seed(3)
    expected = theirs(key, block, x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(key, block, x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("target", ["module", "parameter"])
def test_longcat_reads_the_weight_of_its_classifier_past_peft_and_so_do_we(target):
    """transformers calls F.linear on `classifier.weight`, so an adapter there does nothing."""
    key, x = "longcat_flash", tokens(T)
    if target == "module":
        model = adapted(key, target_modules=["classifier"])
    else:
        model = adapted(key, target_parameters=["classifier.weight"], target_modules=[])
    block = first_block(model)
    assert any("lora_A" in n for n, _ in block.router.named_parameters())
    assert_parity(key, block, x)


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "gemma4_text", "gpt_oss"])
def test_a_router_in_modules_to_save_is_the_saved_copy(key):
    name = "gate" if key in ("qwen3_moe", "deepseek_v3") else "router"
    model = adapted(key, target_modules=["q_proj", "q_a_proj"], modules_to_save=[name])
    block, x = first_block(model), tokens(T)
    wrapper = getattr(block, name)
    base = theirs(key, block, x)
    with torch.no_grad():
        for p in wrapper.modules_to_save["default"].parameters():
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
            p.add_(0.2 * noise)
    assert (theirs(key, block, x) - base).abs().max() > 1e-3
    assert_parity(key, block, x)
    trained = [p for p in wrapper.modules_to_save["default"].parameters() if p.dim() == 2]
    grad = torch.autograd.grad(ours(key, block, x).square().sum(), trained)
    assert all(g.abs().sum() > 0 for g in grad)
    with model.disable_adapter():
        assert_parity(key, block, x)
        torch.testing.assert_close(ours(key, block, x), base, rtol=2e-6, atol=2e-6)


def test_bfloat16_logits_keep_their_dtype_under_a_float32_adapter():
    for key in ("qwen3_moe", "mistral4", "deepseek_v3", "jamba"):
        model = on_router(key)
        for name, p in model.named_parameters():
            if "lora_" not in name:
                p.data = p.data.bfloat16()
        block, x = first_block(model), tokens(T, torch.bfloat16)
        logits = router_logits(block, x)
        expected = torch.float32 if key == "deepseek_v3" else torch.bfloat16
        assert logits.dtype == expected, key
        exact = router_logits(first_block(on_router(key)), tokens(T))
        assert (logits.float() - exact).norm() < 2e-2 * exact.norm(), key
