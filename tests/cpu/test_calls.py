"""Calls of `expert_mlp` are told apart, quickly or not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from turnout import shortcuts
from turnout.experts import call as calls
from turnout.experts.call import Call, called
from turnout.shortcuts import empty_on, same_kind

ONE = torch.zeros(4, 8)
OTHERS: dict[str, Callable[[], Tensor]] = {
    "shape": lambda: torch.zeros(5, 8),
    "strides": lambda: torch.zeros(8, 4).t(),
    "dtype": lambda: ONE.half(),
    "requires_grad": lambda: torch.zeros(4, 8, requires_grad=True),
    "type": lambda: torch.nn.Parameter(ONE, requires_grad=False),
}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_calls", OrderedDict())
    monkeypatch.setattr(calls, "_recent", ())


@pytest.fixture(params=[True, False], ids=["quick", "public"])
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(shortcuts, "_TensorGuards", None)
        monkeypatch.setattr(shortcuts, "_empty_strided_cuda", None)
    return bool(request.param)


def ask(*tensors: Tensor | None, options: tuple[Any, ...] = ("a",)) -> Call:
    return called(tensors, options, lambda: Call(1, torch.float32, ""))


def test_torch_has_moved_what_makes_it_quick() -> None:
    """Not wrong, but every call of `expert_mlp` then takes tens of microseconds more."""
    assert shortcuts._TensorGuards is not None
    assert same_kind([ONE]) is not None
    if torch.backends.cuda.is_built():
        assert shortcuts._empty_strided_cuda is not None


@pytest.mark.parametrize("what", OTHERS)
def test_another_kind_is_taken_for_the_same(what: str) -> None:
    is_like = same_kind([ONE, ONE])
    assert is_like is not None
    assert is_like(ONE, torch.ones(4, 8))
    assert not is_like(ONE, OTHERS[what]())
    assert not is_like(OTHERS[what](), ONE)


def test_a_subclass_is_judged_by_the_quick_way() -> None:
    class Own(Tensor):
        pass

    assert same_kind([ONE.as_subclass(Own)]) is None


@pytest.mark.parametrize("what", [w for w in OTHERS if w != "requires_grad"])
def test_calls_of_another_kind_share_a_call(what: str, quick: bool) -> None:
    first = ask(ONE, ONE)
    other = ask(ONE, OTHERS[what]())
    assert other is not first
    for _ in range(2):
        assert ask(ONE, torch.ones(4, 8)) is first
        assert ask(ONE, OTHERS[what]()) is other


def test_whether_gradients_are_asked_for_makes_another_call(quick: bool) -> None:
    """It does not: what is checked does not depend on it."""
    assert ask(ONE, OTHERS["requires_grad"]()) is ask(ONE, ONE)


def test_who_is_none_is_forgotten(quick: bool) -> None:
    found = {ask(ONE, *rest) for rest in ((ONE, None), (None, ONE), (ONE, ONE), (None, None))}
    assert len(found) == 4
    assert ask(ONE, None, ONE) in found


def test_options_and_autocast_are_forgotten(quick: bool) -> None:
    plain = ask(ONE)
    assert ask(ONE, options=("b",)) is not plain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ask(ONE) is not plain
    assert ask(ONE) is plain


def test_calls_that_are_not_recent_are_checked_again() -> None:
    made = [ask(torch.zeros(n, 8)) for n in range(1, 3 * calls.RECENT)]
    assert len(calls._recent) == calls.RECENT
    assert [ask(torch.zeros(n, 8)) for n in range(1, 3 * calls.RECENT)] == made


@pytest.mark.parametrize("wrong", ["x", 3, [1.0]])
def test_what_is_no_tensor_is_not_left_to_the_check(wrong: object, quick: bool) -> None:
    ask(ONE, ONE)
    with pytest.raises(ZeroDivisionError):
        called((ONE, wrong), ("a",), lambda: 1 / 0)  # type: ignore[arg-type,return-value]


def test_memory_is_made_on_another_device(quick: bool) -> None:
    made = empty_on(torch.device("cpu"))((2, 3), (1, 2), torch.float16)
    assert (made.shape, made.stride(), made.dtype) == ((2, 3), (1, 2), torch.float16)
    assert made.device.type == "cpu"


def test_deterministic_mode_leaves_memory_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch fills new memory in that mode; what compiled code calls does not."""
    asked: list[str] = []
    monkeypatch.setattr(shortcuts, "_empty_strided_cuda", lambda *_: asked.append("quick"))
    monkeypatch.setattr(torch, "empty_strided", lambda *_, **__: asked.append("torch"))
    for enabled in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=enabled: on)
        empty_on(torch.device("cuda", 0))((2,), (1,), torch.float16)
    assert asked == ["quick", "torch"]
