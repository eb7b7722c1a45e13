"""SonicMoE as a back end of `expert_mlp`, with a stand-in that computes from what it is given."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import fake_sonicmoe
import turnout
from problems import GPT_OSS, assert_same, check, judge, output_gradient, random_problem, run
from turnout import Activation, ExpertSpec, Unsupported, doctor, reference
from turnout.device import Device
from turnout.experts import gemm, sonic, sonic_package
from turnout.experts.weights import alternating, halves

ALTERNATING = Activation(interleaved=True)
LORA = ("x", "weights_TK", "a_up", "b_up", "a_down", "b_down")
PLAIN = {"activation": ALTERNATING, "rank_up": 0, "rank_down": 0}
H100 = fake_sonicmoe.H100
LAYER = sonic.Problem(
    spec=ExpertSpec(activation=ALTERNATING),
    experts=8,
    hidden=512,
    intermediate=64,
    dtype="bfloat16",
    compute="bfloat16",
)


@pytest.fixture(params=["functions", "flat"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    fake_sonicmoe.install(monkeypatch, request.param)
    return request.param


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_sonicmoe.install(monkeypatch)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"top_k": 1, "tokens": 7},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 16, "tokens": 3},  # most experts are empty
        {"top_k": 3, "hidden": 40, "intermediate": 28, "tokens": 64},
    ],
    ids=str,
)
def test_full_training_gives_another_result(sizes: dict[str, int], dtype: torch.dtype) -> None:
    check(lambda seed: random_problem(dtype=dtype, seed=seed, **PLAIN, **sizes), backend="sonic")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("ranks", [(4, 3), (4, 0), (0, 3)])
@pytest.mark.parametrize("needs", [LORA, (*LORA, "gate_up", "down")], ids=["lora", "all"])
def test_merged_adapters_give_another_result(ranks: tuple[int, int], needs: Any) -> None:
    def make(seed: int) -> Any:
        up, down = ranks
        options = {"activation": ALTERNATING, "rank_up": up, "rank_down": down}
        return random_problem(seed=seed, **options)

    needs = [name for name in needs if name in make(0).leaves]
    check(make, needs, backend="sonic-merged")


@pytest.mark.usefixtures("fake")
def test_half_of_the_inputs_are_frozen() -> None:
    for needs in (("x",), ("weights_TK",), ("gate_up",), ("down", "x")):
        check(lambda seed: random_problem(seed=seed, **PLAIN), needs, backend="sonic")


@pytest.mark.usefixtures("fake")
def test_slots_without_an_expert_are_computed_or_leave_nan() -> None:
    """The stand-in leaves NaN in rows that belong to no expert."""

    def make(seed: int) -> Any:
        problem = random_problem(seed=seed, top_k=3, **PLAIN)
        experts = problem.experts.clone()
        experts[::2, 1] = problem.num_experts
        experts[5] = problem.num_experts
        return problem.changed(experts=experts)

    check(make, backend="sonic")
    assert torch.equal(run(make(0), (), backend="sonic")["out"][5], torch.zeros(24))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("needs", [(), ("x", "weights_TK", "gate_up", "down")], ids=["fwd", "full"])
def test_no_tokens_is_a_launch(needs: Any) -> None:
    problem = random_problem(tokens=0, **PLAIN)
    assert_same(
        run(problem, needs, backend="sonic"), run(problem, needs, function=reference.expert_mlp)
    )


@pytest.mark.usefixtures("fake")
def test_a_gradient_with_strides_of_zero_is_read_in_place() -> None:
    problem = random_problem(**PLAIN)
    x = problem["x"].clone().requires_grad_()
    problem.changed(x=x).call(backend="sonic").sum().backward()
    other = problem["x"].clone().requires_grad_()
    problem.changed(x=other).call(reference.expert_mlp).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.usefixtures("functions")
def test_inputs_with_strides_are_misread() -> None:
    problem = random_problem(tokens=10, **PLAIN)
    strided = problem.changed(
        x=torch.stack((problem["x"], problem["x"]), 2)[:, :, 0],
        experts=problem.experts.int().T.contiguous().T,
        weights_TK=problem["weights_TK"].double(),
    )
    got, expected = strided.call(backend="sonic"), problem.call(backend="sonic")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("functions")
def test_a_second_derivative_is_wrong_in_silence() -> None:
    problem = random_problem(**PLAIN)
    x = problem["x"].clone().requires_grad_()
    out = problem.changed(x=x).call(backend="sonic")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.usefixtures("fake")
def test_inference_is_told_only_without_gradients() -> None:
    """With `is_inference_mode_enabled` the kernels keep no pre-activation."""
    problem = random_problem(**PLAIN)
    trained = problem.changed(gate_up=problem["gate_up"].clone().requires_grad_())
    problem.call(backend="sonic")
    with torch.no_grad():
        trained.call(backend="sonic")
    trained.call(backend="sonic")
    assert [call["inference"] for call in fake_sonicmoe.Calls.forwards] == [True, True, False]


@pytest.mark.usefixtures("functions")
def test_stacks_are_copied_without_adapters() -> None:
    problem = random_problem(**PLAIN)
    problem.call(backend="sonic")
    problem.call(backend="sonic-merged")
    pointers = {call["w1"] for call in fake_sonicmoe.Calls.forwards}
    assert pointers == {problem["gate_up"].data_ptr()}


@pytest.mark.usefixtures("fake")
def test_merged_stacks_live_until_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for backward by every layer, they would be a second copy of all experts."""
    merge, alive = sonic._merge, []

    def counted(*args: Any) -> Any:
        out = merge(*args)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setattr(sonic, "_merge", counted)
    problem = random_problem(activation=ALTERNATING)
    problem["a_up"].requires_grad_()
    out = problem.call(backend="sonic-merged")
    assert [one.expired() for one in alive] == [True, True]
    out.sum().backward()
    assert len(alive) == 4, "each stack is merged once in forward and once in backward"
    assert problem["a_up"].grad is not None


