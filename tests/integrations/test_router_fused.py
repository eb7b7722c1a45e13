"""`patch(router="fused")`: the same tuple as the model's own router, whatever is around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    FUSED_ARCHS,
    assert_same_step,
    changes,
    forward,
    loss_of,
    pickled,
    relative,
    snapshot,
    step,
    tiny,
    with_lora,
)
from peft import LoraConfig, get_peft_model
from test_router_adapters import LINEARS, PARAMETERS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import turnout
from turnout import Unsupported
from turnout.integrations import router_forward, router_outputs, router_swap, routers
from turnout.integrations.router_forward import METHOD, block_route, is_swapped, swap_state
from turnout.integrations.router_places import places
from turnout.routing import rules
from turnout.verify.tiny import TINY, make_inputs

OWN = ("jetmoe", "phimoe", "switch_transformers", "nllb-moe")
SWAPPED = tuple(key for key in TINY if key not in OWN)
NOISE = 1e-3  # a gradient below this part of the largest one is compared with that part
LOGITS = (
    "qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v4", "laguna", "ernie4_5_moe", "jamba",
    "minimax_m2", "afmoe", "hy_v3", "qwen3_next", "flex_olmo",
)  # fmt: skip
AUX = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "jamba", "minimax_m2", "ernie4_5_moe")


def live_routers(model: nn.Module) -> list[Any]:
    return [place.router for place in places(model)]


def swapped(key: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny(key, dtype=dtype)
    turnout.patch(model, router="fused", **options)
    return model


class Call:
    """What one swapped module was given in a forward."""

    def __init__(self, module: Any, method: str, args: Any, kwargs: Any) -> None:
        self.module, self.method, self.args, self.kwargs = module, method, args, kwargs

    def own(self) -> tuple[Tensor, ...]:
        function = getattr(type(self.module), self.method)
        return function(self.module, *self.args, **self.kwargs)

    def ours(self) -> tuple[Tensor, ...]:
        ours = {"forward": router_forward.router_forward, METHOD: block_route}[self.method]
        return ours(self.module, *self.args, **self.kwargs)


def calls_of(model: Any, key: str) -> list[Call]:
    """The calls of every swapped module in one forward."""
    found: list[Call] = []

    def looked_at(module: Any, method: str, function: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(Call(module, method, args, kwargs))
            return function(*args, **kwargs)

        return mock.patch.dict(vars(module), {method: call})

    dtype = next(model.parameters()).dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in make_inputs(key).items()}
    patches = []
    for module in filter(is_swapped, model.modules()):
        kind = swap_state(module).rule.output.method
        method = "forward" if kind == "router" else METHOD
        patches.append(looked_at(module, method, vars(module)[method]))
    for patch in patches:
        patch.start()
    with torch.no_grad():
        model(**inputs)
    for patch in reversed(patches):
        patch.stop()
    return found


def described(out: tuple[Tensor, ...]) -> list[tuple[torch.dtype, tuple[int, ...], bool]]:
    return [(t.dtype, tuple(t.shape), t.requires_grad) for t in out]


@pytest.mark.parametrize("key", SWAPPED)
def test_a_tuple_of_another_form_comes_back(key: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        calls = calls_of(swapped(key, dtype), key)
        assert calls
        for call in calls:
            for autocast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    own, ours = call.own(), call.ours()
                assert described(ours) == described(own), (dtype, autocast)
                assert all(t.is_contiguous() for t in ours if not t.is_floating_point())


@pytest.mark.parametrize("key", SWAPPED)
def test_a_tuple_of_other_values_comes_back(key: str) -> None:
    calls = calls_of(swapped(key), key)
    assert calls
    for call in calls:
        own, ours = call.own(), call.ours()
        assert len(own) == len(ours)
        experts = [(a, b) for a, b in zip(ours, own, strict=True) if not a.is_floating_point()]
        for a, b in zip(ours, own, strict=True):
            if experts and a.shape == experts[0][0].shape:  # sorted=False leaves the order open
                a, b = (t.gather(1, i.argsort(-1)) for t, i in zip((a, b), experts[0], strict=True))
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


WIDE = {torch.softmax, F.softmax, Tensor.softmax, torch.exp, torch.sum, Tensor.sum, F.softplus}


class CudaAutocast(TorchFunctionMode):
    """What CUDA's autocast to bfloat16 does to the operations of routers, on any device."""

    on = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = None
        if self.on and func is F.linear:
            to = torch.bfloat16
        elif self.on and func in WIDE and kwargs.get("dtype") is None:
            to = torch.float32
        if to is not None:
            args = [
                a.to(to) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
            ]
        return func(*args, **kwargs)


