"""Bad input to `expert_mlp` is a clear error before any work, never a wrong number."""

import math

import pytest
import torch

import turnout
from problems import random_problem
from turnout import Activation, ExpertSpec, Unsupported
from turnout.experts import passes
from turnout.experts.gemm import BACKENDS

BASE = random_problem(tokens=6, top_k=2, num_experts=3, hidden=8, intermediate=5, bias=True)
# G = 10, R = 4 and 3


def changed(**leaves):
    return BASE.changed(**leaves)


def swapped(name):
    """An adapter factor in the other order of its dims."""
    return BASE[name].permute(2, 1, 0).contiguous()


def filled(index, dtype=torch.int64):
    experts = BASE.experts.clone()
    experts[2, 1] = index
    return experts.to(dtype)


BAD = {
    "x of another width": (changed(x=torch.zeros(6, 9)), r"x_TH has shape \(6, 9\).*\(T, 8\)"),
    "x with a batch dim": (changed(x=torch.zeros(2, 3, 8)), "x_TH has shape"),
    "x of integers": (changed(x=torch.zeros(6, 8, dtype=torch.int64)), "x_TH .*torch.int64"),
    "complex x": (changed(x=torch.zeros(6, 8, dtype=torch.complex64)), "x_TH .*complex64"),
    "x on another device": (changed(x=torch.zeros(6, 8, device="meta")), "expected meta"),
    "float indices": (changed(experts=torch.zeros(6, 2)), "experts_TK has dtype torch.float32"),
    "int8 indices": (changed(experts=filled(0, torch.int8)), "experts_TK has dtype torch.int8"),
    "bool indices": (changed(experts=filled(0, torch.bool)), "expected int32 or int64"),
    "flat indices": (changed(experts=BASE.experts.reshape(-1)), "experts_TK has shape"),
    "indices of other tokens": (changed(experts=BASE.experts[:5]), r"T = 6"),
    "indices on another device": (changed(experts=BASE.experts.to("meta")), "experts_TK is on m"),
    "no choice per token": (
        changed(experts=BASE.experts[:, :0], weights_TK=torch.zeros(6, 0)),
        "K of at least 1",
    ),
    "negative index": (changed(experts=filled(-1)), r"experts_TK holds -1\.\.2; expected 0\.\.2"),
    "index above E": (changed(experts=filled(4)), r"0\.\.4; expected 0\.\.2, or 3 for a dropped"),
    "int32 index above E": (changed(experts=filled(99, torch.int32)), "experts_TK holds"),
    "weights of another K": (changed(weights_TK=torch.zeros(6, 3)), r"weights_TK .*\(6, 2\)"),
    "weights that would broadcast": (changed(weights_TK=torch.zeros(6, 1)), "weights_TK"),
    "integer weights": (changed(weights_TK=torch.ones(6, 2, dtype=torch.int64)), "float tensor"),
    "weights on another device": (
        changed(weights_TK=torch.zeros(6, 2, device="meta")),
        "weights_TK is on meta",
    ),
    "2-D stack": (changed(gate_up=BASE["gate_up"][0]), r"gate_up has shape \(10, 8\)"),
    "integer stack": (changed(down=BASE["down"].to(torch.int8)), "down has shape .*int8"),
    "stacks of different E": (changed(down=BASE["down"][:2]), "do not fit each other"),
    "stacks of different F": (changed(down=BASE["down"][:, :, :4]), "do not fit each other"),
    "odd G with a gate": (changed(gate_up=BASE["gate_up"][:, :9]), r"G = 2 \* F"),
    "no experts": (
        changed(gate_up=BASE["gate_up"][:0], down=BASE["down"][:0]),
        "do not fit each other",
    ),
    "other layout than the spec's": (
        changed(spec=ExpertSpec(transposed=True)),
        r"\(E, H, G\) and \(E, F, H\).*ExpertSpec\.transposed",
    ),
    "gate missing": (
        changed(spec=ExpertSpec(activation=Activation(act="relu2", gated=False))),
        r"G = 1 \* F",
    ),
    "stacks of two dtypes": (changed(down=BASE["down"].bfloat16()), "down is torch.bfloat16"),
    "stacks on two devices": (changed(down=BASE["down"].to("meta")), "down is .* on meta"),
    "bias of another width": (
        changed(gate_up_bias=torch.zeros(3, 5)),
        r"gate_up_bias has shape \(3, 5\); expected \(3, 10\)",
    ),
    "bias that would broadcast": (changed(down_bias=torch.zeros(8)), "down_bias has shape"),
    "bias of another dtype": (
        changed(down_bias=BASE["down_bias"].double()),
        "down_bias is torch.float64",
    ),
    "a of another width": (changed(a_up=torch.zeros(3, 4, 7)), r"lora\.gate_up .*\(3, R, 8\)"),
    "b of another width": (changed(b_up=torch.zeros(9, 4, 3)), r"b \(O, R, E\) = \(10, R, 3\)"),
    "a of other experts": (changed(a_up=torch.zeros(2, 4, 8)), r"a \(E, R, I\) = \(3, R, 8\)"),
    "a and b swapped": (
        changed(a_up=BASE["b_up"], b_up=BASE["a_up"]),
        r"lora\.gate_up has a \(10, 4, 3\)",
    ),
    "b with experts first": (changed(b_down=swapped("b_down")), r"\(8, R, 3\)"),
    "a with experts last": (changed(a_down=swapped("a_down")), r"\(3, R, 5\)"),
    "b of another rank": (changed(b_up=torch.zeros(10, 5, 3)), r"lora\.gate_up"),
    "2-D adapter as PEFT stores it": (
        changed(a_up=BASE["a_up"].reshape(12, 8)),
        r"expected 3-D tensors a \(E, R, I\) and b \(O, R, E\)",
    ),
    "rank 0": (changed(a_up=torch.zeros(3, 0, 8), b_up=torch.zeros(10, 0, 3)), "rank 0"),
    "integer adapter": (changed(a_up=BASE["a_up"].long()), r"lora\.gate_up\.a is torch\.int64"),
    "adapter on another device": (
        changed(b_down=BASE["b_down"].to("meta")),
        r"lora\.down\.b is torch\.float32 on meta",
    ),
}  # fmt: skip

