"""Liger's patches and turnout's on one model: who runs the experts. No kernel of Liger runs here.

`tests/interpret/test_liger.py` runs them. Skipped, and so not run, where liger-kernel is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hf_models import probe, relative, tiny, with_lora
from torch import Tensor
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

import turnout
from turnout import Unsupported

liger = pytest.importorskip(
    "liger_kernel.transformers", reason="liger-kernel is not installed: its patches were not tested"
)
KEY = "qwen3_moe"
NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm")
TAKEN = r"other_kernel \(the instance has the forward LigerExperts\.forward .* swiglu=False\)"


@pytest.fixture(autouse=True)
def transformers_gets_its_own_back() -> Iterator[None]:
    """Liger sets names of the modeling file, and given a model too."""
    with mock.patch.dict(vars(modeling)):
        yield


def by_function(model: Any, **options: bool) -> None:
    """Liger's own function, which takes the model without PEFT around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    liger.apply_liger_kernel_to_qwen3_moe(model=base, **options)


def by_trainer(model: Any, **options: bool) -> None:
    """What `TrainingArguments(use_liger_kernel=True, liger_kernel_config=options)` leads to."""
    apply_liger_kernel(model, options)


APPLY = pytest.mark.parametrize("apply", [by_function, by_trainer])


def made(order: str, apply: Callable[..., None], **options: bool) -> tuple[Any, turnout.Report]:
    """A model after the steps of `order`, and turnout's report."""
    model, report = tiny(KEY), None
    for what in order.split(", "):
        if what == "patch":
            report = turnout.patch(model)
        elif what == "peft":
            model = with_lora(model)
        else:
            apply(model, **options)
    assert report is not None
    return model, report


def through_blocks(model: Any) -> list[Tensor]:
    """Each MoE block's output on the same tokens; nothing around the blocks runs."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, model.config.hidden_size)
    return [m(x) for m in model.modules() if type(m).__name__ == "Qwen3MoeSparseMoeBlock"]


@APPLY
@pytest.mark.parametrize(
    "order",
    ["patch, liger, peft", "liger, patch, peft", "patch, peft, liger", "peft, liger, patch"],
)
def test_liger_without_swiglu_takes_the_experts(order: str, apply: Callable[..., None]) -> None:
    model, report = made(order, apply, swiglu=False)
    assert report.require("fused").counts == {"fused": 2}
    with probe() as ran:
        got = through_blocks(model)
    assert (len(ran.calls), ran.fused_projections, ran.folds) == (2, 4, 0)
    for out, expected in zip(got, through_blocks(with_lora(tiny(KEY))), strict=True):
        assert relative(out, expected) < 1e-5


@APPLY
def test_liger_does_not_take_the_rest(apply: Callable[..., None]) -> None:
    model, _ = made("patch, liger", apply, swiglu=False)
    taken = {
        name.rpartition(".")[2]: module.forward.__func__
        for name, module in model.named_modules()
        if hasattr(vars(module).get("forward"), "__func__")
    }
    loss = taken.pop("")  # the model's own, which computes head and loss in one
    assert loss.__module__ == "liger_kernel.transformers.model.qwen3_moe"
    assert taken == dict.fromkeys(NORMS, liger.LigerRMSNorm.forward)
    assert modeling.apply_rotary_pos_emb is liger.liger_rotary_pos_emb


@APPLY
@pytest.mark.parametrize("order", ["patch, liger", "liger, patch", "patch, peft, liger"])
def test_report_says_fused_of_experts_that_liger_runs(
    order: str, apply: Callable[..., None]
) -> None:
    _, report = made(order, apply)  # swiglu is on by default
    assert report.counts == {"stock": 2}
    with pytest.raises(Unsupported, match=TAKEN):
        report.require("fused")
    assert all(path.startswith("not PEFT's: the") for path in report.adapters.values())


def test_adapters_on_experts_that_liger_runs_are_dropped_in_silence() -> None:
    model, report = made("patch, liger, peft", by_function)
    assert len(report.adapters) == 4
    assert all(path.startswith("raises: the instance has") for path in report.adapters.values())
    with mock.patch("liger_kernel.transformers.swiglu.LigerFusedMoEFunction") as kernel:
        kernel.apply = lambda x, *_: x
        with pytest.raises(RuntimeError, match="ran without turnout, so the adapter on"):
            through_blocks(model)


def test_experts_of_a_class_that_liger_replaced_have_no_reason() -> None:
    liger.apply_liger_kernel_to_qwen3_moe(fused_linear_cross_entropy=False)  # before the model
    model = tiny(KEY)
    report = turnout.patch(model)
    assert {(row.experts_class, row.reason) for row in report.layers} == {
        ("LigerExperts", "other_kernel")
    }
    with pytest.raises(Unsupported, match="give it swiglu=False"):
        report.require("fused")
    with pytest.raises(Unsupported, match="swiglu=False"):
        turnout.lora_targets(model)


def test_unpatch_takes_the_norms_from_liger() -> None:
    model, _ = made("patch, liger", by_function, swiglu=False)
    turnout.unpatch(model)
    assert model.model.norm.forward.__func__ is liger.LigerRMSNorm.forward
