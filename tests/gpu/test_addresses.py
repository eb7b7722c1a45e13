"""Rows, and experts' strides, past 2^31 elements: an address in 32 bits wraps to another place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_cases import DEVICE, MEMORY
from torch import Tensor

from problems import Problem, judge, restricted, run
from turnout import ExpertSpec

pytestmark = [pytest.mark.filterwarnings("error::RuntimeWarning"), MEMORY["large"]]
BF16 = torch.bfloat16


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(scale)


def problem_of(
    experts: Tensor, num_experts: int, hidden: int, intermediate: int, *, transposed: bool = False
) -> Problem:
    """Drawn on the device in the final dtype; rank 4."""
    (tokens, top_k), wide, rank = experts.shape, 2 * intermediate, 4
    leaves = {
        "x": normal(tokens, hidden),
        "weights_TK": normal(tokens, top_k, dtype=torch.float32).softmax(1),
        "gate_up": normal(num_experts, wide, hidden, scale=hidden**-0.5),
        "down": normal(num_experts, hidden, intermediate, scale=intermediate**-0.5),
    }
    if transposed:
        leaves["gate_up"] = leaves["gate_up"].view(num_experts, hidden, wide)
        leaves["down"] = leaves["down"].view(num_experts, intermediate, hidden)
    for side, inputs, outputs in (("up", hidden, wide), ("down", intermediate, hidden)):
        a = normal(num_experts, rank, inputs, scale=inputs**-0.5, dtype=torch.float32)
        b = normal(outputs, rank, num_experts, scale=rank**-0.5, dtype=torch.float32)
        leaves |= {f"a_{side}": a, f"b_{side}": b}
    spec = ExpertSpec(transposed=transposed)
    return Problem(leaves, experts, spec, {"up": 0.75, "down": 1.25})


def at(problem: Problem, tokens: slice | Tensor) -> Problem:
    """The problem of these tokens alone."""
    leaves = {name: problem[name][tokens] for name in ("x", "weights_TK")}
    return problem.changed(**leaves, experts=problem.experts[tokens])


# S * H, or S * G, is 2.156e9 and more. Hopper's own kernels take the multiples of 64.
ROWS = {
    "hidden": (2056, 16),
    "gate_up": (32, 1028),
    "hidden of whole 64s": (2112, 64),
    "gate_up of whole 64s": (64, 1088),
}
TOKENS, TOP_K, CHUNK = 131_080, 8, 64


@pytest.mark.parametrize("wide", ROWS)
def test_rows_past_2_31_elements_are_addressed_in_32_bits(wide: str) -> None:
    """Only the first and the last tokens reach expert 3, so its gradients need only them."""
    torch.manual_seed(0)
    chunks = [slice(i * CHUNK, (i + 1) * CHUNK) for i in range(7)]
    chunks.insert(0, slice(TOKENS - CHUNK, TOKENS))
    experts = torch.randint(3, (TOKENS, TOP_K), device=DEVICE)
    for chunk in (chunks[0], chunks[1]):
        experts[chunk] = torch.randint(4, (CHUNK, TOP_K), device=DEVICE)
    problem = problem_of(experts, 4, *ROWS[wide])
    assert TOKENS * TOP_K * max(problem["gate_up"].shape[1:]) > 2**31
    dout = normal(*problem["x"].shape)
    got = run(problem, dout=dout)

    names = ("x", "weights_TK")
    cases = [(at(problem, chunk), dout[chunk]) for chunk in chunks]
    for first in (0, 1):
        here = {name: got[name][chunks[first]] for name in ("out", *names)}
        judge(here, cases[first:], names)

    reached = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks[:2]]).to(DEVICE)
    small = restricted(at(problem, reached), torch.tensor([3], device=DEVICE))
    names = tuple(name for name in problem.leaves if name not in names)
    part = {name: got[name][..., 3:] if name[:2] == "b_" else got[name][3:] for name in names}
    judge(part, like(small, dout[reached], 7), names)


def like(problem: Problem, dout: Tensor, others: int) -> Iterator[tuple[Problem, Tensor]]:
    """The problem, and others of its size for the yardstick."""
    yield problem, dout
    transposed, down = problem.spec.transposed, problem["down"]
    hidden, intermediate = down.shape[1:][::-1] if transposed else down.shape[1:]
    for _ in range(others):
        sizes = (problem.num_experts, hidden, intermediate)
        other = problem_of(problem.experts, *sizes, transposed=transposed)
        yield other, normal(*dout.shape)


# E * G * H is 4.4e9 and E * H * F is 2.2e9: 13 GB of weights, and as much of their gradients.
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 130, 4096, 4096
# 192 rows per expert, all of them on four: from there on Hopper's own kernels run.
EXPERT_TOKENS = {"few rows": 96, "many rows": 8320}


@pytest.mark.parametrize("rows", EXPERT_TOKENS)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_experts_past_2_31_elements_are_addressed_in_32_bits(transposed: bool, rows: str) -> None:
    torch.manual_seed(0)
    tokens = EXPERT_TOKENS[rows]
    reached = torch.tensor([0, 64, 128, 129], device=DEVICE)
    experts = reached[torch.rand(tokens, 4, device=DEVICE).argsort(1)[:, :3]]
    sizes = (NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    problem = problem_of(experts, *sizes, transposed=transposed)
    assert min(problem[name].numel() for name in ("gate_up", "down")) > 2**31
    dout = normal(*problem["x"].shape)
    got = run(problem, dout=dout)
    for name in ("gate_up", "down"):
        others = [e for e in range(NUM_EXPERTS) if e not in reached.tolist()]
        assert not any(got[name][e].any() for e in others), f"{name} of an expert without rows"
    part = {name: got[name] for name in ("out", "x", "weights_TK")}
    part |= {name: got[name][..., reached] for name in ("b_up", "b_down")}
    part |= {name: got[name][reached] for name in ("gate_up", "down", "a_up", "a_down")}
    small = restricted(problem, reached)
    del problem, got  # what follows takes gigabytes in float64
    judge(part, like(small, dout, 3), tuple(small.leaves))
