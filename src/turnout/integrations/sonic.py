"""SonicMoE in a patched model: which layers it takes, what merged adapters cost.

`check` runs before anything is changed and `start` after everything else: a model is either as it
was or entirely in SonicMoE's order. See `turnout.integrations.interleave` for the order itself.

Legend: E experts, H hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from turnout.device import Device, device_of, visible_gpus
from turnout.experts import sonic
from turnout.integrations.architectures import Layout, Stock, get_path, stack_holder
from turnout.integrations.interleave import interleave, interleaved_layout, place_of, restore
from turnout.integrations.state import LayerState, state_of
from turnout.integrations.transformers import stacks
from turnout.specs import Unsupported

Layers = Iterable[tuple[str, nn.Module, Layout | Stock]]
MIB = 2**20


def check(layers: Layers, backend: str, recompute: str, expert_dropout: float) -> None:
    """Raise `Unsupported`, with layer and reason, unless SonicMoE runs every known layer."""
    seen: dict[int, str] = {}
    for name, module, layout in layers:
        if isinstance(layout, Stock):
            continue
        holder = stack_holder(module, layout)
        weights = stacks(holder, layout)
        gate_up = weights.gate_up
        where = f"{name} ({type(holder).__name__})"
        other = seen.setdefault(id(gate_up), where)
        if other != where:
            raise Unsupported(
                f"backend={backend!r}: {where} shares its stack with {other}; expected a stack "
                "for each layer, as its rows are reordered in place. Use backend='auto'"
            )
        place, parameter = place_of(holder, layout)
        if place._parameters.get(parameter) is None or gate_up.is_meta:
            raise Unsupported(
                f"backend={backend!r}: {layout.gate_up} of {where} is no parameter with data; "
                "expected one, as its rows are reordered in place. Load the model first"
            )
        problem = sonic.problem_of(
            weights,
            interleaved_layout(layout).spec,
            dtype=gate_up.dtype,
            recompute=recompute != "none",
            dropout=expert_dropout > 0,
            merged=backend == sonic.MERGED,
        )
        reason = sonic.rejects(problem, _device(gate_up.device))
        if reason is not None:
            raise Unsupported(
                f"backend={backend!r} does not run {where}: {reason}. It runs every "
                "layer or none; backend='auto' runs this one too"
            )


def _device(device: torch.device) -> Device:
    """Where the weights are, or will be: a model on the CPU is judged by the first GPU."""
    gpus = visible_gpus() if device.type == "cpu" else ()
    return gpus[0] if gpus else device_of(device)


def refuse_adapters(wrapper: Any, state: LayerState) -> None:
    """Raise `Unsupported` where an expert's adapter meets `backend="sonic"`."""
    if state.backend == sonic.NAME:
        raise Unsupported(
            f"the adapter on {wrapper.parameter_name} of "
            f"{type(wrapper.get_base_layer()).__name__} has no place in backend='sonic', which "
            "computes weights only; expected experts without adapters. Use backend='auto', which "
            "computes adapters in the products, or unpatch, attach the adapters and patch with "
            f"backend={sonic.MERGED!r}, which merges them in every forward and backward"
        )


def refuse_fold(wrapper: Any, reason: str) -> None:
    """Raise `Unsupported` where PEFT would fold adapters into stacks beside reordered rows."""
    raise Unsupported(
        f"PEFT would fold the adapters on {wrapper.parameter_name} of "
        f"{type(wrapper.get_base_layer()).__name__} ({reason}), and the rows of gate_up are "
        f"interleaved in memory for backend={sonic.MERGED!r}; expected one active adapter, and "
        "turnout's forward. Activate one adapter, or call turnout.unpatch(model)"
    )


def guard_merging(wrapper: Any) -> None:
    """PEFT must not add to or take from a stack whose rows are reordered, not even to `down`.

    A wrapper merges after those around it: refused inside, the outer ones would be merged already.
    """
    for method in ("merge", "unmerge"):
        setattr(wrapper, method, partial(_refuse, wrapper, method))


def release_merging(wrapper: Any) -> None:
    """Undo `guard_merging`."""
    for method in ("merge", "unmerge"):
        found = vars(wrapper).get(method)
        if isinstance(found, partial) and found.func is _refuse:
            del vars(wrapper)[method]


def _refuse(wrapper: Any, method: str, *_: Any, **__: Any) -> None:
    raise Unsupported(
        f"{method} of the adapter on {wrapper.parameter_name}: the rows of gate_up are interleaved "
        f"in memory for backend={sonic.MERGED!r}; expected the usual order. Call "
        "turnout.unpatch(model) first"
    )


def start(model: nn.Module) -> None:
    """Bring the stacks of every layer that SonicMoE runs into its order."""
    for module in list(model.modules()):
        state = state_of(module)
        if state is not None and state.backend in sonic.NAMES and state.interleaved is None:
            state.interleaved = interleave(module, state.layout)
            state.layout = interleaved_layout(state.layout)


def stop(state: LayerState) -> None:
    """Bring one layer's stack back into the usual order."""
    if state.interleaved is not None:
        restore(state.interleaved)
        state.interleaved = None


def merge_cost(module: nn.Module, layout: Layout, names: Iterable[str]) -> str:
    """What merging the adapters of these parameters costs one layer, in words.

    A step builds each merged stack twice (reads and writes it) and its gradient is written once and
    read for A and for B: seven times its bytes.
    """
    adapted = [get_path(module, name) for name in names]
    mib = sum(stack.numel() * stack.element_size() for stack in adapted) / MIB
    return (
        f"merged in every forward and backward for {sonic.NAME}: {mib:.4g} MiB for a merged copy "
        f"and as much for its gradient, one layer at a time; about {7 * mib:.4g} MiB of memory "
        "traffic a step"
    )


def describe(state: LayerState) -> str:
    """The line of a layer's row in the report, empty where SonicMoE does not run it."""
    if state.interleaved is None:
        return ""
    return f"SonicMoE, back end {state.backend}; gate and up rows interleaved in memory"
