"""The expert MLP on a GPU against its definition: dtypes, epilogues, adapters, other tests' sizes.

`make test-gpu`, or `PYTHONPATH=src python -m pytest tests/gpu` with what the machine has. Truth is
the definition in float64, and a result may be twice as wrong as eager PyTorch in its dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import BASE, DEVICE, DTYPES, HOPPER, LORA, SHAPES, make

import turnout
from problems import (
    LORA_LEAVES,
    SEED_SIZES,
    assert_near,
    assert_same,
    check,
    judge,
    output_gradient,
    random_problem,
    run,
)
from turnout import Activation

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# bfloat16 everywhere; float32 (another path through the kernels) and float16 where they can differ.
CASES = [
    *((shape, "bf16") for shape in SHAPES),
    *((shape, "fp32") for shape in ("T257-E8-K2-H515", BASE, "gpt-oss", "not-gated")),
    *((shape, "fp16") for shape in ("T257-E8-K2-H515", "gpt-oss")),
]
ACTIVATIONS = {
    "gelu": Activation(act="gelu"),
    "gelu_tanh": Activation(act="gelu_tanh"),
    "relu": Activation(act="relu"),
    "identity": Activation(act="identity"),
    "interleaved": Activation(interleaved=True),
    "clamped": Activation(alpha=1.702, limit=0.7, up_offset=1.0, interleaved=True),
    "clamped halves": Activation(limit=0.7, up_offset=0.5),
    "clamped after": Activation(limit=0.7, limit_after=True),
    "silu alone": Activation(gated=False),
    "silu alone, alpha": Activation(gated=False, alpha=1.702),
    "gelu alone": Activation(act="gelu", gated=False),
    "gelu_tanh alone": Activation(act="gelu_tanh", gated=False),
    "relu alone": Activation(act="relu", gated=False),
}
RANKS = [(1, 256), (3, 100), (16, 33), (256, 1), (100, 3), (33, 16)]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_a_kernel_is_more_than_twice_as_wrong_as_eager(shape: str, dtype: str) -> None:
    check(lambda seed: make(shape, DTYPES[dtype], seed), backend="triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_epilogue_is_another_function_or_slope(activation: str) -> None:
    """In float32, where rounding decides next to nothing about which side of a clamp a value is."""
    sizes = {"hidden": 40, "intermediate": 24, "rank_up": 0, "rank_down": 0, "bias": True}

    def problem(seed: int) -> Any:
        chosen = ACTIVATIONS[activation]
        return random_problem(seed=seed, tokens=100, activation=chosen, device=DEVICE, **sizes)

    check(problem, ("x", "weights_TK"), backend="triton")


@pytest.mark.parametrize(("rank_up", "rank_down"), RANKS)
def test_a_rank_is_cut_or_padded_wrong(rank_up: int, rank_down: int) -> None:
    sizes = {"tokens": 300, "num_experts": 8, "hidden": 128, "intermediate": 96}

    def problem(seed: int) -> Any:
        options = {"dtype": torch.bfloat16, "rank_up": rank_up, "rank_down": rank_down, **LORA}
        return random_problem(seed=seed, device=DEVICE, **sizes, **options)

    check(problem, problem(0).trained_by_lora, backend="triton")


@pytest.mark.parametrize("side", ["up", "down"])
def test_one_adapter_alone_is_not_one_adapter(side: str) -> None:
    other = {"up": {"rank_down": 0}, "down": {"rank_up": 0}}[side]
    check(lambda seed: make(BASE, seed=seed, **other), make(BASE, **other).trained_by_lora)


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_a_dropout_mask_is_not_the_definitions(recompute: str) -> None:
    check(lambda seed: make(BASE, seed=seed), expert_dropout=0.3, recompute=recompute)


def test_dropout_on_a_weighted_input_masks_something_else() -> None:
    check(lambda seed: make("llama4", seed=seed), expert_dropout=0.3)


def test_auto_falls_back_to_plain_pytorch_in_silence() -> None:
    problem = make(BASE)
    assert_same(run(problem), run(problem, backend="triton"))


def test_the_torch_back_end_is_wrong_on_a_gpu() -> None:
    check(lambda seed: make(BASE, seed=seed), backend="torch")


def test_float64_is_not_the_definition() -> None:
    """No kernel takes float64, so plain PyTorch runs, on rows that a kernel sorted."""
    problem = make(BASE, torch.float64, lora_dtype=torch.float64, weights_dtype=torch.float64)
    assert_near(run(problem), run(problem, function=turnout.reference.expert_mlp))


SIZES_OF_THE_SEED = [*SEED_SIZES, (256, 256, 512, 8, 16, 2), (64, 64, 128, 1, 8, 1)]
SEED_CASES = [
    *((size, "fp32") for size in SIZES_OF_THE_SEED),
    *((SEED_SIZES[1], dtype) for dtype in ("bf16", "fp16")),
]


def of_size(size: tuple[int, ...], dtype: str, seed: int, **other: Any) -> Any:
    tokens, hidden, gate_up, num_experts, rank, top_k = size
    sizes = {"tokens": tokens, "top_k": top_k, "num_experts": num_experts, "hidden": hidden}
    ranks = {"rank_up": rank, "rank_down": rank, "intermediate": gate_up // 2}
    options = {"dtype": DTYPES[dtype], **sizes, **ranks, **other}
    return random_problem(seed=seed, device=DEVICE, **options)


@pytest.mark.parametrize(("size", "dtype"), SEED_CASES, ids=str)
def test_a_size_of_the_seeds_tests_is_wrong(size: tuple[int, ...], dtype: str) -> None:
    """The weight of the only slot of one token is one number, which has no typical error."""
    names = of_size(size, dtype, 0).trained_by_lora
    needs = [name for name in names if name != "weights_TK" or size[0] > 1]
    check(lambda seed: of_size(size, dtype, seed), needs)


@pytest.mark.parametrize("routing", ["one expert", "half of the experts"])
def test_empty_experts_get_gradients_or_lose_others(routing: str) -> None:
    def problem(seed: int) -> Any:
        made = of_size(SEED_SIZES[1], "fp32", seed)
        experts = {"one expert": made.experts * 0 + 2, "half of the experts": made.experts // 2}
        return made.changed(experts=experts[routing])

    check(problem)
    got, used = run(problem(0)), problem(0).experts.unique()
    unused = torch.tensor([e for e in range(4) if e not in used], device=DEVICE)
    for name in ("gate_up", "down", "a_up", "a_down"):
        assert not got[name][unused].any(), name
        assert got[name][used].flatten(1).any(1).all(), name
    for name in ("b_up", "b_down"):
        assert not got[name][..., unused].any(), name


def test_experts_with_whole_tiles_lose_or_double_rows() -> None:
    """256 rows each, as routers make them that round to tiles; some slots are dropped for it."""

    def problem(seed: int) -> Any:
        made = make(HOPPER, seed=seed)
        tokens, top_k = made.experts.shape
        slots = torch.arange(tokens * top_k, device=DEVICE)
        kept = slots < 256 * made.num_experts
        even = torch.where(kept, slots % made.num_experts, made.num_experts)
        return made.changed(experts=even.view(tokens, top_k).to(made.experts.dtype))

    check(problem)


@pytest.mark.parametrize("silence", ["scaling 0", "B = 0"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_that_adds_nothing_changes_the_output(silence: str, dtype: str) -> None:
    """Its gradients are those of the definition: zero for A where B is, zero for all at scale 0."""
    needs = ("x", "weights_TK")
    loud = of_size(SEED_SIZES[1], dtype, 0)
    if silence == "scaling 0":
        loud.scaling.update(up=0.0, down=0.0)
        silent = LORA_LEAVES
    else:
        loud = loud.changed(**{n: torch.zeros_like(loud[n]) for n in ("b_up", "b_down")})
        silent = ("a_up", "a_down")
    got = run(loud, loud.trained_by_lora)
    for name in LORA_LEAVES:
        assert bool(got[name].any()) == (name not in silent), name
    bases = [of_size(SEED_SIZES[1], dtype, seed, rank_up=0, rank_down=0) for seed in range(8)]
    cases = [(base, output_gradient(base)) for base in bases]
    judge({name: got[name] for name in ("out", *needs)}, cases, needs)


def test_deltas_of_two_adapters_do_not_add_up() -> None:
    """The output is linear in B of `down`: rank 6 is the sum of its first and its last columns."""
    both = make("T1000-E4", torch.float32, rank_up=0, rank_down=6)
    base = both.changed(b_down=torch.zeros_like(both["b_down"])).call().double()
    parts = [slice(0, 2), slice(2, 6)]
    sides = [
        both.changed(a_down=both["a_down"][:, part], b_down=both["b_down"][:, part]).call().double()
        for part in parts
    ]
    total, expected = both.call().double(), sides[0] + sides[1] - base
    assert (base - expected).norm() > 0.1 * expected.norm()
    assert (total - expected).norm() < 1e-5 * expected.norm()


def test_an_adapter_is_not_the_merged_weight() -> None:
    problem = make("gpt-oss", torch.float32)
    merged = {}
    for side, stack in (("up", "gate_up"), ("down", "down")):
        delta = torch.einsum("ore,eri->eoi", problem[f"b_{side}"], problem[f"a_{side}"])
        merged[stack] = problem[stack] + problem.scaling[side] * delta.transpose(1, 2)
    plain = problem.changed(**merged)
    for name in LORA_LEAVES:
        del plain.leaves[name]
    needs = ("x", "weights_TK")
    got, expected = run(problem, needs), run(plain, needs)
    for name in ("out", *needs):
        assert (got[name] - expected[name]).norm() < 1e-5 * expected[name].norm(), name
