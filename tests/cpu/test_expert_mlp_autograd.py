"""`expert_mlp` under autograd's harder uses: used twice, checkpointed, compiled."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import turnout
from problems import GPT_OSS, LORA_LEAVES, assert_same, output_gradient, random_problem, run
from turnout import Activation

COMPILED = {
    "LoRA on a frozen base": ({}, "LoRA", {}),
    "recompute": ({}, "LoRA", {"recompute": "gate_up"}),
    "everything trained": ({"bias": True}, "full", {}),
    "gpt-oss": ({"bias": True, "transposed": True, "activation": GPT_OSS}, "LoRA", {}),
    "no adapter, weight on input": (
        {"rank_up": 0, "rank_down": 0, "weight_on_input": True},
        "LoRA",
        {},
    ),
    "not gated, bfloat16": (
        {
            "activation": Activation(act="relu2", gated=False),
            "dtype": torch.bfloat16,
            "lora_dtype": torch.float32,
        },
        "LoRA",
        {},
    ),
    "one adapter, dropout": ({"rank_up": 0}, "LoRA", {"expert_dropout": 0.5}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graded(problem, needs=None):
    fresh = problem.mapped(torch.Tensor.detach)
    for name in problem.leaves if needs is None else needs:
        fresh[name].requires_grad_()
    return fresh


def grads(problem):
    return {name: leaf.grad for name, leaf in problem.leaves.items()}


def needed(problem, which):
    return problem.trained_by_lora if which == "LoRA" else tuple(problem.leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    problem = random_problem(dtype=dtype, bias=True, tokens=65)
    first = run(problem)
    for _ in range(3):
        assert_same(run(problem), first)


def test_the_order_of_tokens_does_not_change_their_rows():
    """The sum over a token's choices has a fixed order, whatever its neighbours."""
    problem = random_problem(tokens=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = problem.changed(
        x=problem["x"][order],
        weights_TK=problem["weights_TK"][order],
        experts=problem.experts[order],
    )
    torch.testing.assert_close(moved.call(), problem.call()[order], rtol=1e-5, atol=1e-6)


def test_using_the_output_twice_adds_the_gradients():
    problem = random_problem(dtype=torch.float64)
    dout = output_gradient(problem)
    fresh = graded(problem)
    out = fresh.call()
    ((out * dout).sum() + 2 * (out * dout).sum()).backward()
    once = run(problem, dout=3 * dout)
    for name, value in grads(fresh).items():
        torch.testing.assert_close(value, once[name])


def test_a_kept_graph_gives_the_same_gradients_again():
    problem = random_problem(bias=True)
    dout = output_gradient(problem)
    fresh = graded(problem)
    out = fresh.call(recompute="gate_up")
    out.backward(dout, retain_graph=True)
    first = {name: value.clone() for name, value in grads(fresh).items()}
    for leaf in fresh.leaves.values():
        leaf.grad = None
    out.backward(dout)
    assert_same(grads(fresh), first)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(dout)


def test_two_calls_share_no_state():
    problem, other = random_problem(), random_problem(seed=7)
    first, second = graded(problem), graded(other)
    outs = first.call(), second.call()
    outs[1].backward(output_gradient(other))
    outs[0].backward(output_gradient(problem))
    assert_same({"out": outs[0].detach(), **grads(first)}, run(problem))
    assert_same({"out": outs[1].detach(), **grads(second)}, run(other))


def test_a_gradient_of_a_gradient_is_an_error_not_a_zero():
    fresh = graded(random_problem())
    (dx,) = torch.autograd.grad(fresh.call().square().sum(), fresh["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "weights_TK", "gate_up", "a_up"])
def test_changing_an_input_before_the_backward_pass_is_an_error(name):
    fresh = graded(random_problem())
    out = fresh.call()
    with torch.no_grad():
        fresh[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("names", [("experts",), ("x", "weights_TK", "gate_up", "b_down")], ids=str)
def test_inputs_are_not_written_to(names):
    problem = random_problem(bias=True)
    before = {name: leaf.clone() for name, leaf in problem.leaves.items()}
    experts = problem.experts.clone()
    run(problem, recompute="gate_up")
    assert torch.equal(problem.experts, experts)
    assert all(torch.equal(problem[name], before[name]) for name in names if name != "experts")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_activation_checkpointing_changes_no_bit(use_reentrant, recompute):
    problem = random_problem(bias=True)

    def in_checkpoint(x, *rest, **options):
        return checkpoint(
            lambda x: turnout.expert_mlp(x, *rest, **options), x, use_reentrant=use_reentrant
        )

    assert_same(run(problem, function=in_checkpoint, recompute=recompute), run(problem))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_checkpointing_survives_hidden_states_one_ulp_off(use_reentrant, recompute):
    """Attention is not bitwise repeatable, so a near-tie can route otherwise in recompute."""
    problem = random_problem(tokens=300, num_experts=6, top_k=3)
    generator = torch.Generator().manual_seed(4)
    half = torch.randn(3, 24, generator=generator)
    # Experts in pairs with nearly equal logits; the third choice is one of a pair.
    router = torch.cat([half, half + 1e-7 * torch.randn(3, 24, generator=generator)])
    router.requires_grad_()
    fresh = graded(problem, LORA_LEAVES)
    seen = []

    def block(x):
        target = torch.full_like(x, torch.inf) if seen else x
        x = x + (x.nextafter(target) - x).detach()  # one ulp in recompute, nothing before
        weights_TK, experts = (x @ router.T).topk(3)
        seen.append(experts)
        moved = fresh.changed(x=x, weights_TK=weights_TK, experts=experts)
        return moved.call(recompute=recompute)

    x = problem["x"].clone().requires_grad_()
    checkpoint(block, x, use_reentrant=use_reentrant).backward(output_gradient(problem))
    assert len(seen) == 2
    counts = [experts.flatten().bincount(minlength=6) for experts in seen]
    assert not torch.equal(*counts), "the perturbation changed no choice"
    for gradient in (x.grad, router.grad, *(fresh[name].grad for name in LORA_LEAVES)):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_a_backward_pass_inside_forward_mode_fails_at_the_seed():
    """There autograd is shown every tensor, also those that have no gradient."""
    problem = random_problem()
    needs = problem.trained_by_lora
    torch.manual_seed(3)
    expected = run(problem, needs, expert_dropout=0.5)
    torch.manual_seed(3)
    with torch.autograd.forward_ad.dual_level():
        assert_same(run(problem, needs, expert_dropout=0.5), expected)


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_whole_gives_the_same_bits(case):
    layout, which, options = COMPILED[case]
    problem = random_problem(**layout)
    needs = needed(problem, which)
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    got = run(problem, needs, function=compiled, **options)
    torch.manual_seed(3)
    assert_same(got, run(problem, needs, **options))


@pytest.mark.parametrize("which", ["nothing", "LoRA"])
def test_a_call_left_to_eager_mode_gives_the_op_inside_too_much(which):
    """The compiler goes on with the functions that such a call reaches."""
    problem = random_problem()
    needs = () if which == "nothing" else problem.trained_by_lora
    left = torch.compiler.disable(turnout.expert_mlp, recursive=False)
    compiled = torch.compile(lambda *args, **options: left(*args, **options), backend="aot_eager")
    assert_same(run(problem, needs, function=compiled), run(problem, needs))


def test_compiled_under_autocast_gives_the_same_bits():
    problem = random_problem()
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(problem.call(compiled), problem.call())


def test_a_compiled_call_drops_sentinels_too():
    problem = random_problem()
    experts = problem.experts.clone()
    experts[::3] = problem.num_experts
    problem = problem.changed(experts=experts)
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend="aot_eager")
    assert_same(run(problem, function=compiled), run(problem))


def test_a_new_number_of_tokens_does_not_compile_again_and_again():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend=counter)
    for tokens in (5, 9, 33, 64, 17):
        problem = random_problem(tokens=tokens)
        needs = problem.trained_by_lora
        assert_same(run(problem, needs, function=compiled), run(problem, needs))
    assert counter.frame_count <= 2


STRIDED = {
    "contiguous": lambda t: t,
    "x in another dtype": lambda t: t.float(),
    "columns": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("options", [{}, {"recompute": "gate_up"}], ids=str)
def test_ops_return_what_their_fakes_promise(how, options):
    """Shapes, dtypes and strides: compiled code reads results by the strides of the fake."""
    problem = random_problem(bias=True, dtype=torch.bfloat16, lora_dtype=torch.float32)
    strided = {name: STRIDED[how](problem[name]) for name in ("x", "weights_TK")}
    calls = record_op_calls(problem.changed(**strided), **options)
    assert list(calls) == ["expert_mlp_forward", "expert_mlp_backward"]
    for name, args in calls.items():
        op = getattr(torch.ops.turnout, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def record_op_calls(problem, **options):
    """Arguments of the two custom ops in one step."""
    from turnout.experts import ops

    calls = {}
    plain = {name: getattr(ops, name) for name in ("_forward", "_backward")}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in plain.items():

            def call(*args, name=name, function=function):
                detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
                schema = getattr(torch.ops.turnout, "expert_mlp" + name).default._schema
                calls["expert_mlp" + name] = tuple(detached[: len(schema.arguments)])
                return function(*args)

            patch.setattr(ops, name, call)
        run(problem, **options)
    return calls
