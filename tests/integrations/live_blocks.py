"""Live MoE blocks of the tiny models, and what their own routers answer, each in its own dialect.

Independent of `turnout.verify.routing`: only transformers' modules are asked.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from turnout.verify.tiny import TINY, E, H, build

OWN_ROUTER = ("phimoe", "switch_transformers", "nllb-moe")
ROUTED = tuple(key for key in TINY if key not in OWN_ROUTER)


def model_of(key: str, dtype: torch.dtype = torch.float32) -> Any:
    """A new tiny model in `dtype`."""
    return build(key, dtype=dtype)


@cache
def blocks_of(key: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The blocks of an architecture. Shared by all tests: `block_of` gives one to change."""
    if dtype == torch.float32:
        return find_blocks(build(key))
    return {n: copy.deepcopy(b).to(dtype) for n, b in blocks_of(key).items()}


def is_block(module: nn.Module) -> bool:
    """A module that owns a router and the experts (JetMoE: the projections) that it routes to."""
    router = getattr(module, "gate", None)
    router = router if isinstance(router, nn.Module) else getattr(module, "router", None)
    holds = hasattr(module, "experts") or hasattr(module, "input_linear")
    return isinstance(router, nn.Module) and holds


def find_blocks(model: nn.Module) -> dict[str, Any]:
    """The first block of each pair of block class and router class, by those names."""
    found: dict[str, Any] = {}
    for module in model.modules():
        if is_block(module):
            router = module.gate if isinstance(getattr(module, "gate", None), nn.Module) else None
            router = module.router if router is None else router
            found.setdefault(f"{type(module).__name__}/{type(router).__name__}", module)
    return found


def block_of(key: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of the block of an architecture that a test may change (DeepSeek-V4: not the hash
    router's; JetMoE: the MLP's)."""
    blocks = list(blocks_of(key, dtype).values())
    if key == "jetmoe":
        blocks = [b for b in blocks if hasattr(b, "input_linear") and hasattr(b, "activation")]
    block = next(b for b in blocks if not hasattr(getattr(b, "gate", None), "tid2eid"))
    return copy.deepcopy(block)


@cache
def has_linear_router(key: str) -> bool:
    """jamba and aria_text had a bare Linear as router up to transformers 5.17."""
    return type(getattr(block_of(key), "router", None)) is nn.Linear


def tokens(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator).to(dtype)


def ids_of(count: int) -> Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(3))


def answer(key: str, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, experts), both (T, K), of the block's own router for x (T, H).

    JetMoE and Llama 4 do not keep the (T, K) form: theirs is rebuilt from what they return.
    """
    bare = has_linear_router(key)
    if key in ("granitemoe", "granitemoeshared", "granitemoehybrid", "longcat_flash"):
        # the order of the tuple differs by release; the integers are the experts
        out = block.router(x)
        experts = next(t for t in out if not t.is_floating_point())
        weights = next(t for t in out if t.is_floating_point() and t.shape == experts.shape)
    elif key == "jamba" and bare:
        experts, weights = block.route_tokens_to_experts(x, block.router(x))
    elif key == "aria_text" and bare:
        experts, weights = block.experts.route_tokens_to_experts(block.router(x))
    elif key == "dbrx":
        weights, experts = block.route_tokens_to_experts(block.router(x))
    elif key == "llama4_text":
        scores, logits = block.router(x)
        experts = logits.topk(block.top_k, dim=1).indices
        weights = scores.gather(1, experts)
    elif key == "jetmoe":
        order, _, gates, sizes, _ = block.router(x)
        top_k = block.router.top_k
        expert_S = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        back = order.argsort()
        weights, experts = gates[back].view(-1, top_k), expert_S[back].view(-1, top_k)
    elif key == "afmoe":
        _, weights, experts = block.router(x[None], block.expert_bias)
    elif key in ("minimax_m2", "hy_v3"):
        _, weights, experts = block.gate(x, block.e_score_correction_bias)
    elif key == "lfm2_moe":
        _, weights, experts = block.gate(x, block.expert_bias)
    elif key == "deepseek_v4" and hasattr(block.gate, "tid2eid"):
        _, weights, experts = block.gate(x, ids_of(len(x)))
    else:
        router = block.gate if isinstance(getattr(block, "gate", None), nn.Module) else block.router
        _, weights, experts = router(x)[:3]
    return weights.reshape(len(x), -1), experts.reshape(len(x), -1)


def num_selectable(key: str) -> int:
    return {"longcat_flash": E + 4, "zaya": E + 1}.get(key, E)


def dense(weights_TK: Tensor, experts_TK: Tensor, experts: int) -> Tensor:
    """(T, E) in the dtype of the weights, zero where an expert is not chosen."""
    out = weights_TK.new_zeros(len(weights_TK), experts)
    return out.scatter_add(1, experts_TK.long(), weights_TK)
