"""What is compiled: which calls are recorded, and which of their launches are kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import product
from typing import Any

import torch
from recording import Launch, chip, recording

from problems import GPT_OSS, random_problem, run
from turnout import Activation, RouteSpec
from turnout.ragged import counts_of, sort_by_expert
from turnout.routing import balance, fused
from turnout.shapes import SHAPES

_SHAPES: dict[str, dict[str, Any]] = {
    shape.name: {
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "num_experts": shape.experts,
        "top_k": shape.top_k,
    }
    for shape in SHAPES
}
MODELS = {name: _SHAPES[name] for name in ("qwen3-30b", "mixtral", "gptoss-20b")}
SHIPPED = (_SHAPES["olmoe"], _SHAPES["sonic-readme"])  # besides, with configs that ship for sm_90
MODELS["gptoss-20b"] |= {"activation": GPT_OSS, "transposed": True, "bias": True}
ODD = {"hidden": 515, "intermediate": 131, "num_experts": 8, "rank_up": 33, "rank_down": 33}
DTYPES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "bf16-fp32-adapters": {"dtype": torch.bfloat16, "lora_dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "fp32-autocast": {"dtype": torch.float32},
}
# Rows per expert: a single token, then what gives tiles of 16, 64 and 128 rows.
ROWS_PER_EXPERT = (0, 8, 64, 512)
USUAL = 512
LORA = {"rank_up": 16, "rank_down": 16}
# Further calls: the problem's options, those of `expert_mlp`, and whether base weights train too.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "everything trains": ({}, {}, True),
    "rank 4": ({"rank_up": 4, "rank_down": 4}, {}, False),
    "rank 256": ({"rank_up": 256, "rank_down": 256}, {}, False),
    "no adapters": ({"rank_up": 0, "rank_down": 0}, {}, True),
    "dropout": ({}, {"expert_dropout": 0.1}, False),
    "recompute": ({}, {"recompute": "gate_up"}, False),
    "weight on the input": ({"weight_on_input": True}, {}, True),
    "not gated": ({"activation": Activation(act="relu2", gated=False)}, {}, True),
    "clamped after": ({"activation": Activation(limit=7.0, limit_after=True)}, {}, False),
    "gelu": ({"activation": Activation(act="gelu")}, {}, False),
    "gelu_tanh": ({"activation": Activation(act="gelu_tanh")}, {}, False),
}
# The further calls differ in code, not in what their dtypes do to it.
CALL_DTYPES = ("bf16", "fp32", "fp32-autocast")


def record(
    arch: int,
    dtype: str,
    model: dict[str, Any],
    rows_per_expert: int,
    call: str,
    backend: str = "triton",
) -> dict[str, Launch]:
    """The launches of one forward and backward pass, by key."""
    changes, options, everything = CALLS[call]
    tokens = max(1, rows_per_expert * model["num_experts"] // model.get("top_k", 2))
    with recording(chip(arch)) as found:
        problem = random_problem(tokens=tokens, **(LORA | model | DTYPES[dtype] | changes))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype.endswith("autocast")):
            needs = None if everything else problem.trained_by_lora
            run(problem, needs, backend=backend, **options)
    return found


HOPPER_ODD = {"hidden": 320, "intermediate": 192, "num_experts": 8, "rank_up": 33}


def hopper(dtype: str, model: dict[str, Any], call: str) -> list[Launch]:
    """The launches of the Hopper kernels in one forward and backward pass."""
    found = record(90, dtype, model, USUAL, call, backend="hopper")
    return [one for one in found.values() if "hopper" in one.kernel.__module__]


# Rules of the router with their experts; the third has everything that is a switch.
RULES: dict[str, tuple[RouteSpec, int]] = {
    "qwen3-30b": (RouteSpec(top_k=8), 128),
    "deepseek-v3": (
        RouteSpec(top_k=8, score="sigmoid", n_group=8, topk_group=4, eps=1e-20, scale=2.5),
        256,
    ),
    "everything": (
        RouteSpec(top_k=32, softcap=30.0, n_always=2, norm=False, n_group=4, topk_group=2),
        1020,
    ),
}


def record_routing(arch: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The launches of the router forward and backward, plain and with every tensor, of the sort
    behind it, and of the load-balancing loss."""
    with recording(chip(arch)) as found:
        for spec, experts in RULES.values():
            for more in (False, True):
                logits = torch.empty(4096, experts + spec.n_always, dtype=dtype)
                logits.requires_grad_()
                tensors = {}
                if more:
                    names = {"bias_E": experts, "expert_scale_E": experts, "scale": 1}
                    tensors = {n: torch.empty(size).requires_grad_() for n, size in names.items()}
                out = fused.route(logits, spec, **tensors)
                out.weights_TK.sum().backward()
                counted = counts_of(out.experts_TK, experts)
                assert counted is not None
                sort_by_expert(out.experts_TK, experts, counted)
        for tokens, top_k in ((777, 32), (7, 1)):  # the widest buckets, the most experts
            sort_by_expert(torch.empty(tokens, top_k, dtype=torch.int64), 1024)
        for top_k, experts in ((8, 128), (4, 60), (32, 1000)):
            logits = [torch.empty(4096, experts, dtype=dtype)]
            for weight, wide in product((None, torch.empty(4096)), (False, True)):
                _, sums = balance.sums(logits, top_k, weight, wide)
                balance.gradients(logits, weight, sums, wide)
    return found


def launches(arch: int, dtype: str) -> list[Launch]:
    """Everything that is compiled for one chip and dtype: all models, tiles and calls.

    Of launches with the same code and tiles, those with the most and the fewest aligned arguments.
    Configs that ship with the package are chosen by the same host code; their shapes belong here.
    """
    found: dict[str, Launch] = {}
    more = SHIPPED if (arch, dtype) == (90, "bf16") else ()
    for model in (*MODELS.values(), ODD, *more):
        for rows in ROWS_PER_EXPERT:
            found |= record(arch, dtype, model, rows, "everything trains")
    if dtype in ("bf16", "fp16", "fp32"):
        found |= record_routing(arch, DTYPES[dtype]["dtype"])
    if dtype in CALL_DTYPES:
        for model in (MODELS["qwen3-30b"], MODELS["gptoss-20b"]):
            for call in CALLS:
                found |= record(arch, dtype, model, USUAL, call)
    best = chosen(found.values(), lambda one: one.code_and_tiles, lambda one: one.aligned)
    worst = chosen(found.values(), lambda one: one.code_and_tiles, lambda one: -one.aligned)
    return list({one.key: one for one in (*best, *worst)}.values())


def hungriest(arch: int) -> list[Launch]:
    """Of each kernel, epilogue and dtype the largest tiles, plain; of each epilogue the most code.

    What is plain goes to shared memory unchanged and takes the most of it; switches take registers.
    """
    found = record(arch, "bf16", ODD, 0, "everything trains")
    found |= record_routing(arch, torch.bfloat16)
    for dtype in ("bf16", "fp32", "fp32-autocast"):
        for model in (MODELS["qwen3-30b"], MODELS["gptoss-20b"]):
            found |= record(arch, dtype, model, USUAL, "everything trains")
    plain = chosen(
        found.values(), lambda one: one.family, lambda one: (one.volume, one.aligned, -one.switches)
    )
    for model, call in ((MODELS["qwen3-30b"], "dropout"), (ODD, "everything trains")):
        found |= record(arch, "bf16", model, USUAL, call)
    wide = [one for one in found.values() if "EPILOGUE" in one.by_name]
    full = chosen(wide, lambda one: one.by_name["EPILOGUE"], lambda one: (one.volume, one.switches))
    return list({one.key: one for one in (*plain, *full)}.values())


def hot(arch: int) -> list[Launch]:
    """What takes the time in LoRA training in bfloat16: the wide products at the models' shapes."""
    found: dict[str, Launch] = {}
    for model in MODELS.values():
        for call in ("rank 4", "recompute"):
            found |= record(arch, "bf16", model, USUAL, call)
    wide = [one for one in found.values() if one.by_name.get("HAS_TAIL")]
    return chosen(wide, lambda one: one.code_and_tiles, lambda one: one.aligned)


def chosen(
    found: Iterable[Launch], group: Callable[[Launch], Hashable], rank: Callable[[Launch], Any]
) -> list[Launch]:
    """The first launch of the highest rank of each group."""
    best: dict[Hashable, Launch] = {}
    for one in found:
        other = best.get(group(one))
        if other is None or rank(one) > rank(other):
            best[group(one)] = one
    return list(best.values())
