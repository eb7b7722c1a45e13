"""SonicMoE (arXiv:2512.14080) as a back end of `expert_mlp`: the whole op, not a product of it.

    y[t] = sum over k of weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]),   e = experts[t, k]

It runs when it is named, never for `auto`. SonicMoE reads stacks (E, 2F, H) whose rows alternate
between gate and up (`Activation.interleaved`); `turnout.patch` brings a model's stacks into that
order and back (`turnout.integrations.interleave`). Its autograd is its own: it keeps x and the
pre-activation, and computes the gradients of both stacks in every backward pass, also of frozen
ones.

It has no adapters. `sonic-merged` runs it on W + scaling * B A of both stacks, which are built in
each forward and, as none is kept, again in each backward. `sonic` refuses adapters.

Slots without an expert (index E) are computed with weight 0 by experts in turn, because SonicMoE
has no rows to leave out.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate, G = 2F.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.device import device_of
from turnout.experts import reference
from turnout.experts.sonic_package import Package, package, use
from turnout.experts.sonic_rules import (
    ACTIVATION,
    LEAST_HIDDEN,
    MERGED,
    MULTIPLE,
    NAME,
    NAMES,
    Problem,
    problem_of,
    rejects,
    require,
)
from turnout.experts.weights import ExpertWeights, Lora, LoraWeights, alternating
from turnout.ragged import counts_of, sort_by_expert
from turnout.routing.rules import Routing
from turnout.specs import ExpertSpec, Unsupported

__all__ = [
    "ACTIVATION",
    "LEAST_HIDDEN",
    "MERGED",
    "MULTIPLE",
    "NAME",
    "NAMES",
    "Problem",
    "expert_mlp",
    "for_sonic",
    "problem_of",
    "rejects",
    "require",
    "use",
]


class _Tap(torch.autograd.Function):
    """The identity around SonicMoE: its backward reads rows in place, and has no derivative."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout.contiguous()


