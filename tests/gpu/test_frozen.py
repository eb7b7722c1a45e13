"""What is frozen costs neither launches nor memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from cuda_cases import BASE, device_work, make, peak, requested, step_of

from problems import LORA_LEAVES, Problem

pytestmark = pytest.mark.unpoisoned
GROUPS = {
    "the base weights": ("gate_up", "down"),
    "gate_up": ("gate_up",),
    "down": ("down",),
    "x": ("x",),
    "the adapter of gate_up": ("a_up", "b_up"),
    "the adapter of down": ("a_down", "b_down"),
    "the adapters": LORA_LEAVES,
}
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "recompute": {"recompute": "gate_up"}}


def launches(problem: Problem, needs: Iterable[str], **options: Any) -> int:
    return len(device_work(step_of(problem, needs, **options)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [BASE, "gpt-oss"])
def test_a_frozen_group_is_launched_for(shape: str, options: str) -> None:
    problem = make(shape)
    leaves = tuple(problem.leaves)
    full = launches(problem, leaves, **OPTIONS[options])
    for group in GROUPS.values():
        rest = [name for name in leaves if name not in group]
        assert launches(problem, rest, **OPTIONS[options]) < full, group


def test_a_single_frozen_leaf_adds_launches() -> None:
    problem = make("gpt-oss")
    leaves = tuple(problem.leaves)
    full = launches(problem, leaves)
    for leaf in leaves:
        assert launches(problem, [name for name in leaves if name != leaf]) <= full, leaf


def test_the_router_alone_pays_for_adapters_or_x() -> None:
    """Its gradient needs the product with `down` and its adapter's, and none after."""
    problem = make(BASE)
    forward = launches(problem, ())
    router = launches(problem, ("weights_TK",)) - forward
    lora = launches(problem, problem.trained_by_lora) - forward
    without = launches(problem, ("weights_TK", "x")) - forward
    assert 0 < router < without < lora
    names = device_work(step_of(problem, ("weights_TK",)))
    assert not any("gram" in name for name in names), names
    assert any("gram" in name for name in device_work(step_of(problem, LORA_LEAVES)))


@pytest.mark.parametrize("needs", [("b_down",), ("down_bias",), ("b_down", "down_bias")], ids=str)
def test_the_last_factor_alone_pays_for_a_gradient_of_h(needs: tuple[str, ...]) -> None:
    """dB and the bias gradient of `down` read dout and what the forward pass kept."""
    problem = make("gpt-oss")
    assert launches(problem, needs) < launches(problem, ("weights_TK", *needs))


# (E, H, F) with stacks of 134 and 67 MB in bfloat16; 64 tokens are nothing beside them.
STACKS = {"num_experts": 64, "hidden": 1024, "intermediate": 512, "tokens": 64, "top_k": 8}
RANKS = {"rank_up": 4, "rank_down": 4}


def smaller_stack(problem: Problem) -> int:
    return min(problem[name].nbytes for name in ("gate_up", "down"))


@pytest.mark.parametrize("options", OPTIONS)
def test_lora_training_pays_for_the_gradient_of_a_stack(options: str) -> None:
    problem = make("T1000-E4", **STACKS, **RANKS)
    lora = peak(step_of(problem, problem.trained_by_lora, **OPTIONS[options]))
    assert lora < smaller_stack(problem) / 2
    full = peak(step_of(problem, problem.leaves, **OPTIONS[options]))
    assert full >= problem["gate_up"].nbytes + problem["down"].nbytes
    one = peak(step_of(problem, ("x", "down"), **OPTIONS[options]))
    assert one < problem["down"].nbytes + problem["gate_up"].nbytes / 2


def kept(problem: Problem, needs: Iterable[str], mode: AbstractContextManager[Any]) -> int:
    """Bytes that live after the forward pass, without the output."""
    fresh = problem.mapped(torch.Tensor.detach)
    for name in needs:
        fresh[name].requires_grad_()
    with mode:
        fresh.call()
        before = requested()
        out = fresh.call()
        return requested() - before - out.nbytes


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_z_is_kept_where_no_backward_pass_follows(mode: str) -> None:
    problem = make("T1000-E4")
    rows, wide = problem.experts.numel(), problem["gate_up"].shape[1]
    z = rows * wide * problem["x"].itemsize
    assert kept(problem, problem.leaves, nullcontext()) >= z
    if mode == "frozen":
        assert kept(problem, (), nullcontext()) == 0
    else:
        assert kept(problem, problem.leaves, getattr(torch, mode)()) == 0


def test_z_is_written_where_no_backward_pass_follows() -> None:
    """The forward pass alone holds h and y at its worst moment, and no z beside them."""
    problem = make("T1000-E4", tokens=8192)
    rows, wide = problem.experts.numel(), problem["gate_up"].shape[1]
    z = rows * wide * problem["x"].itemsize
    frozen = problem.mapped(torch.Tensor.detach)
    graded = problem.mapped(torch.Tensor.detach)
    graded["x"].requires_grad_()
    assert peak(frozen.call) <= peak(graded.call) - 0.9 * z


@pytest.mark.parametrize("frozen", ["gate_up", "x", "weights_TK", "b_up"])
def test_freezing_one_leaf_changes_the_other_gradients(frozen: str) -> None:
    problem = make("gpt-oss")
    leaves = tuple(problem.leaves)
    rest = [name for name in leaves if name != frozen]
    full = dict(zip(("out", *leaves), step_of(problem, leaves)(), strict=True))
    part = dict(zip(("out", *rest), step_of(problem, rest)(), strict=True))
    assert all(torch.equal(value, full[name]) for name, value in part.items())
