"""Every legal input: sizes, routings, dropped slots, strides, alignments and mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import BASE, DEVICE, DTYPES, HOPPER, make
from torch import Tensor

from problems import (
    Problem,
    assert_same,
    check,
    output_gradient,
    random_problem,
    run,
    undefined_where,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
ODD = "T257-E8-K2-H515"
DTYPE = torch.bfloat16
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "recompute": {"recompute": "gate_up"}}


def without_lonely_weights(problem: Problem) -> tuple[str, ...]:
    """One number has no typical error: the only slot's weight is not judged."""
    names = problem.trained_by_lora
    return tuple(n for n in names if n != "weights_TK" or problem.experts.numel() > 4)


@pytest.mark.parametrize("shape", [BASE, "gpt-oss", "not-gated", "llama4"])
@pytest.mark.parametrize(
    "options", [*OPTIONS.values(), {"expert_dropout": 0.5}], ids=[*OPTIONS, "dropout"]
)
def test_no_tokens_fail(shape: str, options: dict[str, Any]) -> None:
    problem = make(shape, tokens=0)
    got = run(problem, **options)
    assert got["out"].shape == problem["x"].shape
    for name, leaf in problem.leaves.items():
        assert got[name].shape == leaf.shape
        assert got[name].dtype == leaf.dtype
        assert not got[name].any(), name


SIZES: dict[str, dict[str, Any]] = {
    "T1": {"tokens": 1, "num_experts": 3},
    "K32-E40": {"tokens": 9, "num_experts": 40, "top_k": 32},
    "K7-E3": {"num_experts": 3, "top_k": 7},
    "E1000": {"tokens": 12, "num_experts": 1000},
    # many tokens: 33 single numbers have no typical error
    "widths of 1": {
        "hidden": 1,
        "intermediate": 1,
        "rank_up": 1,
        "rank_down": 1,
        "tokens": 600,
        "num_experts": 32,
    },
}


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_wrong(size: str) -> None:
    def problem(seed: int) -> Problem:
        options = {"dtype": DTYPE, "lora_dtype": torch.float32, "bias": True, **SIZES[size]}
        return random_problem(seed=seed, device=DEVICE, **options)

    check(problem, without_lonely_weights(problem(0)))


ROUTINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all on one expert": lambda experts, n: torch.full_like(experts, n - 1),
    "empty experts": lambda experts, n: experts % 2 * 3,
    "dropped slots": lambda experts, n: torch.where(dropped_of(experts), n, experts),
    "one row an expert": lambda experts, n: one_each(experts, n),
}


def dropped_of(experts: Tensor) -> Tensor:
    """40 % of the slots, and all of token 4."""
    generator = torch.Generator().manual_seed(9)
    dropped = torch.rand(experts.shape, generator=generator) < 0.4
    dropped[4] = True
    return dropped.to(experts.device)


def one_each(experts: Tensor, num_experts: int) -> Tensor:
    alone = torch.full_like(experts, num_experts)
    alone[:num_experts, 1] = torch.arange(num_experts, device=experts.device)
    return alone


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("shape", "dtype"), [(ODD, "bf16"), ("gpt-oss", "fp32")])
def test_a_routing_is_wrong(shape: str, dtype: str, routing: str) -> None:
    def problem(seed: int) -> Problem:
        made = make(shape, DTYPES[dtype], seed)
        return made.changed(experts=ROUTINGS[routing](made.experts, made.num_experts))

    check(problem)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [ODD, "gpt-oss", "llama4", HOPPER])
def test_a_dropped_slot_is_read_or_counted(shape: str, options: str) -> None:
    problem = make(shape)
    dropped = dropped_of(problem.experts)
    garbage, clean = undefined_where(dropped, problem)
    dout = output_gradient(problem)
    expected = run(clean, dout=dout, **OPTIONS[options])
    assert_same(run(garbage, dout=dout, **OPTIONS[options]), expected)
    assert not expected["weights_TK"][dropped].any()
    assert expected["weights_TK"][~dropped].all()
    assert not expected["out"][4].any()
    assert not expected["x"][4].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [ODD, "gpt-oss", "llama4", HOPPER])
