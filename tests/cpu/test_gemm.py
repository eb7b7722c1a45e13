"""The grouped GEMM contract: who is asked, who runs, and one choice for base and adapters."""

from dataclasses import replace

import pytest
import torch

from problems import assert_same, random_problem, run
from turnout import kernel_facts
from turnout.device import Device
from turnout.experts import gemm, gemm_hopper, gemm_torch, gemm_triton
from turnout.experts.gemm import backend_named, grouped_gemm, grouped_gram, select
from turnout.experts.operands import Activate, Operand, Tail
from turnout.ragged import sort_by_expert
from turnout.specs import Activation, GemmProblem, Unsupported

CPU = Device(name="cpu", arch=None, num_sms=0, shared_memory=0, memory_bytes=0, l2_bytes=0)
HOPPER = Device(
    name="H100", arch=90, num_sms=132, shared_memory=232448, memory_bytes=2**36, l2_bytes=2**25
)
PROBLEM = GemmProblem(
    ragged="m", rows=64, experts=4, n=32, k=16, dtype="bfloat16", weight_dtype="bfloat16"
)


class Fake:
    """A back end that records what it is asked and what it runs, and runs it through `gemm_torch`.

    It rejects everything with `reason`, or what `only` does not accept.
    """

    def __init__(self, name, reason=None, only=None):
        self.NAME, self.reason, self.only = name, reason, only
        self.asked, self.ran = [], []

    def __getattr__(self, name):
        return getattr(gemm_torch, name)

    def rejects(self, problem, device):
        self.asked.append((problem, device))
        if self.only is not None and not self.only(problem):
            return "not this one"
        return self.reason

    def launch_rows(self, problem, *args):
        self.ran.append(problem)
        return gemm_torch.launch_rows(problem, *args)

    def launch_gram(self, problem, *args):
        self.ran.append(problem)
        return gemm_torch.launch_gram(problem, *args)


def install(monkeypatch, *modules):
    monkeypatch.setattr(gemm, "BACKENDS", modules)
    return modules


def test_every_back_end_keeps_the_contract():
    names = [module.NAME for module in gemm.BACKENDS]
    assert len(set(names)) == len(names)
    for module in gemm.BACKENDS:
        assert callable(module.launch_rows)
        assert callable(module.launch_gram)
        reason = module.rejects(PROBLEM, CPU)
        assert reason is None or (isinstance(reason, str) and reason)


def test_torch_is_the_last_resort_and_takes_everything():
    assert gemm.BACKENDS[-1] is gemm_torch
    assert gemm_torch.rejects(PROBLEM, CPU) is None
    assert gemm_torch.rejects(PROBLEM, HOPPER) is None


def test_the_first_that_accepts_is_chosen(monkeypatch):
    no, first, second = install(monkeypatch, Fake("no", "too old"), Fake("a"), Fake("b"))
    assert select(PROBLEM, HOPPER) is first
    assert no.asked == first.asked == [(PROBLEM, HOPPER)]
    assert second.asked == [], "the choice is made and the next is still asked"
    install(monkeypatch, second, first)
    assert select(PROBLEM, HOPPER) is second


def test_a_named_back_end_is_chosen_over_the_first(monkeypatch):
    first, second = install(monkeypatch, Fake("a"), Fake("b"))
    assert select(PROBLEM, CPU, "b") is second
    assert first.asked == []


@pytest.mark.parametrize(("version", "runs"), [("3.5.1", False), ("3.6.0", True), ("3.10.0", True)])
def test_hoppers_kernels_stop_the_step_with_a_triton_that_does_not_compile_them(
    version, runs, monkeypatch
):
    """torch 2.9 comes with 3.5, whose Gluon starts warps in another way."""
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    kernel_facts.has_gluon.cache_clear()
    reason = gemm_hopper.rejects(PROBLEM, HOPPER)
    kernel_facts.has_gluon.cache_clear()
    assert (reason is None) == runs
    assert gemm_triton.rejects(PROBLEM, HOPPER) is None


@pytest.mark.parametrize("weights", ["bfloat16", "float32", "float64"])
def test_hoppers_kernels_take_weights_that_the_portable_ones_refuse(weights):
    """What TMA can not read, theirs read; a float64 adapter beside 16-bit rows neither takes."""
    pytest.importorskip("triton")
    problem = replace(PROBLEM, dtype="bfloat16", weight_dtype=weights)
    reasons = [module.rejects(problem, HOPPER) for module in (gemm_hopper, gemm_triton)]
    assert (reasons[0] is None) == (reasons[1] is None) == (weights != "float64")