class Off:
    """In the place of `torch.autocast(enabled=False)` and of transformers' `maybe_autocast`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        CudaAutocast.on = False

    def __exit__(self, *_: object) -> None:
        CudaAutocast.on = True


@pytest.mark.parametrize("key", SWAPPED)
def test_another_dtype_comes_back_under_autocast_of_cuda(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exactly(output: Any, x: Tensor) -> Any:
        return Off() if output.exact else nullcontext()

    calls = calls_of(swapped(key), key)
    for module in (router_forward, routers):
        monkeypatch.setattr(module, "exactly", exactly)
    monkeypatch.setattr(router_outputs, "_is_widened", lambda z: CudaAutocast.on)
    from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as ernie
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as ernie_vl
    from transformers.models.inkling import modeling_inkling as inkling

    for module in (ernie, ernie_vl, inkling):
        monkeypatch.setattr(module, "maybe_autocast", Off, raising=False)
    for call in calls:
        with CudaAutocast():
            assert [t.dtype for t in call.ours()] == [t.dtype for t in call.own()]


@pytest.mark.parametrize("key", FUSED_ARCHS)
def test_outputs_or_gradients_change(key: str) -> None:
    model = tiny(key)
    turnout.patch(model)
    expected = step(model, key)
    report = turnout.patch(model, router="fused")
    assert_same_step(step(model, key), expected, floor=NOISE)
    own = {row.detail for row in report.routers if row.status == "model"}
    assert bool(own) == (key in OWN)


@pytest.mark.parametrize("key", SWAPPED)
def test_the_own_forward_still_routes(key: str) -> None:
    model = swapped(key)
    ran = mock.Mock(side_effect=router_outputs.route)
    with mock.patch.object(router_outputs, "route", ran):
        forward(model, key)
    names = [p.name for p in places(model) if "vision_moe" not in p.name]  # no images in the batch
    assert ran.call_count == len(names)
    classes = {type(p.modules[0]) for p in places(model) if p.rule.output.method == "router"}
    refuses = [mock.patch.object(cls, "forward", side_effect=AssertionError) for cls in classes]
    for one in refuses:
        one.start()
    try:
        forward(model, key)
    finally:
        for one in refuses:
            one.stop()


@pytest.mark.parametrize("key", LOGITS)
def test_router_logits_of_the_model_change(key: str) -> None:
    options = {"output_router_logits": True}
    with torch.no_grad():
        expected = tiny(key)(**make_inputs(key), **options).router_logits
        got = swapped(key)(**make_inputs(key), **options).router_logits
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("key", AUX)
def test_the_auxiliary_loss_or_its_router_gradient_changes(key: str) -> None:
    def aux(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = make_inputs(key)
        out = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        names = [n for n, p in model.named_parameters() if n.endswith(("gate.weight", "er.weight"))]
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(out.aux_loss, [parameters[n] for n in names], allow_unused=True)
        return out.aux_loss, {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    assert_same_step(aux(swapped(key)), aux(tiny(key)))


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "gemma4_text", "jamba", "dbrx"])
def test_hooks_on_the_router_no_longer_fire(key: str) -> None:
    model = tiny(key)
    seen: list[Any] = []
    for router in live_routers(model):
        router.register_forward_hook(lambda module, args, out: seen.append(out))
        router.register_forward_pre_hook(lambda module, args: seen.append(args))
    forward(model, key)
    expected, seen = seen, []
    turnout.patch(model, router="fused")
    forward(model, key)
    assert len(seen) == len(expected) > 0
    for got, wanted in zip(seen, expected, strict=True):
        got, wanted = (t if isinstance(t, tuple) else (t,) for t in (got, wanted))
        assert [t.dtype for t in got] == [t.dtype for t in wanted]


@pytest.mark.parametrize("key", ["qwen3_moe", "aria_text", "jamba", "dbrx", "llama4_text", "zaya"])
def test_unpatch_leaves_a_swapped_router_behind(key: str) -> None:
    model = tiny(key)
    before, out = snapshot(model), forward(model, key)
    turnout.patch(model, router="fused", routing_cache=True)
    turnout.patch(model, router="fused")
    forward(model, key)
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []
    assert torch.equal(forward(model, key), out)


def test_patching_again_keeps_the_swapped_router() -> None:
    model = swapped("qwen3_moe")
    report = turnout.patch(model)
    assert not any(is_swapped(module) for module in model.modules())
    assert {row.status for row in report.routers} == {"model"}


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v4", "aria_text", "inkling_text"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_shares_its_router_with_the_original(key: str, duplicate: Any) -> None:
    model = swapped(key)
    expected = step(model, key)
    twin = duplicate(model)
    assert sum(is_swapped(m) for m in twin.modules()) == sum(is_swapped(m) for m in model.modules())
    assert_same_step(step(twin, key), expected)
    with torch.no_grad():
        for router in live_routers(twin):
            next(p for p in router.parameters() if p.dim() == 2).neg_()
    assert relative(forward(twin, key), expected[0]) > 1e-3
    assert torch.equal(forward(model, key), expected[0])


def on_router(key: str, base: Any) -> Any:
    """A PEFT model with random adapters on the router."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    if key in PARAMETERS:
        options |= {"target_parameters": [PARAMETERS[key]], "target_modules": []}
    else:
        options |= {"target_modules": [LINEARS[key]]}
    return get_peft_model(base, LoraConfig(**options)).eval()


