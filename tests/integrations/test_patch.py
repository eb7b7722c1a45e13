"""`patch` and `unpatch`: one line in, exactly undone; no other model or library is touched."""

from __future__ import annotations

import copy
from importlib import metadata
from typing import Any

import pytest
import torch
from hf_models import (
    FUSED_ARCHS,
    UNDECORATED,
    assert_same_step,
    changes,
    config_values,
    experts_of,
    forward,
    pickled,
    probe,
    relative,
    snapshot,
    step,
    tiny,
    with_lora,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import moe

import turnout
from turnout import Unsupported
from turnout.tuning import first_use

KEYS = ("qwen3_moe", "gpt_oss", "nemotron_h", "gemma4_text", *UNDECORATED)


@pytest.mark.parametrize("key", KEYS)
def test_unpatch_leaves_something_behind(key: str) -> None:
    model = tiny(key)
    before, out = snapshot(model), forward(model, key)
    turnout.patch(model)
    assert changes(before, snapshot(model))
    forward(model, key)
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []
    assert torch.equal(forward(model, key), out)


@pytest.mark.parametrize("key", ["qwen3_moe", "llama4_text", "longcat_flash", "nemotron_h"])
@pytest.mark.parametrize("when", ["before PEFT", "after PEFT"])
def test_unpatch_of_an_adapted_model_leaves_something_behind(key: str, when: str) -> None:
    base = tiny(key)
    if when == "before PEFT":
        turnout.patch(base)
    model = with_lora(base)
    stock = with_lora(tiny(key))
    expected = forward(stock, key)
    if when == "after PEFT":
        turnout.patch(model)
    with probe() as ran:
        forward(model, key)
    assert ran.fused_projections
    turnout.unpatch(model)
    names = [k for k in snapshot(model) if "turnout" in k or "_activate_lora" in k]
    assert names == []
    assert snapshot(model).keys() == snapshot(stock).keys()
    with probe() as ran:
        assert torch.equal(forward(model, key), expected)
    assert not ran.calls


def test_unpatch_forgets_the_router_warning() -> None:
    base = tiny("qwen3_moe")
    turnout.patch(base)
    model = with_lora(base, target_modules="all-linear")
    with pytest.warns(UserWarning, match="the router .* is adapted"):
        forward(model, "qwen3_moe")
    turnout.unpatch(model)
    assert [key for key in snapshot(model) if "turnout" in key] == []


def test_unpatch_of_the_inner_model_breaks_the_outer_one() -> None:
    model = with_lora(tiny("qwen3_moe"))
    expected = forward(model, "qwen3_moe")
    turnout.patch(model)
    forward(model, "qwen3_moe")
    turnout.unpatch(model.get_base_model())
    assert torch.equal(forward(model, "qwen3_moe"), expected)


def test_unpatch_of_an_unpatched_model_changes_it() -> None:
    model = tiny("qwen3_moe")
    before = snapshot(model)
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("key", ["qwen3_moe", "llama4_text"])
def test_patching_twice_is_not_unpatch_then_patch(key: str) -> None:
    model = tiny(key)
    before = snapshot(model)
    turnout.patch(model, recompute="gate_up")
    once = len(model._forward_pre_hooks)
    report = turnout.patch(model, recompute="none")
    assert len(model._forward_pre_hooks) == once
    assert report.recompute == "none"
    with probe() as ran:
        forward(model, key)
    assert len(ran.calls) == len(experts_of(model))
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []


def test_patching_an_adapted_model_at_two_levels_runs_adapters_twice() -> None:
    base = tiny("qwen3_moe")
    turnout.patch(base)
    model = with_lora(base)
    turnout.patch(model).require("fused")
    assert_same_step(step(model, "qwen3_moe"), step(with_lora(tiny("qwen3_moe")), "qwen3_moe"))
    turnout.unpatch(model)
    assert [key for key in snapshot(model) if "turnout" in key] == []


@pytest.mark.parametrize("key", FUSED_ARCHS)
def test_a_layer_reported_as_fused_is_never_called(key: str) -> None:
    model = tiny(key)
    report = turnout.patch(model).require("fused")
    with probe() as ran:
        forward(model, key)
    skipped = 2 if key == "ernie4_5_vl_moe_text" else 0  # no image tokens in a text batch
    assert len(ran.calls) == len(report.layers) - skipped


def test_a_model_without_experts_is_patched_silently() -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no MoE layer"):
        turnout.patch(model)
    assert changes(before, snapshot(model)) == []
    with pytest.raises(ValueError, match="no MoE layer"):
        turnout.lora_targets(model)


def test_model_config_is_touched() -> None:
    model = tiny("qwen3_moe")
    before = config_values(model.config)
    turnout.patch(model)
    forward(model, "qwen3_moe")
    assert config_values(model.config) == before
    assert all(module.config is not model.config for module in experts_of(model))


def test_a_model_built_from_the_same_config_is_patched_too() -> None:
    first = tiny("qwen3_moe")
    second = type(first)(first.config).eval()
    assert second.config is first.config
    second.load_state_dict(first.state_dict())
    expected = forward(second, "qwen3_moe")
    before = snapshot(second)
    turnout.patch(first)
    with probe() as ran:
        assert torch.equal(forward(second, "qwen3_moe"), expected)
    assert not ran.calls
    assert changes(before, snapshot(second)) == []
    with probe() as ran:
        forward(first, "qwen3_moe")
    assert len(ran.calls) == 2


def test_no_class_of_another_library_is_modified() -> None:
    from peft.tuners.lora.layer import ParamWrapper

    model = with_lora(tiny("qwen3_moe"))
    experts = type(experts_of(model)[0])
    classes = (ParamWrapper, experts, type(model), type(model.get_base_model()), nn.Module)
    before = [dict(vars(cls)) for cls in classes]
    turnout.patch(model)
    forward(model, "qwen3_moe")
    assert [dict(vars(cls)) for cls in classes] == before


def _deepcopy(model: Any) -> Any:
    return copy.deepcopy(model)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", *UNDECORATED])
@pytest.mark.parametrize("duplicate", [_deepcopy, pickled])
def test_a_copy_of_a_patched_peft_model_loses_the_fused_path(key: str, duplicate: Any) -> None:
    model = with_lora(tiny(key))
    report = turnout.patch(model)
    expected = step(model, key)
    twin = duplicate(model)
    with probe() as ran:
        got = step(twin, key)
    assert ran.folds == 0 or key in ("aria_text", "jetmoe")
    assert len(ran.calls) == len(report.layers) or key in ("aria_text", "jetmoe")
    assert torch.equal(got[0], expected[0])
    assert_same_step(got, expected)


@pytest.mark.parametrize("key", ["qwen3_moe", "llama4_text", "longcat_flash"])
@pytest.mark.parametrize("duplicate", [_deepcopy, pickled])
def test_a_copy_shares_state_with_the_original(key: str, duplicate: Any) -> None:
    model = with_lora(tiny(key))
    turnout.patch(model)
    expected = forward(model, key)
    twin = duplicate(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name or "down_proj" in name:
                parameter.zero_()
    changed = forward(twin, key)
    assert relative(changed, expected) > 1e-3
    assert torch.equal(forward(model, key), expected)
    turnout.unpatch(twin)
    with probe() as ran:
        assert relative(forward(twin, key), changed) < 1e-5
        assert not ran.calls
        assert torch.equal(forward(model, key), expected)
        assert ran.calls
    assert [name for name in snapshot(twin) if "turnout" in name] == []


def test_a_copy_attaches_adapters_to_the_original() -> None:
    base = tiny("qwen3_moe")
    turnout.patch(base)
    twin = copy.deepcopy(base)
    adapted = with_lora(twin)
    with probe() as ran:
        forward(adapted, "qwen3_moe")
    assert ran.folds == 0
    assert ran.fused_projections == 4
    assert not [key for key in snapshot(base) if "lora" in key]


def test_a_failed_patch_leaves_the_model_half_patched() -> None:
    # nemotron_h has up_proj, so the adapter is on attention only.
    model = with_lora(
        tiny("nemotron_h"), target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="no expert parameter"):
        turnout.patch(model)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; expected one of 'auto'"),
        ({"router": "fast"}, ValueError, "router is 'fast'"),
        ({"recompute": "all"}, ValueError, "recompute is 'all'"),
        ({"expert_dropout": 1.0}, ValueError, "expert_dropout is 1.0"),
        ({"expert_dropout": -0.1}, ValueError, "expert_dropout is -0.1"),
        ({"tune": "now"}, ValueError, "expected None or 'first-use'"),
        ({"backend": "sonic"}, Unsupported, "sonic"),
    ],
)
def test_a_bad_option_changes_the_model(options: Any, error: Any, words: str) -> None:
    model = tiny("qwen3_moe")
    before = snapshot(model)
    with pytest.raises(error, match=words):
        turnout.patch(model, **options)
    assert changes(before, snapshot(model)) == []


