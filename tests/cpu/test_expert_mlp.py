"""`expert_mlp` computes what the definition says: values and gradients, every layout and dtype.

Truth is the definition in float64, which itself is checked against a loop over single tokens.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import turnout
from problems import (
    GPT_OSS,
    LEAVES,
    LORA_LEAVES,
    SEED_SIZES,
    assert_near,
    assert_same,
    check,
    output_gradient,
    random_experts,
    random_problem,
    run,
)
from turnout import Activation
from turnout.testing import errors, poison_empty

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
RELU2 = Activation(act="relu2", gated=False)
LAYOUTS = {
    "plain": {},
    "transposed": {"transposed": True},
    "biases": {"bias": True},
    "gpt-oss": {"activation": GPT_OSS, "transposed": True, "bias": True},
    "not gated": {"activation": RELU2},
    "weight on input": {"weight_on_input": True},
    "weight on input, transposed, biases": {
        "weight_on_input": True,
        "transposed": True,
        "bias": True,
    },
    "clamped after": {"activation": Activation(limit=1.0, limit_after=True), "bias": True},
    "no adapter": {"rank_up": 0, "rank_down": 0, "bias": True},
    "adapter on gate_up only": {"rank_down": 0},
    "adapter on down only": {"rank_up": 0},
    "ranks not powers of two": {"rank_up": 5, "rank_down": 11},
    "ranks above the widths": {"rank_up": 40, "rank_down": 33, "hidden": 12, "intermediate": 8},
}
SIZES_OF_THE_SEED = [*SEED_SIZES, (257, 48, 56, 7, 3, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layout_matches_the_definition(layout, dtype):
    check(lambda seed: random_problem(dtype=dtype, seed=seed, **LAYOUTS[layout]))


@pytest.mark.parametrize("size", SIZES_OF_THE_SEED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_size_matches_the_definition(size, dtype):
    tokens, hidden, gate_up, num_experts, rank, top_k = size

    def make(seed):
        return random_problem(
            tokens=tokens,
            top_k=top_k,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=gate_up // 2,
            rank_up=rank,
            rank_down=rank,
            dtype=dtype,
            weights_dtype=torch.promote_types(dtype, torch.float32),
            seed=seed,
        )

    if dtype == torch.float64:
        assert_near(run(make(0)), run(make(0), function=turnout.reference.expert_mlp))
        return
    # One number has no typical error: the weight of the only slot is judged in float64 alone.
    check(make, [name for name in make(0).leaves if name != "weights_TK" or tokens > 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recompute_matches_the_definition(layout):
    """In float64 to rounding, so that no formula hides behind a tolerance."""
    problem = random_problem(dtype=torch.float64, weights_dtype=torch.float64, **LAYOUTS[layout])
    expected = run(problem, function=turnout.reference.expert_mlp)
    assert_near(run(problem), expected)
    assert_near(run(problem, recompute="gate_up"), expected)


@pytest.mark.parametrize(
    ("dtypes", "options"),
    [
        ({"dtype": torch.bfloat16, "lora_dtype": torch.float32}, {}),
        ({"dtype": torch.float16, "lora_dtype": torch.float32}, {}),
        ({"dtype": torch.bfloat16, "weights_dtype": torch.bfloat16}, {}),
        ({"dtype": torch.float32, "lora_dtype": torch.bfloat16}, {}),
        ({"dtype": torch.bfloat16, "lora_dtype": torch.float32}, {"recompute": "gate_up"}),
    ],
    ids=str,
)
def test_mixed_dtypes_match_the_definition(dtypes, options):
    check(lambda seed: random_problem(bias=True, seed=seed, **dtypes), **options)


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_in_another_dtype_than_the_weights(x_dtype, dtype):
    def make(seed):
        problem = random_problem(dtype=dtype, lora_dtype=torch.float32, seed=seed)
        return problem.changed(x=problem["x"].to(x_dtype))

    check(make)
    assert run(make(0))["out"].dtype == x_dtype


def test_adapters_in_bfloat16_beside_float32_are_computed_in_float32():
    """`Job.lora_dtype` promises the wider dtype; rounding x A^T to bfloat16 costs four digits."""
    problem = random_problem(dtype=torch.float32, lora_dtype=torch.bfloat16)
    exact = problem.double().call(turnout.reference.expert_mlp)
    assert errors(problem.call(), exact)[1] < 1e-5


def test_bias_gradients_of_many_rows_are_summed_well():
    """A Gram product with a column of ones adds a thousand rows one after the other."""
    sizes = {"tokens": 4096, "num_experts": 2, "hidden": 8, "intermediate": 6, "top_k": 1}
    needs = ("gate_up_bias", "down_bias")
    check(lambda seed: random_problem(bias=True, rank_up=0, rank_down=0, seed=seed, **sizes), needs)


def by_token(problem):
    """One token and one choice after the other, with nothing of ours in it."""
    x, experts, spec = problem["x"], problem.experts, problem.spec
    activation, lora = spec.activation, problem.lora
    out = torch.zeros_like(x)
    for t, k in [(t, k) for t in range(x.shape[0]) for k in range(experts.shape[1])]:
        e, weight = int(experts[t, k]), problem["weights_TK"][t, k]
        if e == problem.num_experts:
            continue
        up, down = problem["gate_up"][e], problem["down"][e]
        if spec.transposed:
            up, down = up.T, down.T
        row = x[t] * weight if spec.weight_on_input else x[t]
        z = up @ row
        if lora.gate_up is not None:
            a, b = lora.gate_up.a_ERI[e], lora.gate_up.b_ORE[:, :, e]
            z = z + lora.gate_up.scaling * (b @ (a @ row))
        if "gate_up_bias" in problem.leaves:
            z = z + problem["gate_up_bias"][e]
        if activation is RELU2:
            h = F.relu(z) ** 2
        elif activation is GPT_OSS:
            gate, linear = z[0::2].clamp(max=7.0), z[1::2].clamp(-7.0, 7.0)
            h = gate * torch.sigmoid(1.702 * gate) * (linear + 1)
        else:
            assert activation == Activation()
            gate, linear = z.tensor_split(2)
            h = F.silu(gate) * linear
        y = down @ h
        if lora.down is not None:
            a, b = lora.down.a_ERI[e], lora.down.b_ORE[:, :, e]
            y = y + lora.down.scaling * (b @ (a @ h))
        if "down_bias" in problem.leaves:
            y = y + problem["down_bias"][e]
        out[t] += y if spec.weight_on_input else weight * y
    return out


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "clamped after"])
def test_the_definition_is_what_a_loop_over_tokens_says(layout):
    problem = random_problem(
        tokens=9, dtype=torch.float64, weights_dtype=torch.float64, **LAYOUTS[layout]
    )
    experts = problem.experts.clone()
    experts[3, 1] = problem.num_experts
    problem = problem.changed(experts=experts)
    expected = by_token(problem)
    for function in (turnout.reference.expert_mlp, turnout.expert_mlp):
        torch.testing.assert_close(problem.call(function), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("plain", {}),
        ("gpt-oss", {"recompute": "gate_up"}),
        ("not gated", {}),
        ("weight on input, transposed, biases", {}),
        ("plain", {"expert_dropout": 0.4}),
        ("weight on input", {"expert_dropout": 0.4, "recompute": "gate_up"}),
    ],
    ids=str,
)
def test_gradients_pass_gradcheck(layout, options):
    sizes = {"tokens": 4, "num_experts": 3, "hidden": 4, "intermediate": 3}
    problem = random_problem(
        **{"rank_up": 2, "rank_down": 2, **LAYOUTS[layout], **sizes},
        dtype=torch.float64,
        weights_dtype=torch.float64,
        seed=3,
    )
    experts = problem.experts.clone()
    experts[1, 0] = 3  # a dropped slot
    problem = problem.changed(experts=experts)
    names = list(problem.leaves)

    def call(*tensors):
        torch.manual_seed(5)
        return problem.changed(**dict(zip(names, tensors, strict=True))).call(**options)

    leaves = [problem[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("silence", ["scaling 0", "B = 0"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_adapter_that_adds_nothing_changes_no_bit(silence, dtype):
    problem = random_problem(dtype=dtype, bias=True, lora_dtype=torch.float32)
    base = run(random_problem(dtype=dtype, bias=True, rank_up=0, rank_down=0), ("x", "weights_TK"))
    if silence == "scaling 0":
        problem.scaling.update(up=0.0, down=0.0)
    else:
        zeros = {name: torch.zeros_like(problem[name]) for name in ("b_up", "b_down")}
        problem = problem.changed(**zeros)
    got = run(problem, problem.trained_by_lora)
    assert_same({name: got[name] for name in base}, base)
    moving = LORA_LEAVES if silence == "scaling 0" else ("a_up", "a_down")
    for name in LORA_LEAVES:
        assert got[name].any() == (name not in moving), name


def test_a_scaling_of_zero_is_not_taken_for_none():
    problem = random_problem(bias=True)
    problem.scaling.update(up=0.0, down=0.0)
    loud = random_problem(bias=True)
    assert not torch.allclose(problem.call(), loud.call())


@pytest.mark.parametrize("layout", ["plain", "transposed", "gpt-oss", "weight on input"])
def test_adapter_equals_the_merged_weight(layout):
    problem = random_problem(dtype=torch.float64, weights_dtype=torch.float64, **LAYOUTS[layout])
    merged = {}
    for side, stack in (("up", "gate_up"), ("down", "down")):
        delta = torch.einsum("ore,eri->eoi", problem[f"b_{side}"], problem[f"a_{side}"])
        delta = delta.transpose(1, 2) if problem.spec.transposed else delta
        merged[stack] = problem[stack] + problem.scaling[side] * delta
    plain = problem.changed(**merged)
    for name in LORA_LEAVES:
        del plain.leaves[name]
    needs = ("x", "weights_TK")
    expected = run(plain, needs)
    got = run(problem, needs)
    assert_near({name: got[name] for name in expected}, expected)


def test_deltas_of_two_adapters_add_up():
    """The output is linear in B_down: one adapter of rank 6 is the sum of its halves."""
    both = random_problem(rank_up=0, rank_down=6, dtype=torch.float64)
    base = both.changed(b_down=torch.zeros_like(both["b_down"])).call()
    halves = [
        both.changed(a_down=both["a_down"][:, part], b_down=both["b_down"][:, part]).call() - base
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(both.call() - base, halves[0] + halves[1])


def routed(experts_of, **sizes):
    def make(seed):
        problem = random_problem(seed=seed, bias=True, **sizes)
        return problem.changed(experts=experts_of(problem))

    return make


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(routed(lambda p: torch.full_like(p.experts, 2)), id="all on one expert"),
        pytest.param(routed(lambda p: p.experts % 2 * 3), id="empty experts"),
        pytest.param(routed(lambda p: p.experts, num_experts=1, top_k=1), id="E1"),
        pytest.param(routed(lambda p: p.experts, top_k=1), id="K1"),
        pytest.param(routed(lambda p: p.experts, num_experts=3, top_k=7), id="K above E"),
        pytest.param(routed(lambda p: p.experts, num_experts=60, tokens=50), id="E60"),
        pytest.param(
            routed(lambda p: p.experts, num_experts=40, top_k=32, tokens=6, hidden=8), id="K32"
        ),
        pytest.param(routed(lambda p: p.experts, hidden=1, intermediate=1), id="widths of 1"),
    ],
)
def test_routing_matches_the_definition(make):
    check(make)


def test_experts_without_tokens_get_dense_zeros():
    """Not None and not NaN: optimisers and ZeRO-3 need a gradient of every expert."""
    problem = random_problem(bias=True, num_experts=6)
    problem = problem.changed(experts=problem.experts % 2)
    got = run(problem)
    for name in LEAVES[2:]:
        unused = got[name][..., 2:] if name.startswith("b_") else got[name][2:]
        assert unused.numel()
        assert not unused.any(), name


def sentinels(problem, seed=9):
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand(problem.experts.shape, generator=generator) < 0.4
    dropped[4] = True  # a token that no expert takes
    return problem.changed(experts=problem.experts.masked_fill(dropped, problem.num_experts))


@pytest.mark.parametrize("layout", ["plain", "gpt-oss", "weight on input, transposed, biases"])
def test_sentinel_slots_are_dropped_forward_and_backward(layout):
    problem = sentinels(random_problem(dtype=torch.float64, **LAYOUTS[layout]))
    expected = run(problem, function=turnout.reference.expert_mlp)
    got = run(problem)
    assert_near(got, expected)
    dropped = problem.experts == problem.num_experts
    assert not got["weights_TK"][dropped].any()
    assert got["weights_TK"][~dropped].all()
    assert not got["out"][4].any()
    assert not got["x"][4].any()


@pytest.mark.parametrize("layout", ["plain", "gpt-oss", "weight on input, transposed, biases"])
@pytest.mark.parametrize("options", [{}, {"recompute": "gate_up"}], ids=str)
def test_garbage_in_dropped_slots_is_never_read(layout, options):
    """Expert parallelism leaves weights undefined where the slot belongs to another rank."""
    problem = sentinels(random_problem(**LAYOUTS[layout]))
    dropped = problem.experts == problem.num_experts
    x = problem["x"].clone()
    x[4] = float("nan")
    weights_TK = problem["weights_TK"].masked_fill(dropped, float("nan"))
    assert_same(run(problem.changed(x=x, weights_TK=weights_TK), **options), run(problem))


@pytest.mark.parametrize("function", [turnout.expert_mlp, turnout.reference.expert_mlp])
def test_every_slot_dropped_gives_zeros(function):
    problem = random_problem(bias=True)
    problem = problem.changed(experts=torch.full_like(problem.experts, problem.num_experts))
    for needs in (LEAVES, LORA_LEAVES):
        got = run(problem, needs, function)
        assert {name for name, value in got.items() if value is not None} == {"out", *needs}
        assert not any(value.any() for value in got.values() if value is not None)


@pytest.mark.parametrize("layout", ["plain", "gpt-oss", "not gated", "weight on input"])
@pytest.mark.parametrize(
    "options", [{}, {"recompute": "gate_up"}, {"expert_dropout": 0.5}], ids=str
)
def test_no_tokens(layout, options):
    problem = random_problem(tokens=0, **LAYOUTS[layout])
    got = run(problem, **options)
    assert got["out"].shape == (0, 24)
    for name, leaf in problem.leaves.items():
        assert got[name].shape == leaf.shape
        assert not got[name].any()


def test_int32_indices_give_the_same_bits():
    problem = random_problem(bias=True)
    narrow = problem.changed(experts=problem.experts.int())
    assert_same(run(narrow), run(problem))


def spread(tensor):
    """The same values with a gap, a NaN, between the elements."""
    wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


STRIDES = {
    "gaps": spread,
    "reversed dims": lambda t: (
        t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
    ),
    "slice of a larger tensor": lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("layout", ["plain", "gpt-oss"])
def test_strides_do_not_matter(how, layout):
    problem = random_problem(dtype=torch.float64, **LAYOUTS[layout])
    strided = problem.mapped(STRIDES[how])
    strided = strided.changed(experts=STRIDES["reversed dims"](problem.experts))
    assert not any(leaf.is_contiguous() for leaf in strided.leaves.values())
    for options in ({}, {"recompute": "gate_up"}):
        assert_near(run(strided, **options), run(problem))


def test_transposed_view_of_the_other_layout_is_the_same_problem():
    problem = random_problem(dtype=torch.float64, bias=True)
    stored = random_problem(dtype=torch.float64, bias=True, transposed=True)
    view = {name: stored[name].transpose(1, 2) for name in ("gate_up", "down")}
    assert_near(run(problem.changed(**view)), run(problem))
    got = run(stored)
    for name in ("gate_up", "down"):
        got[name] = got[name].transpose(1, 2)
    assert_near(got, run(problem))


def test_an_output_gradient_with_gaps_or_expanded():
    problem = random_problem(dtype=torch.float64)
    dout = output_gradient(problem)
    assert_near(run(problem, dout=spread(dout)), run(problem, dout=dout))
    row = dout[:1].expand_as(dout)
    assert_near(run(problem, dout=row), run(problem, dout=row.contiguous()))


@pytest.mark.parametrize("weights_dtype", FLOATS, ids=str)
def test_gradient_of_the_routing_weights_has_their_dtype(weights_dtype):
    make = {"dtype": torch.bfloat16, "weights_dtype": weights_dtype, "bias": True}
    check(lambda seed: random_problem(seed=seed, **make), ("weights_TK",))
    assert run(random_problem(**make))["weights_TK"].dtype == weights_dtype


def test_routing_weights_in_float32_are_not_rounded_to_the_weights_dtype():
    """Two routing weights that are one bfloat16 number must give two outputs."""
    problem = random_problem(tokens=1, top_k=1, dtype=torch.bfloat16, rank_up=0, rank_down=0)
    problem = problem.changed(x=problem["x"].float())
    low, high = torch.tensor([[1.0]]), torch.tensor([[1.001]])
    assert low.bfloat16() == high.bfloat16()
    ratio = problem.changed(weights_TK=high).call() / problem.changed(weights_TK=low).call()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.001), rtol=1e-5, atol=0)


def autocast(problem, needs, *, backward_inside=False):
    fresh = problem.mapped(Tensor.detach)
    for name in needs:
        fresh[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fresh.call()
        if backward_inside:
            out.backward(output_gradient(problem))
    if not backward_inside:
        out.backward(output_gradient(problem))
    return {"out": out.detach()} | {name: fresh[name].grad for name in fresh.leaves}


def test_autocast_equals_weights_cast_by_hand():
    problem = random_problem()
    needs = problem.trained_by_lora
    by_hand = problem.changed(**{n: problem[n].bfloat16() for n in ("gate_up", "down")})
    got = autocast(problem, needs)
    assert got["out"].dtype == torch.float32
    assert_same(got, run(by_hand, needs))
    assert not torch.equal(got["out"], run(problem, needs)["out"])


def test_autocast_gives_full_gradients_in_the_weights_dtype():
    problem = random_problem(bias=True)
    for name, value in autocast(problem, LEAVES).items():
        assert value.dtype == torch.float32, name
        assert value.isfinite().all()


def test_autocast_around_the_backward_pass_changes_nothing():
    """`loss.backward()` inside the autocast region must not run the adapters in bfloat16."""
    problem = random_problem()
    needs = problem.trained_by_lora
    assert_same(autocast(problem, needs, backward_inside=True), autocast(problem, needs))


def test_autocast_leaves_float64_alone():
    problem = random_problem(dtype=torch.float64)
    assert_same(autocast(problem, LORA_LEAVES), run(problem, LORA_LEAVES))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"recompute": "gate_up"}], ids=str)
def test_nothing_is_read_before_it_is_written(layout, options):
    problem = sentinels(random_problem(**LAYOUTS[layout]))
    expected = run(problem, **options)
    with poison_empty():
        got = run(problem, **options)
    assert_same(got, expected)
    assert all(value.isfinite().all() for value in got.values())


def test_parameters_of_op_and_definition_are_the_same():
    op, definition = (
        inspect.signature(f) for f in (turnout.expert_mlp, turnout.reference.expert_mlp)
    )
    assert op == definition


@st.composite
def problems(draw, low=1, **fixed):
    activation = draw(
        st.sampled_from([Activation(), GPT_OSS, RELU2, Activation(limit=0.5, limit_after=True)])
    )
    num_experts, top_k = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    tokens = draw(st.integers(low, 20 + low))
    arguments = {
        "tokens": tokens,
        "top_k": top_k,
        "num_experts": num_experts,
        "hidden": draw(st.integers(max(low, 1), 20 + low)),
        "intermediate": draw(st.integers(max(low, 1), 20 + low)),
        "rank_up": draw(st.sampled_from([0, 1, 3, 8])),
        "rank_down": draw(st.sampled_from([0, 1, 3, 8])),
        "activation": activation,
        "transposed": draw(st.booleans()),
        "weight_on_input": draw(st.booleans()),
        "bias": draw(st.booleans()),
        **fixed,
    }
    dropped = draw(st.sampled_from([0, num_experts]))
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    strided = draw(st.booleans())

    def make(seed):
        problem = random_problem(seed=seed, **arguments)
        experts = random_experts(tokens, top_k, num_experts + bool(dropped), seed, index_dtype)
        problem = problem.changed(experts=experts)
        return problem.mapped(spread) if strided else problem

    needs = draw(st.sets(st.sampled_from(sorted(make(0).leaves))))
    return make, needs, draw(st.sampled_from(["none", "gate_up"]))


@settings(max_examples=60)
@given(case=problems(low=0, dtype=torch.float64, weights_dtype=torch.float64))
def test_any_problem_in_float64_is_the_definition(case):
    make, needs, recompute = case
    problem = make(0)
    got = run(problem, needs, recompute=recompute)
    assert {name for name in problem.leaves if got[name] is not None} == needs
    if problem.experts.numel() and (problem.experts < problem.num_experts).any():
        assert_near(got, run(problem, needs, turnout.reference.expert_mlp))


@settings(max_examples=15)
@given(
    case=problems(low=8),
    dtype=st.sampled_from(FLOATS),
    lora_dtype=st.sampled_from([torch.float32, None]),
)
def test_any_problem_is_as_exact_as_the_definition(case, dtype, lora_dtype):
    make, needs, recompute = case
    check(
        lambda seed: to_dtypes(make(seed), dtype, lora_dtype or dtype), needs, recompute=recompute
    )


def to_dtypes(problem, dtype, lora_dtype):
    return problem.changed(
        **{
            name: leaf.to(lora_dtype if name in LORA_LEAVES else dtype)
            for name, leaf in problem.leaves.items()
            if name != "weights_TK"
        }
    )
