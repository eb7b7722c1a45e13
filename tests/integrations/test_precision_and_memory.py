"""Mixed precision is not worse than stock, memory does not hold a merged stack, compile sees one
graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_models import experts_of, forward, loss_of, pair, relative, step, tiny, with_lora
from torch import Tensor, nn

import turnout
from turnout.verify.tiny import make_inputs, out_tensor

KEY = "qwen3_moe"
WIDE = {
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16},
    "gpt_oss": {"hidden_size": 256, "intermediate_size": 128, "num_local_experts": 16},
    "llama4_text": {"hidden_size": 256, "intermediate_size": 128, "num_local_experts": 16},
}


def _saved_over_experts(model: Any, key: str) -> float:
    """Bytes kept for backward that are no parameter, over the bytes of the expert stacks."""
    model.enable_input_require_grads()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stacks = sum(
        p.numel() * p.element_size()
        for module in experts_of(model)
        for p in module.parameters()
        if p.dim() == 3
    )
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = out_tensor(model(input_ids=torch.tensor([[3, 4, 5, 6]]), use_cache=False))
    assert out.requires_grad
    return sum(kept.values()) / stacks


@pytest.mark.parametrize("key", list(WIDE))
def test_lora_training_keeps_a_merged_stack_for_backward(key: str) -> None:
    stock, model = with_lora(tiny(key, **WIDE[key])), with_lora(tiny(key, **WIDE[key]))
    turnout.patch(model)
    assert _saved_over_experts(stock, key) > 1
    assert _saved_over_experts(model, key) < 0.1


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_recompute_keeps_the_pre_activation(key: str) -> None:
    def kept(recompute: Any) -> float:
        model = with_lora(tiny(key, **WIDE[key]))
        turnout.patch(model, recompute=recompute)
        return _saved_over_experts(model, key)

    z = 2 * (4 * 2) * (2 * 128) * 4  # two layers, four tokens, top two, G, fp32
    stacks = 2 * 16 * 3 * 256 * 128 * 4
    assert kept("none") - kept("gate_up") == pytest.approx(z / stacks, rel=1e-6)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_lora_training_allocates_a_stack(key: str) -> None:
    def largest(model: Any) -> int:
        model.train()
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
            loss_of(out_tensor(model(input_ids=torch.tensor([[3, 4]]), use_cache=False))).backward()
        events = profile.profiler.kineto_results.events()
        return max(e.nbytes() for e in events if e.name() == "[memory]")

    stock, model = with_lora(tiny(key, **WIDE[key])), with_lora(tiny(key, **WIDE[key]))
    turnout.patch(model)
    stack = 16 * 256 * 128 * 4  # the smaller one
    assert largest(stock) >= stack
    assert largest(model) < stack / 2


def _small_delta(model: Any, part: float) -> None:
    """Scale the adapters so that each delta is `part` of its stack, in norm."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "parameter_name"):
                weight, delta = module.get_param(), module.get_delta_weight("default")
                size = part * float(weight.float().norm()) / float(delta.float().norm())
                module.lora_B["default"].weight.mul_(size)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("part", [0.005, 0.001])