def test_tuning_goes_on_after_unpatch_or_never_starts() -> None:
    one, other = tiny("qwen3_moe"), tiny("qwen3_moe")
    turnout.patch(one)
    assert first_use.current() is None
    turnout.patch(one, tune="first-use")
    turnout.patch(other, tune="first-use")
    turnout.unpatch(one)
    assert first_use.current() is not None, "the other model still asks for it"
    turnout.unpatch(other)
    assert first_use.current() is None


def test_something_that_is_not_a_module_is_patched() -> None:
    with pytest.raises(ValueError, match="model is str"):
        turnout.patch("Qwen/Qwen3-30B-A3B")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("package", "version"),
    [("transformers", "5.16.0"), ("transformers", "4.57.6"), ("peft", "0.19.0"), ("peft", "0.9.3")],
)
def test_too_old_libraries_are_used(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: version if n == package else real(n))
    model = tiny("qwen3_moe")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{package} is {version}; expected .* or newer.*pip"):
        turnout.patch(model)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("version", ["5.16.1", "5.17", "5.17.0rc1", "5.20.0.dev0+abc", "6.0.0"])
def test_a_new_enough_transformers_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: version if n == "transformers" else real(n))
    assert turnout.patch(tiny("qwen3_moe")).counts == {"fused": 2}