def test_a_named_back_end_that_rejects_is_an_error_with_its_reason(monkeypatch):
    """No silent step down to another one."""
    install(monkeypatch, Fake("fast", "rank 7 is not a multiple of 8"), Fake("b"))
    with pytest.raises(Unsupported, match="fast: rank 7 is not a multiple of 8") as error:
        select(PROBLEM, CPU, "fast")
    assert "b:" not in str(error.value)


def test_all_reasons_are_told(monkeypatch):
    install(monkeypatch, Fake("a", "needs sm_90"), Fake("b", "no bfloat16"))
    with pytest.raises(Unsupported, match=r"a: needs sm_90; b: no bfloat16"):
        select(PROBLEM, CPU)


def test_an_unknown_name_lists_what_there_is(monkeypatch):
    install(monkeypatch, Fake("a"), Fake("b"))
    with pytest.raises(Unsupported, match=r"backend='c' .* it has: a, b\."):
        backend_named("c")


def test_the_choice_depends_on_problem_and_device_alone(monkeypatch):
    install(monkeypatch, Fake("small", only=lambda p: p.rows < 100), Fake("any"))
    large = GemmProblem(
        ragged="m", rows=500, experts=4, n=32, k=16, dtype="float32", weight_dtype="float32"
    )
    chosen = [select(p, CPU).NAME for p in (PROBLEM, large, PROBLEM, large)]
    assert chosen == ["small", "any", "small", "any"]


@pytest.mark.parametrize("options", [{}, {"recompute": "gate_up"}], ids=str)
def test_one_back_end_runs_base_and_adapters_forward_and_backward(options, monkeypatch):
    """A name that reaches only some launches runs the rest on another back end (T19)."""
    problem = random_problem(bias=True)
    expected = run(problem, **options)
    ours, other = install(monkeypatch, Fake("torch"), Fake("triton"))
    assert_same(run(problem, backend="triton", **options), expected)
    assert other.ran
    assert ours.ran == ours.asked == []
    assert {p.ragged for p in other.ran} == {"m", "k"}
    count = len(other.ran)
    assert_same(run(problem, **options), expected)
    assert len(ours.ran) == count


def test_one_launch_that_is_rejected_stops_a_named_back_end(monkeypatch):
    rows_only = Fake("triton", only=lambda p: p.ragged == "m")
    install(monkeypatch, rows_only, Fake("torch"))
    with pytest.raises(Unsupported, match="triton: not this one"):
        run(random_problem(), backend="triton")


def test_back_ends_may_be_mixed_when_none_is_named(monkeypatch):
    rows_only, rest = install(
        monkeypatch, Fake("triton", only=lambda p: p.ragged == "m"), Fake("torch")
    )
    problem = random_problem()
    got = run(problem)
    assert {p.ragged for p in rows_only.ran} == {"m"}
    assert {p.ragged for p in rest.ran} == {"k"}
    monkeypatch.undo()
    assert_same(got, run(problem))


def test_problems_say_what_is_launched(monkeypatch):
    """A kernel chooses and is configured by these fields; a wrong one is a wrong config."""
    (spy,) = install(monkeypatch, Fake("torch"))
    activation = Activation(interleaved=True)
    problem = random_problem(
        tokens=10,
        top_k=2,
        num_experts=3,
        hidden=8,
        intermediate=6,
        rank_up=5,
        rank_down=4,
        activation=activation,
        transposed=True,
        bias=True,
        dtype=torch.bfloat16,
        lora_dtype=torch.float32,
    )
    problem.call(expert_dropout=0.5)
    half = {"dtype": "bfloat16", "weight_dtype": "bfloat16"}
    full = {"dtype": "float32", "weight_dtype": "float32"}
    # Stored as (E, in, out), read as x @ W: the contracted dim is not the contiguous one.
    stack = {"weight_k_major": False, "bias": True, "dropout": False}
    act = {"epilogue": "activate", "activation": activation}
    plain = {"epilogue": None, "activation": None}
    expected = [
        {**full, **plain, "n": 5, "k": 8, "rank": 0, "gathered": True, "dropout": True},
        {**half, **act, **stack, "n": 12, "k": 8, "rank": 5, "gathered": True},
        {**full, **plain, "n": 4, "k": 6, "rank": 0, "gathered": False, "dropout": True},
        {**half, **plain, **stack, "n": 8, "k": 6, "rank": 4, "gathered": False},
    ]
    for problem, fields in zip(spy.ran, expected, strict=True):
        assert {name: getattr(problem, name) for name in fields} == fields
        assert (problem.ragged, problem.rows, problem.experts) == ("m", 20, 3)


