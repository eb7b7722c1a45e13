"""`lora_targets` names the expert stacks and nothing else; adapters in the wrong place are said."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hf_models import (
    FUSED_ARCHS,
    LORA_ARCHS,
    PEFT_PATH_ARCHS,
    assert_same_step,
    experts_of,
    forward,
    forward_after,
    probe,
    step,
    tiny,
    with_lora,
)
from live_blocks import has_linear_router
from peft.tuners.lora.layer import ParamWrapper

import turnout

KEY = "qwen3_moe"


def _adapted(model: Any) -> list[tuple[str, str, Any]]:
    """(name, parameter, module that holds it) of every adapted parameter."""
    return [
        (name, module.parameter_name, module.get_base_layer())
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    ]


@pytest.mark.parametrize("key", LORA_ARCHS)
def test_targets_miss_an_expert_stack_or_hit_something_else(key: str) -> None:
    base = tiny(key)
    stacks = {
        (id(module), name)
        for module in experts_of(base)
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 3
    }
    assert len(stacks) == 2 * len(experts_of(base)) >= 4
    model = with_lora(base)
    adapted = _adapted(model)
    assert {(id(holder), name) for _, name, holder in adapted} == stacks
    assert len(adapted) == len(stacks)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(stacks)


@pytest.mark.parametrize("key", PEFT_PATH_ARCHS)
def test_targets_of_an_architecture_with_a_module_per_stack_miss_one(key: str) -> None:
    model = with_lora(tiny(key))
    holders = [type(holder).__name__ for _, _, holder in _adapted(model)]
    assert len(holders) == 4
    assert set(holders) <= {"AriaGroupedExpertsGemm", "JetMoeParallelExperts"}
    assert not any("attention" in name for name, _, _ in _adapted(model))
    report = turnout.patch(model)
    assert set(report.adapters.values()) == {
        "PEFT's own fold: this architecture keeps each stack in a module of its own"
    }
    stock = forward(with_lora(tiny(key)), key)
    assert torch.allclose(forward(model, key), stock, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("key", PEFT_PATH_ARCHS)
def test_an_adapter_on_one_of_two_stack_modules_is_dropped(key: str, index: int) -> None:
    target = turnout.lora_targets(tiny(key))[index]
    expected = step(with_lora(tiny(key), target_parameters=[target]), key)
    assert len(expected[1]) == 4
    model = with_lora(tiny(key), target_parameters=[target])
    turnout.patch(model)
    assert_same_step(step(model, key), expected)


@pytest.mark.parametrize("key", ["qwen3_moe", "gemma4_text", "llama4_text", "nemotron_h"])
def test_targets_depend_on_what_was_done_to_the_model(key: str) -> None:
    base = tiny(key)
    expected = turnout.lora_targets(base)
    turnout.patch(base)
    assert turnout.lora_targets(base) == expected
    model = with_lora(base)
    assert turnout.lora_targets(model) == expected
    turnout.unpatch(model)
    assert turnout.lora_targets(model) == expected


def test_targets_are_the_same_for_every_architecture() -> None:
    found = {key: tuple(turnout.lora_targets(tiny(key))) for key in FUSED_ARCHS}
    assert found["qwen3_moe"] == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert found["nemotron_h"] == ("mixer.experts.up_proj", "mixer.experts.down_proj")
    assert found["gemma4_text"] == ("experts.gate_up_proj", "experts.down_proj")
    assert found["llama4_text"][0] == "feed_forward.experts.gate_up_proj"
    assert found["granitemoe"][0] == "block_sparse_moe.experts.gate_up_proj"
    assert found["jetmoe"][0] == "mlp.input_linear.weight"


def _router_warnings(model: Any, key: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        turnout.patch(model)
        forward(model, key)
        forward(model, key)
    return [str(w.message) for w in caught if "the router" in str(w.message)]


# PEFT converts the experts too in the first four; in the others only Linear layers are wrapped.
@pytest.mark.parametrize(
    "key",
    [
        "qwen3_moe",
        "hunyuan_v1_moe",
        "afmoe",
        "longcat_flash",
        *(["jamba", "aria_text"] if has_linear_router("jamba") else []),
        "gemma4_text",
        "jetmoe",
        "dbrx",
        "zaya",
    ],
)
def test_all_linear_adapts_the_router_in_silence(key: str) -> None:
    model = with_lora(tiny(key), target_modules="all-linear")
    names = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and (".router" in name or ".gate" in name)
    ]
    assert names
    said = _router_warnings(model, key)
    assert len(said) == 1
    assert "all-linear" in said[0]
    assert "lora_targets" in said[0]


@pytest.mark.parametrize("when", ["patch first", "adapters first"])
def test_a_router_without_adapter_is_warned_about(when: str) -> None:
    model = tiny(KEY)
    if when == "patch first":
        turnout.patch(model)
    model = with_lora(
        model, target_modules=["q_proj"], target_parameters=turnout.lora_targets(model)
    )
    assert _router_warnings(model, KEY) == []


def test_a_router_adapted_after_patching_is_not_warned_about() -> None:
    base = tiny(KEY)
    turnout.patch(base)
    model = with_lora(base, target_modules="all-linear")
    with pytest.warns(UserWarning, match=r"the router .*mlp\.gate is adapted"):
        forward(model, KEY)
    twin = copy.deepcopy(model.peft_config["default"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following .*_pattern keys")
        model.add_adapter("second", twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(model, KEY)


@pytest.mark.parametrize("when", ["patch first", "adapters first"])
@pytest.mark.parametrize(
    ("key", "target"),
    [("nemotron_h", "experts.gate_up_proj"), ("qwen3_moe", "experts.up_proj")],
)
def test_expert_adapters_that_match_nothing_train_nothing(key: str, target: str, when: str) -> None:
    model = tiny(key)
    if when == "patch first":
        turnout.patch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="target_parameters=")
        model = with_lora(model, target_modules=["q_proj"], target_parameters=[target])
    with pytest.raises(ValueError, match=r"asks for .*" + target + r".*lora_targets\(model\)"):
        forward_after(turnout.patch if when == "adapters first" else None, model, key)


# PEFT turns these names into expert adapters for some architectures; not for these.
@pytest.mark.parametrize("when", ["patch first", "adapters first"])
@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("qwen3_5_moe_text", "list"),
        ("qwen3_5_moe_text", "regex"),
        ("llama4_text", "list"),
        ("nemotron_h", "list"),
        ("gemma4_text", "list"),
    ],
)
def test_names_that_hit_only_shared_experts_pass_for_expert_adapters(
    key: str, kind: str, when: str
) -> None:
    model = tiny(key)
    if when == "patch first":
        turnout.patch(model)
    names = ["gate_proj", "up_proj", "down_proj"]
    targets: Any = names if kind == "list" else rf".*\.({'|'.join(names)})"
    model = with_lora(model, target_modules=targets)
    assert _adapted(model) == []
    with pytest.warns(UserWarning, match=r"no routed expert is adapted.*lora_targets"):
        forward_after(turnout.patch if when == "adapters first" else None, model, key)


def test_attention_only_adapters_are_complained_about() -> None:
    model = with_lora(tiny(KEY), target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = turnout.patch(model).require("fused")
        forward(model, KEY)
    assert report.adapters == {}
    with probe() as ran:
        forward(model, KEY)
    assert len(ran.calls) == 2
