"""What a layer computes is never guessed: unknown gates, flags and storage leave it stock, and say
why."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hf_models import (
    STOCK_ARCHS,
    assert_same_step,
    changes,
    experts_of,
    forward,
    forward_after,
    probe,
    relative,
    snapshot,
    step,
    tiny,
    with_lora,
)
from torch import Tensor, nn
from transformers.integrations import moe

import turnout
from turnout import Unsupported
from turnout.integrations import architectures
from turnout.integrations.architectures import StockReason
from turnout.verify.tiny import TINY

REASONS = set(get_args(StockReason))


def assert_stock(model: Any, key: str, reason: str, layers: int = 2) -> None:
    """The whole model stays stock for `reason`, and computes what it did, bit for bit."""
    expected = forward(model, key)  # some routers keep values of the last forward
    before = snapshot(model)
    report = turnout.patch(model)
    assert report.counts == {"stock": layers}
    assert {row.reason for row in report.layers} == {reason}
    assert all(row.detail for row in report.layers)
    with probe() as ran:
        assert torch.equal(forward(model, key), expected)
    assert not ran.calls
    with pytest.raises(Unsupported, match=reason):
        report.require("fused")
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("key", "reason", "layers"),
    [
        ("dbrx", "unknown_layout", 2),
        ("switch_transformers", "no_3d_weights", 4),
        ("nllb-moe", "upstream_broken", 4),
    ],
)
def test_an_architecture_that_is_not_fused_gives_no_reason(
    key: str, reason: str, layers: int
) -> None:
    assert key in STOCK_ARCHS
    assert_stock(tiny(key), key, reason, layers)
    with pytest.raises(Unsupported, match="no stacks to adapt"):
        turnout.lora_targets(tiny(key))


def test_stock_reasons_are_not_from_the_fixed_list() -> None:
    assert {
        "no_3d_weights",
        "upstream_broken",
        "unknown_gate",
        "unknown_layout",
        "quantised",
        "not_token_routed",
        "other_kernel",
    } == REASONS
    for key in STOCK_ARCHS:
        assert {row.reason for row in turnout.patch(tiny(key)).layers} <= REASONS


def _give_class(modules: list[Any], **members: Any) -> None:
    for module in modules:
        module.__class__ = type(f"Mine{type(module).__name__}", (type(module),), members)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "minimax_m3_vl_text", "step3p5"])
def test_a_subclass_with_another_gate_runs_the_known_one(key: str) -> None:
    model = tiny(key)

    def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(gate) * up

    _give_class(experts_of(model), _apply_gate=_apply_gate)
    assert_stock(model, key, "unknown_gate")


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_an_instance_with_another_gate_runs_the_known_one(key: str) -> None:
    model = tiny(key)
    for module in experts_of(model):
        module._apply_gate = lambda z: torch.tanh(z.chunk(2, dim=-1)[0]) * z.chunk(2, dim=-1)[1]
    assert_stock(model, key, "unknown_gate")


def test_a_gate_that_computes_the_same_is_not_recognised_by_what_it_is() -> None:
    # Without a known definition even a right answer on the grid is no proof.
    model = tiny("qwen3_moe")

    def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    _give_class(experts_of(model), _apply_gate=_apply_gate)
    assert_stock(model, "qwen3_moe", "unknown_gate")


@pytest.mark.parametrize("key", ["qwen3_moe", "nemotron_h", "llama4_text", "longcat_flash"])
def test_an_activation_without_epilogue_runs_silu(key: str) -> None:
    model = tiny(key)
    for module in experts_of(model):
        module.act_fn = nn.Tanh()
    assert_stock(model, key, "unknown_gate")


class SiLU(nn.Module):
    """Has the name of silu and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.5 * x)


@pytest.mark.parametrize("key", ["qwen3_moe", "nemotron_h", "longcat_flash", "llama4_text"])
def test_an_activation_is_believed_by_its_name(key: str) -> None:
    model = tiny(key)
    for module in experts_of(model):
        module.act_fn = SiLU()
    assert_stock(model, key, "unknown_gate")