@pytest.mark.usefixtures("functions")
def test_an_adapter_changed_before_backward_gives_wrong_gradients() -> None:
    problem = random_problem(activation=ALTERNATING)
    problem["a_up"].requires_grad_()
    out = problem.call(backend="sonic-merged")
    with torch.no_grad():
        problem["b_up"].add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        out.sum().backward()


@pytest.mark.usefixtures("functions")
def test_autocast_of_the_same_dtype_changes_bits() -> None:
    problem = random_problem(dtype=torch.bfloat16, **PLAIN)
    expected = run(problem, backend="sonic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(problem, backend="sonic"), expected)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(Unsupported, match="dtype: the stacks are float32, computed in bfloat16"),
    ):
        random_problem(**PLAIN).call(backend="sonic")


@pytest.mark.usefixtures("functions")
def test_an_earlier_size_is_trained_again_with_the_buffer_of_a_later_one() -> None:
    """`ds_partial_N` of release 0.0.1."""

    def train(intermediate: int) -> None:
        run(random_problem(intermediate=intermediate, tokens=4, **PLAIN), backend="sonic")

    train(20)
    train(40)  # as many tiles of 128
    train(20)
    train(200)
    train(200)
    random_problem(intermediate=20, **PLAIN).call(backend="sonic")  # no gradients, no buffer
    train(20 + 128)  # compiled for the first time, with its own size
    with pytest.raises(Unsupported, match=r"F = 148 after those of F = 20.*one size per process"):
        train(20)


@pytest.mark.usefixtures("functions")
def test_the_order_of_forwards_hides_the_order_of_compilations() -> None:
    """It compiles in the backward pass: here the smaller size is the last one."""
    outs = []
    for intermediate in (20, 200):
        one = random_problem(intermediate=intermediate, tokens=4, **PLAIN)
        one["x"].requires_grad_()
        outs.append(one.call(backend="sonic"))
    outs[1].sum().backward()
    outs[0].sum().backward()
    with pytest.raises(Unsupported, match="F = 20 after those of F = 200"):
        run(random_problem(intermediate=200, tokens=4, **PLAIN), backend="sonic")


def test_release_0_1_has_no_such_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sonicmoe.install(monkeypatch, "flat")
    for intermediate in (20, 200, 20):
        run(random_problem(intermediate=intermediate, tokens=4, **PLAIN), backend="sonic")