def test_bfloat16_loses_a_small_delta_as_pefts_fold_does(key: str, part: float) -> None:
    def wrapper_of(dtype: torch.dtype, patched: bool) -> Any:
        model = tiny(key, torch.bfloat16)
        if dtype == torch.float32:
            model = model.float()  # the truth has the same rounded weights
        model = with_lora(model)
        _small_delta(model.float(), part)
        for module in experts_of(model):
            module.to(dtype)
        if patched:
            turnout.patch(model)
        wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
        assert wrapper.lora_A["default"].weight.dtype == torch.float32
        assert wrapper.get_base_layer().down_proj.dtype == dtype
        return wrapper

    torch.manual_seed(0)
    x = torch.randn(64, 64).bfloat16()
    index = torch.stack([torch.randperm(8)[:2] for _ in range(64)])
    weights = torch.rand(64, 2).bfloat16()

    @torch.no_grad()
    def effect(wrapper: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        args = (x.to(dtype), index, weights.to(dtype))
        out = wrapper(*args)
        return out.float(), out.float() - wrapper.get_base_layer()(*args).float()

    truth, true_delta = effect(wrapper_of(torch.float32, False), torch.float32)
    peft, peft_delta = effect(wrapper_of(torch.bfloat16, False), torch.bfloat16)
    ours, our_delta = effect(wrapper_of(torch.bfloat16, True), torch.bfloat16)
    assert relative(ours, truth) < relative(peft, truth)
    assert relative(our_delta, true_delta) < relative(peft_delta, true_delta)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text"])
def test_bfloat16_training_is_further_from_the_truth_than_stock(key: str) -> None:
    truth = step(with_lora(tiny(key, torch.bfloat16).float()), key)
    stock = with_lora(tiny(key, torch.bfloat16))
    model = with_lora(tiny(key, torch.bfloat16))
    turnout.patch(model).require("fused")
    expected, got = step(stock, key), step(model, key)
    assert got[0].dtype == expected[0].dtype
    assert {n: g.dtype for n, g in got[1].items()} == {n: g.dtype for n, g in expected[1].items()}
    assert all(torch.isfinite(grad).all() for grad in got[1].values())
    eps = torch.finfo(torch.bfloat16).eps
    assert relative(got[0], truth[0]) <= 2 * relative(expected[0], truth[0]) + eps
    ours = {n: relative(g, truth[1][n]) for n, g in got[1].items()}
    theirs = {n: relative(g, truth[1][n]) for n, g in expected[1].items()}
    assert sum(ours.values()) <= 1.2 * sum(theirs.values())


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_autocast_is_further_from_the_truth_than_stock(key: str) -> None:
    stock, model = pair(key)
    truth = step(stock, key)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = step(stock, key), step(model, key)
    assert got[0].dtype == expected[0].dtype
    assert got[1].keys() == truth[1].keys()
    assert {g.dtype for g in got[1].values()} == {torch.float32}
    assert relative(got[0], truth[0]) > 1e-4  # autocast was on
    eps = torch.finfo(torch.bfloat16).eps
    assert relative(got[0], truth[0]) <= 2 * relative(expected[0], truth[0]) + eps
    for name, grad in truth[1].items():
        allowed = 2 * relative(expected[1][name], grad) + eps
        assert relative(got[1][name], grad) <= allowed, name


def test_autocast_copies_a_stack() -> None:
    model = with_lora(tiny(KEY, **WIDE[KEY]))
    turnout.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert _saved_over_experts(model, KEY) < 0.1


def _call(wrapper: Callable[..., Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(10, 64, requires_grad=True)
    index = torch.stack([torch.randperm(8)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, requires_grad=True)
    out = wrapper(x, index, weights)
    return [out.detach(), *torch.autograd.grad(loss_of(out), [x, weights, *parameters])]


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_compile_breaks_the_graph_at_the_adapters(key: str) -> None:
    _, model = pair(key)
    forward(model, key)
    wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    trainable = [p for p in wrapper.parameters() if p.requires_grad]
    assert len(trainable) == 4
    expected = _call(wrapper, trainable)
    torch._dynamo.reset()
    compiled = torch.compile(wrapper, backend="aot_eager", fullgraph=True)
    got = _call(compiled, trainable)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
    with model.disable_adapter():
        plain = wrapper(*_arguments())
    assert relative(compiled(*_arguments()), plain) > 1e-3


def _arguments() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(10, 64), torch.randint(0, 8, (10, 2)), torch.rand(10, 2)


def test_compile_of_a_whole_patched_model_computes_something_else() -> None:
    _, model = pair(KEY)
    expected = forward(model, KEY)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    got = out_tensor(compiled(**make_inputs(KEY), use_cache=False))
    assert relative(got, expected) < 1e-5
