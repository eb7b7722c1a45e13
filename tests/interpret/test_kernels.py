"""The Triton kernels in Triton's interpreter, on the CPU: float32 and float16, small shapes.

Run in a process of its own with TRITON_INTERPRET=1 (`make test` does). Triton's interpreter
computes bfloat16 on raw bits, so bfloat16 is judged on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import turnout
from problems import GPT_OSS, Problem, assert_same, check, random_problem, run
from sort_cases import assert_tiles
from turnout import Activation
from turnout.kernel_facts import interpreting
from turnout.launch import noting
from turnout.ragged import Ragged, sort_by_expert
from turnout.ragged.kernels import launch_sort
from turnout.testing import poison_empty

RELU2 = Activation(act="relu2", gated=False)
CLAMPED_AFTER = Activation(limit=0.7, limit_after=True)
CASES = {
    "plain": {},
    "transposed gpt-oss with biases": {"activation": GPT_OSS, "transposed": True, "bias": True},
    "biases": {"bias": True},
    "not gated": {"activation": RELU2, "bias": True},
    "clamped after": {"activation": CLAMPED_AFTER},
    "gelu": {"activation": Activation(act="gelu_tanh")},
    "weight on the input": {"weight_on_input": True, "transposed": True},
    "no adapters": {"rank_up": 0, "rank_down": 0},
    "one adapter, rank past a tile": {"rank_up": 0, "rank_down": 70},
    "one expert": {"tokens": 9, "num_experts": 1, "top_k": 1},
    "many experts, few rows": {"tokens": 5, "num_experts": 40, "top_k": 3},
}


def test_the_interpreter_is_on() -> None:
    assert interpreting()


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_something_else_than_the_definition(case: str) -> None:
    def make(seed: int) -> Problem:
        return random_problem(seed=seed, weights_dtype=torch.float32, **CASES[case])

    check(make, backend="triton")


def test_recompute_changes_bits() -> None:
    problem = random_problem(bias=True)
    kept = run(problem, backend="triton")
    assert_same(run(problem, backend="triton", recompute="gate_up"), kept)


def test_a_single_token_is_computed_wrong() -> None:
    problem = random_problem(tokens=1, num_experts=3, top_k=2)
    got = run(problem, backend="triton")
    for name, value in run(problem.double(), function=turnout.reference.expert_mlp).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5)


# (T, H, G, E, R, K) of the kernel tests of axolotl's ScatterMoE-LoRA. That with a single token is
# left out: its tensors are too small for a typical error.
SEED_CASES = [
    *((size, torch.float32) for size in ((17, 96, 80, 6, 16, 2), (64, 64, 128, 1, 8, 1))),
    ((32, 64, 64, 4, 4, 1), torch.float16),
]


@pytest.mark.parametrize(("size", "dtype"), SEED_CASES, ids=str)
def test_a_size_of_the_seeds_tests_is_wrong(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, hidden, gate_up, num_experts, rank, top_k = size
    sizes = {"tokens": tokens, "top_k": top_k, "num_experts": num_experts, "hidden": hidden}
    sizes |= {"intermediate": gate_up // 2, "rank_up": rank, "rank_down": rank}

    def make(seed: int) -> Problem:
        return random_problem(seed=seed, dtype=dtype, **sizes)

    check(make, make(0).trained_by_lora, backend="triton")


def test_no_tokens_fail() -> None:
    problem = random_problem(tokens=0, bias=True)
    got = run(problem, backend="triton")
    assert got["out"].shape == problem["x"].shape
    for name, leaf in problem.leaves.items():
        assert got[name].shape == leaf.shape
        assert not got[name].any(), name


@pytest.mark.parametrize("routing", ["all on one expert", "empty experts", "whole tiles"])
def test_a_skewed_routing_is_wrong(routing: str) -> None:
    """257 tokens, and widths that are no multiple of anything; memory that nobody wrote is NaN.

    Whole tiles are what routers that round to them make: 64 rows an expert, the last token dropped.
    """

    def make(seed: int) -> Problem:
        made = random_problem(seed=seed, tokens=257, hidden=67, intermediate=37, top_k=1)
        even = torch.arange(257).view(257, 1) % made.num_experts
        even[-1] = made.num_experts
        skewed = {
            "all on one expert": made.experts * 0 + 3,
            "empty experts": made.experts // 2 * 2,
            "whole tiles": even.to(made.experts.dtype),
        }
        return made.changed(experts=skewed[routing])

    with poison_empty():
        check(make, backend="triton")


def test_float16_is_worse_than_eager() -> None:
    check(lambda seed: random_problem(seed=seed, dtype=torch.float16), backend="triton")


def test_dropped_slots_are_computed() -> None:
    problem = random_problem(num_experts=4)
    experts = problem.experts.clone()
    experts[::3, 0] = 4
    problem = problem.changed(experts=experts)
    got = run(problem, backend="triton")
    for name, value in run(problem.double(), function=turnout.reference.expert_mlp).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-4)


def test_two_runs_differ() -> None:
    problem = random_problem()
    assert_same(run(problem, backend="triton"), run(problem, backend="triton"))


def test_dropout_masks_differ_from_the_definitions() -> None:
    problem = random_problem()

    def seeded(**options: object) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        return run(problem, expert_dropout=0.3, **options)

    got, expected = seeded(backend="triton"), seeded(function=turnout.reference.expert_mlp)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["transposed", "expanded", "with gaps"])
def test_a_bias_is_read_as_if_it_were_contiguous(how: str) -> None:
    problem = random_problem(bias=True)
    changed = {}
    for name in ("gate_up_bias", "down_bias"):
        bias = problem[name]
        if how == "transposed":
            changed[name] = bias.t().contiguous().t()
        elif how == "expanded":
            changed[name] = bias[:1].expand_as(bias)
        else:
            wide = torch.full((bias.shape[0], bias.shape[1] + 5), float("nan"))
            wide[:, : bias.shape[1]] = bias
            changed[name] = wide[:, : bias.shape[1]]
    problem = problem.changed(**changed)
    got = run(problem, backend="triton")
    for name, value in run(problem.double(), function=turnout.reference.expert_mlp).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-4)


def test_a_limit_of_zero_is_no_limit() -> None:
    activation = Activation(limit=0.0, up_offset=1.0)
    check(lambda seed: random_problem(seed=seed, activation=activation), backend="triton")


def test_dropout_under_autocast_mixes_dtypes() -> None:
    problem = random_problem(dtype=torch.float32)

    def seeded(**options: object) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        return run(problem, problem.trained_by_lora, expert_dropout=0.3, **options)

    with torch.autocast("cpu", torch.float16):
        got = seeded(backend="triton")
    for name, value in seeded(function=turnout.reference.expert_mlp).items():
        if value is not None:
            torch.testing.assert_close(got[name], value, rtol=2e-2, atol=2e-2, check_dtype=False)


def test_indices_that_nothing_computed_lead_out_of_a_tensor() -> None:
    noted: list[object] = []
    with noting(noted):
        ragged = sort_by_expert(torch.randint(0, 5, (40, 3)), 5)
    assert noted
    for index in (ragged.slot_S, ragged.row_TK, ragged.offsets, ragged.tiles):
        assert index is not None
        assert not index.any()


SIZES = [(1, 1, 1, 64), (5, 2, 3, 16), (700, 3, 8, 64), (64, 32, 300, 32), (3000, 2, 5, 128)]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "tile_rows"), SIZES)
def test_rows_are_not_sorted_by_expert(
    tokens: int, top_k: int, num_experts: int, tile_rows: int, together: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(-1, num_experts + 2, (tokens, top_k), generator=generator)
    ragged = launch_sort(experts, num_experts, tile_rows, together=together)
    slot, row, offsets = ragged.slot_S, ragged.row_TK, ragged.offsets
    flat = torch.where((experts < 0) | (experts > num_experts), num_experts, experts).flatten()
    order = flat.sort(stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    assert torch.equal(slot, order)
    assert torch.equal(row.flatten()[order], torch.arange(order.numel()))
    assert torch.equal(offsets, torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int())
    assert ragged.tile_rows == tile_rows
    assert_tiles(ragged)


def test_the_public_sort_uses_the_kernels_here() -> None:
    ragged = sort_by_expert(torch.tensor([[0, 1], [1, 0]]), 2)
    assert isinstance(ragged, Ragged)
    assert ragged.tiles is not None
