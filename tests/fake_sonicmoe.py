"""A stand-in for the package `sonicmoe` in plain PyTorch: the same functions, strict about inputs.

It computes from what SonicMoE is really given (interleaved rows, index arrays, strides), with the
gradients written out, so a wrong layout, index, dtype or stride shows. What a kernel would leave
unwritten is NaN here. Two forms, as in `turnout.experts.sonic_package`.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import sys
from enum import Enum
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.device import Device
from turnout.experts import sonic, sonic_package, sonic_rules

H100 = Device(name="NVIDIA H100", arch=90, num_sms=132, shared_memory=1, memory_bytes=1, l2_bytes=1)


class ActivationType(Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"


def check_stack(w: Tensor) -> None:
    """(rows, columns, E), columns contiguous, then rows, then experts."""
    rows, columns, _ = w.shape
    assert w.stride() == (columns, 1, rows * columns), f"stack strides {w.stride()}"


def check_indices(*indices: Tensor) -> None:
    for index in indices:
        assert index.dtype == torch.int32
        assert index.is_contiguous()


def segments(offsets: Tensor, rows: int) -> list[tuple[int, slice]]:
    edges = offsets.tolist()
    assert edges[0] == 0
    assert edges[-1] == rows, "rows without an expert would be read and never written"
    return [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(edges))]


class Calls:
    """What the fake saw last: cleared by `fake`."""

    forwards: list[dict[str, Any]]


class _UpProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Any,
        expert_frequency_offset: Tensor,
        total_expert_freq: int,
        K: Any,
        stream_id: int,
        x_gather_idx: Tensor,
        s_scatter_idx: Tensor,
        s_reverse_scatter_idx: Tensor,
        num_activated_expert_per_token_offset: Tensor,
        is_varlen_K: bool,
        activation_type: Any,
        is_inference_mode_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        check_stack(w1)
        check_indices(x_gather_idx, s_scatter_idx, s_reverse_scatter_idx)
        check_indices(expert_frequency_offset, num_activated_expert_per_token_offset)
        assert x.is_contiguous()
        assert x.dtype == w1.dtype
        assert b1 is None
        assert activation_type is ActivationType.SWIGLU
        Calls.forwards.append({"inference": is_inference_mode_enabled, "w1": w1.data_ptr()})
        z = x.new_full((total_expert_freq, w1.shape[0]), torch.nan)
        for e, rows in segments(expert_frequency_offset, total_expert_freq):
            z[rows] = x[x_gather_idx[rows].long()] @ w1[:, :, e].T
        y1 = F.silu(z[:, 0::2]) * z[:, 1::2]
        if is_inference_mode_enabled:
            z = torch.full_like(z, torch.nan)
        ctx.save_for_backward(x, w1, expert_frequency_offset, x_gather_idx, s_reverse_scatter_idx)
        ctx.starts = num_activated_expert_per_token_offset
        ctx.mark_non_differentiable(y1)
        ctx.set_materialize_grads(False)
        return y1, z

    @staticmethod
    def backward(ctx: Any, _: Any, dz: Tensor) -> Any:
        x, w1, offsets, gather, back = ctx.saved_tensors
        check_stack(w1)
        dw1, expanded = (
            torch.full_like(w1, torch.nan),
            dz.new_full((len(dz), x.shape[1]), torch.nan),
        )
        for e, rows in segments(offsets, len(dz)):
            dw1[:, :, e] = dz[rows].T @ x[gather[rows].long()]
            expanded[rows] = dz[rows] @ w1[:, :, e]
        return _sum(expanded, None, back, ctx.starts), dw1, *[None] * 13


def _sum(rows: Tensor, weights: Tensor | None, back: Tensor, starts: Tensor) -> Tensor:
    """out[t] = sum of weights[j] * rows[back[j]] for j in [starts[t], starts[t + 1])."""
    found = rows[back.long()] if weights is None else rows[back.long()] * weights[:, None]
    count = starts.diff().long()
    token = torch.arange(len(count)).repeat_interleave(count)
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(len(count), rows.shape[1], dtype=wide)
    return out.index_add(0, token, found.to(wide)).to(rows.dtype)


class _DownProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y1: Tensor,
        z: Tensor,
        w2: Tensor,
        b2: Any,
        topk_scores: Tensor,
        expert_frequency_offset: Tensor,
        T: int,
        K: Any,
        stream_id: int,
        x_gather_idx: Tensor,
        s_scatter_idx: Tensor,
        s_reverse_scatter_idx: Tensor,
        num_activated_expert_per_token_offset: Tensor,
        is_varlen_K: bool,
        activation_type: Any,
    ) -> Tensor:
        check_stack(w2)
        assert topk_scores.dtype == torch.float32
        y2 = torch.full((len(y1), w2.shape[0]), torch.nan, dtype=y1.dtype)
        for e, rows in segments(expert_frequency_offset, len(y1)):
            y2[rows] = y1[rows] @ w2[:, :, e].T
        scores = topk_scores.flatten()
        starts = num_activated_expert_per_token_offset
        assert len(starts) == T + 1
        ctx.save_for_backward(z, w2, scores, expert_frequency_offset, x_gather_idx, s_scatter_idx)
        ctx.shape = topk_scores.shape
        return _sum(y2, scores, s_reverse_scatter_idx, starts)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        assert dout.is_contiguous(), "rows of dout are read in place"
        z, w2, scores, offsets, gather, scatter = ctx.saved_tensors
        check_stack(w2)
        gate, up = z[:, 0::2], z[:, 1::2]
        sigmoid = gate.sigmoid()
        h, s = F.silu(gate) * up, scores[scatter.long()][:, None].to(z.dtype)
        dh, dw2 = torch.full_like(h, torch.nan), torch.full_like(w2, torch.nan)
        for e, rows in segments(offsets, len(z)):
            token = gather[rows].long()
            dh[rows] = dout[token] @ w2[:, :, e]
            dw2[:, :, e] = dout[token].T @ (h * s)[rows]
        ds = torch.full_like(scores, torch.nan)
        ds[scatter.long()] = (dh * h).sum(1).float()
        dz = torch.empty_like(z)
        dz[:, 0::2] = s * dh * up * (sigmoid * (1 + gate * (1 - sigmoid)))
        dz[:, 1::2] = s * dh * F.silu(gate)
        return None, dz, dw2, None, ds.view(ctx.shape), *[None] * 10


def _general(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Any,
    w2: Tensor,
    b2: Any,
    E: int,
    stream_id: int,
    activation_type: Any,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """The entry point of releases from 0.1 on: tokens ascend, rows are sorted here."""
    assert not concat_layout
    check_indices(token_indices, expert_indices)
    assert bool((token_indices.diff() >= 0).all()), "token_indices must ascend"
    assert router_scores.dtype == torch.float32
    assert w2.shape[2] == E
    order = expert_indices.argsort(stable=True).int()
    back = torch.empty_like(order)
    back[order.long()] = torch.arange(len(order), dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    counts = torch.bincount(expert_indices.long(), minlength=E)
    per_token = torch.bincount(token_indices.long(), minlength=len(x))
    offsets = torch.cat([zero, counts.cumsum(0).int()])
    starts = torch.cat([zero, per_token.cumsum(0).int()])
    rows = (token_indices[order.long()], order, back, starts, True, activation_type)
    common = (offsets, len(order), None, stream_id, *rows, is_inference_mode_enabled)
    h, z = _UpProjection.apply(x, w1, b1, *common)
    down = (offsets, len(x), None, stream_id, *rows)
    return _DownProjection.apply(h, z, w2, b2, router_scores, *down), counts


def _old_general(x: Tensor, router_scores: Tensor, E: int) -> None:
    raise AssertionError("the entry point of 0.0.1 builds a kernel with nvcc")


def make(form: str = "functions", *, quack: bool = False) -> ModuleType:
    """The module, as `import sonicmoe` gives it."""
    module, functional = ModuleType("sonicmoe"), ModuleType("sonicmoe.functional")
    enums = ModuleType("sonicmoe.enums")
    enums.ActivationType = ActivationType  # type: ignore[attr-defined]
    names: dict[str, Any] = {"moe_general_routing_inputs": _general}
    if form == "functions":
        names = {
            "moe_general_routing_inputs": _old_general,
            "_UpProjection": _UpProjection,
            "_DownProjection": _DownProjection,
            "is_using_quack_gemm": lambda: quack,
        }
    vars(functional).update(names)
    vars(module).update(enums=enums, functional=functional)
    if form == "flat":
        vars(module).update(names)
    return module


def install(
    monkeypatch: pytest.MonkeyPatch, form: str = "functions", *, limits: bool = False
) -> ModuleType:
    """Makes the fake the installed package and the CPU an H100.

    Without `limits` it also takes small sizes and float32, which the real kernels do not.
    """
    module = make(form)
    Calls.forwards = []
    monkeypatch.setitem(sys.modules, "sonicmoe", module)
    monkeypatch.setattr(sonic_package, "_given", None)
    monkeypatch.setattr(sonic, "_trained", {})
    monkeypatch.setattr(sonic, "device_of", lambda device: H100)
    if not limits:
        monkeypatch.setattr(sonic_rules, "MULTIPLE", 1)
        monkeypatch.setattr(sonic_rules, "LEAST_HIDDEN", 1)
        monkeypatch.setattr(sonic_rules, "DTYPES", ("float32", "bfloat16"))
    return module