@pytest.mark.parametrize(
    ("key", "attribute", "value"),
    [
        ("gpt_oss", "limit", 3.0),
        ("gpt_oss", "alpha", 1.0),
        ("minimax_m3_vl_text", "swiglu_limit", 2.0),
        ("deepseek_v4", "limit", 0.5),
        *([("hy_v4", "swiglu_limit", 0.5)] if "hy_v4" in TINY else []),  # transformers 5.17
        ("step3p5", "limit", 0.5),
    ],
)
def test_a_gates_constant_is_taken_from_the_architecture_and_not_the_module(
    key: str, attribute: str, value: float
) -> None:
    model = tiny(key)
    before = forward(model, key)
    for module in experts_of(model):
        assert hasattr(module, attribute)
        setattr(module, attribute, value)
        with torch.no_grad():
            module.gate_up_proj.mul_(4)
    expected = step(model, key)
    assert relative(expected[0], before) > 1e-3
    report = turnout.patch(model)
    got = step(model, key)
    assert report.counts == {"fused": 2}
    assert_same_step(got, expected, 2e-5, floor=1e-3)  # hyper-connections: tiny gradients


def test_interleaved_gates_are_read_as_concatenated() -> None:
    model = tiny("gpt_oss")
    expected = forward(model, "gpt_oss")
    for module in experts_of(model):
        module.is_concatenated = True  # a lie: gpt-oss's `_apply_gate` takes every second column
    report = turnout.patch(model)
    assert {row.reason for row in report.layers} == {"unknown_gate"}
    assert torch.equal(forward(model, "gpt_oss"), expected)


