"""Which axis of an expert weight the factors of a PEFT adapter belong to, and how to swap them.

A weight of E experts is stored W (E, dim1, dim2). PEFT keeps two matrices for it:

    A (E*R, a)   row    e*R + r:   A[e, r, :]       expert-major
    B (b, R*E)   column r*E + e:   B[:, r, e]       rank-major

The packing never changed. What changed is whether A runs over dim1 or over dim2:

    A over dim1:   dW[e, i, o] = s * sum_r A[e, r, i] * B[o, r, e]    a = dim1, b = dim2
    A over dim2:   dW[e, o, i] = s * sum_r B[o, r, e] * A[e, r, i]    a = dim2, b = dim1

    PEFT                     module without `is_transposed`     module with `is_transposed = True`
    0.17.0 to 0.18.1         dim1                               dim1
    0.19.0                   dim1                               dim2
    0.19.1 and later         dim2                               dim1

0.19.0 reads the flag the wrong way round, so everything it wrote must be swapped. Swapping is
a permutation of entries, its own inverse, and leaves rank, alpha and dW as they are:

    A'[e, r, :] = B[:, r, e]        B'[:, r, e] = A[e, r, :]

A weight of two dimensions (and a stack of one expert) has dW = s * B @ A in every version that
could run it. Which parameter a tensor belongs to is not in its name: PEFT wraps the parameters of
one module in the order in which the module registered them, the first innermost, so the keys are
`experts.base_layer.lora_A` for the first and `experts.lora_A` for the last. Where the base module
already carries a parametrization (4-bit weights) the order is that of the sorted names.

Legend: E experts, R LoRA rank, a and b the lengths of A's rows and of B's columns.
This file reads no file and knows no model; see `adapters.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, TypeVar

from packaging.version import InvalidVersion, Version
from torch import Tensor

Layout = Literal["peft<=0.18.1", "peft==0.19.0", "peft>=0.19.1", "unknown"]
Axis = Literal["dim1", "dim2"]

FIRST_OF_TODAY = "0.19.1"  # the first release of today's layout
NEWEST_READ = "0.21.2"  # the newest release whose source was read for the table above
_TODAY: Layout = "peft>=0.19.1"
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_PREFIX = "base_model.model."
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraKey:
    """The parts of `base_model.model.<module>[.base_layer]*.lora_<side>[.<adapter>].weight`."""

    module: str
    level: int
    side: str
    adapter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One pair of LoRA tensors. `level` 0 is the outermost wrapper of `module`."""

    module: str
    level: int
    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One way to read all slots of one module, innermost first. `swap`: today's layout differs."""

    parameters: tuple[str | None, ...]
    experts: tuple[int, ...]
    axis: Axis | None
    swap: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModule:
    """What the base model says of one module: its targeted parameters in order of registration."""

    shapes: dict[str, tuple[int, ...]]
    is_transposed: bool


def layout_of(peft_version: str | None) -> tuple[Layout, str]:
    """The layout a PEFT version writes, and in words why."""
    if peft_version is None:
        return "unknown", (
            "adapter_config.json has no peft_version: PEFT writes it since 0.18.0, so this is an "
            "adapter of PEFT 0.17, of another program, or edited by hand"
        )
    text = peft_version.partition("@")[0]
    try:
        version = Version(Version(text).public)
    except InvalidVersion:
        return "unknown", f"peft_version is {peft_version!r}, which is not a version number"
    if version < Version("0.17.0"):
        return "unknown", f"PEFT {text} is older than target_parameters (0.17.0)"
    if version <= Version("0.18.1"):
        return "peft<=0.18.1", f"PEFT {text}: A runs over dim1 of (E, dim1, dim2)"
    if version == Version("0.19.0"):
        return "peft==0.19.0", "PEFT 0.19.0: A runs over dim1, over dim2 where is_transposed"
    if version >= Version(FIRST_OF_TODAY):
        return _TODAY, f"PEFT {text}: A runs over dim2, over dim1 where is_transposed"
    return "unknown", (
        f"PEFT {text} is a development build between two layouts; which one depends on the commit"
    )


def is_newer_than_known(peft_version: str) -> bool:
    """Whether `peft_version` came after the last release this table was checked against."""
    return Version(peft_version.partition("@")[0]) > Version(NEWEST_READ)


def split_key(key: str) -> LoraKey | None:
    """The parts of a LoRA weight's key; None for any other tensor."""
    found = _KEY.match(key)
    if found is None:
        return None
    path, level = found["path"], 0
    while path.endswith(".base_layer"):
        path, level = path.removesuffix(".base_layer"), level + 1
    # A module inside a wrapped one: its path names the wrapper, the base model's does not.
    path = re.sub(r"(\.base_layer)+(?=\.)", "", path.removeprefix(_PREFIX))
    return LoraKey(module=path, level=level, side=found["side"], adapter=found["adapter"])