ADAPTED = [key for key in (*PARAMETERS, *LINEARS) if key in SWAPPED]


@pytest.mark.filterwarnings("ignore:the router .* is adapted")
@pytest.mark.parametrize("key", ADAPTED)
@pytest.mark.parametrize("when", ["before PEFT", "after PEFT"])
def test_adapters_on_the_router_get_other_values_or_gradients(key: str, when: str) -> None:
    expected = step(on_router(key, tiny(key)), key)
    base = tiny(key)
    if when == "before PEFT":
        turnout.patch(base, router="fused")
    model = on_router(key, base)
    if when == "after PEFT":
        turnout.patch(model, router="fused")
    assert any("lora_" in name for name in expected[1])
    got = step(model, key)
    assert_same_step(got, expected, floor=NOISE)
    assert relative(got[0], forward(tiny(key), key)) > 1e-4, "the adapter changed nothing"


@pytest.mark.parametrize("when", ["before PEFT", "after PEFT"])
def test_a_saved_copy_of_the_router_is_not_swapped(when: str) -> None:
    base, plain = tiny("qwen3_moe"), tiny("qwen3_moe")
    if when == "before PEFT":
        turnout.patch(base, router="fused")
    models = []
    for inner in (base, plain):
        torch.manual_seed(1)
        config = LoraConfig(
            target_modules=["q_proj"], modules_to_save=["gate"], init_lora_weights=False
        )
        models.append(get_peft_model(inner, config))
    if when == "after PEFT":
        turnout.patch(models[0], router="fused")
    for model in models:
        model.eval()
        with torch.no_grad():
            for router in live_routers(model):
                router.weight.mul_(-0.5)
    with mock.patch.object(type(live_routers(models[1])[0]), "forward", side_effect=AssertionError):
        forward(models[0], "qwen3_moe")
        with models[0].disable_adapter():
            forward(models[0], "qwen3_moe")
    got = step(models[0], "qwen3_moe")
    assert_same_step(got, step(models[1], "qwen3_moe"))
    assert any("modules_to_save" in name for name in got[1])


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_a_block_no_longer_compiles_in_one_graph(key: str) -> None:
    model = swapped(key)
    place = next(iter(places(model)))
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    expected = place.block(x)
    compiled = torch.compile(place.block, backend="aot_eager", fullgraph=True)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    torch.testing.assert_close(first(compiled(x)), first(expected), rtol=1e-5, atol=1e-5)