def _newer_decorator(
    experts_class: Any = None,
    *,
    experts_interface: Any = None,
    is_concatenated: bool = True,
    is_transposed: bool = False,
    has_bias: bool = False,
    has_gate: bool = True,
    has_post_expert_norm: bool = False,
) -> Any:
    raise AssertionError("only its signature is read")


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_of_a_newer_decorator_is_ignored(
    value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe")
    monkeypatch.setattr(moe, "use_experts_implementation", _newer_decorator)
    architectures._newer_flags.cache_clear()
    try:
        experts_of(model)[1].has_post_expert_norm = value
        report = turnout.patch(model)
        assert [row.status for row in report.layers] == ["fused", "stock" if value else "fused"]
        if value:
            assert report.layers[1].reason == "unknown_layout"
            assert "has_post_expert_norm" in report.layers[1].detail
    finally:
        architectures._newer_flags.cache_clear()


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantised_stacks_are_computed_with(key: str, dtype: torch.dtype) -> None:
    model = tiny(key)
    module = experts_of(model)[0]
    stored = module.down_proj.detach().to(dtype)
    module.down_proj = nn.Parameter(stored, requires_grad=False)
    before = snapshot(model)
    report = turnout.patch(model)
    assert [row.status for row in report.layers] == ["stock", "fused"]
    assert report.layers[0].reason == "quantised"
    assert str(dtype) in report.layers[0].detail
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []


def test_quantised_after_patching_is_computed_with() -> None:
    model = tiny("qwen3_moe")
    turnout.patch(model)
    for module in experts_of(model):
        stored = module.down_proj.detach().to(torch.float8_e4m3fn)
        module.down_proj = nn.Parameter(stored, requires_grad=False)
    with pytest.raises(Unsupported, match=r"down_proj .* quantised.*bfloat16"):
        forward(model, "qwen3_moe")


class _Identity(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.0


def _parametrize(model: Any) -> None:
    for module in experts_of(model):
        nn.utils.parametrize.register_parametrization(module, "down_proj", _Identity())


def test_a_parametrized_stack_is_fused() -> None:
    # bitsandbytes keeps 4-bit experts behind a parametrization.
    model = tiny("qwen3_moe")
    _parametrize(model)
    assert_stock(model, "qwen3_moe", "quantised")


@pytest.mark.parametrize("order", ["patch, wrap, quantise", "wrap, patch, quantise"])
def test_lora_on_a_parametrized_stack_adds_the_delta_twice(order: str) -> None:
    model = tiny("qwen3_moe")
    if order.startswith("patch"):
        turnout.patch(model)
    adapted = with_lora(model)
    if order.startswith("wrap"):
        turnout.patch(adapted)
    forward(adapted, "qwen3_moe")
    _parametrize(model)
    with pytest.raises(Unsupported, match="parametrization"):
        forward(adapted, "qwen3_moe")


def test_lora_on_a_stack_parametrized_before_patching_adds_the_delta_twice() -> None:
    model = with_lora(tiny("qwen3_moe"))
    _parametrize(model)
    with pytest.raises(Unsupported, match="parametrization"):
        forward_after(turnout.patch, model, "qwen3_moe")


@pytest.mark.parametrize("key", ["qwen3_moe", "llama4_text", "longcat_flash"])
def test_sharded_weights_are_computed_with(key: str) -> None:
    model = tiny(key)
    turnout.patch(model)
    experts_of(model)[1].down_proj.device_mesh = object()
    with pytest.raises(Unsupported, match=r"down_proj of .* is a DTensor; expected a local"):
        forward(model, key)


@pytest.mark.parametrize("when", ["before patch", "after patch"])
@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_partitioned_weights_are_computed_with(key: str, when: str) -> None:
    # DeepSpeed ZeRO-3 leaves parameters of shape (0,) outside the module's own forward.
    model = tiny(key)
    if when == "after patch":
        turnout.patch(model)
    for module in experts_of(model):
        module.gate_up_proj.data = torch.empty(0)
        module.down_proj.data = torch.empty(0)
    with pytest.raises(Unsupported, match=r"gate_up_proj of .* is empty or partitioned"):
        forward_after(turnout.patch if when == "before patch" else None, model, key)


SQUARE = ("qwen3_moe", "gpt_oss", "nemotron_h", "gemma4_text", "llama4_text", "longcat_flash")


@pytest.mark.parametrize("key", SQUARE)
@pytest.mark.parametrize("intermediate", [32, 64, 24])
def test_the_layout_is_guessed_from_sizes(key: str, intermediate: int) -> None:
    # H is 64: 32 makes gate_up square, 64 down; 24 is smaller than any tile.
    size = {
        "qwen3_moe": "moe_intermediate_size",
        "nemotron_h": "moe_intermediate_size",
        "gemma4_text": "moe_intermediate_size",
        "longcat_flash": "expert_ffn_hidden_size",
    }.get(key, "intermediate_size")
    assert size in TINY[key].config
    config = {size: intermediate} | ({"moe_latent_size": None} if key == "nemotron_h" else {})
    plain, adapted = tiny(key, **config), with_lora(tiny(key, **config))
    assert intermediate in experts_of(plain)[0].down_proj.shape
    expected, expected_lora = step(plain, key), step(adapted, key)
    for model, truth in ((plain, expected), (adapted, expected_lora)):
        turnout.patch(model).require("fused")
        with probe() as ran:
            assert_same_step(step(model, key), truth, 2e-5)
        assert ran.folds == 0


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_the_orientation_of_an_adapter_is_remembered_by_architecture(targets: list[str]) -> None:
    # PEFT goes by `is_transposed`; a later release may declare it for Llama 4's transposed stacks.
    def model_() -> Any:
        model = tiny("llama4_text", intermediate_size=32)
        for module in experts_of(model):
            module.is_transposed = True
        return with_lora(model, target_parameters=[f"feed_forward.experts.{t}" for t in targets])

    expected = step(model_(), "llama4_text")
    model = model_()
    turnout.patch(model)
    assert_same_step(step(model, "llama4_text"), expected, 2e-5)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"])
def test_an_activation_of_the_config_is_mistaken_for_another(act: str) -> None:
    model = tiny("qwen3_moe", hidden_act=act)
    expected = step(model, "qwen3_moe")
    turnout.patch(model).require("fused")
    assert_same_step(step(model, "qwen3_moe"), expected, 2e-5)


@pytest.mark.parametrize("act", ["tanh", "mish", "leaky_relu", "relu6", "laplace", "gelu_10"])
def test_an_activation_of_the_config_without_epilogue_is_approximated(act: str) -> None:
    assert_stock(tiny("qwen3_moe", hidden_act=act), "qwen3_moe", "unknown_gate")
