"""What a call of `expert_mlp` asks for, checked once for each set of shapes, dtypes and options.

A model asks for the same at every step, and the checks take as long as two launches, so a `Call`
is kept. It is found by everything that it depends on, and stands for all of that: whoever keeps
something for each kind of call has it as the key (`turnout.replay` does). The last few calls are
recognised without making that key.

Legend: T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from turnout.experts.weights import Dims, ExpertWeights, LoraWeights, check_lora, check_weights
from turnout.shortcuts import same_kind
from turnout.specs import (
    Activation,
    BackendName,
    ExpertSpec,
    Recompute,
    Unsupported,
    check_choice,
)

KEPT = 1024  # T changes from step to step in some runs
RECENT = 4  # a model has one or two kinds of layers, each with and without gradients


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Tensors of certain types, shapes, strides, dtypes and devices, and options, that fit.

    Equal to itself alone, so that it is a key.

    Attributes:
        experts: E.
        dtype: what is computed in.
        encoded: the spec and the options, as `decode` reads them.
    """

    experts: int
    dtype: torch.dtype
    encoded: str


class _Recent(NamedTuple):
    """How a call is recognised: which tensors are None, the options, what the others are like."""

    absent: tuple[bool, ...]
    options: tuple[Hashable, ...]
    is_like: Callable[..., bool]
    call: Call


_calls: OrderedDict[Hashable, Call] = OrderedDict()
_recent: tuple[_Recent, ...] = ()


def _autocast(device: str) -> torch.dtype | None:
    """What autocast asks for there, if it is on."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def called(
    tensors: Sequence[Tensor | None], options: tuple[Hashable, ...], check: Callable[[], Call]
) -> Call:
    """The call with tensors and options like these; `check` makes it, or raises, the first time."""
    global _recent
    x = tensors[0]
    if torch.compiler.is_compiling() or x is None or x.is_meta:
        return check()
    try:
        absent = tuple([t is None for t in tensors])
        present = [t for t in tensors if t is not None]
        asked = (_autocast(x.device.type), *options)
        for known in _recent:
            if known.absent == absent and known.options == asked and known.is_like(*present):
                return known.call
        facts = [(type(t), t.dtype, t.device, t.shape, t.stride()) for t in present]
        key = (absent, asked, *facts)
        found = _calls.get(key)
    except (AttributeError, TypeError):
        return check()  # it says what is no tensor, or no option
    if found is None:
        found = _calls[key] = check()
        if len(_calls) > KEPT:
            _calls.popitem(last=False)
    is_like = same_kind(present)
    if is_like is not None:
        _recent = (_Recent(absent, asked, is_like, found), *_recent[: RECENT - 1])
    return found


def check_call(
    x: Tensor,
    experts: Tensor,
    weights_TK: Tensor,
    weights: ExpertWeights,
    lora: LoraWeights,
    options: tuple[ExpertSpec, Recompute, BackendName, float],
) -> Call:
    """See `turnout.experts.ops.expert_mlp` for what must fit and what is raised."""
    spec, recompute, backend, dropout = options
    dims = check_weights(weights, spec)
    check_lora(lora, dims, weights)
    _check_inputs(x, experts, weights_TK, weights, dims)
    if recompute not in get_args(Recompute):
        check_choice("recompute", recompute, Recompute)
    if backend not in get_args(BackendName):
        check_choice("backend", backend, BackendName)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"expert_dropout is {dropout!r}; expected 0 <= p < 1")
    if x.is_meta:
        raise Unsupported("x_TH is on the meta device, which computes nothing; use a real device")
    dtype = weights.gate_up.dtype
    if dtype.itemsize < 2:
        raise Unsupported(
            f"the expert weights are {dtype}; quantised experts are not supported. Load them in "
            "bfloat16 or float16"
        )
    if dtype != torch.float64:
        dtype = _autocast(x.device.type) or dtype
    return Call(dims.experts, dtype, encode(spec, recompute, backend, dtype))


def encode(spec: ExpertSpec, recompute: Recompute, backend: str, dtype: torch.dtype) -> str:
    """What an op can not take as an argument, as a string of plain constants."""
    a = spec.activation
    return (
        f"{a.act},{a.gated},{a.interleaved},{a.limit},{a.limit_after},{a.alpha},{a.up_offset},"
        f"{spec.transposed},{spec.weight_on_input},{recompute},{backend},{dtype}"
    )


@lru_cache(maxsize=256)
def decode(call: str) -> tuple[ExpertSpec, str, str, torch.dtype]:
    """The spec, recompute, backend and dtype of `encode`."""
    act, *rest, recompute, backend, dtype = call.split(",")
    gated, interleaved, limit, limit_after, alpha, up_offset, transposed, on_input = rest
    activation = Activation(
        act=act,  # type: ignore[arg-type]
        gated=gated == "True",
        interleaved=interleaved == "True",
        limit=None if limit == "None" else float(limit),
        limit_after=limit_after == "True",
        alpha=float(alpha),
        up_offset=float(up_offset),
    )
    spec = ExpertSpec(
        activation=activation, transposed=transposed == "True", weight_on_input=on_input == "True"
    )
    return spec, recompute, backend, getattr(torch, dtype.removeprefix("torch."))


def _check_inputs(
    x: Tensor, experts: Tensor, weights_TK: Tensor, weights: ExpertWeights, dims: Dims
) -> None:
    if x.dim() != 2 or x.shape[1] != dims.hidden or not x.is_floating_point():
        raise ValueError(
            f"x_TH has shape {tuple(x.shape)} and dtype {x.dtype}; expected a float tensor (T, "
            f"{dims.hidden}), H from gate_up {tuple(weights.gate_up.shape)}. Is the weight layout "
            "transposed? See ExpertSpec.transposed"
        )
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts_TK has dtype {experts.dtype}; expected int32 or int64")
    if experts.dim() != 2 or experts.shape[0] != x.shape[0] or experts.shape[1] < 1:
        raise ValueError(
            f"experts_TK has shape {tuple(experts.shape)}; expected (T, K) with T = {x.shape[0]} "
            "and K of at least 1"
        )
    if weights_TK.shape != experts.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f"weights_TK has shape {tuple(weights_TK.shape)} and dtype {weights_TK.dtype}; "
            f"expected a float tensor of the shape of experts_TK, {tuple(experts.shape)}"
        )
    for name, tensor in (
        ("experts_TK", experts),
        ("weights_TK", weights_TK),
        ("gate_up", weights.gate_up),
    ):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device} as x_TH")


def check_indices(experts_TK: Tensor, num_experts: int) -> None:
    """Raise `ValueError` unless every index is in 0..E. Waits for the device on a GPU."""
    if not experts_TK.numel():
        return
    low, high = int(experts_TK.min()), int(experts_TK.max())
    if low < 0 or high > num_experts:
        raise ValueError(
            f"experts_TK holds {low}..{high}; expected 0..{num_experts - 1}, or {num_experts} for "
            "a dropped slot (the expert-parallel sentinel)"
        )