def test_a_changed_top_k_is_not_seen() -> None:
    model = swapped("qwen3_moe")
    live_routers(model)[0].top_k = 3
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.gate has top_k=3; expected top_k=2 as .*patch"
    ):
        forward(model, "qwen3_moe")
    turnout.patch(model, router="fused")
    forward(model, "qwen3_moe")


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out[::-1],
        lambda out: (out[0], out[1].double(), out[2]),
        lambda out: (out[0], 2 * out[1], out[2]),
        lambda out: out[:2],
        lambda out: list(out),
    ],
    ids=["order", "dtype", "values", "length", "type"],
)
def test_a_release_that_returns_something_else_is_swapped(change: Any) -> None:
    model = tiny("qwen3_moe")
    cls = type(live_routers(model)[0])
    own = cls.forward
    with mock.patch.object(cls, "forward", lambda self, x: change(own(self, x))):
        report = turnout.patch(model, router="fused")
        assert {row.status for row in report.routers} == {"model"}
        assert "returns something else" in report.routers[0].detail
        with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.gate: router model \(Qwen3Moe"):
            report.require("fused")


def test_the_other_order_of_granite_is_not_known() -> None:
    model = tiny("granitemoe")
    cls = type(live_routers(model)[0])
    own = cls.forward
    expected = calls_of(swapped("granitemoe"), "granitemoe")[0].own()
    with mock.patch.object(cls, "forward", lambda self, x: own(self, x)[::-1]):
        turnout.patch(model, router="fused")
    got = live_routers(model)[0](calls_of(swapped("granitemoe"), "granitemoe")[0].args[0])
    for a, b in zip(got, expected[::-1], strict=True):
        torch.testing.assert_close(a, b)


def test_a_forward_of_another_library_is_lost() -> None:
    model = tiny("qwen3_moe")
    router = live_routers(model)[0]
    own, seen = router.forward, []

    def theirs(x: Tensor) -> Any:
        seen.append(1)
        return own(x)

    router.forward = theirs
    report = turnout.patch(model, router="fused")
    assert report.routers[0].status == "model"
    assert "forward of another library" in report.routers[0].detail
    assert report.routers[1].status == "fused"
    forward(model, "qwen3_moe")
    assert seen
    turnout.unpatch(model)
    assert router.forward is theirs


def test_the_check_on_made_up_tokens_changes_the_modes_or_the_gradients() -> None:
    model = tiny("hunyuan_v1_moe").train()
    model.model.layers[0].mlp.gate.wg.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    turnout.patch(model, router="fused")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("key", ["qwen3_moe", "ernie4_5_moe", "cohere2_moe", "inkling_text"])
def test_block_forward_has_weights_of_another_dtype_than_the_block(key: str) -> None:
    model = tiny(key, dtype=torch.bfloat16)
    place = next(iter(places(model)))
    seen = []
    experts = place.block.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[2].dtype))
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    place.block(x)
    handle.remove()
    from turnout.integrations import blocks

    run = mock.Mock(side_effect=blocks.run)
    with mock.patch.object(blocks, "run", run):
        turnout.block_forward(place.block, x)
    assert run.call_args.args[4].dtype == seen[0]


