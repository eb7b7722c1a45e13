"""Loading a local checkpoint and putting LoRA on its attention and its experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

import turnout
from turnout.train.data import Data

# The projections of attention in the models of transformers; the second line is latent attention.
_ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)
_VOCABULARY = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("tekken.json", "*.tiktoken", "tiktoken.model", "sentencepiece*.model"),
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def check_checkpoint(path: Path) -> None:
    """Raise `ValueError` unless `path` is a folder with a readable config.json and weights."""
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise ValueError(
            f"model is {path}, which is {what}; expected the folder of a Hugging Face checkpoint. "
            "turnout downloads nothing: fetch the model first, for example with `hf download`."
        )
    config = path / "config.json"
    if not config.is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = " This is an adapter: give the folder of its base model." if adapter else ""
        raise ValueError(f"{path} is not a checkpoint: it has no config.json.{hint}")
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config} is not JSON ({error}); expected a model's config.") from None
    if not isinstance(parsed, dict) or "model_type" not in parsed:
        raise ValueError(
            f'{config} has no "model_type"; expected the config of a transformers model.'
        )
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise ValueError(
            f"{path} has no weights; expected *.safetensors or pytorch_model*.bin. Is the download "
            "complete?"
        )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the checkpoint.

    Raises:
        ValueError: there is none that transformers can read.
    """
    # Without a vocabulary transformers 5 builds a tokenizer that knows no word.
    if not any(next(path.glob(pattern), None) for pattern in _VOCABULARY):
        raise ValueError(
            f"{path} has no tokenizer; expected tokenizer.json or another vocabulary beside the "
            "weights. Save the model's tokenizer there."
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no tokenizer that transformers can load: {error}") from error


def load_model(path: Path, dtype: torch.dtype) -> Any:
    """The causal language model in the checkpoint, all of its weights read from the files.

    Raises:
        ValueError: not a causal language model, unreadable weights, or weights that are missing.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} can not be loaded as a causal language model: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}; expected all of them. Is "
            "the download complete?"
        )
    return model


def attention_targets(model: nn.Module) -> list[str]:
    """The names of the attention projections this model has; empty if none is known."""
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return [name for name in _ATTENTION if name in linear]


def add_lora(model: nn.Module, *, rank: int, alpha: float, seed: int) -> Any:
    """A PEFT model with adapters on attention and experts, initialised from `seed`.

    Raises:
        ValueError: the model has no MoE layer.
        Unsupported: PEFT can not adapt its experts.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        # PEFT declares an integer but computes with any number.
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        target_modules=attention_targets(model),
        target_parameters=turnout.lora_targets(model),
    )
    set_seed(seed)
    return get_peft_model(model, config)


def check_fits(model: Any, data: Data, seq_len: int) -> None:
    """Raise `ValueError` unless every token has an embedding and the sequence a position."""
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = max(int(part.ids.max()) for part in (data.train, data.heldout) if part is not None)
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {highest}, but the model has {vocabulary} embeddings; "
            "expected a tokenizer that belongs to the model."
        )
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if limit is not None and seq_len > limit:
        raise ValueError(
            f"seq_len is {seq_len}; expected at most {limit}, the positions of the model."
        )
