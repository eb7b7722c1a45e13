"""A whole training step of a patched model as one CUDA graph, and without waiting for the device.

Forward, the model's own loss, backward, clipping and AdamW, captured once and replayed on other
tokens, against the same steps one launch after the other. What the models' own code would wait for
is given: an attention mask of four dimensions, which transformers takes as it is, and checkpoints
that keep no random state, whose seed can not be read in a capture.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, on_side_stream, waits_are_errors
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import turnout

pytestmark = [
    pytest.mark.unpoisoned,  # the stock parts of a model have no deterministic versions
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
VOCABULARY, BATCH, LENGTH = 256, 4, 256  # 256 rows an expert: enough for all of Hopper's kernels
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.05,
    "use_cache": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "gpt_oss": {"intermediate_size": 128, "num_local_experts": 8, "head_dim": 64},
    # sigmoid scores, groups, a bias that chooses, a shared expert
    "deepseek_v3": {
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    },
}
ATTENTION = {"deepseek_v3": ["q_b_proj", "kv_b_proj", "o_proj"]}
# Relative norm of the difference of all gradients. The same kernels run in both, so it is far
# below; a matrix product of the model's own may be another one within a capture.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ROUTERS = ("model", "fused")
CASES = [(model, torch.bfloat16, router, False) for model in MODELS for router in ROUTERS]
CASES += [("qwen3_moe", torch.float32, router, False) for router in ROUTERS]
CASES += [("qwen3_moe", torch.bfloat16, "model", True)]


class Training:
    """A patched model with adapters, its batch and its optimizer; the same for the same arguments.

    Attributes:
        ids: (B, L) the batch; replays read what it then holds.
        loss: of the last step.
    """

    def __init__(self, model: str, dtype: torch.dtype, router: Any, checkpointing: bool) -> None:
        config = CONFIG_MAPPING[model](**COMMON, **MODELS[model])
        torch.manual_seed(0)
        with DEVICE:
            base = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager"
            )
        report = turnout.patch(base, router=router)
        lora = LoraConfig(
            r=8,
            init_lora_weights=False,
            target_modules=ATTENTION.get(model, ["q_proj", "v_proj"]),
            target_parameters=turnout.lora_targets(base),
        )
        self.model: Any = get_peft_model(base, lora)
        report.require("fused")
        if checkpointing:
            self.model.gradient_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": False}
            )
        self.model.train()
        named = self.model.named_parameters()
        self.adapters = {name: p for name, p in named if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.adapters.values(), lr=1e-3, capturable=DEVICE.type == "cuda"
        )
        self.ids = tokens(0)
        barred = torch.full((LENGTH, LENGTH), torch.finfo(dtype).min, dtype=dtype, device=DEVICE)
        self.mask = barred.triu(1).expand(1, 1, LENGTH, LENGTH)
        self.loss: Tensor | None = None

    def step(self) -> None:
        """One step; the gradients stay."""
        out = self.model(input_ids=self.ids, attention_mask=self.mask, labels=self.ids)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapters.values(), 1.0)
        self.optimizer.step()
        self.loss = out.loss.detach()

    def fresh_step(self) -> None:
        """One step from no gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step()

    @property
    def gradient(self) -> Tensor:
        """Of all adapters together."""
        parts = []
        for name, parameter in self.adapters.items():
            assert parameter.grad is not None, name
            parts.append(parameter.grad.flatten().double())
        return torch.cat(parts)


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator).to(DEVICE)


def captured(training: Training) -> torch.cuda.CUDAGraph:
    """The graph of a step that ran twice before; nothing runs while it is captured."""
    on_side_stream(training.fresh_step)
    training.optimizer.zero_grad(set_to_none=True)  # so that the graph has gradients of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    return graph


@pytest.mark.parametrize(("model", "dtype", "router", "checkpointing"), CASES)
def test_a_captured_step_trains_otherwise(
    model: str, dtype: torch.dtype, router: str, checkpointing: bool
) -> None:
    plain, graphed = (Training(model, dtype, router, checkpointing) for _ in range(2))
    for _ in range(2):
        plain.fresh_step()
    graph = captured(graphed)
    gradients = []
    for seed in (1, 2, 3):
        for training in (plain, graphed):
            training.ids.copy_(tokens(seed))
        before = [p.detach().clone() for p in graphed.adapters.values()]
        plain.fresh_step()
        graph.replay()
        assert plain.loss is not None
        assert graphed.loss is not None
        torch.testing.assert_close(graphed.loss, plain.loss, rtol=ALLOWED[dtype] / 10, atol=0)
        expected = plain.gradient
        assert float((graphed.gradient - expected).norm() / expected.norm()) <= ALLOWED[dtype]
        moved = zip(graphed.adapters.items(), before, strict=True)
        assert not [name for (name, p), old in moved if torch.equal(p, old)], "did not train"
        gradients.append(expected)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) > 0.3


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_for_the_device(model: str, router: str) -> None:
    training = Training(model, torch.bfloat16, router, False)
    for _ in range(3):
        training.fresh_step()
    torch.cuda.synchronize()
    with waits_are_errors():
        training.fresh_step()
