"""The report says what runs now, in words, in JSON and as an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hf_models import FUSED_ARCHS, STOCK_ARCHS, experts_of, forward, probe, tiny, with_lora
from rich.console import Console
from torch import nn

import turnout
from turnout import Unsupported

KEY = "qwen3_moe"


def half_stock() -> Any:
    model = tiny(KEY)
    experts_of(model)[1].act_fn = nn.Tanh()
    return model


def test_print_does_not_say_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    print(turnout.patch(half_stock()))
    text = capsys.readouterr().out
    for word in ("Qwen3MoeForCausalLM", "Qwen3MoeExperts", "fused", "silu glu", "float32", "64"):
        assert word in text
    assert "unknown_gate" in text
    assert "48" in text


def test_print_leaves_out_the_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(KEY)
    report = turnout.patch(model)
    adapted = with_lora(model)
    print(report)
    text = capsys.readouterr().out
    assert "4 adapters" in text
    assert "rank 4" in text
    with adapted.disable_adapter():
        assert "disabled by PEFT" in str(report)
    assert repr(report) == str(report)


def test_rich_prints_something_else() -> None:
    report = turnout.patch(tiny(KEY))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report)
    assert "fused" in console.export_text()


@pytest.mark.parametrize("key", [*FUSED_ARCHS, *STOCK_ARCHS])
def test_a_report_is_not_json(key: str) -> None:
    report = turnout.patch(tiny(key))
    assert str(report)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["counts"] == {"stock" if key in STOCK_ARCHS else "fused": len(report.layers)}
    assert values["backend"] == "auto"
    assert values["router"] == "model"
    assert values["recompute"] == "none"
    names = dict(tiny(key).named_modules())
    assert {row["name"] for row in values["layers"]} <= names.keys()
    if key not in STOCK_ARCHS:
        assert {row["num_experts"] for row in values["layers"]} == {8}
        widths = {64, 48} if key == "nemotron_h" else {64}
        assert {row["hidden"] for row in values["layers"]} <= widths
        assert {row["intermediate"] for row in values["layers"]} <= {48, 24}


def test_require_does_not_name_what_is_stock() -> None:
    report = turnout.patch(half_stock())
    with pytest.raises(Unsupported) as caught:
        report.require("fused")
    assert "model.layers.1.mlp.experts" in str(caught.value)
    assert "unknown_gate" in str(caught.value)
    assert "model.layers.0" not in str(caught.value)


def test_require_does_not_name_an_adapter_on_pefts_path() -> None:
    model = with_lora(tiny("jetmoe"))
    with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.output_linear.*PEFT's own fold"):
        turnout.patch(model).require("fused")


def test_require_takes_anything() -> None:
    report = turnout.patch(tiny(KEY))
    assert report.require("fused") is report
    assert report.require() is report
    with pytest.raises(ValueError, match="require takes 'fused'; got 'triton'"):
        report.require("triton")


def test_the_report_is_frozen_when_peft_comes_later() -> None:
    model = tiny(KEY)
    report = turnout.patch(model)
    assert report.to_dict()["adapters"] == {}
    assert {row["frozen"] for row in report.to_dict()["layers"]} == {False}
    with_lora(model)
    values = report.to_dict()
    assert len(values["adapters"]) == 4
    assert all(path.startswith("fused") for path in values["adapters"].values())
    assert {row["frozen"] for row in values["layers"]} == {True}


def test_the_report_keeps_the_dtype_of_another_time() -> None:
    model = tiny(KEY)
    report = turnout.patch(model)
    model.to(torch.bfloat16)
    forward(model, KEY)
    assert {row["dtype"] for row in report.to_dict()["layers"]} == {"bfloat16"}
    assert "float32" not in str(report)


def test_the_report_of_an_unpatched_model_says_fused() -> None:
    model = tiny(KEY)
    report = turnout.patch(model)
    turnout.unpatch(model)
    with pytest.raises(Unsupported):
        report.require("fused")


def test_options_of_patch_are_not_in_the_report() -> None:
    report = turnout.patch(tiny(KEY), backend="torch", recompute="gate_up")
    assert (report.backend, report.recompute) == ("torch", "gate_up")
    assert "back end torch" in str(report)
    assert report.to_dict()["recompute"] == "gate_up"


def test_a_forward_of_another_library_is_not_in_the_report() -> None:
    model = with_lora(tiny(KEY))
    report = turnout.patch(model)
    first, second = experts_of(model)
    first.forward = type(second).forward.__get__(first)  # its own
    assert report.counts == {"fused": 2}
    second.forward = lambda x, experts, weights: x
    assert [row.status for row in report.layers] == ["fused", "stock"]
    with pytest.raises(Unsupported, match=r"other_kernel \(the instance has the forward .*lambda"):
        report.require("fused")
    assert sum(path.startswith("raises: the instance") for path in report.adapters.values()) == 2


@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_hooks_of_accelerate_are_taken_for_another_forward(when: str) -> None:
    model = tiny(KEY)
    report = turnout.patch(model) if when == "after patch" else None
    add_hook_to_module(experts_of(model)[0], ModelHook())
    report = report or turnout.patch(model)
    assert report.require("fused").counts == {"fused": 2}
    with probe() as ran:
        forward(model, KEY)
    assert len(ran.calls) == 2
