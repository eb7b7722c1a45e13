"""`patch(routing_cache=True)`: the recompute of activation checkpointing chooses nothing again."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hf_models import assert_same_step, changes, forward, loss_of, snapshot, step, tiny, with_lora
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import modeling_utils

import turnout
from turnout.integrations import checkpoints
from turnout.integrations.checkpoints import Checkpointed
from turnout.integrations.router_places import places
from turnout.routing import rules
from turnout.verify.tiny import TINY, make_inputs, out_tensor

KEY = "deepseek_v3"  # chooses with a bias that no gradient needs, so a test may change it
NOT = ("jetmoe", "diffusion_gemma_text")  # transformers 5.17 does not checkpoint them
NOISE = 1e-3


def training(key: str = KEY, patched: bool = True, **options: Any) -> Any:
    model = tiny(key).train()
    if patched:
        turnout.patch(model, routing_cache=True, **options)
    return model


def enable(model: Any, **kwargs: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False, **kwargs})
    return model


def run(model: Any, key: str = KEY, seed: int = 0) -> Tensor:
    torch.manual_seed(7)
    return out_tensor(model(**make_inputs(key, seed=seed), use_cache=False))


def grads(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def other_choice(model: nn.Module, sign: float = 1.0) -> None:
    """Change what the routers choose, and nothing else of what they compute."""
    for place in places(model):
        bias = place.router.e_score_correction_bias
        bias.add_(sign * torch.linspace(-5, 5, len(bias)))


@contextmanager
def choices() -> Any:
    """Counts the selections of `turnout.routing.rules`."""
    with mock.patch.object(rules, "top_indices", side_effect=rules.top_indices) as counted:
        yield counted


DEFINITIONS = [(key, "model") for key in ("qwen3_moe", KEY, "gpt_oss", "zaya", "llama4_text")]


@pytest.mark.parametrize(
    ("key", "router"), [*((key, "fused") for key in TINY if key not in NOT), *DEFINITIONS]
)
def test_gradients_change(key: str, router: str) -> None:
    expected = step(tiny(key).train(), key)
    model = training(key, router=router)
    if TINY[key].inputs != "encdec":
        enable(model)
    assert_same_step(step(model, key), expected, floor=NOISE)


@pytest.mark.parametrize("router", ["model", "fused"])
@pytest.mark.parametrize("order", ["enabled, patched", "patched, enabled"])
def test_the_recompute_chooses_again(order: str, router: str) -> None:
    model = training(patched=False)
    expected_out = run(model)
    loss_of(expected_out).backward()
    expected = grads(model)
    if order == "enabled, patched":
        enable(model)
    turnout.patch(model, routing_cache=True, router=router)
    enable(model)
    with choices() as counted:
        out = run(model)
        in_forward = counted.call_count
        other_choice(model)
        loss_of(out).backward()
    assert in_forward > 0
    assert counted.call_count == in_forward
    assert_same_step((out.detach(), grads(model)), (expected_out.detach(), expected), floor=NOISE)


def test_the_test_can_tell() -> None:
    """Without the cache the recompute does choose again, so the tests above could fail."""
    model = enable(training(patched=False))
    turnout.patch(model, router="fused")
    with choices() as counted:
        out = run(model)
        before = counted.call_count
        loss_of(out).backward()
    assert counted.call_count == 2 * before


@pytest.mark.parametrize("router", ["model", "fused"])
def test_two_forwards_before_one_backward_share_a_store(router: str) -> None:
    plain = training(patched=False)
    (loss_of(run(plain, seed=0)) + 2 * loss_of(run(plain, seed=1))).backward()
    model = enable(training(router=router))
    outs = [run(model, seed=seed) for seed in (0, 1)]
    other_choice(model)
    (loss_of(outs[0]) + 2 * loss_of(outs[1])).backward()
    assert_same_step((outs[0], grads(model)), (outs[0], grads(plain)), floor=NOISE)


def test_a_second_backward_finds_an_empty_store() -> None:
    model = enable(training())
    out = run(model)
    loss = loss_of(out)
    loss.backward(retain_graph=True)
    first = grads(model)
    other_choice(model)
    loss.backward()
    assert_same_step((out.detach(), grads(model)), (out.detach(), first))


@pytest.mark.parametrize("early_stop", [True, False])
def test_nested_checkpoints_choose_again(early_stop: bool) -> None:
    plain = training(patched=False)
    out = run(plain)
    loss_of(out).backward()
    expected = grads(plain)
    model = enable(training(), early_stop=early_stop)
    layer = model.model.layers[-1]
    layer.mlp = checkpoint_wrapper(layer.mlp, CheckpointImpl.NO_REENTRANT, early_stop=early_stop)
    got = run(model)
    other_choice(model)
    with choices() as counted:
        loss_of(got).backward()
    assert counted.call_count == 0
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in grads(model).items()}
    assert_same_step((got.detach(), found), (out.detach(), expected), floor=NOISE)


def test_torchs_checkpoint_wrapper_is_not_reached() -> None:
    plain = training(patched=False)
    out = run(plain)
    loss_of(out).backward()
    model = training()
    layers = set(model.model.layers)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(
            checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT
        ),
        check_fn=lambda module: module in layers,
    )
    got = run(model)
    other_choice(model)
    loss_of(got).backward()
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in grads(model).items()}
    assert_same_step((got.detach(), found), (out.detach(), grads(plain)), floor=NOISE)


class Noted:
    """A context of a user, that notes when it is entered."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __enter__(self) -> None:
        self.seen.append(self.name)

    def __exit__(self, *_: object) -> None:
        self.seen.append(f"end of {self.name}")


