"""Liger's kernels around turnout's experts, in Triton's interpreter: one step, and the example.

Run in a process of its own with TRITON_INTERPRET=1 (`make test` does). Skipped, and so not run,
where liger-kernel is missing.
"""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling
from triton.runtime import interpreter

import turnout
from turnout.integrations import transformers as glue

liger = pytest.importorskip(
    "liger_kernel.transformers", reason="liger-kernel is not installed: its kernels were not run"
)
from liger_kernel.ops import rms_norm  # noqa: E402  # behind the skip

EXAMPLES = Path(__file__).parents[2] / "examples"
IDS = torch.arange(2, 12).view(2, 5)


@pytest.fixture(autouse=True)
def kernels_of_liger_run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Triton 3.6's interpreter lacks for Liger's RMSNorm; and its patches are taken back."""
    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # libdevice's returns None
    with mock.patch.dict(vars(modeling)):
        yield


def adapted(model: nn.Module) -> Any:
    """Adapters on attention and experts, the same at every call."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(model, config).train()


def step(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model's output with the aux loss, and every gradient."""
    out = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", ["turnout", "liger"])
def test_liger_around_the_experts_changes_a_step(first: str) -> None:
    model, _ = runpy.run_path(str(EXAMPLES / "tiny.py"))["qwen3_moe"]()
    expected, expected_grads = step(adapted(copy.deepcopy(model)))
    if first == "turnout":
        report = turnout.patch(model, backend="torch")
    liger.apply_liger_kernel_to_qwen3_moe(model=model, swiglu=False)
    if first == "liger":
        report = turnout.patch(model, backend="torch")
    model = adapted(model)
    report.require("fused")
    got, grads = step(model)
    assert got.logits is None  # head and loss are one in Liger
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert float((grads[name] - grad).norm()) < 1e-4 * float(grad.norm()), name


def test_the_example_trains_without_liger_or_without_turnout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(["ab", "cd", "ef", "gh"]), encoding="utf-8")
    words = ["liger_lora", "--data", data, "--out", tmp_path, "--steps", 2]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.syspath_prepend(EXAMPLES)
    with (
        mock.patch.object(glue, "expert_mlp", wraps=glue.expert_mlp) as experts,
        mock.patch.object(rms_norm, "rms_norm_backward", wraps=rms_norm.rms_norm_backward) as norm,
    ):
        runpy.run_path(str(EXAMPLES / "liger_lora.py"))
    text = capsys.readouterr().out
    assert "Liger runs the norms, the rotary embedding and the loss" in text
    assert "stock" not in text
    assert "in 2 steps" in text
    layers, steps = 2, 2
    assert experts.call_count == layers * steps
    # four norms a layer and the last one, less the first: nothing below it trains
    assert norm.call_count == 4 * layers * steps