def change(**values: Any) -> sonic.Problem:
    return dataclasses.replace(LAYER, **values)


def spec(**values: Any) -> sonic.Problem:
    options = {"activation": ALTERNATING, **values}
    return change(spec=ExpertSpec(**options))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (spec(activation=GPT_OSS), r"activation: .*limit=7\.0"),
        (spec(activation=Activation(limit=7.0, interleaved=True)), "activation: "),
        (spec(activation=Activation(act="gelu", interleaved=True)), "activation: .*'gelu'"),
        (spec(activation=Activation(act="gelu_tanh")), "activation: .*'gelu_tanh'"),
        (spec(activation=Activation(alpha=1.702)), r"activation: .*1\.702"),
        (spec(activation=Activation(act="silu", gated=False)), "activation: .*gated=False"),
        (spec(activation=Activation(act="relu2", gated=False)), "activation: "),
        (change(bias=True), "bias: "),
        (spec(transposed=True), "layout: .* these are transposed"),
        (change(dense=False), "layout: .* these are strided or not aligned"),
        (spec(weight_on_input=True), "layout: .*weight_on_input"),
        (spec(activation=Activation()), "layout: gate and up lie in two halves; expected"),
        (change(hidden=448), "dims: H is 448 and F is 64; expected multiples of 64, H of at least"),
        (change(hidden=2080), "dims: H is 2080"),
        (change(intermediate=96), "dims: .*F is 96"),
        (change(dtype="float32", compute="float32"), "dtype: the stacks are float32"),
        (change(dtype="float16", compute="float16"), "dtype: the stacks are float16"),
        (change(compute="float16"), "dtype: .*computed in float16"),
        (change(recompute=True), "recompute='gate_up'"),
        (change(lora=True), "adapters: .*backend='auto'.*backend='sonic-merged'"),
        (change(lora=True, merged=True, dropout=True), "expert_dropout"),
        (change(lora=True, merged=True), None),
        (LAYER, None),
        (change(hidden=2880, intermediate=2880), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reason_is_another(
    problem: sonic.Problem, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sonicmoe.install(monkeypatch, limits=True)
    got = sonic.rejects(problem, H100)
    if reason is None:
        assert got is None
    else:
        assert got is not None
        assert re.search(reason, got), got


@pytest.mark.parametrize(
    ("arch", "form", "quack", "reason"),
    [
        (90, "functions", False, None),
        (90, "flat", False, None),
        (100, "flat", False, None),
        (103, "functions", True, None),
        (100, "functions", False, "sm_100 .*USE_QUACK_GEMM=1"),
        (80, "functions", False, "sm_80; expected sm_90"),
        (89, "flat", False, "sm_89; expected sm_90"),
        (120, "flat", False, "sm_120; expected sm_90"),
        (None, "flat", False, "needs an NVIDIA GPU of sm_90 or newer; got "),
    ],
)
def test_a_gpu_it_has_no_kernels_for_is_taken(
    arch: int | None, form: str, quack: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sonicmoe.install(monkeypatch, limits=True)
    monkeypatch.setitem(sys.modules, "sonicmoe", fake_sonicmoe.make(form, quack=quack))
    got = sonic.rejects(LAYER, dataclasses.replace(H100, arch=arch))
    if reason is None:
        assert got is None
    else:
        assert got is not None
        assert re.search(reason, got), got


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """No SonicMoE, whatever is installed."""
    monkeypatch.delitem(sys.modules, "sonicmoe", raising=False)
    monkeypatch.setattr(sonic_package, "find_spec", lambda name: None)
    monkeypatch.setattr(sonic_package, "_given", None)


def test_a_missing_package_is_a_riddle(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    words = r"the package sonicmoe is not installed.*pip install sonic-moe.*backend='auto'"
    with pytest.raises(Unsupported, match=f"backend='sonic' can not run: {words}"):
        sonic.require("sonic")
    with pytest.raises(Unsupported, match=words):
        random_problem(**PLAIN).call(backend="sonic")


def test_a_package_that_does_not_import_stops_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("no cutlass")

    without(monkeypatch)
    monkeypatch.setattr(sonic_package, "find_spec", lambda name: object())
    monkeypatch.setattr(sonic_package, "import_module", fail)
    with pytest.raises(Unsupported, match=r"sonicmoe does not import \(no cutlass\)"):
        sonic.require("sonic-merged")


def changed_up(module: Any) -> None:
    class Other:
        @staticmethod
        def forward(ctx: Any, x: Any, w1: Any, concat: Any) -> None: ...

    module.functional._UpProjection = Other


def changed_entry(module: Any) -> None:
    def entry(x: Any, w1: Any, concat_layout: bool, precision: Any) -> None: ...

    module.functional.moe_general_routing_inputs = entry


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (changed_up, r"_UpProjection of sonicmoe takes \('x', 'w1', 'concat'\); expected SonicMoE"),
        (changed_entry, r"moe_general_routing_inputs of sonicmoe takes \('x', .*; expected"),
        (lambda m: delattr(m, "enums"), r"has no .*enums\.ActivationType"),
        (lambda m: delattr(m.functional, "moe_general_routing_inputs"), "has no moe_general"),
        (lambda m: delattr(m.functional, "_DownProjection"), "has no _DownProjection"),
        (lambda m: delattr(m.functional, "is_using_quack_gemm"), "does not say which products"),
    ],
)
def test_another_version_is_called(
    spoil: Any, words: str, functions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(functions)
    with pytest.raises(Unsupported, match=words):
        random_problem(**PLAIN).call(backend="sonic")


def test_a_module_of_the_hub_is_taken_only_when_given(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sonicmoe.install(monkeypatch)
    without(monkeypatch)
    hub = fake_sonicmoe.make("flat")
    sonic.use(hub)
    expected = random_problem(**PLAIN)
    judge(run(expected, backend="sonic"), [(expected, output_gradient(expected))], expected.leaves)
    sonic.use(None)
    with pytest.raises(Unsupported, match="not installed"):
        sonic.require("sonic")
    del hub.enums
    sonic_package.form_of.cache_clear()
    with pytest.raises(Unsupported, match="has no"):
        sonic.use(hub)


@pytest.mark.usefixtures("fake")
def test_auto_takes_it() -> None:
    assert sonic not in gemm.BACKENDS
    problem = random_problem(activation=ALTERNATING)
    problem.call()
    assert fake_sonicmoe.Calls.forwards == []


@pytest.mark.usefixtures("functions")
def test_wrong_options_reach_the_kernels() -> None:
    problem = random_problem(**PLAIN)
    adapted = random_problem(activation=ALTERNATING)
    cases = [
        (problem, {"recompute": "gate_up"}, "recompute='gate_up'"),
        (adapted, {}, "adapters: "),
        (adapted, {"backend": "sonic-merged", "expert_dropout": 0.1}, "expert_dropout"),
        (random_problem(), {}, "adapters|layout"),
        (random_problem(activation=GPT_OSS), {}, "activation"),
        (random_problem(bias=True, **PLAIN), {}, "bias"),
    ]
    for one, options, words in cases:
        with pytest.raises(Unsupported, match=words):
            one.call(**{"backend": "sonic", **options})
    assert fake_sonicmoe.Calls.forwards == []


def test_rows_lose_their_order() -> None:
    rows = torch.arange(24.0).view(2, 6, 2)
    mixed = alternating(rows, 1)
    assert mixed[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert torch.equal(halves(mixed, 1), rows)
    lora = turnout.Lora(torch.zeros(2, 3, 5), torch.randn(6, 3, 2), 0.5)
    swapped = sonic.for_sonic(lora)
    assert torch.equal(swapped.b_ORE[1], lora.b_ORE[3])


def test_doctor_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(device: Device) -> dict[str, Any]:
        (found,) = [one for one in doctor.backends(device) if one["name"] == "sonic"]
        return found

    without(monkeypatch)
    assert "not installed" in row(H100)["reason"]
    fake_sonicmoe.install(monkeypatch, limits=True)
    assert row(H100) == {"name": "sonic", "usable": True, "reason": None}
    assert "sm_80" in row(dataclasses.replace(H100, arch=80))["reason"]


def test_importing_turnout_imports_the_package() -> None:
    code = "import sys, turnout, turnout.experts.ops; assert 'sonicmoe' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