def test_an_index_out_of_range_reads_out_of_bounds(shape: str, dtype: torch.dtype) -> None:
    """It is dropped, as E is; `test_sanitizer.py` watches the addresses of the same inputs."""
    problem = make(shape)
    dropped = dropped_of(problem.experts)
    info = torch.iinfo(dtype)
    far = [-1, problem.num_experts + 1, info.max, info.min, -problem.num_experts, 10**9]
    if dtype == torch.int64:
        far += [2**32, 2**32 + 1, -(2**32) + 1]
    values = torch.tensor(far, dtype=dtype, device=DEVICE)
    slots = torch.arange(dropped.numel(), device=DEVICE).view(dropped.shape)
    garbage = torch.where(dropped, values[slots % len(far)], problem.experts.to(dtype))
    sentinel = torch.where(dropped, problem.num_experts, problem.experts)
    assert_same(run(problem.changed(experts=garbage)), run(problem.changed(experts=sentinel)))


@pytest.mark.parametrize("needs", ["LoRA", "full"])
def test_every_slot_dropped_leaves_something(needs: str) -> None:
    problem = make("gpt-oss")
    problem = problem.changed(experts=torch.full_like(problem.experts, problem.num_experts))
    names = problem.trained_by_lora if needs == "LoRA" else tuple(problem.leaves)
    got = run(problem, names)
    assert {name for name, value in got.items() if value is not None} == {"out", *names}
    assert not any(value.any() for value in got.values() if value is not None)


def test_int32_indices_change_bits() -> None:
    problem = make(BASE)
    assert_same(run(problem.changed(experts=problem.experts.int())), run(problem))


def spread(tensor: Tensor) -> Tensor:
    """The same values with a gap, a NaN, between the elements."""
    fill = float("nan") if tensor.is_floating_point() else 0
    wide = torch.full((*tensor.shape, 2), fill, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def reverse(tensor: Tensor) -> Tensor:
    """The same values with the first dim contiguous."""
    order = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def shift(tensor: Tensor) -> Tensor:
    """The same values, contiguous, one element past an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape).copy_(tensor)


STRIDES = {"gaps": spread, "reversed dims": reverse, "unaligned": shift}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("shape", [BASE, HOPPER])
def test_strides_or_alignment_matter(shape: str, how: str, bias: bool) -> None:
    """After the same sizes ran contiguous and aligned: what was compiled for those does not fit."""
    run(make(shape, bias=bias))

    def problem(seed: int) -> Problem:
        made = make(shape, seed=seed, bias=bias)
        strided = made.mapped(STRIDES[how]).changed(experts=STRIDES[how](made.experts))
        assert all(
            not leaf.is_contiguous() or leaf.data_ptr() % 16 for leaf in strided.leaves.values()
        )
        return strided

    check(problem)


@pytest.mark.parametrize("how", STRIDES)
def test_strides_of_the_output_gradient_matter(how: str) -> None:
    problem = make(BASE)
    dout = output_gradient(problem)
    assert_same(run(problem, dout=STRIDES[how](dout)), run(problem, dout=dout))
    row = dout[:1].expand_as(dout)
    assert_same(run(problem, dout=row), run(problem, dout=row.contiguous()))


MIXED: dict[str, dict[str, Any]] = {
    "adapters bf16": {"lora_dtype": torch.bfloat16},
    "adapters fp16": {"lora_dtype": torch.float16},
    "adapters bf16, rest fp32": {"dtype": torch.float32, "lora_dtype": torch.bfloat16},
    "routing weights bf16": {"weights_dtype": torch.bfloat16},
    "routing weights fp16": {"weights_dtype": torch.float16},
}


@pytest.mark.parametrize("shape", [ODD, HOPPER])
@pytest.mark.parametrize("dtypes", MIXED)
def test_a_pair_of_dtypes_is_wrong(dtypes: str, shape: str) -> None:
    def problem(seed: int) -> Problem:
        return make(shape, seed=seed, **MIXED[dtypes])

    check(problem, problem(0).trained_by_lora)


@pytest.mark.parametrize("x_dtype", ["fp32", "fp16"])
def test_x_in_another_dtype_than_the_weights_is_wrong(x_dtype: str) -> None:
    def problem(seed: int) -> Problem:
        made = make(ODD, DTYPE, seed)
        return made.changed(x=made["x"].to(DTYPES[x_dtype]))

    check(problem, problem(0).trained_by_lora)
