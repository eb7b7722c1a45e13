"""The built-in model: a Qwen3-MoE small enough for a CPU; its tokens are characters."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, set_seed

_SPECIAL = ("<unk>", "<eos>")
BASE_STEPS = 150
BASE_LR = 5e-3


def make_tokenizer() -> Any:
    """One token per printable ASCII character, plus newline, tab, EOS and unknown."""
    characters = [
        *_SPECIAL,
        *string.digits,
        *string.ascii_letters,
        *string.punctuation,
        " ",
        "\n",
        "\t",
    ]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Any, seed: int) -> Any:
    """Two layers, eight experts, two per token, about 180 000 parameters, drawn from `seed`."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config)
