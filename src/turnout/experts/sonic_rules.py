"""What SonicMoE runs: the description of one layer, and why it is refused.

Limits are those that its source asserts; activation, bias and layout are those of its one formula
that turnout uses. See `turnout.experts.sonic`.

Legend: E experts, H hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turnout.device import Device
from turnout.experts.sonic_package import missing, package
from turnout.experts.weights import ExpertWeights
from turnout.specs import Activation, ExpertSpec, Unsupported

NAME = "sonic"
MERGED = "sonic-merged"
NAMES = (NAME, MERGED)

ACTIVATION = Activation(interleaved=True)
MULTIPLE, LEAST_HIDDEN = 64, 512  # asserted by release 0.0.1 for H and F; asked of all releases
DTYPES = ("bfloat16",)  # what its own tests run
GENERATIONS = (9, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What SonicMoE is asked to run.

    Attributes:
        spec: layout and activation, as the stacks lie now.
        experts, hidden, intermediate: E, H, F.
        dtype: torch dtype name of the stacks; `compute` of the products.
        bias, lora, dropout: there are biases; there are adapters; their inputs are masked.
        recompute: the pre-activation must not be kept.
        merged: adapters may be merged into copies of the stacks.
        dense: the stacks are contiguous and begin at a multiple of 16 bytes.
    """

    spec: ExpertSpec
    experts: int
    hidden: int
    intermediate: int
    dtype: str
    compute: str
    bias: bool = False
    lora: bool = False
    dropout: bool = False
    recompute: bool = False
    merged: bool = False
    dense: bool = True


def rejects(problem: Problem, device: Device) -> str | None:
    """Why SonicMoE does not run this on that device, or None."""
    return (
        missing() or _rejects_device(device) or _rejects_problem(problem) or _rejects_form(device)
    )


def require(backend: str) -> None:
    """Raise `Unsupported` unless there is a SonicMoE that can be called, whatever the GPU."""
    reason = missing()
    if reason is None:
        found = package()
        reason = found if isinstance(found, str) else None
    if reason is not None:
        raise Unsupported(f"backend={backend!r} can not run: {reason}")


def _rejects_device(device: Device) -> str | None:
    if device.arch is None:
        return f"it needs an NVIDIA GPU of sm_90 or newer; got {device.name}"
    if device.arch // 10 not in GENERATIONS:
        return f"{device.name} is sm_{device.arch}; expected sm_90, sm_100 or sm_103"
    return None


def _rejects_form(device: Device) -> str | None:
    found = package()
    if isinstance(found, str):
        return found
    assert device.arch is not None
    if device.arch // 10 == 10 and not found.is_quack:
        return (
            f"{device.name} is sm_{device.arch} and this release runs its own kernels for sm_90; "
            "take a release from 0.1 on, or start Python with SonicMoE's USE_QUACK_GEMM=1"
        )
    return None


def _rejects_problem(problem: Problem) -> str | None:
    """The reason that no device and no release changes."""
    spec, act = problem.spec, problem.spec.activation
    plain = Activation(interleaved=act.interleaved) if act.gated else None
    if act != plain:
        return f"activation: it computes silu(gate) * up; got {act}"
    if problem.bias:
        return "bias: its kernels are used without biases; these experts have some"
    if spec.weight_on_input:
        return "layout: it weights the expert's output; the spec says weight_on_input"
    if spec.transposed or not problem.dense:
        how = "transposed" if spec.transposed else "strided or not aligned to 16 bytes"
        return f"layout: expected contiguous stacks (E, 2F, H) and (E, H, F); these are {how}"
    if not act.interleaved:
        return (
            "layout: gate and up lie in two halves; expected rows that alternate. turnout.patch "
            "brings a model into that order; alone, use alternating of turnout.experts.weights"
        )
    hidden, inner = problem.hidden, problem.intermediate
    if hidden % MULTIPLE or hidden < LEAST_HIDDEN or inner % MULTIPLE or not inner:
        return (
            f"dims: H is {hidden} and F is {inner}; expected multiples of {MULTIPLE}, H of at "
            f"least {LEAST_HIDDEN}"
        )
    if problem.dtype not in DTYPES or problem.compute != problem.dtype:
        return (
            f"dtype: the stacks are {problem.dtype}, computed in {problem.compute}; expected both "
            f"{' or '.join(DTYPES)}"
        )
    if problem.recompute:
        return "recompute='gate_up': it keeps the pre-activation; use recompute='none'"
    if problem.lora and not problem.merged:
        return (
            "adapters: it computes weights only. Use backend='auto', which computes adapters in "
            f"the products, or backend={MERGED!r}, which builds merged copies of both stacks in "
            "every forward and backward"
        )
    if problem.dropout:
        return "expert_dropout: merged adapters have no input to mask; use expert_dropout=0"
    return None


def problem_of(
    weights: ExpertWeights,
    spec: ExpertSpec,
    *,
    dtype: torch.dtype,
    lora: bool = False,
    dropout: bool = False,
    recompute: bool = False,
    merged: bool = False,
) -> Problem:
    """The question that `rejects` answers, of a bundle."""
    gate_up, down = weights.gate_up, weights.down
    hidden, inner = reversed(down.shape[1:]) if spec.transposed else down.shape[1:]
    return Problem(
        spec=spec,
        experts=down.shape[0],
        hidden=hidden,
        intermediate=inner,
        dtype=_name(gate_up.dtype),
        compute=_name(dtype),
        bias=weights.gate_up_bias is not None or weights.down_bias is not None,
        lora=lora,
        dropout=dropout,
        recompute=recompute,
        merged=merged,
        dense=all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (gate_up, down)),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