def test_experts_implementation_turnout_computes_something_else() -> None:
    expected = step(tiny("qwen3_moe"), "qwen3_moe")
    model = tiny("qwen3_moe")
    assert "turnout" in moe.ALL_EXPERTS_FUNCTIONS
    model.set_experts_implementation("turnout")
    with probe() as ran:
        assert_same_step(step(model, "qwen3_moe"), expected)
    assert len(ran.calls) == 2
    model.set_experts_implementation("eager")
    with probe() as ran:
        forward(model, "qwen3_moe")
    assert not ran.calls


@pytest.mark.parametrize("key", ["step3p5", "llama4_text", "longcat_flash", "dbrx", "jetmoe"])
def test_layers_that_transformers_never_reaches_count_as_fused(key: str) -> None:
    # transformers takes the name silently on undecorated architectures, and never calls it.
    model = tiny(key)
    model.set_experts_implementation("turnout")
    with probe() as ran:
        expected = forward(model, key)
    assert not ran.calls
    report = turnout.patch(model)
    with probe() as ran:
        assert relative(forward(model, key), expected) < 1e-5
    assert len(ran.calls) == report.counts.get("fused", 0)
    assert sum(report.counts.values()) == 2


def test_a_change_of_the_models_implementation_undoes_a_patch() -> None:
    model = tiny("qwen3_moe")
    turnout.patch(model)
    model.set_experts_implementation("grouped_mm")
    with probe() as ran:
        forward(model, "qwen3_moe")
    assert len(ran.calls) == 2
    turnout.unpatch(model)
    with probe() as ran:
        forward(model, "qwen3_moe")
    assert not ran.calls


def test_an_instance_forward_of_another_library_is_lost() -> None:
    # accelerate's hooks and transformers' tensor-parallel styles set `forward` on instances.
    model = tiny("step3p5")
    module = experts_of(model)[0]
    original, seen = module.forward, []

    def forward_of_another(*args: Any) -> Any:
        seen.append(1)
        return original(*args)

    module.forward = forward_of_another
    expected = forward(model, "step3p5")
    turnout.patch(model)
    forward(model, "step3p5")
    turnout.unpatch(model)
    assert vars(module).get("forward") is forward_of_another
    seen.clear()
    assert torch.equal(forward(model, "step3p5"), expected)
    assert seen
