"""Frozen inputs: no gradient, the other gradients unchanged, and no GEMM that nobody reads."""

import itertools
import random
from collections import Counter

import pytest
import torch

from problems import LEAVES, LORA_LEAVES, assert_near, random_problem, run
from turnout.experts import passes

SMALL = {"tokens": 9, "num_experts": 3, "hidden": 6, "intermediate": 5, "rank_up": 2}
GRAMS = ("gate_up", "down", "gate_up_bias", "down_bias", *LORA_LEAVES)


def subsets():
    """None, one, two, all but one, all, and a seeded sample of the rest."""
    every = [
        subset
        for size in (0, 1, 2, len(LEAVES) - 1, len(LEAVES))
        for subset in itertools.combinations(LEAVES, size)
    ]
    rng = random.Random(0)
    return every + [tuple(n for n in LEAVES if rng.random() < 0.5) for _ in range(100)]


@pytest.fixture
def launches(monkeypatch):
    """The grouped GEMMs in call order, named by their epilogue or by the width they produce."""
    found = []
    gemm, gram = passes.grouped_gemm, passes.grouped_gram

    def counted_gemm(a, w_ENK, ragged, **options):
        epilogue = options.get("epilogue")
        kind = "plain" if epilogue is None else epilogue.name
        found.append(kind if epilogue is not None else f"to {w_ENK.shape[1]}")
        return gemm(a, w_ENK, ragged, **options)

    def counted_gram(*args, **options):
        found.append("gram")
        return gram(*args, **options)

    monkeypatch.setattr(passes, "grouped_gemm", counted_gemm)
    monkeypatch.setattr(passes, "grouped_gram", counted_gram)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": "gate_up"}, {"weight_on_input": True}, {"transposed": True}],
    ids=str,
)
def test_every_subset_of_frozen_inputs(options, launches):
    layout = {name: value for name, value in options.items() if name != "recompute"}
    options = {name: value for name, value in options.items() if name == "recompute"}
    problem = random_problem(
        **SMALL, **layout, bias=True, dtype=torch.float64, weights_dtype=torch.float64
    )
    full = run(problem, LEAVES, **options)
    for needs in subsets():
        launches.clear()
        got = run(problem, needs, **options)
        assert {name for name in LEAVES if got[name] is not None} == set(needs)
        assert_near(got, {n: v if n in ("out", *needs) else None for n, v in full.items()})
        # A bias gradient is a Gram product too, so there is one for each weight that is asked for.
        assert launches.count("gram") == len(set(needs) & set(GRAMS)), needs


def test_a_problem_without_gradients_saves_nothing():
    problem = random_problem(**SMALL)
    assert not run(problem, ())["out"].requires_grad
    out = problem.call()
    assert out.grad_fn is None


# Widths that tell the GEMMs apart by what they produce.
WIDTHS = {"hidden": 7, "intermediate": 5, "rank_up": 2, "rank_down": 3, "tokens": 9}
DX, Z, DYB, DZB = "to 7", "to 10", "to 3", "to 2"
BACK = "activate_backward"


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        pytest.param(("down_bias",), [], id="down bias alone"),
        pytest.param(("b_down",), [], id="B of down alone"),
        pytest.param(("b_down", "down_bias"), [], id="B and bias of down"),
        pytest.param(("a_down", "b_down"), [DYB, BACK], id="adapter of down"),
        pytest.param(("down",), [DYB, BACK], id="down"),
        pytest.param(("weights_TK",), [DYB, BACK], id="routing weights"),
        pytest.param(("weights_TK", "b_down"), [DYB, BACK], id="router and B of down"),
        pytest.param(("b_up",), [DYB, BACK], id="B of gate_up alone"),
        pytest.param(("gate_up",), [DYB, BACK], id="gate_up"),
        pytest.param(("b_up", "b_down", "weights_TK"), [DYB, BACK], id="both B and the router"),
        pytest.param(("a_up",), [DYB, BACK, DZB], id="A of gate_up"),
        pytest.param(LORA_LEAVES, [DYB, BACK, DZB], id="adapters"),
        pytest.param(("x",), [DYB, BACK, DZB, DX], id="x"),
        pytest.param(("x", "weights_TK", *LORA_LEAVES), [DYB, BACK, DZB, DX], id="LoRA training"),
    ],
)
def test_no_gemm_runs_that_nobody_reads(needs, expected, recompute, launches):
    problem = random_problem(**WIDTHS, bias=True)
    run(problem, (), recompute=recompute)
    forward = len(launches)
    launches.clear()
    run(problem, needs, recompute=recompute)
    if recompute == "gate_up" and expected:
        expected = [*expected, Z]
    grams = ["gram"] * len(set(needs) & set(GRAMS))
    assert Counter(launches[forward:]) == Counter([*expected, *grams])


def test_weight_on_input_needs_dx_for_the_router(launches):
    problem = random_problem(**WIDTHS, weight_on_input=True)
    run(problem, ("weights_TK",))
    assert Counter(launches[4:]) == Counter([DYB, BACK, DZB, DX])


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (("x",), False),
        (("weights_TK", "a_up", "b_up"), False),
        (("down",), True),
        (("a_down",), True),
    ],
    ids=str,
)
def test_the_weighted_h_is_written_only_where_a_gradient_reads_it(needs, expected, monkeypatch):
    kept = []
    gemm = passes.grouped_gemm

    def spy(*args, **options):
        epilogue = options.get("epilogue")
        if epilogue is not None and epilogue.name == BACK:
            kept.append(epilogue.keep_h)
        return gemm(*args, **options)

    monkeypatch.setattr(passes, "grouped_gemm", spy)
    run(random_problem(**SMALL), needs)
    assert kept == [expected]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_z_is_not_written_where_no_backward_pass_follows(mode, monkeypatch):
    """Evaluation, and the first pass of reentrant activation checkpointing."""
    kept = []
    forward = passes.forward

    def spy(*args, keep):
        kept.append(keep)
        return forward(*args, keep=keep)

    monkeypatch.setattr(passes, "forward", spy)
    problem = random_problem(**SMALL)
    if mode == "frozen":
        problem.call()
    else:
        for leaf in problem.leaves.values():
            leaf.requires_grad_()
        with getattr(torch, mode)():
            assert problem.call().grad_fn is None
    assert kept == [False]
