"""`record_routing` and `replay_routing`: the choice of one forward, given to another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_models import (
    assert_same_step,
    changes,
    forward,
    loss_of,
    relative,
    snapshot,
    tiny,
    with_lora,
)
from safetensors.torch import load_file, save_file
from test_routing_cache import KEY, NOISE, choices, enable, grads, other_choice, run, training
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import turnout
from turnout import Unsupported
from turnout.integrations.router_places import places
from turnout.verify.tiny import TINY, make_inputs, out_tensor

OWN = ("zaya", "jetmoe", "phimoe", "switch_transformers", "nllb-moe")
REPLAYED = tuple(key for key in TINY if key not in OWN)
HOW = ["unpatched", "model", "fused"]


def prepared(key: str, how: str = "unpatched", **options: Any) -> Any:
    model = tiny(key, **options)
    if how != "unpatched":
        turnout.patch(model, router=how)
    return model


def recorded(model: Any, key: str) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad(), turnout.record_routing(model) as record:
        out = forward(model, key)
    return out, record


def shifted(record: dict[str, Tensor], by: int = 3) -> dict[str, Tensor]:
    """Another choice, distinct experts in each row."""
    return {name: (experts + by) % 8 for name, experts in record.items()}


def sets(record: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: experts.sort(-1).values.tolist() for name, experts in record.items()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("key", REPLAYED)
def test_a_replayed_choice_is_not_the_recorded_one(key: str, how: str) -> None:
    model = prepared(key, how)
    before = snapshot(model)
    out, record = recorded(model, key)
    assert record
    for name, experts in record.items():
        assert experts.dtype == torch.int32, name
        assert experts.dim() == 2, name
        assert not experts.requires_grad, name
    with turnout.replay_routing(model, record):
        assert relative(forward(model, key), out) < 1e-5
    other = shifted(record)
    with turnout.replay_routing(model, other), turnout.record_routing(model) as again:
        changed = forward(model, key)
    assert sets(again) == sets(other)
    if how != "unpatched":
        with turnout.replay_routing(plain := tiny(key), other):
            assert relative(changed, forward(plain, key)) < 1e-5
    assert relative(changed, out) > 1e-4
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("key", ["qwen3_moe", "jamba", "aria_text", "dbrx", "deepseek_v3"])
def test_the_record_is_not_what_the_experts_were_given(key: str) -> None:
    model = prepared(key)
    seen = []
    for place in places(model):
        holder = place.modules[0]
        if place.rule.output.method == "router":
            holder.register_forward_hook(
                lambda m, a, out: seen.append(next(t for t in out if not t.is_floating_point()))
            )
        else:
            own = holder.route_tokens_to_experts

            def route(*args: Any, own: Any = own) -> Any:
                out = own(*args)
                seen.append(next(t for t in out if not t.is_floating_point()))
                return out

            holder.route_tokens_to_experts = route
    _, record = recorded(model, key)
    assert list(record) == [f"{place.name}/0" for place in places(model)]
    for experts, expected in zip(record.values(), seen, strict=True):
        assert torch.equal(experts.long(), expected)


@pytest.mark.parametrize("how", HOW)
def test_replayed_weights_are_those_of_the_record(how: str) -> None:
    """Weights and gradients come from the current logits: a sum of all experts at those weights."""
    key = "qwen3_moe"
    model = prepared(key, how)
    _, record = recorded(model, key)
    with torch.no_grad():
        for place in places(model):
            place.router.weight.neg_()
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    place = next(iter(places(model)))
    experts = record[f"{place.name}/0"].long()
    logits = x @ place.router.weight.T
    weights = logits.softmax(-1).gather(1, experts)
    weights = weights / weights.sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad((weights * torch.arange(2)).sum(), place.router.weight)
    one = {name: e for name, e in record.items() if name.startswith(place.name)}
    with turnout.replay_routing(model, one):
        found = place.router(x)
    torch.testing.assert_close(found[0], logits)
    torch.testing.assert_close(found[1], weights)
    assert torch.equal(found[2], experts)
    (grad,) = torch.autograd.grad((found[1] * torch.arange(2)).sum(), place.router.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_router_logits_and_the_auxiliary_loss_are_lost_in_a_replay() -> None:
    key = "qwen3_moe"
    model = prepared(key)
    inputs = make_inputs(key)
    options = {"labels": inputs["input_ids"], "output_router_logits": True}
    expected = model(**inputs, **options)
    _, record = recorded(model, key)
    with turnout.replay_routing(model, record):
        got = model(**inputs, **options)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)
    torch.testing.assert_close(got.loss, expected.loss)
    for a, b in zip(got.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(a, b)


def test_a_record_does_not_survive_a_file(tmp_path: Path) -> None:
    _, record = recorded(prepared(KEY), KEY)
    torch.save(record, tmp_path / "record.pt")
    save_file(record, tmp_path / "record.safetensors")
    for found in (torch.load(tmp_path / "record.pt"), load_file(tmp_path / "record.safetensors")):
        assert found.keys() == record.keys()
        assert all(torch.equal(found[name], record[name]) for name in record)


def test_steps_of_generation_are_one_call() -> None:
    model = prepared("qwen3_moe")
    ids = make_inputs("qwen3_moe")["input_ids"]
    with turnout.record_routing(model) as record:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    for place in places(model):
        shapes = [tuple(e.shape) for n, e in record.items() if n.startswith(f"{place.name}/")]
        assert shapes == [(24, 2), (2, 2), (2, 2), (2, 2)]


def test_several_calls_are_given_in_another_order() -> None:
    model = prepared(KEY)
    with turnout.record_routing(model) as record:
        outs = [run(model, seed=seed) for seed in (0, 1)]
    other_choice(model)
    with turnout.replay_routing(model, record):
        for seed, out in enumerate(outs):
            assert relative(run(model, seed=seed), out) < 1e-5
    assert relative(run(model), outs[0]) > 1e-3


def test_a_record_of_the_plain_model_does_not_fit_it_in_peft() -> None:
    base = tiny("qwen3_moe")
    _, record = recorded(base, "qwen3_moe")
    options = {"target_parameters": ["gate.weight", *turnout.lora_targets(base)]}
    model = with_lora(base, **options)
    with turnout.replay_routing(model, record), turnout.record_routing(model) as again:
        loss_of(forward(model, "qwen3_moe")).backward()
    assert sets(again) == sets(record)
    assert any("gate" in name and "lora" in name for name in grads(model))


@pytest.mark.parametrize("how", HOW)
def test_a_replay_under_checkpointing_chooses_again(how: str) -> None:
    plain = training(patched=False)
    _, record = recorded(plain, KEY)
    record = shifted(record)
    with turnout.replay_routing(plain, record):
        out = run(plain)
        loss_of(out).backward()
    expected = grads(plain)
    model = enable(training(patched=False))
    if how != "unpatched":
        turnout.patch(model, router=how)
    before = snapshot(model)
    for inside in (True, False):
        with turnout.replay_routing(model, record), choices() as counted:
            got = run(model)
            if inside:
                loss_of(got).backward()
        assert counted.call_count == 0
        if not inside:
            with choices() as counted:
                loss_of(got).backward()
            assert counted.call_count == 0
        assert_same_step((got.detach(), grads(model)), (out.detach(), expected), floor=NOISE)
        assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("how", HOW)
def test_two_replays_before_one_backward_mix_their_records(how: str) -> None:
    plain = training(patched=False)
    _, first = recorded(plain, KEY)
    second = shifted(first)
    both = {**first, **{name.replace("/0", "/1"): e for name, e in second.items()}}
    with turnout.replay_routing(plain, both):
        total = loss_of(run(plain)) + 2 * loss_of(run(plain, seed=1))
    total.backward()
    expected = grads(plain)
    model = enable(training(patched=False))
    if how != "unpatched":
        turnout.patch(model, router=how, routing_cache=how == "fused")
    losses = []
    for seed, record in enumerate((first, second)):
        with turnout.replay_routing(model, record):
            losses.append(loss_of(run(model, seed=seed)))
    (losses[0] + 2 * losses[1]).backward()
    assert_same_step((total.detach(), grads(model)), (total.detach(), expected), floor=NOISE)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_a_recompute_is_recorded_as_a_call(how: str, reentrant: bool) -> None:
    model = training(patched=False)
    _, expected = recorded(model, KEY)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if how != "unpatched":
        turnout.patch(model, router=how)
    with turnout.record_routing(model) as record:
        loss_of(run(model)).backward()
    assert sets(record) == sets(expected)


def test_a_replay_in_reentrant_checkpoints_is_taken() -> None:
    model = training(patched=False)
    _, record = recorded(model, KEY)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(Unsupported, match=r"use_reentrant=True.*expected non-reentrant"),
        turnout.replay_routing(model, record),
    ):
        run(model)
    model.eval()
    with turnout.replay_routing(model, record):
        run(model)


@pytest.mark.parametrize("how", HOW)
def test_a_replay_in_a_checkpoint_that_it_does_not_see_is_taken(how: str) -> None:
    model = prepared(KEY, how)
    _, record = recorded(model, KEY)
    layer = model.model.layers[0]
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: checkpoint(own, x, use_reentrant=False)
    with (
        pytest.raises(Unsupported, match=r"gate runs inside a torch.utils.checkpoint call"),
        turnout.replay_routing(model, record),
    ):
        forward(model, KEY)


def test_a_recompute_of_a_forward_outside_takes_the_record() -> None:
    model = enable(training(patched=False))
    _, record = recorded(model, KEY)
    out = run(model)
    with (
        pytest.raises(Unsupported, match="recomputed in a backward pass, for a forward whose"),
        turnout.replay_routing(model, record),
    ):
        loss_of(out).backward()


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("how", HOW)
def test_compiled_code_chooses_again(how: str, when: str) -> None:
    """The graph breaks at a router in a replay."""
    torch._dynamo.reset()
    model = prepared("qwen3_moe", how)
    _, record = recorded(model, "qwen3_moe")
    record = shifted(record)
    with turnout.replay_routing(model, record):
        expected = forward(model, "qwen3_moe")
    compiled = torch.compile(model, backend="eager")
    if when == "before":
        compiled(**make_inputs("qwen3_moe"), use_cache=False)
    with turnout.replay_routing(model, record):
        got = out_tensor(compiled(**make_inputs("qwen3_moe"), use_cache=False))
    assert relative(got, expected) < 1e-5


def test_one_graph_holds_a_replay() -> None:
    torch._dynamo.reset()
    model = prepared("qwen3_moe", "fused")
    _, record = recorded(model, "qwen3_moe")
    first = next(iter(places(model)))
    whole = torch.compile(first.block, backend="eager", fullgraph=True)
    one = {name: experts for name, experts in record.items() if name.startswith(first.name)}
    x = torch.randn(2, 12, 64)
    with pytest.raises(torch._dynamo.exc.Unsupported), turnout.replay_routing(model, one):
        whole(x)
    assert torch.is_tensor(whole(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_integers_of_an_engine_are_refused(dtype: torch.dtype) -> None:
    model = prepared(KEY)
    out, record = recorded(model, KEY)
    with turnout.replay_routing(model, {name: e.to(dtype) for name, e in record.items()}):
        assert relative(forward(model, KEY), out) < 1e-5


def renamed(record: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): experts for name, experts in record.items()}


FIRST = "model.layers.0.mlp.gate"
BAD = {
    "no calls": (lambda r: {}, "has 0 routers; expected the model's 2"),
    "another model": (
        lambda r: renamed(r, "layers.1", "layers.7"),
        r"Not in the model: \['model.layers.7.mlp.gate'\]; not in the record: \['model.layers.1",
    ),
    "a key without a call": (lambda r: renamed(r, "/0", ""), "expected '<router>/<call>'"),
    "a gap": (
        lambda r: r | {f"{FIRST}/2": r[f"{FIRST}/0"]},
        r"calls \[0, 2\] of model.layers.0.mlp.gate; expected 0..n without gaps",
    ),
    "floats": (
        lambda r: {n: e.float() for n, e in r.items()},
        "is torch.float32; expected a tensor of integers",
    ),
    "lists": (lambda r: {n: e.tolist() for n, e in r.items()}, "is list; expected a tensor"),
    "fewer tokens": (
        lambda r: {n: e[:-1] for n, e in r.items()},
        r"gate/0 has shape \(23, 2\); expected \(24, 2\), tokens and experts per token",
    ),
    "more experts": (
        lambda r: {n: torch.cat([e, e], 1) for n, e in r.items()},
        r"gate/0 has shape \(24, 4\); expected \(24, 2\)",
    ),
    "an expert too far": (
        lambda r: {n: e + 4 for n, e in r.items()},
        r"gate/0 holds \d+..1\d; expected 0..7",
    ),
    "a negative expert": (lambda r: {n: e - 1 for n, e in r.items()}, r"gate/0 holds -1..\d"),
    "a layer less": (
        lambda r: {f"{FIRST}/0": r[f"{FIRST}/0"]},
        "the record has 0 calls of model.layers.1.mlp.gate; got call 1",
    ),
    "a call more": (
        lambda r: r | {f"{FIRST}/1": r[f"{FIRST}/0"]},
        "model.layers.0.mlp.gate was called 1 times; expected 2",
    ),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_replayed(case: str, how: str) -> None:
    model = prepared("qwen3_moe", how)
    before = snapshot(model)
    _, record = recorded(model, "qwen3_moe")
    change, words = BAD[case]
    with pytest.raises(ValueError, match=words), turnout.replay_routing(model, change(record)):
        forward(model, "qwen3_moe")
    assert changes(before, snapshot(model)) == []
    forward(model, "qwen3_moe")


def test_a_call_more_than_recorded_is_free() -> None:
    model = prepared("qwen3_moe")
    _, record = recorded(model, "qwen3_moe")
    words = r"has 1 calls of model\.layers\.0\.mlp\.gate; got call 2"
    with turnout.replay_routing(model, record):
        forward(model, "qwen3_moe")
        with pytest.raises(ValueError, match=words):
            forward(model, "qwen3_moe")


@pytest.mark.parametrize("key", OWN)
def test_a_router_that_can_not_be_replayed_is_left_out(key: str) -> None:
    model = prepared(key)
    before = snapshot(model)
    with (
        pytest.raises(Unsupported, match=r"can not be recorded: .*; expected a router"),
        turnout.record_routing(model),
    ):
        pass
    name = next(iter(places(model))).name
    record = {f"{name}/0": torch.zeros(24, 2, dtype=torch.int32)}
    with (
        pytest.raises(Unsupported, match=r"can not be replayed: .*; expected a router"),
        turnout.replay_routing(model, record),
    ):
        pass
    assert changes(before, snapshot(model)) == []


def test_a_replay_inside_a_replay_is_taken() -> None:
    model = prepared("qwen3_moe")
    before = snapshot(model)
    _, record = recorded(model, "qwen3_moe")
    with (
        pytest.raises(ValueError, match="replay_routing inside replay_routing"),
        turnout.replay_routing(model, record),
        turnout.replay_routing(model, record),
    ):
        pass
    assert changes(before, snapshot(model)) == []


def test_a_model_without_routers_is_recorded() -> None:
    model = torch.nn.Linear(2, 2)
    for context in (turnout.record_routing(model), turnout.replay_routing(model, {})):
        with pytest.raises(ValueError, match="Linear has no router that turnout knows"), context:
            pass


def test_a_replayed_router_calls_the_kernel_of_an_unpatched_model() -> None:
    """Unpatched, and with router='model', the definition runs; `fused` asks `turnout.route`."""
    for how, count in (("unpatched", 0), ("model", 0), ("fused", 2)):
        model = prepared("qwen3_moe", how)
        _, record = recorded(model, "qwen3_moe")
        from turnout.integrations import router_outputs

        ran = mock.Mock(side_effect=router_outputs.route)
        patch = mock.patch.object(router_outputs, "route", ran)
        with patch, turnout.replay_routing(model, record):
            forward(model, "qwen3_moe")
        assert ran.call_count == count, how


def test_an_error_in_the_block_is_replaced_by_that_of_unused_calls() -> None:
    model = prepared("qwen3_moe")
    before = snapshot(model)
    _, record = recorded(model, "qwen3_moe")
    with pytest.raises(KeyError), turnout.replay_routing(model, record):
        raise KeyError
    assert changes(before, snapshot(model)) == []


def test_the_record_of_a_copy_is_of_the_original() -> None:
    model = prepared("qwen3_moe", "fused")
    with turnout.record_routing(model) as record:
        twin = copy.deepcopy(model)
        forward(twin, "qwen3_moe")
        assert record == {}
