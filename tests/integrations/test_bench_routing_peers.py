"""What `benchmarks/routing.py` calls `hf` is what transformers runs."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import routing_cases as cases


def routers():
    """Those of the shapes, with as many hidden features as experts."""
    of = {name: cases.shape_named(name) for name in ("qwen3-30b", "deepseek-v3", "gptoss-20b")}
    qwen, deepseek, oss = of.values()
    spec = deepseek.spec
    grouped = {"n_group": spec.n_group, "topk_group": spec.topk_group, "norm_topk_prob": True}
    configs = {
        "qwen3-30b": Qwen3MoeConfig(
            num_experts=qwen.experts,
            num_experts_per_tok=qwen.spec.top_k,
            norm_topk_prob=True,
            hidden_size=qwen.experts,
        ),
        "deepseek-v3": DeepseekV3Config(
            n_routed_experts=deepseek.experts,
            num_experts_per_tok=spec.top_k,
            routed_scaling_factor=spec.scale,
            hidden_size=deepseek.experts,
            **grouped,
        ),
        "gptoss-20b": GptOssConfig(
            num_local_experts=oss.experts,
            num_experts_per_tok=oss.spec.top_k,
            hidden_size=oss.experts,
        ),
    }
    kinds = (Qwen3MoeTopKRouter, DeepseekV3TopkRouter, GptOssTopKRouter)
    return {name: kind(config) for kind, (name, config) in zip(kinds, configs.items(), strict=True)}


@pytest.mark.parametrize("name", ["qwen3-30b", "deepseek-v3", "gptoss-20b"])
def test_the_stock_router_is_another_one(name):
    """With the identity as its weight, the module's logits are its input."""
    shape, router = cases.shape_named(name), routers()[name]
    torch.nn.init.eye_(router.weight)
    logits = torch.randn(64, shape.experts).to(shape.hf_dtype or shape.dtype)
    bias = None
    if shape.has_bias:
        bias = router.e_score_correction_bias.normal_() / 10
        router.e_score_correction_bias.copy_(bias)
    router_logits, weights, experts = router.to(logits.dtype)(logits)
    assert torch.equal(router_logits, logits)
    got_experts, got_weights = shape.hf(logits, shape.spec, bias)
    assert torch.equal(got_experts, experts)
    assert got_weights.dtype == weights.dtype
    assert torch.equal(got_weights, weights)


def test_the_stock_sort_is_another_one():
    """Its lines stand in the stock forward, with the names that they have there."""
    stock, ours = map(inspect.getsource, (grouped_mm_experts_forward, cases.stock_sort))
    for call in (
        "= torch.sort(",
        "= torch.histc(histc_input, ",
        "torch.cumsum(tokens_per_expert, ",
    ):
        assert call in stock
        assert call in ours