ROUTING = torch.tensor([[0, 2], [2, 4], [-1, 0], [2, 2], [4, 3]])  # 4 of 5 slots kept; 1 is empty
EXPERTS = 4


def operands(dtype=torch.float64, inputs=6, outputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ragged = sort_by_expert(ROUTING, EXPERTS)
    x = torch.randn(5, inputs, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(EXPERTS, outputs, inputs, generator=generator, dtype=torch.float64).to(dtype)
    return ragged, x, w, generator


def rows_of(ragged):
    """(row, expert, token) of every kept row."""
    flat = ROUTING.reshape(-1)
    slots = enumerate(ragged.slot_S.tolist())
    return [(row, int(flat[s]), s // 2) for row, s in slots if 0 <= flat[s] < EXPERTS]


def test_rows_are_multiplied_by_their_experts_weight():
    ragged, x, w, generator = operands()
    bias = torch.randn(EXPERTS, 5, generator=generator, dtype=torch.float64)
    xa = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 3, EXPERTS, generator=generator, dtype=torch.float64).permute(2, 0, 1)
    weight = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    out = grouped_gemm(
        Operand(x, True, weight),
        w,
        ragged,
        dtype=torch.float64,
        bias_EN=bias,
        tail=Tail(xa, b),
    ).out
    expected = torch.zeros(10, 5, dtype=torch.float64)
    for row, e, token in rows_of(ragged):
        expected[row] = (
            w[e] @ (x[token] * weight.flatten()[ragged.slot_S[row]]) + bias[e] + b[e] @ xa[row]
        )
    assert len(rows_of(ragged)) == 7
    torch.testing.assert_close(out, expected)


def test_dropped_rows_are_zero_and_never_read():
    ragged, _, w, _ = operands()
    rows = torch.full((10, 6), float("nan"), dtype=torch.float64)
    rows[:7] = 1.0
    out = grouped_gemm(
        Operand(rows),
        w,
        ragged,
        dtype=torch.float64,
        epilogue=Activate(Activation(gated=False), True),
    )
    for tensor in (out.out, out.z_SG):
        assert tensor.isfinite().all()
        assert not tensor[7:].any()
    total = torch.zeros(EXPERTS, 6, 6, dtype=torch.float64)
    grouped_gram(Operand(rows), Operand(rows), ragged, total, dtype=torch.float64)
    assert total.isfinite().all()


def test_gram_sums_outer_products_per_expert():
    ragged, x, _, generator = operands()
    dy = torch.randn(10, 4, generator=generator, dtype=torch.float64)  # a fourth column is padding
    out = torch.full((3, EXPERTS, 6), float("nan"), dtype=torch.float64).transpose(0, 1)
    grouped_gram(Operand(dy), Operand(x, by_token=True), ragged, out, dtype=x.dtype)
    expected = torch.zeros(EXPERTS, 3, 6, dtype=torch.float64)
    for row, e, token in rows_of(ragged):
        expected[e] += torch.outer(dy[row, :3], x[token])
    torch.testing.assert_close(out, expected)
    assert not out[1].any(), "an expert without rows is zero"


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.75])
def test_an_adapters_intermediate_is_scaled(scale):
    ragged, x, w, _ = operands()
    options = {"dtype": torch.float64, "narrow": True}
    out = grouped_gemm(Operand(x, by_token=True), w, ragged, scale=scale, **options).out
    plain = grouped_gemm(Operand(x, by_token=True), w, ragged, **options).out
    torch.testing.assert_close(out, scale * plain)


def test_weights_are_converted_as_they_are_read():
    ragged, x, w, _ = operands(torch.float32)
    out = grouped_gemm(Operand(x, by_token=True), w, ragged, dtype=torch.bfloat16).out
    by_hand = grouped_gemm(
        Operand(x.bfloat16(), by_token=True), w.bfloat16(), ragged, dtype=torch.bfloat16
    ).out
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, by_hand)


def test_z_is_returned_only_when_it_is_kept():
    ragged, x, w, _ = operands(outputs=8)
    for keep in (True, False):
        out = grouped_gemm(
            Operand(x, by_token=True),
            w,
            ragged,
            dtype=torch.float64,
            epilogue=Activate(Activation(), keep),
        )
        assert out.out.shape == (10, 4)
        assert (out.z_SG is not None) == keep
