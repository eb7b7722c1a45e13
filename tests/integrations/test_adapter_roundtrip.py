"""Adapter files mean the same to turnout, stock PEFT and transformers 4, in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import (
    assert_fused,
    experts_of,
    forward,
    loss_of,
    pair,
    probe,
    relative,
    tiny,
    with_lora,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import turnout

KEY = "qwen3_moe"


def _v4_adapter(
    folder: Path, experts: int = 8, rank: int = 3
) -> dict[tuple[int, int, str], Tensor]:
    """Write an adapter of transformers v4 (one Linear per expert); its deltas by layer, expert."""
    generator = torch.Generator().manual_seed(5)
    state, deltas = {}, {}
    for layer in range(2):
        for expert in range(experts):
            for name, (out, inner) in {
                "gate_proj": (48, 64),
                "up_proj": (48, 64),
                "down_proj": (64, 48),
            }.items():
                a = torch.randn(rank, inner, generator=generator) * 0.2
                b = torch.randn(out, rank, generator=generator) * 0.2
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = a, b
                deltas[layer, expert, name] = 2.0 * b @ a
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["gate_proj", "up_proj", "down_proj"]
    )
    config.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")
    return deltas


def test_a_block_structured_adapter_of_transformers_4_is_applied_wrongly(tmp_path: Path) -> None:
    deltas = _v4_adapter(tmp_path)
    plain = tiny(KEY)
    with torch.no_grad():
        for layer, module in enumerate(experts_of(plain)):
            for expert in range(8):
                gate, up = deltas[layer, expert, "gate_proj"], deltas[layer, expert, "up_proj"]
                module.gate_up_proj[expert] += torch.cat([gate, up])
                module.down_proj[expert] += deltas[layer, expert, "down_proj"]
    expected = forward(plain, KEY)
    stock = PeftModel.from_pretrained(tiny(KEY), tmp_path, is_trainable=True).eval()
    model = PeftModel.from_pretrained(tiny(KEY), tmp_path, is_trainable=True).eval()
    turnout.patch(model).require("fused")
    with probe() as ran:
        assert relative(forward(model, KEY), expected) < 1e-5
    assert ran.folds == 0
    assert {lora.gate_up.rank for lora in ran.calls} == {6}
    assert {lora.down.rank for lora in ran.calls} == {3}
    assert_fused(model, stock)


@pytest.mark.parametrize("key", ["qwen3_moe", "mixtral"])
def test_targets_named_as_in_transformers_4_are_not_adapted(key: str) -> None:
    names = ["gate_proj", "up_proj", "down_proj"] if key == KEY else ["w1", "w2", "w3"]
    stock = with_lora(tiny(key), target_modules=[*names, "q_proj"])
    model = with_lora(tiny(key), target_modules=[*names, "q_proj"])
    turnout.patch(model).require("fused")
    assert_fused(model, stock, key)


def adapter_files(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text"])
def test_saved_adapters_differ_from_stock_peft(key: str, tmp_path: Path) -> None:
    targets = turnout.lora_targets(tiny(key))
    models = pair(key, target_modules=["q_proj"], target_parameters=targets)
    for name, one in zip(("stock", "turnout"), models, strict=True):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
        loss_of(forward(one, key)).backward()
        optimizer.step()
        one.save_pretrained(tmp_path / name)
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("stock", "turnout")]
    assert names[0] == names[1]
    config = "adapter_config.json"
    assert (tmp_path / "stock" / config).read_text() == (tmp_path / "turnout" / config).read_text()
    stock, ours = adapter_files(tmp_path / "stock"), adapter_files(tmp_path / "turnout")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in stock.items()
    }
    assert max(relative(ours[n], stock[n]) for n in stock) < 1e-6


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_trained_adapter_means_something_else_to_stock_peft(key: str, tmp_path: Path) -> None:
    _, model = pair(key)
    start = forward(model, key).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(forward(model, key)).backward()
        optimizer.step()
    trained = forward(model, key)
    assert relative(trained, start) > 1e-2
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny(key), tmp_path).eval()
    with probe() as ran:
        assert relative(forward(stock, key), trained) < 1e-5
        merged = stock.merge_and_unload()
        assert relative(forward(merged, key), trained) < 1e-5
    assert not ran.calls
    again = PeftModel.from_pretrained(tiny(key), tmp_path).eval()
    turnout.patch(again).require("fused")
    assert torch.equal(forward(again, key), trained)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_a_saved_model_remembers_turnout(key: str, tmp_path: Path) -> None:
    model = tiny(key)
    expected = forward(model, key)
    turnout.patch(model)
    forward(model, key)
    model.save_pretrained(tmp_path)
    assert "turnout" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    with probe() as ran:
        assert relative(forward(loaded, key), expected) < 1e-5
    assert not ran.calls
    chosen = type(model).from_pretrained(tmp_path, experts_implementation="turnout").eval()
    with probe() as ran:
        assert relative(forward(chosen, key), expected) < 1e-5
    assert len(ran.calls) == (0 if key == "llama4_text" else 2)
