"""`turnout tune --model`: the expert layers of a checkpoint, from its config alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_models import tiny

from turnout.integrations.expert_shapes import expert_shapes


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_a_layer_has_other_sizes_than_the_models(tmp_path: Path, key: str) -> None:
    model = tiny(key)
    model.config.save_pretrained(tmp_path)
    (found,) = expert_shapes(tmp_path)
    (stack, *_) = [p for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    experts, *sizes = stack.shape
    assert found.experts == experts
    assert [found.hidden, found.intermediate] == (sizes[::-1] if found.spec.transposed else sizes)
    assert found.hidden == model.config.hidden_size
    assert found.top_k == model.config.num_experts_per_tok
    assert found.has_bias == found.spec.transposed == (key == "gpt_oss")


def test_a_folder_without_a_checkpoint_is_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        expert_shapes(tmp_path)


def test_a_dense_model_is_tuned(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="no expert layer"):
        expert_shapes(tmp_path)
