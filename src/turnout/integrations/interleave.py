"""gate_up in SonicMoE's row order, in place, behind a guard.

    stack[e] = [gate 0, gate 1, ..., up 0, up 1, ...]  to  [gate 0, up 0, gate 1, up 1, ...]

`interleave` reorders the rows of one module's stack (and of its gradient), expert by expert, so
nothing of the stack's size is allocated; the parameter stays the same object. From then on

- the module's `state_dict` holds the usual order, and `load_state_dict` takes it: two hooks;
- reading or setting the attribute from outside raises: the module's class becomes a subclass of its
  own, with a property under that name. transformers' eager experts, PEFT's wrappers and its merging
  all go through the attribute, so none computes on reordered rows. turnout reads `_parameters`.

`restore` undoes it. What goes by the parameter itself (`named_parameters`, an optimizer's state)
has the rows reordered until then.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turnout.experts.weights import alternating, halves
from turnout.integrations.architectures import Layout, get_path
from turnout.specs import Unsupported

_NAME = "_turnout_interleaved"  # class attribute of a guarded module: the parameter's name


@dataclass
class Interleaved:
    """What `interleave` did to one module.

    Attributes:
        holder: the module that holds the parameter, itself below the experts in a few models.
        name: of the parameter.
        handles: of the state-dict hooks.
    """

    holder: nn.Module
    name: str
    handles: list[RemovableHandle] = field(default_factory=list)


def interleaved_layout(layout: Layout) -> Layout:
    """The layout of the stacks as they lie after `interleave`; without a gate, the same."""
    if not layout.spec.activation.gated:
        return layout
    activation = replace(layout.spec.activation, interleaved=True)
    return replace(layout, spec=replace(layout.spec, activation=activation))


def place_of(module: nn.Module, layout: Layout) -> tuple[nn.Module, str]:
    """The module that holds gate_up, and the parameter's name there."""
    head, _, name = layout.gate_up.rpartition(".")
    return (get_path(module, head) if head else module), name


def interleave(module: nn.Module, layout: Layout) -> Interleaved:
    """Reorder the rows of gate_up, hook the state dict, guard the attribute."""
    holder, name = place_of(module, layout)
    done = Interleaved(holder, name)
    _reorder(holder._parameters[name], alternating)
    done.handles.append(holder.register_state_dict_post_hook(_to_usual))
    done.handles.append(holder.register_load_state_dict_pre_hook(_from_usual))
    holder.__class__ = _guarded(type(holder), name)
    return done


def restore(done: Interleaved) -> None:
    """Undo `interleave`."""
    holder: Any = done.holder
    if _NAME not in vars(type(holder)):
        raise Unsupported(
            f"{type(holder).__name__} has got another class since turnout.patch; expected the one "
            "that guards its interleaved rows. Undo what came after patch first"
        )
    for handle in done.handles:
        handle.remove()
    holder.__class__ = type(holder).__mro__[1]
    _reorder(holder._parameters[done.name], halves)


@torch.no_grad()
def _reorder(parameter: Any, order: Any) -> None:
    """The rows of a stack and of its gradient, one expert's copy at a time."""
    for stack in (parameter.data, parameter.grad):
        if stack is not None:
            for matrix in stack:
                matrix.copy_(order(matrix, 0))


def _to_usual(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State-dict hook: a copy of the stack in the usual order."""
    name: str = getattr(type(module), _NAME)  # of a base class, where another one came on top
    key = prefix + name
    if key in state_dict:
        state_dict[key] = halves(state_dict[key], 1)


def _from_usual(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local: Any, *_: Any
) -> None:
    """Load-state-dict hook; a stack of another shape is left for torch to refuse."""
    name: str = getattr(type(module), _NAME)
    given, parameter = state_dict.get(prefix + name), module._parameters[name]
    if given is None or parameter is None or given.shape != parameter.shape:
        return
    if local.get("assign_to_params_buffers"):  # since torch 2.1
        raise Unsupported(f"load_state_dict(assign=True): {_explain(type(module), name)}")
    state_dict[prefix + name] = alternating(given, 1)


def _explain(cls: type, name: str) -> str:
    return (
        f"{name} of {cls.__name__} has its gate and up rows interleaved in memory for "
        "backend='sonic', so it can not be read or replaced from outside; expected turnout's "
        "forward, state_dict() or load_state_dict() only. Call turnout.unpatch(model) before you "
        "attach or merge adapters, run eager experts or touch the weights, and patch again after"
    )


_classes: dict[tuple[type, str], Any] = {}


def _guarded(cls: type, name: str) -> Any:
    """A subclass whose attribute `name` raises; same name, as it is that class to everybody."""
    if (cls, name) in _classes:
        return _classes[cls, name]

    def refuse(module: nn.Module) -> Tensor:
        raise Unsupported(_explain(cls, name))

    def reduce(module: nn.Module, protocol: Any) -> Any:
        return _new, (cls, name), dict(vars(module))

    body = {
        name: property(refuse),
        _NAME: name,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    _classes[cls, name] = type(cls.__name__, (cls,), body)
    return _classes[cls, name]


def _new(cls: type, name: str) -> Any:
    """An empty module of the guarded class, for copies and pickles."""
    guarded = _guarded(cls, name)
    return guarded.__new__(guarded)
