"""Rows, and experts' strides, past 2^31 elements: an address in 32 bits wraps to another place.

Views of memory that is mostly never touched, so that no machine has to have it; contiguous tensors
of that size are in `tests/gpu/test_addresses.py`.
"""

from __future__ import annotations

import pytest
import torch
import triton  # noqa: F401  its import decides that kernels are interpreted
from torch import Tensor

from problems import Problem, assert_same, random_problem, run

TOKENS, PITCH = 20, 2**27
EXPERTS, STRIDE = 5, 2**29 + 64


def problem() -> Problem:
    return random_problem(tokens=TOKENS, num_experts=EXPERTS, dtype=torch.float16)


def far(tensor: Tensor, pitch: int) -> Tensor:
    """The same values with `pitch` elements from one entry of the first dim to the next."""
    wide = torch.empty(tensor.shape[0], pitch, dtype=tensor.dtype)
    assert (wide.shape[0] - 1) * pitch >= 2**31
    view = wide[:, : tensor[0].numel()].view(tensor.shape)
    return view.copy_(tensor)


def test_far_rows_of_the_input_are_gathered_from_elsewhere() -> None:
    made = problem()
    moved = made.changed(x=far(made["x"], PITCH))
    assert_same(run(moved, backend="triton"), run(made, backend="triton"))


@pytest.mark.parametrize("stack", ["gate_up", "down"])
def test_a_far_expert_is_another(stack: str) -> None:
    made = problem()
    moved = made.changed(**{stack: far(made[stack], STRIDE)})
    needs = made.trained_by_lora
    assert_same(run(moved, needs, backend="triton"), run(made, needs, backend="triton"))
