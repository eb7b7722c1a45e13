"""What the examples share: their arguments, and without `--model` a tiny random model and texts.

Copy the other files, not this one. The tiny models need a CPU and seconds, and no download.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, set_seed

from turnout.train.builtin import make_model, make_tokenizer

TEXTS = [f"The {a} of {b} is {c}." for a in ("sum", "product") for b in "abcd" for c in "wxyz"]


def arguments(description: str | None) -> argparse.Namespace:
    """The command line; without `--model` the values are those of a tiny run."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument("--model", type=Path, help="a local checkpoint; without it a tiny model")
    parser.add_argument("--data", type=Path, help="a text file, one document per line")
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--steps", type=int, help="100, or 6 for the tiny model")
    parser.add_argument("--lr", type=float, help="2e-4, or 1e-2 for the tiny model")
    args = parser.parse_args()
    is_tiny = args.model is None
    args.steps = args.steps or (6 if is_tiny else 100)
    args.lr = args.lr or (1e-2 if is_tiny else 2e-4)
    args.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return args


def texts(data: Path | None) -> list[str]:
    """The documents to train on."""
    if data is None:
        return TEXTS
    return [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]


def no_liger() -> str:
    """Why Liger's kernels can not run here, or an empty string."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from triton import knobs  # a requirement of Liger

    if torch.cuda.is_available() or knobs.runtime.interpret:
        return ""
    return "its kernels are Triton's and need a GPU"


def qwen3_moe() -> tuple[Any, Any]:
    """Two layers of eight experts, and a tokenizer of characters."""
    tokenizer = make_tokenizer()
    return make_model(tokenizer, seed=0), tokenizer


def gpt_oss() -> tuple[Any, Any]:
    """Two layers of eight experts with biases and the clamped GLU of gpt-oss."""
    tokenizer = make_tokenizer()
    set_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer
