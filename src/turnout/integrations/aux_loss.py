"""The load-balancing loss of transformers' models, computed by `turnout.routing.losses`.

The models call a function of their module, `load_balancing_loss_func`, by its global name, so the
instance gets a forward that is the class's own code over a copy of those globals in which the name
is ours. Which logits are recorded, the mask, the coefficient, the sum with the loss and the output
stay the model's own lines. A forward that somebody put on the instance and that imports the
function in every call, as TRL's does, is copied likewise, with an import that finds ours. No class,
module or function of another library changes.

A model is left alone if its function takes other arguments, or gives another value or gradient
than ours on made-up logits.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import builtins
import dis
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turnout.integrations.architectures import live
from turnout.routing.losses import load_balancing_loss

STATE = "_turnout_aux_loss"
NAME = "load_balancing_loss_func"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
_BEHIND = "_old_forward"  # where accelerate keeps the forward that its hook calls


def balancing(
    gate_logits: tuple[Tensor, ...] | None,
    num_experts: int | None = None,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor | int:
    """E * sum over e of f[e] * P[e], with the arguments and the result of transformers' function.

    Args:
        gate_logits: (T, E) of each layer; 0 is returned for anything but a tuple, as there.
        num_experts, top_k: E and K. attention_mask: (batch, sequence), 0 for padding.

    Returns:
        A float32 scalar on the device of the first layer.

    Raises:
        ValueError: a shape that does not fit, such as that of a mask of four dimensions.

    Source: `load_balancing_loss_func` of transformers' `modeling_mixtral`.
    """
    if not isinstance(gate_logits, tuple):
        return 0
    if gate_logits and gate_logits[0].shape[-1] != num_experts:
        raise ValueError(
            f"the router logits have {gate_logits[0].shape[-1]} experts; expected {num_experts}, "
            "as the model says. Call turnout.unpatch(model), or patch without aux_loss='fused'"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; expected (batch, sequence), as the "
            "load-balancing loss weighs tokens. Pass such a mask, or output_router_logits=False"
        )
    device = gate_logits[0].device if gate_logits else None
    logits = [z.to(device) for z in gate_logits]
    mask = None if attention_mask is None else attention_mask.to(device)
    return load_balancing_loss(logits, top_k, mask=mask).float()


@dataclass
class AuxState:
    """What a module that computes the loss carries in its `__dict__`, beside the forward.

    Attributes:
        cls: of the module. own: why it keeps its own function, or an empty string.
        theirs: the function that was on the instance and imports the loss; None if there is none.
        stock: `theirs`, or the forward of the class when this was made.
        ours: the same code with `balancing` in place of the function.
    """

    cls: type[nn.Module]
    own: str = ""
    theirs: Any = None
    stock: Any = None
    ours: Any = None

    def __post_init__(self) -> None:
        if not self.own:
            self.stock = self.theirs or self.cls.forward
            self.ours = _importing_ours(self.stock) if self.theirs else _exchanged(self.stock)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a function can not be pickled
        return {"cls": self.cls, "own": self.own, "theirs": self.theirs}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(**values)  # type: ignore[misc]


def _body(function: Any) -> FunctionType | None:
    """The function below all decorators, if it looks the loss up by name."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, FunctionType) or NAME not in inner.__code__.co_names:
        return None
    loads = (i.argval for i in dis.get_instructions(inner) if i.opname == "LOAD_GLOBAL")
    return inner if NAME in loads and NAME in inner.__globals__ else None


def _exchanged(function: Any) -> Callable[..., Any] | None:
    """The function with `balancing` under the global name, or None below an unknown decorator.

    Each decorator has what it wraps in a cell of its closure, and is copied with another cell.
    """
    if not isinstance(function, FunctionType):
        return None
    scope, cells = function.__globals__, function.__closure__
    below = vars(function).get("__wrapped__")
    if below is None:
        # without a name: torch.compile looks for the globals of a named module in that module
        scope = {k: v for k, v in scope.items() if k != "__name__"} | {NAME: balancing}
    else:
        inner = _exchanged(below)
        held = [cell.cell_contents is below for cell in cells or ()]
        if inner is None or not any(held):
            return None
        cells = tuple(
            CellType(inner) if ours else cell for ours, cell in zip(held, cells or (), strict=True)
        )
    return _copy(function, scope, cells)