def test_choosing_keeps_indices_of_all_experts_for_backward() -> None:
    logits = torch.randn(50, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = turnout.route(logits, turnout.RouteSpec.softmax(2))
    assert not [
        t for t in kept if t.dtype == torch.int64 and t.untyped_storage().nbytes() > 50 * 16
    ]
    assert found.experts_TK.untyped_storage().nbytes() == 50 * 2 * 8


def test_a_sigmoid_that_saturates_hides_the_larger_logit() -> None:
    """cohere2 and Llama 4 choose by the logits, and only then score."""
    model = tiny("cohere2_moe", expert_selection_fn="sigmoid")
    turnout.patch(model, router="fused")
    router = live_routers(model)[0]
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([30.0, 10, 40, 20, 35, 1, 2, 50])
    x = torch.zeros(1, 64)
    x[0, 0] = 1
    assert router(x)[2].sort().values.tolist() == [[2, 7]]


def test_scores_that_the_model_rounds_under_autocast_are_not_rounded() -> None:
    """hy_v3 adds the bias to sigmoids in the dtype of its logits, which autocast makes bfloat16."""
    model = swapped("hy_v3")
    router = live_routers(model)[0]
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([20.0, 9, 7, 0, 0, 0, 0, 0])
    x, bias = torch.zeros(1, 64), torch.zeros(8)
    x[0, 0], bias[0], bias[2] = 1, 0.1, 5e-4
    for autocast, expected in ((False, [0, 1]), (True, [0, 2])):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            own = type(router).forward(router, x, bias)
            ours = router(x, bias)
        assert own[2].sort().values.tolist() == [expected] == ours[2].sort().values.tolist()


def test_a_bias_that_lfm2_ignores_counts() -> None:
    model = tiny("lfm2_moe", use_expert_bias=False)
    expected = step(model, "lfm2_moe")
    assert {row.status for row in turnout.patch(model, router="fused").routers} == {"fused"}
    assert_same_step(step(model, "lfm2_moe"), expected)


@pytest.mark.parametrize("key", ["qwen3_moe", "jetmoe", "phimoe"])
def test_the_report_does_not_say_what_routes(key: str) -> None:
    model = tiny(key)
    report = turnout.patch(model)
    assert {row.status for row in report.routers} == {"model"}
    assert "router: model (router='model')" in " ".join(str(report).split())
    report = turnout.patch(model, router="fused")
    rows = report.to_dict()["routers"]
    assert [row["name"] for row in rows] == [place.name for place in places(model)]
    if key == "qwen3_moe":
        reason = turnout.routing.fused.rejects(torch.empty(0, 8), turnout.RouteSpec.softmax(2))
        assert {row["status"] for row in rows} == {"fused"}
        assert {row["detail"] for row in rows} == {f"definition in PyTorch: {reason}"}
        assert report.require("fused") is report
    else:
        assert {row["status"] for row in rows} == {"model"}
        with pytest.raises(Unsupported, match="router model"):
            report.require("fused")
    turnout.unpatch(model)
    assert {row.detail for row in report.routers} == {"turnout.unpatch was called"}


def test_the_report_hides_that_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    report = turnout.patch(tiny("qwen3_moe"), router="fused")
    monkeypatch.setattr("turnout.routing.fused.rejects", lambda logits, spec: None)
    assert {(row.status, row.detail) for row in report.routers} == {("fused", "kernel")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_asks_the_kernel_about_other_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    for key in SWAPPED:
        model = swapped(key, dtype)
        report = turnout.patch(model, router="fused")
        monkeypatch.setattr(
            "turnout.routing.fused.rejects", lambda z, spec: asked.append((z, spec)) or "no"
        )
        assert report.routers
        told = list(asked)
        asked.clear()
        forward_in(model, key, dtype)
        assert {(z.dtype, z.shape[1]) for z, _ in told} == {(z.dtype, z.shape[1]) for z, _ in asked}
        asked.clear()


def forward_in(model: Any, key: str, dtype: torch.dtype) -> None:
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in make_inputs(key).items()}
    with torch.no_grad():
        model(**inputs)


def test_training_with_adapters_on_experts_and_router_is_not_stock() -> None:
    options = {"target_parameters": ["gate.weight", *turnout.lora_targets(tiny("qwen3_moe"))]}
    stock, model = (with_lora(tiny("qwen3_moe"), **options) for _ in range(2))
    with pytest.warns(UserWarning, match="the router .* is adapted"):
        turnout.patch(model, router="fused").require("fused")
    for _ in range(3):
        losses = []
        for one in (stock, model):
            loss = loss_of(forward(one, "qwen3_moe"))
            loss.backward()
            with torch.no_grad():
                for p in one.parameters():
                    if p.grad is not None:
                        p.sub_(0.05 * p.grad)
            one.zero_grad(set_to_none=True)
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)


def test_the_definition_is_what_runs_on_the_cpu() -> None:
    model = swapped("qwen3_moe")
    with (
        mock.patch.object(rules, "route", side_effect=AssertionError),
        pytest.raises(AssertionError),
    ):
        forward(model, "qwen3_moe")


def test_made_up_tokens_do_not_fit_a_state() -> None:
    """The state of a place is the one that its module carries."""
    model = swapped("qwen3_moe")
    for place in places(model):
        assert swap_state(place.modules[0]).name == place.name
        assert router_swap.make_state(place, place.modules[0]).parts == "zwi"
