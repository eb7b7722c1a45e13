"""`TurnoutPlugin` against axolotl itself: its plugin base, its schema, its loader, `axolotl train`.

Skipped, and so not run, where axolotl is not installed; `docs/axolotl.md` says how to install it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed: its plugin was not tested")

import torch
import yaml
from axolotl.cli.config import plugin_set_cfg, prepare_plugins
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.integrations.liger.models.qwen3_5_moe import apply_liger_kernel_to_qwen3_5_moe
from axolotl.kernels.lora import apply_lora_mlp_swiglu
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.config import normalize_config, validate_config
from axolotl.utils.dict import DictDefault
from axolotl_cases import LORA, PLUGIN, ROOT, config, tiny_model, train, write_inputs
from hf_models import probe, relative, with_lora
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3MoeForCausalLM

import turnout
from turnout.experts import early
from turnout.integrations import axolotl as plugin_module
from turnout.integrations import axolotl_rules as rules
from turnout.integrations.axolotl import TurnoutArgs, TurnoutPlugin
from turnout.integrations.state import state_of
from turnout.integrations.trainer import TurnoutCallback
from turnout.specs import Unsupported

LIGER = "axolotl.integrations.liger.LigerPlugin"
CAPABILITIES = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl keeps its plugins in one object per process."""
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axolotl")
    write_inputs(folder)
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plugin's messages, from axolotl's own logger."""
    found: list[str] = []

    def keep(record: Any) -> bool:
        found.append(record.getMessage())
        return True

    monkeypatch.setattr(plugin_module.LOG.logger, "filter", keep)
    return found


def validated(inputs: Path, *, plugins: tuple[str, ...] = (PLUGIN,), **keys: Any) -> DictDefault:
    """What axolotl makes of a config: plugins registered, the merged schema, defaults."""
    cfg = DictDefault(config(inputs, "out", plugins=list(plugins), **keys))
    prepare_plugins(cfg)
    environment = {"torch_version": "2.13.0"}
    cfg = validate_config(cfg, capabilities=CAPABILITIES, env_capabilities=environment)
    plugin_set_cfg(cfg)
    return cfg


def loaded(cfg: DictDefault) -> Any:
    """The model, through the hooks of the manager in the loader's order."""
    manager = PluginManager.get_instance()
    manager.pre_model_load(cfg)
    model = tiny_model()
    manager.post_model_build(cfg, model)
    manager.pre_lora_load(cfg, model)
    if cfg.adapter:
        model = with_lora(model)
    manager.post_lora_load(cfg, model)
    manager.post_model_load(cfg, model)
    return model


def test_plugin_is_one_of_axolotls_and_invents_no_hook() -> None:
    assert issubclass(TurnoutPlugin, BasePlugin)
    own = {name for name in vars(TurnoutPlugin) if not name.startswith("_")}
    assert own <= set(vars(BasePlugin))


def test_axolotl_finds_the_plugin_and_its_defaults(inputs: Path) -> None:
    cfg = validated(inputs)
    assert list(PluginManager.get_instance().plugins) == [PLUGIN]
    assert {key: cfg[key] for key in rules.DEFAULTS} == rules.DEFAULTS
    assert set(TurnoutArgs.model_fields) == set(rules.DEFAULTS)


def test_values_survive_axolotls_schema(inputs: Path) -> None:
    keys = {
        "turnout_backend": "torch",
        "turnout_router": "fused",
        "turnout_recompute": "gate_up",
        "turnout_tune": "first-use",
        "turnout_report": "x.jsonl",
    }
    cfg = validated(inputs, **keys)
    assert {key: cfg[key] for key in keys} == keys
    assert validated(inputs, turnout_report=True).turnout_report is True


@pytest.mark.parametrize(
    ("key", "got"),
    [
        ("turnout_backend", "cuda"),
        ("turnout_router", "both"),
        ("turnout_recompute", True),
        ("turnout_tune", "always"),
        ("turnout_report", ""),
        ("turnout_backnd", "torch"),
        ("use_scattermoe", True),
        ("use_sonicmoe", True),
        ("experts_implementation", "scattermoe"),
    ],
)
def test_bad_value_stops_before_loading(inputs: Path, key: str, got: Any) -> None:
    with pytest.raises(ValueError, match=key):
        validated(inputs, **{key: got})


@pytest.mark.parametrize("turnout_first", [True, False])
@pytest.mark.parametrize("key", ["use_scattermoe", "use_sonicmoe"])
def test_axolotls_kernel_plugin_is_refused(inputs: Path, key: str, turnout_first: bool) -> None:
    plugins = [PLUGIN, "axolotl.integrations.kernels.KernelsPlugin"]
    if not turnout_first:
        plugins.reverse()
    with pytest.raises(ValueError, match=f"{key} is True; expected not set with TurnoutPlugin"):
        validated(inputs, plugins=tuple(plugins), **{key: True})


