"""What the GPU tests share: problems on the device, and meters of launches and of memory.

`TRITON_INTERPRET=1` puts the problems on the CPU, in Triton's interpreter: tests that need neither
bfloat16 nor CUDA itself can be tried there, with `-k` and patience.

Every combination of sizes, dtypes and layout compiles some fifteen kernels of a second each. Take a
shape from `SHAPES` before making a new one.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from problems import GPT_OSS, Problem, output_gradient, random_problem
from turnout import Activation

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LORA = {"lora_dtype": torch.float32}
REPLAYED = 4  # steps after a first one, of which the last ones replay what was recorded

BASE = "T600-E16-K4-R33"  # of tests that need some problem
HOPPER = "T700-E5-H320"  # and of those that Hopper's own kernels shall run on sm_90
SHAPES: dict[str, dict[str, Any]] = {
    "T257-E8-K2-H515": {"tokens": 257, "num_experts": 8, "hidden": 515, "intermediate": 131},
    BASE: {"tokens": 600, "num_experts": 16, "top_k": 4, "rank_up": 33},
    "T1000-E4": {"tokens": 1000, "num_experts": 4, "hidden": 512, "intermediate": 384},
    "E1-K1": {"tokens": 130, "num_experts": 1, "top_k": 1, "hidden": 128},
    "R256": {"tokens": 130, "hidden": 128, "intermediate": 256, "rank_up": 256, "rank_down": 256},
    "gpt-oss": {"activation": GPT_OSS, "transposed": True, "bias": True, "hidden": 96},
    "not-gated": {"activation": Activation(act="relu2", gated=False), "bias": True},
    "llama4": {"weight_on_input": True, "transposed": True, "top_k": 1},
    # 192 rows an expert and more, and a hidden size of whole 64s
    HOPPER: {
        "tokens": 700,
        "num_experts": 5,
        "hidden": 320,
        "intermediate": 192,
        "rank_up": 16,
        "rank_down": 16,
    },
}
# T, K, E, H, F of the models; rank 16 on both projections.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b": {"top_k": 8, "num_experts": 128, "hidden": 2048, "intermediate": 768},
    "olmoe": {"top_k": 8, "num_experts": 64, "hidden": 2048, "intermediate": 1024},
    "sonic-readme": {"top_k": 8, "num_experts": 128, "hidden": 4096, "intermediate": 1024},
    "mixtral": {"top_k": 2, "num_experts": 8, "hidden": 4096, "intermediate": 14336},
    "gpt-oss-20b": {
        "top_k": 4,
        "num_experts": 32,
        "hidden": 2880,
        "intermediate": 2880,
        "activation": GPT_OSS,
        "transposed": True,
        "bias": True,
    },
}
# Tests that allocate more than about 3 GB. One runs at a time of each group, so that with four
# workers all stays below 60 GB: up to 35 GB, and up to 15 GB.
MEMORY = {"large": pytest.mark.memory("large"), "medium": pytest.mark.memory("medium")}


def make(shape: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **other: Any) -> Problem:
    """One of `SHAPES`, with float32 adapters."""
    options = {"dtype": dtype, **LORA, **SHAPES[shape], **other}
    return random_problem(seed=seed, device=DEVICE, **options)


def model_problem(model: str, tokens: int, **other: Any) -> Problem:
    """bfloat16 weights and float32 adapters of rank 16 at the sizes of one of `MODELS`."""
    ranks = {"rank_up": 16, "rank_down": 16}
    options = {"dtype": torch.bfloat16, **LORA, **ranks, **MODELS[model], **other}
    return random_problem(tokens=tokens, device=DEVICE, **options)


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Inside, waiting for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def zipf(problem: Problem, exponent: float = 1.2, seed: int = 0) -> Problem:
    """The problem with skewed routing: experts without replacement, p ~ rank^-exponent."""
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = problem.experts.shape
    num_experts = problem.num_experts
    log_p = -exponent * torch.arange(1, num_experts + 1).log()
    log_p = log_p[torch.randperm(num_experts, generator=generator)]
    uniform = torch.rand(tokens, num_experts, generator=generator).clamp_min(1e-20)
    chosen = (log_p - (-uniform.log()).log()).topk(top_k).indices
    return problem.changed(experts=chosen.to(problem.experts.device))


def step_of(problem: Problem, needs: Iterable[str], **options: Any) -> Callable[[], Any]:
    """Forward and backward; all inputs are made before, and the results are returned."""
    fresh = problem.mapped(Tensor.detach)
    leaves = [fresh[name].requires_grad_() for name in needs]
    dout = output_gradient(problem)

    def step() -> tuple[Tensor, ...]:
        out = fresh.call(**options)
        return (out.detach(), *(torch.autograd.grad(out, leaves, dout) if leaves else ()))

    return step


def spoil(tensors: Iterable[Tensor]) -> None:
    """Writes what a captured step must write again."""
    for tensor in tensors:
        tensor.fill_(math.nan if tensor.is_floating_point() else -7)


def on_side_stream(step: Callable[[], Any]) -> Any:
    """What the second of two runs gives; a capture wants them first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        found = step()
    torch.cuda.current_stream().wait_stream(side)
    return found


def device_work(step: Callable[[], Any]) -> list[str]:
    """Names of the kernels, copies and fills of a step; the step runs twice before."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    return [event.name() for event in events if event.device_type() == DeviceType.CUDA]


def requested() -> int:
    """Bytes that live tensors asked for."""
    gc.collect()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def peak(step: Callable[[], Any]) -> int:
    """Bytes above what was alive before, at the worst moment of a step that ran once before."""
    step()
    torch.cuda.synchronize()
    before = requested()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def largest_allocation(step: Callable[[], Any]) -> int:
    """Bytes of the largest single allocation of a step that ran once before."""
    step()
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=100_000)
    try:
        step()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(None)
    return max(entry["size"] for trace in traces for entry in trace if entry["action"] == "alloc")