def _with_experts(
    experts_TK: Tensor, weights_TK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Every slot with an expert: those that had none get weight 0 and experts in turn."""
    if counts_of(experts_TK, num_experts) is not None:
        return experts_TK, weights_TK  # a router counted them: each has one
    dropped = (experts_TK < 0) | (experts_TK >= num_experts)
    turn = torch.arange(experts_TK.numel(), device=experts_TK.device, dtype=experts_TK.dtype)
    turn = (turn % num_experts).view(experts_TK.shape)
    return torch.where(dropped, turn, experts_TK), weights_TK.masked_fill(dropped, 0)


_trained: dict[tuple[int, int, int], None] = {}


class _Turn(torch.autograd.Function):
    """The identity on the output of release 0.0.1; refuses a backward pass that would be wrong.

    That release sizes one buffer of its backward pass (`ds_partial_N`, tiles of 128 of F) by the
    shape that it compiled last. A shape that was compiled before one of another size would sum the
    gradient of its routing weights over columns nobody wrote, or beyond the buffer.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, shape: tuple[int, int, int]) -> Tensor:
        ctx.shape = shape
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        shape = ctx.shape
        last = next(reversed(_trained), shape)
        if shape in _trained and -(-shape[2] // 128) != -(-last[2] // 128):
            raise Unsupported(
                f"SonicMoE 0.0.1 trained experts of F = {last[2]} after those of F = {shape[2]}; "
                "going back gives wrong gradients of the routing weights (it keeps one buffer "
                "size per process). Use one size per process, a release from 0.1 on, or "
                "backend='auto'"
            )
        _trained.setdefault(shape)
        return dout, None


def _functions(
    found: Package, x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, keep: bool
) -> Tensor:
    """The two autograd functions of release 0.0.1 on rows sorted by turnout."""
    tokens, top_k = routing.experts_TK.shape
    weights_S, token_S, _, _ = routing.flat()
    num_experts = len(down)
    counted = counts_of(routing.experts_TK, num_experts)
    ragged = sort_by_expert(routing.experts_TK, num_experts, counted)
    rows = (
        token_S[ragged.slot_S],
        ragged.slot_S.int(),
        ragged.row_TK.reshape(-1).int(),
        torch.arange(0, tokens * top_k + 1, top_k, dtype=torch.int32, device=x.device),
    )
    stream = _stream(x)
    w1, w2 = gate_up.permute(1, 2, 0), down.permute(1, 2, 0)
    h, z = found.functional._UpProjection.apply(
        x,
        w1,
        None,
        ragged.offsets,
        tokens * top_k,
        top_k,
        stream,
        *rows,
        False,
        found.swiglu,
        not keep,
    )
    return found.functional._DownProjection.apply(
        h,
        z,
        w2,
        None,
        weights_S.view(tokens, top_k),
        ragged.offsets,
        tokens,
        top_k,
        stream,
        *rows,
        False,
        found.swiglu,
    )


def _flat(
    found: Package, x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, keep: bool
) -> Tensor:
    """The entry point of releases from 0.1 on, and of the hub's kernel."""
    weights_S, token_S, expert_S, _ = routing.flat()
    out, _ = found.functional.moe_general_routing_inputs(
        x=x,
        router_scores=weights_S,
        token_indices=token_S,
        expert_indices=expert_S,
        w1=gate_up.permute(1, 2, 0),
        b1=None,
        w2=down.permute(1, 2, 0),
        b2=None,
        E=len(down),
        stream_id=_stream(x),
        activation_type=found.swiglu,
        is_inference_mode_enabled=not keep,
        concat_layout=False,
    )
    return out


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _merge(w_EOI: Tensor, lora: Lora) -> Tensor:
    """W + scaling * B A, a new stack; A and B rounded to its dtype, as in PEFT's fold."""
    a, b = lora.a_ERI.to(w_EOI.dtype), lora.b_ORE.permute(2, 0, 1).to(w_EOI.dtype)
    return torch.baddbmm(w_EOI, b, a, alpha=lora.scaling)


class _Rebuilt:
    """Merged stacks that autograd does not keep: a recipe is saved, and run in the backward."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.recipes: dict[int, Callable[[], Tensor]] = {}

    def merged(self, w_EOI: Tensor, lora: Lora | None) -> Tensor:
        """The stack to compute with."""
        if lora is None or not self.keep:
            return w_EOI if lora is None else _merge(w_EOI, lora)
        inputs = w_EOI, lora.a_ERI, lora.b_ORE
        versions = [t._version for t in inputs]

        def again() -> Tensor:
            if versions != [t._version for t in inputs]:
                raise RuntimeError(
                    "an expert stack or its adapter was changed in place between forward and "
                    "backward; expected the same values. Step the optimizer after backward"
                )
            with torch.no_grad():
                return _merge(w_EOI, lora)

        out = _merge(w_EOI, lora)
        self.recipes[out.untyped_storage().data_ptr()] = again
        return out

    def saving(self) -> AbstractContextManager[Any]:
        """Where SonicMoE saves its tensors. Activation checkpointing has hooks of its own, which
        rebuild everything; these would take their place."""
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if not self.recipes or outer is not None:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        """A recipe in the place of a merged stack; SonicMoE keeps it as (rows, columns, E)."""
        recipe = self.recipes.get(tensor.untyped_storage().data_ptr())
        return tensor if recipe is None else recipe

    def unpack(self, packed: Any) -> Tensor:
        """What `pack` was given, or its like."""
        return packed if isinstance(packed, Tensor) else packed().permute(1, 2, 0)


def expert_mlp(
    x_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    *,
    lora: LoraWeights,
    backend: str,
    dtype: torch.dtype,
    recompute: bool,
    dropout: bool,
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * mlp(x[t], experts[t, k]) in SonicMoE.

    `turnout.expert_mlp` has checked shapes and indices and calls this for `sonic` and
    `sonic-merged`.

    Args:
        x_TH: (T, H); experts_TK, weights_TK: (T, K).
        weights: stacks in bfloat16, (E, 2F, H) with alternating rows and (E, H, F).
        spec: says so.
        lora: adapters of the two projections, rows of B in the order of the stack's.
        backend: `sonic`, or `sonic-merged`, which merges the adapters.
        dtype: what the products are computed in, the stacks' own.
        recompute, dropout: asked for; both are refused.

    Returns:
        (T, H) in x's dtype.

    Raises:
        Unsupported: with the reason of `rejects`; inside `torch.compile`.
    """
    if torch.compiler.is_compiling():
        raise Unsupported(f"backend={backend!r} does not run in compiled code; use 'auto'")
    adapted = lora.gate_up is not None or lora.down is not None
    problem = problem_of(
        weights,
        spec,
        dtype=dtype,
        lora=adapted,
        dropout=dropout and adapted,
        recompute=recompute,
        merged=backend == MERGED,
    )
    reason = rejects(problem, device_of(x_TH.device))
    if reason is not None:
        raise Unsupported(f"backend={backend!r} does not run these experts: {reason}")
    if not x_TH.shape[0]:  # a launch over no rows is none: the definition, with its zero gradients
        return reference.expert_mlp(x_TH, experts_TK, weights_TK, weights, spec, lora=lora)
    found = package()
    assert isinstance(found, Package)
    experts_TK, weights_TK = _with_experts(experts_TK, weights_TK, problem.experts)
    routing = Routing(experts_TK, _Tap.apply(weights_TK))
    stacks = weights.gate_up, weights.down, *_tensors(lora.gate_up), *_tensors(lora.down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TH, weights_TK, *stacks))
    rebuilt = _Rebuilt(keep)
    with torch.autocast(x_TH.device.type, enabled=False):
        x = _Tap.apply(x_TH.to(dtype).contiguous())
        gate_up = _Tap.apply(rebuilt.merged(weights.gate_up, lora.gate_up))
        down = _Tap.apply(rebuilt.merged(weights.down, lora.down))
        run = _functions if found.form == "functions" else _flat
        with rebuilt.saving():
            out = run(found, x, routing, gate_up, down, keep)
        if found.form == "functions" and not found.is_quack:
            out = _Turn.apply(out, (problem.experts, problem.hidden, problem.intermediate))
        return _Tap.apply(out).to(x_TH.dtype)


def _tensors(lora: Lora | None) -> tuple[Tensor, ...]:
    return () if lora is None else (lora.a_ERI, lora.b_ORE)


def for_sonic(lora: Lora) -> Lora:
    """An adapter of gate_up with the rows of B in alternating order, a copy of B."""
    return Lora(lora.a_ERI, alternating(lora.b_ORE, 0), lora.scaling)
