"""Which SonicMoE there is, and how it is called.

Two forms of it are known, told apart by the parameters of their functions, because a copy on the
path carries no version:

    functions  release 0.0.1 of December 2025 (github.com/Dao-AILab/sonic-moe at 8565e849): its two
               autograd functions, with the rows sorted by turnout. Its own entry point builds a
               count kernel with nvcc at the first call, which most machines do not have.
    flat       releases from 0.1 on and the kernel of the Hugging Face hub: the entry point
               `moe_general_routing_inputs`, which sorts by itself.

Any other form is refused. Nothing is imported before the back end is asked for by name, nothing is
downloaded, and no environment variable is read or set here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from turnout.specs import Unsupported

PACKAGE = "sonicmoe"
INSTALL = (
    "Install it (pip install sonic-moe), or give a loaded module to turnout.experts.sonic.use, or "
    "use backend='auto'"
)
_ENTRY = "moe_general_routing_inputs"
# Of `flat`, given by name.
FLAT = (
    "x",
    "router_scores",
    "token_indices",
    "expert_indices",
    "w1",
    "b1",
    "w2",
    "b2",
    "E",
    "stream_id",
    "activation_type",
    "is_inference_mode_enabled",
    "concat_layout",
)
# Of `functions`, given in order, after ctx.
_ROWS = (
    "x_gather_idx",
    "s_scatter_idx",
    "s_reverse_scatter_idx",
    "num_activated_expert_per_token_offset",
    "is_varlen_K",
    "activation_type",
)
UP = (
    *("x", "w1", "b1", "expert_frequency_offset", "total_expert_freq", "K", "stream_id"),
    *(*_ROWS, "is_inference_mode_enabled"),
)
DOWN = (
    *("y1", "z", "w2", "b2", "topk_scores", "expert_frequency_offset", "T", "K", "stream_id"),
    *_ROWS,
)


@dataclass(frozen=True)
class Package:
    """A SonicMoE that can be called.

    Attributes:
        form: see the module's docstring.
        functional: the module that holds the functions.
        swiglu: its name of silu(gate) * up.
    """

    form: Literal["functions", "flat"]
    functional: ModuleType
    swiglu: Any

    @property
    def is_quack(self) -> bool:
        """The products run in QuACK, which also has kernels for sm_100."""
        return self.form == "flat" or bool(self.functional.is_using_quack_gemm())


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@lru_cache(maxsize=8)
def form_of(module: ModuleType) -> Package | str:
    """The module as a `Package`, or why its functions can not be called."""
    names = vars(module)
    functional = names if _ENTRY in names else vars(names.get("functional", module))
    enums = names.get("enums")
    expected = "expected SonicMoE 0.0.1 of December 2025, 0.1, or the hub's kernel"
    if _ENTRY not in functional or enums is None or "ActivationType" not in vars(enums):
        return (
            f"{module.__name__} has no {_ENTRY} or no enums.ActivationType; {expected}. {INSTALL}"
        )
    home = module if _ENTRY in names else names["functional"]
    swiglu = enums.ActivationType.SWIGLU
    entry = inspect.signature(functional[_ENTRY]).parameters
    if "concat_layout" in entry:
        needed = {n for n, p in entry.items() if p.default is inspect.Parameter.empty}
        if needed <= set(FLAT) <= set(entry):
            return Package("flat", home, swiglu)
        return f"{_ENTRY} of {module.__name__} takes {tuple(entry)}; expected {FLAT}. {INSTALL}"
    for name, known in (("_UpProjection", UP), ("_DownProjection", DOWN)):
        if name not in functional:
            return f"{module.__name__} has no {name}; {expected}. {INSTALL}"
        got = _parameters(functional[name].forward)[1:]
        if got != known:
            return f"{name} of {module.__name__} takes {got}; {expected}, which takes {known}"
    if "is_using_quack_gemm" not in functional:
        return f"{module.__name__} does not say which products it runs; {expected}. {INSTALL}"
    return Package("functions", home, swiglu)


_given: ModuleType | None = None


def use(module: ModuleType | None) -> None:
    """Take this SonicMoE instead of the installed package; None takes the package again.

    The way to the kernel of the Hugging Face hub. turnout loads nothing from a network, so its user
    does, with `kernels.get_kernel("kernels-community/sonic-moe")`, and hands over what came.

    Args:
        module: a loaded SonicMoE.

    Raises:
        Unsupported: its functions are not known here.
    """
    global _given
    if module is not None:
        found = form_of(module)
        if isinstance(found, str):
            raise Unsupported(found)
    _given = module


def package() -> Package | str:
    """The SonicMoE to call, or why there is none. Imports it."""
    if _given is not None:
        return form_of(_given)
    reason = missing()
    if reason is not None:
        return reason
    try:
        module = import_module(PACKAGE)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # a package built for other versions of torch or the CUTLASS DSL fails in any of these ways
        return f"{PACKAGE} does not import ({error}). {INSTALL}"
    return form_of(module)


def missing() -> str | None:
    """Why there is no SonicMoE at all, or None; imports nothing."""
    if _given is None and PACKAGE not in sys.modules and find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed. {INSTALL}"
    return None
