"""How the experts of each transformers architecture are stored, or why a layer stays stock.

Facts come from the declarations of transformers' `use_experts_implementation`, from the function
that `type(module)._apply_gate` is, and from the tables below, keyed by the class that transformers
defines. What a gate is said to compute is then checked against the module itself on a fixed grid,
so a changed release is noticed and not trusted. Anything else is `Stock`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from turnout.experts.epilogues import activate
from turnout.specs import Act, Activation, ExpertSpec

StockReason = Literal[
    "no_3d_weights",
    "upstream_broken",
    "unknown_gate",
    "unknown_layout",
    "quantised",
    "not_token_routed",
    "other_kernel",
]
Call = Literal["interface", "forward", "longcat", "llama4_block", "aria", "jetmoe"]


@dataclass(frozen=True, slots=True)
class Stock:
    """The layer keeps its own code, and why."""

    reason: StockReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where one experts module keeps its tensors and how it is called.

    Attributes:
        spec: layout and activation.
        gate_up, down: attribute paths of the stacks below the module.
        gate_up_bias, down_bias: attribute names, or None.
        call: how turnout gets into the module: transformers' interface, or an instance `forward` of
            the named kind.
        fused_lora: PEFT wraps the module that holds the parameter, and turnout can take the
            factors.
    """

    spec: ExpertSpec
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    gate_up_bias: str | None = None
    down_bias: str | None = None
    call: Call = "interface"
    fused_lora: bool = True


def class_key(cls: type) -> str:
    """`<model dir>.<class name>` for a class of transformers, else the full path."""
    parts = cls.__module__.split(".")
    if parts[:2] == ["transformers", "models"] and len(parts) >= 3:
        return f"{parts[2]}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def keys_of(module: nn.Module) -> list[str]:
    """The keys of the module's class and its bases (parametrization makes subclasses)."""
    return [class_key(cls) for cls in type(module).__mro__]


def live(module: Any) -> Any:
    """The module itself, below PEFT's wrappers; of `modules_to_save` the active copy."""
    while True:
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            name = module.active_adapter
            name = name[0] if isinstance(name, list) else name
            on = not module.disable_adapters and name in module.modules_to_save
            module = module.modules_to_save[name] if on else module.original_module
        elif hasattr(module, "base_layer"):
            module = module.base_layer
        else:
            return module


@cache
def _grid() -> torch.Tensor:
    """(64, 32) pre-activations from -12 to 12 in an order that pairs every gate with every up."""
    values = torch.linspace(-12, 12, 64 * 32, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    return values[torch.randperm(values.numel(), generator=generator)].view(64, 32)


@torch.no_grad()
def _agrees(compute: Callable[[torch.Tensor], torch.Tensor], activation: Activation) -> bool:
    z = _grid()
    theirs, ours = compute(z.clone()), activate(z, activation)
    return theirs.shape == ours.shape and bool(
        torch.allclose(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    )


# What ACT2FN hands out, by class name; F.silu is a function.
_ACTS: dict[str, tuple[Act, float]] = {
    "SiLUActivation": ("silu", 1.0),
    "SiLU": ("silu", 1.0),
    "silu": ("silu", 1.0),
    "GELUActivation": ("gelu", 1.0),
    "GELU": ("gelu", 1.0),
    "GELUTanh": ("gelu_tanh", 1.0),
    "NewGELUActivation": ("gelu_tanh", 1.0),
    "QuickGELUActivation": ("silu", 1.702),
    "ReLU": ("relu", 1.0),
    "ReLUSquaredActivation": ("relu2", 1.0),
}


def _known_act(function: Any) -> tuple[Act, float] | None:
    """The activation of a function or module by its class name, if it also computes that."""
    name = function.__name__ if inspect.isroutine(function) else type(function).__name__
    known = _ACTS.get(name)
    if known is None:
        return None
    activation = Activation(act=known[0], alpha=known[1], gated=False)
    return known if _agrees(function, activation) else None


def _act(module: nn.Module) -> tuple[Act, float] | None:
    return _known_act(module.act_fn)


def _default_gate(module: nn.Module) -> Activation | None:
    known = _act(module)
    return None if known is None else Activation(act=known[0], alpha=known[1])


def _gpt_oss_gate(module: Any) -> Activation:
    return Activation(
        alpha=module.alpha,
        limit=module.limit,
        up_offset=1.0,
        interleaved=not module.is_concatenated,
    )


def _minimax_m3_gate(module: Any) -> Activation:
    return Activation(alpha=module.swiglu_alpha, limit=module.swiglu_limit, up_offset=1.0)


def _clamped_act_gate(module: Any) -> Activation | None:
    known = _act(module)
    return None if known is None else Activation(act=known[0], alpha=known[1], limit=module.limit)


def _clamped_silu_gate(module: Any) -> Activation:
    return Activation(limit=module.swiglu_limit)


def _clamped_after_gate(module: Any) -> Activation | None:
    known = _act(module)
    if known is None:
        return None
    if math.isinf(module.limit):
        return Activation(act=known[0], alpha=known[1])
    return Activation(act=known[0], alpha=known[1], limit=module.limit, limit_after=True)


_GATES: dict[str, Callable[[Any], Activation | None]] = {
    "gpt_oss.GptOssExperts": _gpt_oss_gate,
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": _gpt_oss_gate,
    "minimax_m3_vl.MiniMaxM3VLExperts": _minimax_m3_gate,
    "deepseek_v4.DeepseekV4Experts": _clamped_act_gate,
    "glm5_next.Glm5NextTextExperts": _clamped_silu_gate,
    "hy_v4.HYV4Experts": _clamped_silu_gate,
    "step3p7.Step3p7Experts": _clamped_after_gate,
}


def _gate_key(module: nn.Module) -> str | None:
    """The class that defines `_apply_gate`, or None for transformers' default."""
    from transformers.integrations import moe

    for cls in type(module).__mro__:
        if "_apply_gate" in vars(cls):
            default = vars(cls)["_apply_gate"] is moe._default_apply_gate
            return None if default else class_key(cls)
    return None


def activation_of(module: Any) -> Activation | Stock:
    """The activation of a decorated experts module, checked on a grid."""
    if not module.has_gate:
        known = _act(module)
        if known is None:
            return Stock("unknown_gate", f"activation {module.act_fn!r} has no fused epilogue")
        return Activation(act=known[0], alpha=known[1], gated=False)
    key = _gate_key(module)
    reader = _default_gate if key is None else _GATES.get(key)
    found = None if reader is None else reader(module)
    if found is None:
        what = f"_apply_gate of {key}" if key else f"activation {module.act_fn!r}"
        return Stock("unknown_gate", f"{what} has no fused epilogue")
    if not _agrees(module._apply_gate, found):
        return Stock("unknown_gate", f"_apply_gate of {type(module).__name__} is not {found}")
    return found


_KNOWN_FLAGS = {
    "experts_class",
    "experts_interface",
    "is_concatenated",
    "is_transposed",
    "has_bias",
    "has_gate",
}


@cache
def _newer_flags() -> dict[str, object]:
    """Flags of the installed decorator that turnout does not know, with their defaults."""
    from transformers.integrations.moe import use_experts_implementation

    parameters = inspect.signature(use_experts_implementation).parameters
    return {n: p.default for n, p in parameters.items() if n not in _KNOWN_FLAGS}


def is_decorated(module: nn.Module) -> bool:
    """The module's class carries transformers' experts decorator."""
    return "is_concatenated" in vars(module) and "has_gate" in vars(module)


def _decorated_layout(module: Any) -> Layout | Stock:
    for flag, default in _newer_flags().items():
        if getattr(module, flag, default) != default:  # transformers > 5.17 may add flags
            return Stock("unknown_layout", f"{flag}={getattr(module, flag)!r} is not known")
    gate_up = "gate_up_proj" if module.has_gate else "up_proj"
    problem = _check_stacks(module, gate_up, "down_proj")
    if problem is not None:
        return problem
    activation = activation_of(module)
    if isinstance(activation, Stock):
        return activation
    return Layout(
        spec=ExpertSpec(activation=activation, transposed=module.is_transposed),
        gate_up=gate_up,
        gate_up_bias=f"{gate_up}_bias" if module.has_bias else None,
        down_bias="down_proj_bias" if module.has_bias else None,
    )


def get_path(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path; a parameter is read past a guard on its name."""
    value: Any = module
    for part in path.split("."):
        found = vars(value).get("_parameters", {}).get(part)
        value = getattr(value, part) if found is None else found
    return value


def stack_at(module: nn.Module, path: str) -> Any:
    """The tensor at a path of a `Layout`, under whatever PEFT put around the module on the way."""
    head, _, tail = path.partition(".")
    if tail:
        return get_path(live(getattr(module, head)), tail)
    return get_path(module, head)


def foreign_parametrization(module: nn.Module, name: str) -> str:
    """The parametrization of a parameter that is not PEFT's own fold, or an empty string."""
    if not parametrize.is_parametrized(module, name):
        return ""
    found = [type(p) for p in module.parametrizations[name]]  # type: ignore[index]
    foreign = [c.__name__ for c in found if not c.__module__.startswith("peft.")]
    return f"parametrized by {', '.join(foreign)}" if foreign else ""


def _check_stacks(module: nn.Module, *paths: str) -> Stock | None:
    for path in paths:
        head = path.split(".")[0]
        if module._parameters.get(head) is None and not hasattr(module, head):
            return Stock("no_3d_weights", f"{type(module).__name__} has no {path}")
        weight = get_path(module, path)
        if not isinstance(weight, torch.Tensor):
            return Stock("no_3d_weights", f"{path} is {type(weight).__name__}, not a tensor")
        parametrized = foreign_parametrization(module, head)
        if not weight.is_floating_point() or weight.element_size() < 2 or parametrized:
            kind = parametrized or f"stored as {weight.dtype}"
            return Stock("quantised", f"{path} is {kind}")
        if weight.dim() != 3 and weight.numel():
            return Stock("no_3d_weights", f"{path} has shape {tuple(weight.shape)}")
    return None


def _step3p7(module: Any) -> Layout | Stock:
    problem = _check_stacks(module, "gate_up_proj", "down_proj")
    activation = _clamped_after_gate(module)
    if problem is not None or activation is None:
        return problem or Stock("unknown_gate", f"activation {module.act_fn!r}")
    if not _agrees(module._apply_gate, activation):
        return Stock("unknown_gate", f"_apply_gate of Step3p7Experts is not {activation}")
    return Layout(spec=ExpertSpec(activation=activation), call="forward")


def _longcat(module: Any) -> Layout | Stock:
    problem = _check_stacks(module, "gate_up_proj", "down_proj")
    activation = _default_gate(module)
    if problem is not None or activation is None:
        return problem or Stock("unknown_gate", f"activation {module.act_fn!r}")
    return Layout(spec=ExpertSpec(activation=activation), call="longcat")


def _llama4(block: Any) -> Layout | Stock:
    experts = live(block.experts)
    problem = _check_stacks(experts, "gate_up_proj", "down_proj")
    activation = _default_gate(experts)
    if problem is not None or activation is None:
        return problem or Stock("unknown_gate", f"activation {experts.act_fn!r}")
    return Layout(
        spec=ExpertSpec(activation=activation, transposed=True, weight_on_input=True),
        call="llama4_block",
    )


def _aria(module: Any) -> Layout | Stock:
    problem = _check_stacks(module, "fc1.weight", "fc2.weight")
    return problem or Layout(
        spec=ExpertSpec(activation=Activation(), transposed=True),
        gate_up="fc1.weight",
        down="fc2.weight",
        call="aria",
        fused_lora=False,
    )


def _jetmoe(block: Any) -> Layout | Stock:
    problem = _check_stacks(block, "input_linear.weight", "output_linear.weight")
    known = _known_act(block.activation)
    if problem is not None or known is None:
        return problem or Stock("unknown_gate", f"activation {block.activation!r}")
    return Layout(
        spec=ExpertSpec(activation=Activation(act=known[0], alpha=known[1])),
        gate_up="input_linear.weight",
        down="output_linear.weight",
        call="jetmoe",
        fused_lora=False,
    )


_UNDECORATED: dict[str, Callable[[Any], Layout | Stock]] = {
    "step3p7.Step3p7Experts": _step3p7,
    "longcat_flash.LongcatFlashExperts": _longcat,
    "llama4.Llama4TextMoe": _llama4,
    "aria.AriaExperts": _aria,
    "jetmoe.JetMoeMoE": _jetmoe,
}

_STOCK: dict[str, Stock] = {
    "dbrx.DbrxExperts": Stock(
        "unknown_layout", "gate and up are separate 2-D stacks (E*F, H); joining them copies both"
    ),
    "switch_transformers.SwitchTransformersExperts": Stock(
        "no_3d_weights", "the experts are a ModuleDict of Linear layers"
    ),
    "nllb_moe.NllbMoeExperts": Stock(
        "upstream_broken", "transformers 5.17 uses experts 0 and 1 only; also a ModuleDict"
    ),
    "doge.DogeCDMoE": Stock("upstream_broken", "DogeDecoderLayer fails on the block's tuple"),
    "vitpose_backbone.VitPoseNaiveMoe": Stock(
        "not_token_routed", "the expert is chosen per image by the data set"
    ),
    "gpt_oss.Mxfp4GptOssExperts": Stock("quantised", "MXFP4 blocks"),
    "transformers.integrations.mxfp4.Mxfp4GptOssExperts": Stock("quantised", "MXFP4 blocks"),
    "liger_kernel.transformers.swiglu.LigerExperts": Stock(
        "other_kernel", "Liger took the class before the model was made; give it swiglu=False"
    ),
}


def _has_own_forward(module: nn.Module) -> bool:
    """The instance's forward was replaced by something other than turnout."""
    forward = vars(module).get("forward")
    if forward is None:
        return False
    function = getattr(forward, "func", forward)
    return not getattr(function, "__module__", "").startswith("turnout.")


def other_forward(module: nn.Module) -> str:
    """The forward that another library gave the instance, in words, or an empty string.

    A wrapper that names what it wraps counts as that: accelerate's hooks, `torch.compile`.
    """
    forward = vars(module).get("forward")
    if forward is None:
        return ""
    inner = inspect.unwrap(forward)
    inner = getattr(inner, "func", inner)  # turnout's are partials
    function = getattr(inner, "__func__", inner)  # Liger 0.8 binds a method
    home = getattr(function, "__module__", "")  # not every callable object has one
    if home.startswith("turnout.") or function is inspect.unwrap(type(module).forward):
        return ""
    name = getattr(function, "__qualname__", type(function).__name__)
    advice = "; give Liger swiglu=False" if home.startswith("liger_kernel.") else ""
    return f"the instance has the forward {name} of {home}{advice}"


def forward_in_front(model: nn.Module, path: str) -> str:
    """`other_forward` of the module at the path, else of a wrapper of PEFT around it."""
    found = other_forward(model.get_submodule(path))
    while not found and path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
        found = other_forward(model.get_submodule(path))
    return found


def layout_of(module: nn.Module) -> Layout | Stock | None:
    """How to run an experts module, why it stays stock, or None for any other module."""
    if is_decorated(module):
        return _decorated_layout(module)
    for key in keys_of(module):
        if key in _UNDECORATED:
            if _has_own_forward(module):
                return Stock("unknown_layout", "the instance has a forward of another library")
            return _UNDECORATED[key](module)
        if key in _STOCK:
            return _STOCK[key]
    return None


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout | Stock]]:
    """(name, module, layout) of every MoE layer, in model order."""
    for name, module in list(model.named_modules()):
        layout = layout_of(module)
        if layout is not None:
            yield name, module, layout


def stack_holder(module: Any, layout: Layout) -> Any:
    """The module that holds the stacks and the state: Llama 4 is entered at its block."""
    return live(module.experts) if layout.call == "llama4_block" else module