OPTIONS = [
    ({"recompute": "all"}, "recompute is 'all'; expected one of 'none', 'gate_up'"),
    ({"recompute": True}, "recompute is True"),
    ({"recompute": None}, "recompute is None"),
    ({"backend": "cuda"}, "backend is 'cuda'; expected one of 'auto', 'torch'"),
    ({"backend": ""}, "backend is ''"),
    ({"expert_dropout": 1.0}, "expert_dropout is 1.0; expected 0 <= p < 1"),
    ({"expert_dropout": -0.1}, "expert_dropout is -0.1"),
    ({"expert_dropout": math.nan}, "expert_dropout is nan"),
]


@pytest.fixture
def no_work(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("work was started on input that is wrong")

    monkeypatch.setattr(passes, "forward", fail)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", BAD)
def test_bad_tensor_is_a_clear_error(case):
    problem, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        problem.call()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_bad_option_is_a_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        BASE.call(**options)


def test_the_good_problem_is_good():
    """Else the cases above fail for another reason than theirs."""
    assert BASE.call().isfinite().all()
    assert changed(experts=filled(3)).call().isfinite().all()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_weights_are_unsupported(dtype):
    weights = turnout.ExpertWeights(BASE["gate_up"].to(dtype), BASE["down"].to(dtype))
    with pytest.raises(Unsupported, match=r"float8.*Load them in bfloat16"):
        turnout.expert_mlp(BASE["x"], BASE.experts, BASE["weights_TK"], weights, BASE.spec)


def test_packed_integer_weights_are_refused():
    """4-bit storage must not be taken for numbers."""
    weights = turnout.ExpertWeights(BASE["gate_up"].to(torch.uint8), BASE["down"])
    with pytest.raises(ValueError, match=r"gate_up .*uint8.*float tensor"):
        turnout.expert_mlp(BASE["x"], BASE.experts, BASE["weights_TK"], weights, BASE.spec)


@pytest.mark.parametrize("backend", ["triton", "hopper", "sonic"])
@pytest.mark.parametrize("tokens", [0, 6])
def test_a_back_end_that_can_not_run_here_is_named(backend, tokens):
    """Not installed, or not on a CPU; never another one in its place."""
    if backend in [module.NAME for module in BACKENDS]:
        message = f"no back end runs .*{backend}: "
    else:
        message = f"backend='{backend}' does not run these experts: .*backend='auto'"
    with pytest.raises(Unsupported, match=message):
        random_problem(tokens=tokens).call(backend=backend)


def test_everything_on_meta_is_a_clear_error():
    """Offloaded or half-loaded models arrive like this."""
    problem = BASE.mapped(lambda leaf: leaf.to("meta")).changed(experts=BASE.experts.to("meta"))
    with pytest.raises((ValueError, Unsupported), match="meta"):
        problem.call()


def test_a_negative_index_is_checked_before_autograd_saves_it():
    problem = changed(experts=filled(-1))
    problem["x"].requires_grad_()
    with pytest.raises(ValueError, match="experts_TK holds"):
        problem.call()


def test_what_fitted_before_is_not_looked_at_again():
    """Checks are made once for each kind of call; another kind is another."""
    BASE.call()
    for problem, words in (BAD["x of another width"], BAD["integer weights"], BAD["2-D stack"]):
        for _ in range(2):  # nor is a refusal taken for a fit
            with pytest.raises(ValueError, match=words):
                problem.call()
    with pytest.raises(ValueError, match=r"expert_dropout is 1\.5"):
        BASE.call(expert_dropout=1.5)
    with pytest.raises(ValueError, match=r"experts_TK holds -1\.\.2"):
        BASE.changed(experts=filled(-1)).call()
    BASE.call()


def test_the_kinds_of_calls_pile_up(monkeypatch):
    from turnout.experts import call

    monkeypatch.setattr(call, "KEPT", 3)
    monkeypatch.setattr(call, "_calls", type(call._calls)())
    for tokens in range(1, 7):
        random_problem(tokens=tokens).call()
    assert len(call._calls) == 3


def test_an_option_that_can_not_be_a_key_is_another_error():
    with pytest.raises(ValueError, match="recompute"):
        BASE.call(recompute=["none"])


def test_forward_mode_loses_its_tangents():
    """The op has no forward derivative, which must be said also where no gradient is asked for."""
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(BASE["x"], torch.ones_like(BASE["x"]))
        with pytest.raises(RuntimeError, match="jvp"):
            BASE.changed(x=x).call()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_forward_mode_under_the_compiler_gives_no_tangent_or_zeros(fullgraph):
    """Also after a call of the same code without tangents."""
    from torch.autograd import forward_ad

    def call(x):
        return BASE.changed(x=x).call()

    def compiled(function):
        torch.compiler.reset()
        return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)

    x, ones = BASE["x"], torch.ones_like(BASE["x"])
    outside, inside = compiled(call), compiled(lambda x: torch.func.jvp(call, (x,), (ones,)))
    errors = (RuntimeError, torch._dynamo.exc.Unsupported)
    with pytest.raises(errors):
        inside(x)
    outside(x)
    with forward_ad.dual_level(), pytest.raises(errors):
        outside(forward_ad.make_dual(x, ones))
    torch.compiler.reset()


def test_a_vmap_is_half_refused():
    """Not by one of the operators inside, if at all."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(lambda x: BASE.changed(x=x).call())(torch.stack([BASE["x"]] * 2))
