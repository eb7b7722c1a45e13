"""Expert dropout: a mask right on average, replayed exactly, and never drawn for nothing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import turnout
from problems import LORA_LEAVES, assert_near, assert_same, random_problem, run
from turnout.experts.dropout import Dropout, draw_seed, mask

CPU = torch.device("cpu")


def seeded(number=1234):
    return torch.tensor([number])


def factors(p, seed=1234, tag=0, rows=4096, width=256):
    return mask(Dropout(p, seeded(seed), tag), torch.arange(rows), width, torch.float64)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_rate_and_scale_are_those_asked_for(p):
    values = factors(p)
    kept = values > 0
    deviation = (p * (1 - p) / values.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * deviation)
    assert values[kept].unique().item() == pytest.approx(1 / (1 - p), rel=1e-12)


def test_rows_and_columns_are_dropped_evenly():
    """A weak hash has rows or columns that are dropped together."""
    dropped = factors(0.3) == 0
    for dim, count in ((0, 4096), (1, 256)):
        deviation = (0.3 * 0.7 / count) ** 0.5
        means = dropped.double().mean(dim)
        assert (means - 0.3).abs().max() < 6 * deviation
        assert means.std() == pytest.approx(deviation, rel=0.25)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((0, 0, 0, 0), (1, 0, 0, 0), id="next seed"),
        pytest.param((0, 0, 0, 0), (0, 1, 0, 0), id="other projection"),
        pytest.param((0, 0, 0, 0), (0, 0, 1, 0), id="next row"),
        pytest.param((0, 0, 0, 0), (0, 0, 0, 1), id="next column"),
        pytest.param((0, 0, 0, 0), (0, 0, 1, 1), id="diagonal"),
        pytest.param((0, 0, 0, 0), (0, 0, 8, 0), id="next token of eight choices"),
    ],
)
def test_neighbours_are_independent(first, second):
    def dropped(seed, tag, row, column):
        values = factors(0.5, seed=77 + seed * 31, tag=tag)[row:, column:]
        return (values[: 4096 - 8, : 256 - 8] == 0).double()

    a, b = dropped(*first), dropped(*second)
    correlation = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())
    assert abs(correlation) < 5 / a.numel() ** 0.5


def test_mask_depends_on_slot_and_column_alone():
    """Each back end reads its own rows in its own order."""
    slots = torch.tensor([17, 3, 900, 3])
    drop = Dropout(0.5, seeded(), 1)
    values = mask(drop, slots, 64, torch.float32)
    assert torch.equal(values, mask(drop, torch.arange(1000), 64, torch.float32)[slots])
    assert torch.equal(values[:, :10], mask(drop, slots.int(), 10, torch.float32))
    assert torch.equal(values[1], values[3])


def test_slots_above_32_bits_do_not_overflow():
    values = mask(
        Dropout(0.5, torch.tensor([2**31 - 2]), 1), 2**40 + torch.arange(512), 64, torch.float64
    )
    assert values.mean().item() == pytest.approx(1.0, abs=0.03)


def test_seeds_come_from_the_global_generator():
    torch.manual_seed(3)
    first, second = draw_seed(CPU), draw_seed(CPU)
    torch.manual_seed(3)
    assert torch.equal(draw_seed(CPU), first)
    assert not torch.equal(first, second)


def with_seed(problem, needs=None, seed=5, **options):
    torch.manual_seed(seed)
    return run(problem, needs, **options)


LAYOUTS = [
    {},
    {"transposed": True, "bias": True},
    {"weight_on_input": True},
    {"rank_up": 0},
    {"rank_down": 0},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_same_seed_gives_the_definitions_mask(layout, recompute):
    problem = random_problem(dtype=torch.float64, weights_dtype=torch.float64, **layout)
    experts = problem.experts.clone()
    experts[5, 0] = problem.num_experts
    problem = problem.changed(experts=experts)
    options = {"expert_dropout": 0.3}
    got = with_seed(problem, recompute=recompute, **options)
    assert_near(got, with_seed(problem, function=turnout.reference.expert_mlp, **options))
    assert not torch.allclose(got["out"], run(problem)["out"])
    assert not torch.allclose(got["out"], with_seed(problem, seed=6, **options)["out"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("function", [turnout.expert_mlp, turnout.reference.expert_mlp])
def test_every_pair_of_dtypes_takes_dropout(dtype, lora_dtype, function):
    problem = random_problem(dtype=dtype, lora_dtype=lora_dtype)
    got = with_seed(problem, function=function, expert_dropout=0.3)
    assert all(value.isfinite().all() for value in got.values())
    assert got["out"].dtype == dtype


def test_the_base_is_not_masked():
    problem = random_problem(dtype=torch.float64)
    problem.scaling.update(up=0.0, down=0.0)
    assert_near(
        with_seed(problem, ("x", "weights_TK"), expert_dropout=0.9),
        run(problem, ("x", "weights_TK")),
    )


def test_output_is_right_on_average():
    """The output is linear in the input of the down adapter, so masks average out."""
    problem = random_problem(rank_up=0, dtype=torch.float64, tokens=16)
    exact = problem.call()
    torch.manual_seed(0)
    draws = torch.stack([problem.call(expert_dropout=0.3) for _ in range(400)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 400**0.5).clamp_min(1e-12)
    assert error.abs().max() < 5
    assert error.std() == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("function", [turnout.expert_mlp, turnout.reference.expert_mlp])
@pytest.mark.parametrize(
    ("ranks", "p", "draws"),
    [
        pytest.param((4, 3), 0.0, False, id="p is 0"),
        pytest.param((0, 0), 0.5, False, id="no adapter"),
        pytest.param((4, 3), 0.5, True, id="p above 0"),
        pytest.param((0, 3), 0.5, True, id="one adapter"),
    ],
)
def test_random_numbers_are_drawn_only_for_a_mask(ranks, p, draws, function):
    """A draw that one implementation makes and the other does not shifts everything after it."""
    problem = random_problem(rank_up=ranks[0], rank_down=ranks[1])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    problem.call(function, expert_dropout=p)
    assert torch.equal(torch.get_rng_state(), before) != draws


def test_two_layers_get_two_masks():
    problem = random_problem()
    torch.manual_seed(0)
    assert not torch.equal(problem.call(expert_dropout=0.5), problem.call(expert_dropout=0.5))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_activation_checkpointing_replays_the_mask(use_reentrant, recompute):
    problem = random_problem(lora_dtype=torch.float32)

    def in_checkpoint(*args, **options):
        x, *rest = args
        return checkpoint(
            lambda x: turnout.expert_mlp(x, *rest, **options), x, use_reentrant=use_reentrant
        )

    options = {"expert_dropout": 0.5, "recompute": recompute}
    needs = ("x", "weights_TK", *LORA_LEAVES)
    got = with_seed(problem, needs, function=in_checkpoint, **options)
    assert_same(got, with_seed(problem, needs, **options))
    assert not torch.equal(got["out"], run(problem)["out"])


def test_the_backward_pass_draws_nothing():
    """A second draw there would give gradients of another mask."""
    problem = random_problem(dtype=torch.float64, weights_dtype=torch.float64)
    first = with_seed(problem, expert_dropout=0.5)
    fresh = problem.mapped(torch.Tensor.detach)
    for leaf in fresh.leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(5)
    out = fresh.call(expert_dropout=0.5)
    torch.manual_seed(999)
    state = torch.get_rng_state()
    gradient = torch.ones_like(out)
    out.backward(gradient)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = run(problem, dout=gradient, expert_dropout=0.5)
    assert torch.equal(again["out"], first["out"])
    assert torch.equal(fresh["a_up"].grad, again["a_up"])
