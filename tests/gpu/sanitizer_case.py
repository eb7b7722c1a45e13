"""Every kernel on odd sizes, and indices far out of range: what compute-sanitizer watches.

`test_sanitizer.py` runs this file in a process of its own. With `--broken` it runs one kernel that
reads past the end of its input, to show that the watcher sees it. The shapes are those of the other
tests, so that most kernels come from Triton's cache.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from cuda_cases import BASE, DEVICE, HOPPER, make
from torch import Tensor

from balance_cases import check as check_balance
from balance_cases import weights
from problems import Problem, run
from route_cases import SPECS, randn, tensors_of
from route_cases import run as run_route
from turnout import RouteSpec
from turnout.ragged import counts_of, sort_by_expert
from turnout.routing import fused
from turnout.testing import poison_empty

# Shape, dtype, options of the call.
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("T257-E8-K2-H515", torch.bfloat16, {}),
    (BASE, torch.bfloat16, {"expert_dropout": 0.3}),
    ("gpt-oss", torch.bfloat16, {"recompute": "gate_up"}),
    ("not-gated", torch.float32, {}),
    ("llama4", torch.bfloat16, {}),
    (HOPPER, torch.bfloat16, {}),
]
# Rule, tokens, experts: odd numbers of both, and each with counts for the sort.
ROUTES: dict[str, tuple[RouteSpec, int, int]] = {
    "sinks": (SPECS["sinks"], 601, 12),
    "sigmoid, groups": (SPECS["sigmoid, groups"], 601, 12),
    "E1000-K32": (RouteSpec(top_k=32, norm=False), 101, 1000),
}
# Tokens, experts per token, experts of two layers of the load-balancing loss.
BALANCES = ((601, 3, 12), (101, 32, 1000))


@triton.jit
def _overrun(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Reads and writes BLOCK elements, whatever there are."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


def with_garbage(problem: Problem) -> Problem:
    """Some indices below 0, at E, above E and far above; they are dropped."""
    num_experts = problem.num_experts
    values = [-1, num_experts, num_experts + 1, 10**6, -(10**9), 2**40]
    flat = problem.experts.flatten()
    flat[:: len(values)] = torch.tensor(values, device=flat.device)[
        torch.arange(len(flat[:: len(values)]), device=flat.device) % len(values)
    ]
    return problem.changed(experts=flat.view(problem.experts.shape))


def route_and_sort(spec: RouteSpec, tokens: int, num_experts: int) -> dict[str, Tensor]:
    """The router forward and backward, and its choice sorted by its counts."""
    logits = (2 * randn(tokens, num_experts + spec.n_always)).to(DEVICE, torch.bfloat16)
    tensors = tensors_of("bias and scales", logits, num_experts)
    found = run_route(fused.route, logits, spec, **tensors)
    experts = fused.route(logits, spec, **tensors).experts_TK
    counted = counts_of(experts, num_experts)
    assert counted is not None
    got = sort_by_expert(experts, num_experts, counted)
    expected = sort_by_expert(experts.clone(), num_experts)
    assert torch.equal(got.slot_S, expected.slot_S)
    assert torch.equal(got.offsets, expected.offsets)
    return found


def main() -> None:
    if sys.argv[1:] == ["--broken"]:
        x = torch.zeros(33, device=DEVICE)
        _overrun[(1,)](x, torch.empty(64, device=DEVICE), BLOCK=64)
        torch.cuda.synchronize()
        return
    for shape, dtype, options in CASES:
        with poison_empty():
            got = run(with_garbage(make(shape, dtype)), **options)
        wrong = [name for name, value in got.items() if not value.isfinite().all()]
        assert not wrong, f"{shape}: {wrong} read memory that nobody wrote"
        print(shape, "done", flush=True)
    for name, (spec, tokens, num_experts) in ROUTES.items():
        with poison_empty():
            got = route_and_sort(spec, tokens, num_experts)
        wrong = [key for key, value in got.items() if not value.isfinite().all()]
        assert not wrong, f"{name}: {wrong} read memory that nobody wrote"
        print(name, "done", flush=True)
    for tokens, top_k, num_experts in BALANCES:
        logits = [randn(tokens, num_experts).to(DEVICE, torch.bfloat16) for _ in range(2)]
        with poison_empty():
            check_balance(logits, top_k, weights(tokens, DEVICE))
        print("load balancing", num_experts, "done", flush=True)


if __name__ == "__main__":
    main()