def test_alias_of_the_kernel_plugin_is_refused(inputs: Path) -> None:
    plugins = ("axolotl.integrations.kernels.KernelsPlugin", PLUGIN)
    with pytest.raises(ValueError, match="expert_backend is 'scattermoe'; expected"):
        validated(inputs, plugins=plugins, expert_backend="scattermoe")


def test_default_of_dense_mixer_is_seen_before_loading(inputs: Path) -> None:
    cfg = validated(inputs, plugins=("axolotl.integrations.densemixer.DenseMixerPlugin", PLUGIN))
    assert cfg.dense_mixer is True
    with pytest.raises(ValueError, match="dense_mixer is True"):
        TurnoutPlugin().pre_model_load(cfg)


def test_liger_takes_experts_of_a_model_that_the_rules_do_not_name() -> None:
    """The functions that axolotl's Liger plugin calls, by the class that they give to experts."""
    found = {
        name
        for name, function in MODEL_TYPE_TO_APPLY_LIGER_FN.items()
        if "LigerExperts" in function.__code__.co_names and name not in ("qwen3_5", "qwen3_5_moe")
    }
    assert found == set(rules.LIGER_EXPERTS)
    assert "LigerExperts" not in apply_liger_kernel_to_qwen3_5_moe.__code__.co_names


@pytest.mark.parametrize("liger_first", [True, False])
def test_liger_takes_the_experts_and_the_model_is_loaded(inputs: Path, liger_first: bool) -> None:
    plugins = [LIGER, PLUGIN] if liger_first else [PLUGIN, LIGER]
    cfg = validated(inputs, plugins=tuple(plugins), liger_glu_activation=True)
    normalize_config(cfg)
    words = r"liger_glu_activation is True; expected false.*qwen3_moe"
    with pytest.raises(ValueError, match=words):
        TurnoutPlugin().pre_model_load(cfg)


def test_key_written_by_a_later_plugin_is_seen(inputs: Path) -> None:
    cfg = validated(inputs)
    plugin = TurnoutPlugin()
    plugin.pre_model_load(cfg)
    cfg.experts_implementation = "deep_ep_grouped_mm"
    model = tiny_model()
    with pytest.raises(ValueError, match="experts_implementation is 'deep_ep_grouped_mm'"):
        plugin.post_lora_load(cfg, model)
    assert all(state_of(module) is None for module in model.modules())


def test_lora_mlp_kernel_that_axolotl_switches_on_stays_and_is_said(
    inputs: Path, said: list[str]
) -> None:
    keys = {key: value for key, value in LORA.items() if not key.endswith("_kernel")}
    cfg = validated(inputs, **keys)
    assert cfg.lora_mlp_kernel is True
    TurnoutPlugin().pre_model_load(cfg)
    assert any(text.startswith("turnout: lora_mlp_kernel stays on for dense") for text in said)


def test_lora_mlp_kernel_leaves_moe_blocks_and_takes_a_dense_one() -> None:
    """axolotl's own patch, on a model of both kinds."""
    config = tiny_model().config
    config.mlp_only_layers = [0]
    model = with_lora(Qwen3MoeForCausalLM(config), task_type="CAUSAL_LM")
    layers = model.base_model.model.model.layers
    for name in ("gate_proj", "up_proj", "down_proj"):
        # PEFT turns these targets into the experts' on qwen3_moe; axolotl asks for this name only
        layers[0].mlp.get_submodule(name).lora_A = nn.ModuleDict()
    report = turnout.patch(model)
    apply_lora_kernel_patches(model, DictDefault({"lora_mlp_kernel": True}))
    assert layers[0].mlp.forward.__module__.startswith(rules.LORA_KERNELS)
    assert rules.taken_blocks(model, report) == []
    report.require("fused")


def test_moe_block_taken_by_a_lora_kernel_stops_the_run(inputs: Path) -> None:
    cfg, plugin, model = validated(inputs), TurnoutPlugin(), tiny_model()
    plugin.post_lora_load(cfg, model)
    block = model.model.layers[1].mlp
    block.forward = MethodType(apply_lora_mlp_swiglu, block)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*Set lora_mlp_kernel: false"):
        plugin.post_model_load(cfg, model)


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_hooks_patch_the_model_and_log_a_summary(
    inputs: Path, said: list[str], keys: dict[str, Any]
) -> None:
    model = loaded(validated(inputs, turnout_recompute="gate_up", **keys))
    states = [state for module in model.modules() if (state := state_of(module)) is not None]
    assert [state.recompute for state in states] == ["gate_up"] * 2
    with probe() as ran:
        model(input_ids=torch.arange(4, 20)[None])
    assert len(ran.calls) == 2
    assert (ran.fused_projections, ran.folds) == (4 if keys else 0, 0)
    first = "turnout: 2 of 2 MoE layers fused; back end auto, router model, recompute gate_up"
    assert first in said
    assert any("adapted weights: fused" in text for text in said) == bool(keys)


