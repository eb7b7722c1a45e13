"""What the tests of `turnout bench --step` share."""

import dataclasses
import sys

import pytest
import torch

from turnout import cli
from turnout.bench.step_models import step_model
from turnout.bench.step_musts import musts
from turnout.bench.step_records import StepRow
from turnout.bench.step_sweep import StepSetting

CPU = torch.device("cpu")
ALL = ("identity", "stock", "eager", "turnout", "turnout-fused")


def setting(**values):
    base = {
        "device": CPU,
        "commit": "abc",
        "providers": ALL,
        "tokens": 32,
        "sequence": 16,
        "checkpointing": ("off",),
        "repeats": 1,
    }
    return StepSetting(**base | values)


def row(**values):
    base = {
        "commit": "abc",
        "device": "NVIDIA H100 80GB HBM3",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "peft": "0.21.2",
        "fla": "",
        "shape": "qwen3-30b",
        "layers": 6,
        "vocabulary": 19072,
        "tokens": 8192,
        "sequence": 4096,
        "checkpointing": "off",
        "provider": "turnout",
        "step_ms": 90.0,
        "moe_ms": 20.0,
        "tokens_per_s": 91022.2,
        "peak_mb": 10000.0,
        "first_s": 9.0,
        "loss": 12.1,
        "gate": "stock",
        "grad_err": 0.05,
    }
    return StepRow(**base | values)


# Widths of the real configurations that a CPU can run; what is not here stays as it is there.
NARROW = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "sliding_window": 8,
    "eos_token_id": 1,
}


def narrow(name):
    """The real configuration with small widths, and the fewest layers with all its kinds."""
    real = step_model(name)
    config = real.config(1)
    sizes = {key: value for key, value in NARROW.items() if getattr(config, key, None) is not None}
    if real.model_type == "deepseek_v3":
        del sizes["head_dim"]  # it follows from the rotary part
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    layers = {"qwen3.5-35b": 4, "gptoss-20b": 2}.get(name, 1)
    sizes = {**real.sizes, **sizes, "initializer_range": 0.1}
    return dataclasses.replace(real, sizes=sizes, layers=layers)


def judged(rows):
    return {must.name: must for must in musts(rows)}


def turnout(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["turnout", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


SMALL = ("--device", "cpu", "--tokens", 32, "--sequence", 16, "--repeats", 1)
