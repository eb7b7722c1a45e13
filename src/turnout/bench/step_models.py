"""The models of `turnout bench --step`: real sizes, random weights, LoRA, and who runs the experts.

Sizes are those of the published configs (the repository is named at each), given to transformers'
own config classes; what is not written here is the class's default. Four things differ from the
checkpoints: the number of layers; the vocabulary, which is cut with them, so that embedding, head
and loss weigh in a step what they weigh in the whole model's; dense first layers are left out
(every layer is an MoE layer); and the weights are drawn from a seed, with another standard
deviation than the class's where that amplifies roundings beyond what the gate can judge. Drawing on
one device gives every provider the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from turnout import lora_targets, patch
from turnout.bench.step_peers import PEERS
from turnout.bench.step_records import Provider
from turnout.integrations.architectures import expert_modules
from turnout.specs import BackendName, RouterChoice, check_choice

DTYPE = torch.bfloat16
RANK, ALPHA = 16, 32.0
SEED = 0
# B of an adapter is drawn as well: at PEFT's zeros the adapters would change nothing, A would have
# no gradient, and a gate could not see whether they are applied. At this size the delta of a weight
# is about a sixth of the weight.
B_STD = 0.02

WORDS = 128  # a cut vocabulary is a multiple of it

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class StepModel:
    """One configuration.

    Attributes:
        name: of the shape, as in `turnout.shapes` where the expert layer has that size.
        model_type: of the config class.
        sizes: the arguments of the config class that are not its defaults.
        layers: of the checkpoint.
        targets: the linear layers of attention that get adapters.
        recurrence: the linear layer that takes the output of linear attention, if there is one.
        embedding: standard deviation of the embedding; None leaves the config class's draw.
        pair: the MoE block returns its scores beside its output.
        words: of embedding and head; None cuts the vocabulary with the layers.
    """

    name: str
    model_type: str
    sizes: dict[str, Any]
    layers: int
    targets: tuple[str, ...] = _QKVO
    recurrence: str | None = None
    embedding: float | None = None
    pair: bool = False
    words: int | None = None

    def config(self, layers: int) -> Any:
        """The transformers config with `layers` layers."""
        config = CONFIG_MAPPING[self.model_type](
            **self.sizes, num_hidden_layers=layers, use_cache=False
        )
        share = math.ceil(config.vocab_size * layers / self.layers / WORDS) * WORDS
        config.vocab_size = min(config.vocab_size, share) if self.words is None else self.words
        return config


_MODELS = (
    # Qwen/Qwen3-30B-A3B
    StepModel(
        "qwen3-30b",
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        48,
    ),
    # openai/gpt-oss-20b; the defaults of GptOssConfig are those of the 120b, with more experts.
    # Weights of half the usual size: with those of 0.02 six random layers amplify roundings so much
    # that stock in bfloat16 is 0.70 away from stock in float32 (hidden 720, CPU); with 0.01, 0.15.
    StepModel(
        "gptoss-20b",
        "gpt_oss",
        {"num_local_experts": 32, "initializer_range": 0.01},
        24,
        pair=True,
    ),
    # zai-org/GLM-4.5-Air; Glm4MoeConfig's defaults, and what they lack
    StepModel(
        "glm-4.5-air",
        "glm4_moe",
        {
            "head_dim": 128,
            "attention_bias": True,
            "first_k_dense_replace": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 0.5,
            },
        },
        46,
    ),
    # Qwen/Qwen3.5-35B-A3B, its text model; the defaults of Qwen3_5MoeTextConfig. Linear attention
    # normalises what it gives out, so behind an embedding of 0.02 the residual stream is layers
    # alone, and roundings grow with each: with 15 layers a gradient of turnout's was 0.76 of
    # stock's away from it (H100). Behind one of 1, as nn.Embedding draws it, all gradients of 13
    # layers are 0.12 away.
    StepModel(
        "qwen3.5-35b",
        "qwen3_5_moe_text",
        {},
        40,
        (*_QKVO, "in_proj_qkv", "in_proj_z", "out_proj"),
        recurrence="out_proj",
        embedding=1.0,
    ),
    # deepseek-ai/DeepSeek-V3, blocks after the three dense ones; the defaults of DeepseekV3Config
    StepModel(
        "deepseek-v3",
        "deepseek_v3",
        {"first_k_dense_replace": 0},
        61,
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
    # allenai/OLMoE-1B-7B-0924; OlmoeConfig's defaults, but for the width of an expert
    StepModel("olmoe", "olmoe", {"intermediate_size": 1024}, 16),
)
# For tests and machines without a GPU; no checkpoint has these sizes, and no list names it.
_TINY = StepModel(
    "tiny",
    "qwen3_moe",
    {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "initializer_range": 0.1,
    },
    2,
)
NAMES = tuple(model.name for model in _MODELS)


def step_model(name: str) -> StepModel:
    """The configuration called `name`.

    Raises:
        ValueError: there is none.
    """
    for model in (*_MODELS, _TINY):
        if model.name == name:
            return model
    raise ValueError(f"shape is {name!r} with --step; expected one of {', '.join(NAMES)}")


class Identity(nn.Module):
    """In the place of an MoE block: gives back its input, with no scores where scores belong."""

    def __init__(self, *, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        return (x, None) if self.pair else x


@dataclass(frozen=True, slots=True)
class Built:
    """A PEFT model and the two parts that a step calls."""

    model: Any
    decoder: Any
    head: Any

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def build(
    shape: StepModel,
    layers: int,
    provider: Provider,
    device: torch.device,
    *,
    checkpointing: bool,
    attention: str = "auto",
    backend: BackendName = "auto",
) -> Built:
    """The model of one provider, in training mode on `device`.

    Args:
        shape: which sizes.
        layers: how many of them.
        provider: who runs the MoE blocks.
        device: where the weights are drawn and stay.
        checkpointing: recompute each layer in the backward pass.
        attention: transformers' `attn_implementation`; `auto` as `attention_of` says.
        backend: turnout's.

    Raises:
        Unsupported: a peer does not have such experts.
    """
    check_choice("provider", provider, Provider)
    config = shape.config(layers)
    config._experts_implementation = "eager" if provider == "eager" else "grouped_mm"
    model = _random(shape, config, device, attention_of(shape, device, attention))
    if provider == "identity":
        skip_experts(model, pair=shape.pair)
    peer = PEERS.get(provider)
    if peer is not None:
        peer.before(model)
    report = None
    if provider in _ROUTERS:
        report = patch(model, router=_ROUTERS[provider], backend=backend)
    experts = [] if provider == "identity" else lora_targets(model)
    adapted = get_peft_model(model, _lora(shape, experts))
    draw_adapters(adapted)
    if peer is not None:
        peer.after(adapted)
    if report is not None:
        report.require("fused")
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    base = adapted.get_base_model()
    return Built(adapted, base.model, base.lm_head)


_ROUTERS: dict[str, RouterChoice] = {"turnout": "model", "turnout-fused": "fused"}


def attention_of(shape: StepModel, device: torch.device, asked: str) -> str:
    """What computes attention: SDPA; flex attention on GPUs for gpt-oss, whose sinks SDPA lacks."""
    if asked != "auto":
        return asked
    if shape.model_type != "gpt_oss":
        return "sdpa"
    return "flex_attention" if device.type == "cuda" else "eager"


def _random(shape: StepModel, config: Any, device: torch.device, attention: str) -> Any:
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=attention)
        if shape.embedding is not None:
            nn.init.normal_(model.get_input_embeddings().weight, std=shape.embedding)
    return model


def skip_experts(model: nn.Module, *, pair: bool) -> None:
    """Every MoE block, router and shared expert included, becomes the identity."""
    for name, _, _ in list(expert_modules(model)):
        block, _, child = name.rpartition(".")[0].rpartition(".")
        parent = model.get_submodule(block)
        setattr(parent, child, Identity(pair=pair))


def _lora(shape: StepModel, experts: list[str]) -> LoraConfig:
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(shape.targets),
        target_parameters=experts or None,
    )


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """Both factors at random, each from a seed of its own name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            std = B_STD if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
            generator = torch.Generator(parameter.device).manual_seed(crc32(name.encode()))
            parameter.normal_(0.0, std, generator=generator)


def on_meta(shape: StepModel, layers: int) -> Any:
    """The base model without memory: for counting."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape.config(layers), dtype=DTYPE)
