"""Routers under activation checkpointing: the recompute uses the experts that the forward chose.

`attach` puts a `context_fn` on the checkpoint functions of a model (`gradient_checkpointing_enable`
of transformers, `CheckpointWrapper` of torch). Each call of `torch.utils.checkpoint` then has a
store of its own: a swapped router adds the experts it chose to the stores that are open, and in the
recompute it reads them back. So any number of forwards may come before a backward, and a backward
may come after the router's forward was put back: the recompute runs what the forward ran.

Reentrant checkpointing has no `context_fn`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from turnout.specs import Unsupported

# transformers' attribute on its layers, and that of torch's CheckpointWrapper.
_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
# What a swapped router has in its `__dict__`.
_SWAPPED = ("_turnout_router", "forward", "route_tokens_to_experts")
_WARNED = "_turnout_reentrant_warned"
_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


@dataclass(eq=False)
class _Store:
    """The experts chosen in one checkpointed forward, by router and call."""

    chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    routers: dict[int, tuple[nn.Module, dict[str, Any]]] = field(default_factory=dict)


class _Frames(threading.local):
    """What this thread is in; autograd runs a recompute in a thread of its own."""

    def __init__(self) -> None:
        self.stack: list[_Forward | _Recompute] = []


_frames = _Frames()


class _Forward:
    def __init__(self, store: _Store) -> None:
        self.store = store

    def __enter__(self) -> None:
        _frames.stack.append(self)

    def __exit__(self, *_: object) -> None:
        _frames.stack.remove(self)


class _Recompute:
    """Entered once for each backward through the checkpoint; reads from the start each time."""

    def __init__(self, store: _Store) -> None:
        self.store = store
        self.at: dict[int, int] = {}
        self.before: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> None:
        self.at = dict.fromkeys(self.store.chosen, 0)
        for module, attributes in self.store.routers.values():
            self.before.append((module, _exchange(module, attributes)))
        _frames.stack.append(self)

    def __exit__(self, *_: object) -> None:
        _frames.stack.remove(self)
        while self.before:
            _exchange(*self.before.pop())

    def next(self, module: nn.Module) -> Tensor | None:
        call = self.at.get(id(module))
        if call is None:
            return None
        chosen = self.store.chosen[id(module)]
        assert call < len(chosen), "the recompute calls a router more often than the forward did"
        self.at[id(module)] = call + 1
        return chosen[call]


def _exchange(module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """Put these into the module's `__dict__` in the place of what was there, which is returned."""
    values = vars(module)
    before = {name: values.pop(name) for name in _SWAPPED if name in values}
    values.update(attributes)
    return before


def remembered(module: nn.Module) -> Tensor | None:
    """(T, K) experts that the forward chose at this call of a router, None outside a recompute."""
    for frame in reversed(_frames.stack):
        if isinstance(frame, _Recompute):
            return frame.next(module)
    return None


def remember(module: nn.Module, experts_TK: Tensor) -> None:
    """Keep the choice for the recompute of each checkpointed forward that is under way."""
    for frame in reversed(_frames.stack):
        if isinstance(frame, _Recompute):
            return
        values = vars(module)
        attributes = {name: values[name] for name in _SWAPPED if name in values}
        frame.store.routers[id(module)] = module, attributes
        # the tensor itself, as what was counted of it travels with it
        frame.store.chosen.setdefault(id(module), []).append(experts_TK)


def is_followed() -> bool:
    """A checkpoint that this file reaches is under way, in its forward or its recompute."""
    return bool(_frames.stack)


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint function with a store for each call; the user's own `context_fn` runs inside."""

    original: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`torch.utils.checkpoint.checkpoint`; compiled code takes no `context_fn` of this kind."""
        if torch.compiler.is_compiling():
            return self.original(function, *args, **kwargs)
        theirs = getattr(self.original, "keywords", {}).get("context_fn")  # of a partial
        context_fn = partial(_contexts, kwargs.pop("context_fn", theirs))
        return self.original(function, *args, context_fn=context_fn, **kwargs)


def _contexts(theirs: Callable[[], _Contexts] | None) -> _Contexts:
    store = _Store()
    ours = _Forward(store), _Recompute(store)
    if theirs is None:
        return ours
    forward, recompute = theirs()
    return _Both(ours[0], forward), _Both(ours[1], recompute)


class _Both:
    """Two contexts as one that can be entered again, as a second backward does."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts
        self.stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stacks.append(stack.pop_all())

    def __exit__(self, *exception: Any) -> bool | None:
        return self.stacks.pop().__exit__(*exception)


def _why_not(function: Any) -> str:
    """Why this checkpoint function can not be reached, or an empty string."""
    inner = function.func if isinstance(function, partial) else function
    options = function.keywords if isinstance(function, partial) else {}
    # transformers 5.17 and later: a closure around `checkpoint` that offloads what is saved
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
    is_offload = name.startswith("transformers.modeling_utils.PreTrainedModel.") and name.endswith(
        "checkpointing_enable.<locals>.checkpoint_func"
    )
    if inner is not checkpoint and not is_offload:
        return f"checkpointing runs through {inner!r}, not through torch.utils.checkpoint"
    if options.get("use_reentrant") is not False:
        return f"checkpointing has use_reentrant={options.get('use_reentrant')!r}"
    return "checkpointing has debug=True" if options.get("debug") else ""


def attach(model: nn.Module, *, strict: bool) -> None:
    """Give every checkpoint function that is enabled below `model` a store. Twice changes nothing.

    Raises:
        Unsupported: with `strict`, a checkpoint that will run and that can not be reached. Without
            it, one warning.
    """
    for module in model.modules():
        for name in _FUNCTIONS:
            function = vars(module).get(name)
            if function is None or isinstance(function, Checkpointed):
                continue
            if name == _FUNCTIONS[0] and not getattr(module, "gradient_checkpointing", False):
                continue
            why = _why_not(function)
            if not why:
                setattr(module, name, Checkpointed(function))
            elif torch.is_grad_enabled() and (module.training or name != _FUNCTIONS[0]):
                _refuse(model, f"{type(module).__name__}: {why}", strict)


_REMEDY = (
    "expected non-reentrant checkpointing of torch. Call model.gradient_checkpointing_enable("
    "gradient_checkpointing_kwargs={'use_reentrant': False})"
)


def _refuse(model: nn.Module, why: str, strict: bool) -> None:
    if strict:
        raise Unsupported(
            f"{why}, so its recompute would choose experts again instead of replaying them; "
            f"{_REMEDY}"
        )
    if _WARNED not in vars(model):
        vars(model)[_WARNED] = True
        warnings.warn(f"routing_cache=True has no effect: {why}; {_REMEDY}", stacklevel=2)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        vars(module).pop(_WARNED, None)
        for name in _FUNCTIONS:
            function = vars(module).get(name)
            if isinstance(function, Checkpointed):
                setattr(module, name, function.original)


def follow(model: nn.Module, *, strict: bool) -> list[RemovableHandle]:
    """Forward pre-hooks that attach, on the root and on each model of transformers below it.

    Checkpointing may be enabled at any time, and a decoder may be called without its root.
    """
    hook = partial(_before_forward, strict)
    tops = {id(m): m for m in model.modules() if hasattr(m, "gradient_checkpointing_enable")}
    return [m.register_forward_pre_hook(hook) for m in {id(model): model, **tops}.values()]


def _before_forward(strict: bool, module: nn.Module, _: Any) -> None:
    if not torch.compiler.is_compiling():
        attach(module, strict=strict)