def test_merging_leaves_the_model_alone(inputs: Path) -> None:
    cfg = validated(inputs)
    cfg.merge_lora = True
    assert all(state_of(module) is None for module in loaded(cfg).modules())


def test_missing_back_end_stops_before_loading(inputs: Path) -> None:
    with pytest.raises(Unsupported, match="backend='sonic'"):
        TurnoutPlugin().pre_model_load(validated(inputs, turnout_backend="sonic"))


def test_a_back_end_that_no_device_here_runs_is_met_after_loading(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "visible_gpus", lambda: ())
    cfg = validated(inputs, turnout_backend="hopper")
    with pytest.raises(Unsupported, match="backend='hopper' can not run on this machine"):
        TurnoutPlugin().pre_model_load(cfg)


def test_old_axolotl_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_module, "newer_than", lambda package, version: False)
    with pytest.raises(ValueError, match=r"axolotl is older than 0\.19"):
        validated(inputs)


def test_callback_comes_only_when_asked_for(inputs: Path) -> None:
    manager = PluginManager.get_instance()
    assert manager.add_callbacks_post_trainer(validated(inputs), None) == []
    (callback,) = manager.add_callbacks_post_trainer(validated(inputs, turnout_report=True), None)
    assert isinstance(callback, TurnoutCallback)


def weights(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_real_run_trains_what_a_stock_run_trains(inputs: Path, kind: str) -> None:
    """Three steps of `axolotl train` from the same start; float32, so within rounding."""
    keys = LORA | {"lora_model_dir": str(inputs / "adapter")} if kind == "lora" else {}
    status, output = train(inputs, f"stock-{kind}", **keys)
    assert status == 0, output
    status, output = train(inputs, f"turnout-{kind}", plugins=[PLUGIN], turnout_report=True, **keys)
    assert status == 0, output
    assert "turnout: 2 of 2 MoE layers fused" in output
    stock, ours = weights(inputs / f"stock-{kind}"), weights(inputs / f"turnout-{kind}")
    assert ours.keys() == stock.keys()
    # the same bits everywhere would mean that the stock experts ran
    assert not all(ours[name].equal(tensor) for name, tensor in stock.items())
    start = weights(inputs / ("adapter" if kind == "lora" else "model"))
    for name, tensor in stock.items():
        assert relative(ours[name], tensor) < 1e-4, name
        if "experts" in name and name in start:
            assert relative(tensor, start[name]) > 1e-3, f"{name} was not trained"
    lines = (inputs / f"turnout-{kind}" / "turnout-report.jsonl").read_text().splitlines()
    assert "experts" in {json.loads(line)["event"] for line in lines}


@pytest.mark.slow
def test_adapters_that_trl_adds_for_preference_training_are_folded(inputs: Path) -> None:
    """For DPO axolotl gives TRL the LoRA config, after every hook of a plugin on the model."""
    data = {"path": str(inputs / "pairs.jsonl"), "ds_type": "json", "type": "passthrough"}
    keys = {"rl": "dpo", "datasets": [data], "plugins": [PLUGIN], **LORA}
    status, output = train(inputs, "dpo", probed=True, **keys)
    assert status == 0, output
    # three steps of two layers: the policy with two adapters, the reference without
    assert output.splitlines()[-1] == "experts 12 fused 12 folds 0", output


@pytest.mark.slow
def test_real_run_with_a_conflict_ends_with_the_reason(inputs: Path) -> None:
    status, output = train(inputs, "conflict", plugins=[PLUGIN], use_scattermoe=True)
    assert status != 0
    assert "use_scattermoe is True; expected not set with TurnoutPlugin" in output


def test_example_passes_axolotls_schema() -> None:
    text = (ROOT / "examples" / "axolotl_qwen3.yml").read_text(encoding="utf-8")
    cfg = DictDefault(yaml.safe_load(text))
    prepare_plugins(cfg)
    capabilities = CAPABILITIES | {"bf16": True, "compute_capability": "sm_90"}
    cfg = validate_config(
        cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"}
    )
    assert rules.patch_options(cfg) == {
        "backend": "auto",
        "router": "fused",
        "recompute": "gate_up",
        "tune": "first-use",
        "aux_loss": "model",
    }
    assert set(cfg.lora_target_parameters) == set(turnout.lora_targets(tiny_model()))
