"""A router whose forward another library replaces: before `patch`, after it, and in between.

`kernels` does that to routers whose class names a layer (transformers 5.23: Qwen3.5-MoE, Laguna):
with `use_kernels` each `train` and `eval` binds the mapped layer's forward, or the class's own.
"""

from __future__ import annotations

from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hf_models import forward, relative, tiny
from test_router_fused import live_routers
from torch import nn

import turnout
from turnout import Unsupported
from turnout.integrations.router_forward import router_forward

KEY = "qwen3_moe"


def put_back(router: nn.Module) -> None:
    """What `kernels` does where no layer is mapped."""
    router.forward = MethodType(type(router).forward, router)


def runs_ours(router: nn.Module) -> bool:
    return getattr(vars(router).get("forward"), "func", None) is router_forward


def test_a_forward_put_over_ours_is_called_fused() -> None:
    model = tiny(KEY)
    report = turnout.patch(model, router="fused")
    first, second = live_routers(model)
    first.forward = MethodType(lambda self, x: type(self).forward(self, x), first)
    second.forward = update_wrapper(partial(second.forward), second.forward)  # as accelerate hooks
    assert [row.status for row in report.routers] == ["model", "fused"]
    assert "the instance has the forward" in report.routers[0].detail
    with pytest.raises(Unsupported, match=r"router model \(the instance has the forward"):
        report.require("fused")


def test_patch_and_unpatch_break_a_router_that_accelerate_hooked_in_between() -> None:
    """Its wrapper keeps our forward, and calls it after `unpatch`."""
    model = tiny(KEY)
    expected, seen = forward(model, KEY), []

    class Hook(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            seen.append(1)
            return output

    turnout.patch(model, router="fused")
    for router in live_routers(model):
        add_hook_to_module(router, Hook())
    turnout.patch(model, router="fused").require("fused")
    assert relative(forward(model, KEY), expected) < 1e-5
    turnout.unpatch(model)
    assert torch.equal(forward(model, KEY), expected)
    assert len(seen) == 4
    for router in live_routers(model):
        remove_hook_from_module(router)
    assert torch.equal(forward(model, KEY), expected)


def test_our_forward_is_not_missed_where_the_class_own_one_was_put_back() -> None:
    model = tiny(KEY)
    report = turnout.patch(model, router="fused").require("fused")
    put_back(live_routers(model)[0])
    assert [row.status for row in report.routers] == ["model", "fused"]
    with pytest.raises(Unsupported, match=r"its own forward was put back.*patch\(model\) again"):
        report.require("fused")
    turnout.patch(model, router="fused").require("fused")


def test_the_class_own_forward_on_the_instance_counts_as_another_library() -> None:
    model = tiny(KEY)
    expected = forward(model, KEY)
    for router in live_routers(model):
        put_back(router)
    turnout.patch(model, router="fused").require("fused")
    assert all(map(runs_ours, live_routers(model)))
    assert relative(forward(model, KEY), expected) < 1e-5
    turnout.unpatch(model)
    assert torch.equal(forward(model, KEY), expected)


@pytest.mark.parametrize("theirs", [True, False], ids=["theirs", "own"])
def test_a_replay_does_not_reach_a_router_that_lost_our_forward(theirs: bool) -> None:
    model = tiny(KEY)
    report = turnout.patch(model, router="fused")
    with turnout.record_routing(model) as record:
        expected = forward(model, KEY)
    router = live_routers(model)[0]
    if theirs:
        router.forward = MethodType(lambda self, x: type(self).forward(self, x), router)
        with (
            pytest.raises(Unsupported, match="forward of another library"),
            turnout.replay_routing(model, record),
        ):
            pass
        return
    put_back(router)
    before: dict[str, Any] = dict(vars(router))
    with turnout.replay_routing(model, record):
        assert relative(forward(model, KEY), expected) < 1e-5
    assert vars(router) == before
    assert report.routers[0].detail.startswith("its own forward was put back")