def _copy(
    function: FunctionType, scope: dict[str, Any], cells: tuple[CellType, ...] | None
) -> FunctionType:
    """The function with other globals and cells."""
    # a code object of its own, as torch.compile keeps what it compiled with the code
    code = function.__code__.replace()
    made = FunctionType(code, scope, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made


def _source_module(function: Any) -> str | None:
    """The module from which the function itself imports the loss in every call."""
    if not isinstance(function, FunctionType):
        return None
    module = None
    for step in dis.get_instructions(function):
        if step.opname == "IMPORT_NAME":
            module = step.argval
        elif step.opname == "IMPORT_FROM" and step.argval == NAME:
            return module
    return None


def _importing_ours(function: FunctionType) -> FunctionType:
    """The function with an `import` that gives `balancing` for the name, from any module."""

    def find(name: str, *where: Any) -> Any:
        found = builtins.__import__(name, *where)
        names = where[2] if len(where) > 2 and where[2] else ()
        if NAME not in names:
            return found
        return SimpleNamespace(
            **{n: getattr(found, n) for n in names if n != NAME}, **{NAME: balancing}
        )

    scope = {**function.__globals__, "__builtins__": {**vars(builtins), "__import__": find}}
    return _copy(function, scope, function.__closure__)


def aux_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a model: its own code, with turnout's load-balancing loss."""
    state: AuxState | None = vars(module).get(STATE)
    if state is None or state.ours is None or _changed(module, state):
        return type(module).forward(module, *args, **kwargs)
    return state.ours(module, *args, **kwargs)


def _changed(module: nn.Module, state: AuxState) -> bool:
    """Whether the class has got another forward than the one that was copied."""
    return state.theirs is None and type(module).forward is not state.stock


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module whose class calls the function by its name."""
    seen = set()
    for name, module in model.named_modules():
        inner = live(module)
        if id(inner) not in seen and _body(type(inner).forward) is not None:
            seen.add(id(inner))
            yield name, inner


def swap_losses(model: nn.Module) -> None:
    """Give every such module the forward; those that can not have it keep a state with the why."""
    for _, module in holders(model):
        slot = _slot(module)
        state: AuxState | None = vars(module).get(STATE)
        theirs = _importer(vars(module).get(slot))
        if theirs is None and state is not None and _is_ours(vars(module).get(slot)):
            theirs = state.theirs  # patched before
        reason = _why_own(module, theirs)
        vars(module)[STATE] = AuxState(type(module), own=reason, theirs=theirs)
        if reason:
            continue
        if not _is_ours(vars(module).get(slot)):
            vars(module)[slot] = _bound(module)


def restore_loss(module: nn.Module) -> None:
    """Undo `swap_losses` on this module; any other module stays as it is."""
    state: AuxState | None = vars(module).pop(STATE, None)
    if state is None:
        return
    for slot in ("forward", _BEHIND):
        bound = vars(module).get(slot)
        if not isinstance(bound, partial) or bound.func is not aux_forward:
            continue
        if state.theirs is not None:
            vars(module)[slot] = MethodType(state.theirs, module)
        elif slot == _BEHIND:
            vars(module)[slot] = MethodType(type(module).forward, module)
        else:
            del vars(module)[slot]


def _bound(module: nn.Module) -> Any:
    """`aux_forward` of this module with the signature that Trainer and `generate` read."""
    bound = partial(aux_forward, module)
    empty = inspect.Parameter.empty
    found = inspect.signature(MethodType(type(module).forward, module)).parameters.values()
    plain = [parameter.replace(annotation=empty) for parameter in found]
    vars(bound)["__signature__"] = inspect.Signature(plain)
    return bound


def _slot(module: nn.Module) -> str:
    """The attribute that holds the forward: behind accelerate's hook where there is one."""
    return _BEHIND if "_hf_hook" in vars(module) and _BEHIND in vars(module) else "forward"


def _is_ours(bound: Any) -> bool:
    inner = None if bound is None else inspect.unwrap(bound)
    return isinstance(inner, partial) and inner.func is aux_forward


def _importer(bound: Any) -> FunctionType | None:
    """The function of this bound method, if it imports the loss."""
    function = bound.__func__ if isinstance(bound, MethodType) else None
    return function if isinstance(function, FunctionType) and _source_module(function) else None


def _other(module: nn.Module) -> str:
    """The forward of another library on the instance, in words, or an empty string.

    It is named by its code, as functools.wraps gives it the name of what it stands in for.
    """
    bound = vars(module).get(_slot(module))
    function = getattr(bound, "__func__", bound)
    if bound is None or _is_ours(bound) or function is type(module).forward:
        return ""
    if not isinstance(function, FunctionType):
        return f"the instance has the forward {function!r}"
    code = function.__code__
    return f"the instance has the forward {code.co_name} of {code.co_filename}"


def _why_own(module: nn.Module, theirs: FunctionType | None) -> str:
    forward = type(module).forward
    if theirs is None and (other := _other(module)):
        return other
    if theirs is not None:
        where = str(_source_module(theirs))
        function = vars(importlib.import_module(where)).get(NAME)
    else:
        body = _body(forward)
        assert body is not None
        where, function = body.__module__, body.__globals__[NAME]
    if not callable(function):
        return f"{NAME} of {where} is no function"
    names = list(inspect.signature(function).parameters)
    if names != _PARAMETERS:
        return f"{NAME} of {where} takes {', '.join(names)}"
    if theirs is None and _exchanged(forward) is None:
        return f"a decorator of {type(module).__name__}.forward is not known"
    return _difference(function, where)


def _difference(function: Callable[..., Any], where: str) -> str:
    """What the function gives otherwise than ours on made-up logits, or an empty string."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    made = [torch.randn(6, 4, **options) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device="cpu")
    for given in (None, mask):
        found: list[tuple[Tensor, ...]] = []
        losses: tuple[Callable[..., Any], ...] = (balancing, function)
        for loss in losses:
            with torch.inference_mode(False), torch.enable_grad():
                logits = tuple(z.clone().requires_grad_() for z in made)
                try:
                    value = loss(logits, 4, 2, given)
                    grads = torch.autograd.grad(3 * value, logits)
                except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    return f"{NAME} of {where} fails: {type(error).__name__}: {error}"
            found.append((value.detach(), *grads))
        words = "with a mask" if given is not None else "without a mask"
        for what, ours, theirs in zip(("value", *2 * ["gradient"]), *found, strict=True):
            if ours.dtype != theirs.dtype or not torch.allclose(ours, theirs, 1e-4, 1e-6):
                return f"{NAME} of {where} gives another {what} {words}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxLossRow:
    """One module that computes the loss, `model` its own way, `fused` ours; `none`: no module."""

    name: str
    model_class: str
    status: Literal["model", "fused", "none"]
    detail: str


def aux_loss_rows(model: nn.Module, aux_loss: str) -> tuple[AuxLossRow, ...]:
    """One row per module that computes the loss, as it is now; one that says so if none does."""
    rows = []
    for name, module in holders(model):
        state: AuxState | None = vars(module).get(STATE)
        status: Literal["model", "fused"] = "model"
        if state is None:
            detail = "aux_loss='model'" if aux_loss == "model" else "turnout.unpatch was called"
        elif state.own:
            detail = state.own
        elif other := _other(module):
            detail = other
        elif _changed(module, state):
            detail = "its class has another forward now; call turnout.patch(model) again"
        elif not _is_ours(vars(module).get(_slot(module))):
            detail = "its own forward was put back; call turnout.patch(model) again"
        else:
            status, detail = "fused", "turnout.routing.losses.load_balancing_loss"
        kind = type(module).__name__
        rows.append(AuxLossRow(name=name, model_class=kind, status=status, detail=detail))
    if rows:
        return tuple(rows)
    detail = f"no module of this model calls {NAME}"
    return (AuxLossRow(name="", model_class=type(model).__name__, status="none", detail=detail),)