def swap_factors(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A' (E*R, b), B' (a, R*E) with A'[e, r, :] = B[:, r, e] and B'[:, r, e] = A[e, r, :].

    Args:
        a: (E*R, a), expert-major rows.
        b: (b, R*E), rank-major columns, any dtype.
        num_experts: E.
    """
    rows = a.shape[0]
    a_eri = a.reshape(num_experts, -1, a.shape[1])
    b_ore = b.reshape(b.shape[0], -1, num_experts)
    new_a = b_ore.permute(2, 1, 0).reshape(rows, b.shape[0])
    new_b = a_eri.permute(2, 1, 0).reshape(a.shape[1], rows)
    return new_a.contiguous(), new_b.contiguous()


def today_axis(is_transposed: bool) -> Axis:
    """The axis A runs over in PEFT 0.19.1 and later."""
    return "dim1" if is_transposed else "dim2"


def shapes_of(weight: tuple[int, ...], rank: int, axis: Axis) -> tuple[tuple[int, int], ...]:
    """The shapes of A and B for a weight (E, dim1, dim2) or (out, in)."""
    experts = weight[0] if len(weight) == 3 else 1
    dim1, dim2 = weight[-2:]
    a, b = (dim1, dim2) if axis == "dim1" and experts > 1 else (dim2, dim1)
    return (experts * rank, a), (b, rank * experts)


def readings_with_model(
    slots: tuple[Slot, ...],
    base: BaseModule,
    layout: Layout,
    rank_of: Callable[[str], int],
    targets: Iterable[str],
) -> list[Reading]:
    """Every reading of one module's slots (innermost first) that fits the base model's shapes."""
    if len(slots) != len(base.shapes):
        return []
    module, today = slots[0].module, today_axis(base.is_transposed)
    stacks = [shape for shape in base.shapes.values() if len(shape) == 3 and shape[0] > 1]
    found = []
    for order in _orders(tuple(base.shapes), module, set(targets)):
        ranks = tuple(rank_of(f"{module}.{name}") for name in order)
        for axis in _axes(layout, base.is_transposed):
            wanted = [shapes_of(base.shapes[n], r, axis) for n, r in zip(order, ranks, strict=True)]
            if wanted != [(slot.a_shape, slot.b_shape) for slot in slots]:
                continue
            reading = Reading(
                parameters=order,
                experts=tuple(a[0] // r for (a, _), r in zip(wanted, ranks, strict=True)),
                axis=axis if stacks else None,
                swap=bool(stacks) and axis != today,
            )
            if reading not in found:
                found.append(reading)
    return found


def readings_without_model(
    slots: tuple[Slot, ...],
    names: tuple[str, ...],
    layout: Layout,
    rank_of: Callable[[str], int],
) -> list[Reading]:
    """Every reading of one module's slots (innermost first) by names, ranks and widths alone.

    Only one kind of module says by itself whether A runs over inputs or over outputs: gated
    experts with both `gate_up_proj`, whose output has 2F features, and `down_proj`, whose input
    has F. At most one of their two readings can hold, square or not. A that runs over outputs is
    never today's layout of a (E, out, in) weight; A that runs over inputs may be right or not,
    because (E, in, out) is stored both with `is_transposed` (gpt_oss) and without (llama4).
    """
    module = slots[0].module
    found = []
    for order in permutations(names, len(slots)):
        ranks = tuple(rank_of(f"{module}.{name}") for name in order)
        experts = tuple(_experts(slot, rank) for slot, rank in zip(slots, ranks, strict=True))
        if 0 in experts or len({count for count in experts if count > 1}) > 1:
            continue
        runs_over = _gated_runs_over(slots, order, experts)
        if runs_over == "neither":
            continue
        found.append(
            Reading(
                parameters=order,
                experts=experts,
                axis="dim1" if layout == "peft<=0.18.1" and max(experts) > 1 else None,
                swap=_swap_without_model(layout, experts, runs_over),
            )
        )
    return found


def agreed(values: Iterable[_T | None]) -> _T | None:
    """The value all `values` share, or None."""
    seen = list(values)
    return seen[0] if seen and all(value == seen[0] for value in seen) else None


def _axes(layout: Layout, is_transposed: bool) -> tuple[Axis, ...]:
    """The axes A can run over. Transformers before 5.0 did not declare `is_transposed`, so
    an adapter of a module that declares it today may have been trained when it did not."""
    if layout == "peft<=0.18.1":
        return ("dim1",)
    if layout == "peft==0.19.0":
        return ("dim2", "dim1") if is_transposed else ("dim1",)
    if layout == _TODAY:
        return (today_axis(is_transposed),)
    return ("dim1", "dim2")


def _orders(names: tuple[str, ...], module: str, targets: set[str]) -> Iterator[tuple[str, ...]]:
    """The orders in which PEFT can have wrapped `names`, innermost first."""
    yield names
    by_name = tuple(sorted(names))
    if by_name != names and all(f"{module}.{name}" in targets for name in names):
        yield by_name


def _experts(slot: Slot, rank: int) -> int:
    """E of a slot, 0 where the shapes rule `rank` out."""
    rows, columns = slot.a_shape[0], slot.b_shape[1]
    return 0 if rows != columns or rows % rank else rows // rank


def _gated_runs_over(
    slots: tuple[Slot, ...], order: tuple[str, ...], experts: tuple[int, ...]
) -> Literal["input", "output", "either", "neither"]:
    """What A runs over, from gate_up (H -> 2F) and down (F -> H)."""
    if set(order) != {"gate_up_proj", "down_proj"} or min(experts) < 2:
        return "either"
    by_name = dict(zip(order, slots, strict=True))
    up, down = by_name["gate_up_proj"], by_name["down_proj"]
    (up_a, up_b), (down_a, down_b) = ((slot.a_shape[1], slot.b_shape[0]) for slot in (up, down))
    if up_b == 2 * down_a and up_a == down_b:
        return "input"
    if up_a == 2 * down_b and up_b == down_a:
        return "output"
    return "neither"


def _swap_without_model(layout: Layout, experts: tuple[int, ...], runs_over: str) -> bool | None:
    if max(experts) == 1 or layout == _TODAY:
        return False
    if layout != "unknown" and runs_over == "output":
        return True
    return None
