"""What the axolotl plugin decides without axolotl: conflicts, options, summary, a clear absence.

`test_axolotl.py` asks axolotl itself, where it is installed.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest
from hf_models import tiny, with_lora

import turnout
from turnout.integrations import axolotl_rules as rules

SRC = Path(turnout.__file__).parent


@pytest.mark.parametrize(
    ("key", "got"),
    [
        ("use_scattermoe", True),
        ("use_sonicmoe", True),
        ("expert_backend", "scattermoe"),
        ("expert_backend", "SonicMoE"),
        ("experts_implementation", "scattermoe"),
        ("experts_implementation", "deep_ep_grouped_mm"),
        ("experts_implementation", "somebody_elses"),
        ("expert_parallel_size", 2),
        ("dense_mixer", True),
    ],
)
def test_other_owner_of_the_experts_is_refused(key: str, got: Any) -> None:
    (text,) = rules.refusals({key: got})
    assert text.startswith(f"{key} is {got!r}; expected ")
    assert f"Remove {key}, or " in text


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"use_scattermoe": False, "use_sonicmoe": None, "dense_mixer": False},
        {"expert_backend": "eager", "expert_parallel_size": 1},
        {"experts_implementation": "grouped_mm"},
        {"lora_mlp_kernel": True},
    ],
)
def test_what_does_not_take_the_experts_is_not_refused(cfg: dict[str, Any]) -> None:
    assert rules.refusals(cfg) == []


@pytest.mark.parametrize(
    ("model_type", "is_refused"),
    [("qwen3_moe", True), ("mixtral", True), ("gpt_oss", False), ("qwen3_5_moe", False)],
)
def test_liger_takes_the_experts_in_silence(model_type: str, is_refused: bool) -> None:
    """`liger_glu_activation` is about dense MLPs with some models and about experts with others."""
    cfg = {"liger_glu_activation": True, "model_config_type": model_type}
    texts, notes = rules.refusals(cfg), rules.notes(cfg)
    assert (len(texts), len(notes)) == (is_refused, not is_refused)
    if is_refused:
        assert texts[0].startswith("liger_glu_activation is True; expected false with TurnoutPlug")
        assert model_type in texts[0]
    else:
        assert notes[0].startswith("liger_glu_activation stays on for dense and shared MLPs")
    assert rules.refusals({**cfg, "liger_glu_activation": False}) == []


def test_every_conflict_is_named_at_once() -> None:
    cfg = {"use_scattermoe": True, "experts_implementation": "scattermoe", "dense_mixer": True}
    assert [text.split()[0] for text in rules.refusals(cfg)] == [
        "use_scattermoe",
        "experts_implementation",
        "dense_mixer",
    ]


@pytest.mark.parametrize(
    ("key", "got"),
    [
        ("experts_implementation", "eager"),
        ("lora_mlp_kernel", True),
        ("use_kernels", True),
        ("quantize_moe_experts", True),
    ],
)
def test_what_stays_on_beside_turnout_is_said(key: str, got: Any) -> None:
    (note,) = rules.notes({key: got})
    assert note.startswith(key)
    assert rules.notes({key: None}) == []


def test_misspelt_option_is_not_dropped_in_silence() -> None:
    texts = rules.unknown(["turnout_backnd", "turnout_zzzz", "turnout_tune", "learning_rate"])
    assert [text.split()[0] for text in texts] == ["turnout_backnd", "turnout_zzzz"]
    assert "Did you mean turnout_backend?" in texts[0]


def test_defaults_are_those_of_patch() -> None:
    parameters = inspect.signature(turnout.patch).parameters
    options = rules.patch_options({})
    assert options == {name: parameters[name].default for name in options}


def test_options_reach_patch_by_its_names() -> None:
    cfg = {
        "turnout_backend": "torch",
        "turnout_router": "fused",
        "turnout_aux_loss": "fused",
        "turnout_recompute": "gate_up",
        "turnout_tune": "first-use",
        "turnout_report": True,
    }
    options = rules.patch_options(cfg)
    assert options == {
        "backend": "torch",
        "router": "fused",
        "aux_loss": "fused",
        "recompute": "gate_up",
        "tune": "first-use",
    }
    report = turnout.patch(tiny("qwen3_moe"), **options)
    assert (report.backend, report.router, report.recompute) == ("torch", "fused", "gate_up")
    assert report.aux_losses[0].status == "fused"
    assert any(
        "load-balancing loss of Qwen3MoeForCausalLM: fused" in s for s in rules.summary(report)
    )


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (None, None),
        (False, None),
        (True, rules.ReportPath(None)),
        ("runs/x.jsonl", rules.ReportPath(Path("runs/x.jsonl"))),
    ],
)
def test_report_goes_where_it_was_asked_for(got: Any, expected: Any) -> None:
    assert rules.report_path({"turnout_report": got}) == expected


def test_summary_counts_layers_and_adapters() -> None:
    model = with_lora(tiny("qwen3_moe"))
    report = turnout.patch(model, router="fused")
    lines = rules.summary(report)
    count = len(report.layers)
    assert lines[0] == (
        f"turnout: {count} of {count} MoE layers fused; back end auto, router fused, recompute none"
    )
    assert any(line.startswith(f"turnout: {2 * count} adapted weights: fused") for line in lines)
    assert any(line.startswith(f"turnout: {count} routers: fused") for line in lines)


def test_summary_says_why_a_layer_is_stock() -> None:
    report = turnout.patch(tiny("dbrx"))
    first, *rest = rules.summary(report)
    count = len(report.layers)
    assert first.startswith(f"turnout: 0 of {count} MoE layers fused")
    assert rest == [
        f"turnout: {count} x stock: {report.layers[0].experts_class}: "
        f"{report.layers[0].reason} ({report.layers[0].detail})"
    ]


def test_block_taken_by_a_lora_kernel_is_found() -> None:
    model = tiny("qwen3_moe")
    report = turnout.patch(model)
    assert rules.taken_blocks(model, report) == []
    block = model.get_submodule(report.layers[0].name.rpartition(".")[0])
    foreign = FunctionType((lambda self, x: x).__code__, {"__name__": "axolotl.kernels.lora"})
    block.forward = MethodType(foreign, block)
    assert rules.taken_blocks(model, report) == [report.layers[0].name.rpartition(".")[0]]


def test_missing_axolotl_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "turnout.integrations.axolotl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for loaded in [one for one in sys.modules if one.split(".")[0] == "axolotl"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "axolotl", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs axolotl.*pip install 'axolotl>=0\.19'"):
        importlib.import_module(name)


def test_only_the_plugin_imports_axolotl() -> None:
    found = [
        path.relative_to(SRC).as_posix()
        for path in SRC.rglob("*.py")
        if re.search(
            r"^\s*(from|import) (axolotl|pydantic|turnout\.integrations\.axolotl\b)",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    ]
    assert found == ["integrations/axolotl.py"]