def test_the_users_own_context_fn_is_lost() -> None:
    seen: list[str] = []
    model = training(router="fused")
    enable(model, context_fn=lambda: (Noted("forward", seen), Noted("recompute", seen)))
    with choices() as counted:
        out = run(model)
        before = counted.call_count
        loss_of(out).backward()
    assert counted.call_count == before
    layers = len(model.model.layers)
    assert seen.count("forward") == seen.count("end of forward") == layers
    assert seen.count("recompute") == seen.count("end of recompute") == layers


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_recompute_leaves_frames_behind(early_stop: bool) -> None:
    model = enable(training(), early_stop=early_stop)
    loss_of(run(model)).backward()
    assert checkpoints._frames.stack == []
    with pytest.raises(KeyError), mock.patch.object(rules, "score", side_effect=KeyError):
        run(model)
    assert checkpoints._frames.stack == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_unpatch_leaves_a_store_behind(moment: str) -> None:
    model = training(patched=False)
    if moment == "before":
        enable(model)
    before = snapshot(model)
    turnout.patch(model, routing_cache=True)
    if moment == "after":
        enable(model)
    loss_of(run(model)).backward()
    grads(model)
    layer = model.model.layers[0]
    assert isinstance(layer._gradient_checkpointing_func, Checkpointed)
    turnout.unpatch(model)
    if moment == "after":
        assert layer._gradient_checkpointing_func.func is torch.utils.checkpoint.checkpoint
    else:
        assert changes(before, snapshot(model)) == []


def test_unpatch_between_forward_and_backward_chooses_again() -> None:
    model = enable(training())
    out = run(model)
    routers = [place.router for place in places(model)]
    for router in routers:
        turnout.unpatch(router)
    with choices() as counted:
        loss_of(out).backward()
    assert counted.call_count == 0
    assert not any("forward" in vars(router) for router in routers)


def test_a_copy_chooses_again() -> None:
    model = enable(training())
    loss_of(run(model)).backward()
    expected = grads(model)
    twin = copy.deepcopy(model)
    out = run(twin)
    other_choice(twin)
    loss_of(out).backward()
    assert_same_step((out.detach(), grads(twin)), (out.detach(), expected))


def test_a_decoder_called_without_its_root_chooses_again() -> None:
    model = training()
    enable(model)
    out = model.model(**make_inputs(KEY), use_cache=False).last_hidden_state
    with choices() as counted:
        loss_of(out).backward()
    assert counted.call_count == 0


def test_peft_around_the_model_loses_the_cache() -> None:
    plain = with_lora(tiny(KEY)).train()
    plain.enable_input_require_grads()
    base = tiny(KEY)
    turnout.patch(base, routing_cache=True, router="fused")
    model = enable(with_lora(base).train())
    for one in (plain, model):
        out = run(one)
        if one is model:
            other_choice(model)
        loss_of(out).backward()
    assert_same_step((out.detach(), grads(model)), (out.detach(), grads(plain)), floor=NOISE)


def test_reentrant_checkpointing_is_said_to_be_cached() -> None:
    expected = step(tiny(KEY).train(), KEY)
    model = training()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="routing_cache=True has no effect: .*use_reentrant=True"):
        got = step(model, KEY)
    assert_same_step(got, expected, floor=NOISE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, KEY)
        model.eval()
        forward(model, KEY)


def test_checkpoints_that_are_off_are_warned_about() -> None:
    model = training()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, KEY)


OFFLOADS = hasattr(modeling_utils, "save_on_cpu")


@pytest.mark.skipif(not OFFLOADS, reason="transformers before 5.17 does not offload")
def test_offloaded_checkpoints_are_not_reached() -> None:
    model = training()
    options = {"use_reentrant": False}
    model.gradient_checkpointing_enable(offload=True, gradient_checkpointing_kwargs=options)
    function = model.model.layers[0]._gradient_checkpointing_func
    assert checkpoints._why_not(function) == ""


def test_another_librarys_checkpoint_is_taken_for_torchs() -> None:
    model = training()
    enable(model)

    def theirs(function: Any, *args: Any) -> Any:
        return function(*args)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = theirs
    with pytest.warns(UserWarning, match="not through torch.utils.checkpoint"):
        step(model, KEY)


def test_the_report_does_not_say_that_the_definition_runs() -> None:
    report = turnout.patch(tiny(KEY), routing_cache=True)
    assert report.to_dict()["routing_cache"] is True
    found = {(row.status, row.detail) for row in report.routers}
    assert found == {("definition", "in PyTorch, for routing_cache=True")}
    assert "router: definition" in str(report)


@pytest.mark.parametrize("router", ["model", "fused"])
def test_nan_logits_pass_in_anomaly_detection(router: str) -> None:
    model = training(router=router)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    run(model)
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(ValueError, match=r"NaN in 24 of 24 rows, first in row 0"),
    ):
        run(model)


def test_a_compiled_layer_fails_with_the_cache() -> None:
    model = training()
    enable(model)
    expected = step(model, KEY)
    compiled = torch.compile(model, backend="aot_eager")
    out = out_tensor(compiled(**make_inputs(KEY), use_cache=False))
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    loss_of(out).backward()
    assert_same_step((out.detach(), grads(model)), expected, limit=1e-4, floor=NOISE)
