"""Grouped GEMM in plain PyTorch, one expert after the other: any device, any float dtype.

The back end for the CPU, and the fallback that always works. It reads the offsets on the host, so
on a GPU it waits for the device once per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnout.device import Device
from turnout.experts.dropout import mask
from turnout.experts.epilogues import activate, activate_backward
from turnout.experts.operands import Activate, ActivateBackward, Factors, Operand, RowsOut, Tail
from turnout.experts.weights import Lora
from turnout.ragged import Ragged
from turnout.specs import GemmProblem

NAME = "torch"


def rejects(problem: GemmProblem, device: Device) -> str | None:
    """This back end runs everything."""
    return None


def adapter_intermediate(
    rank: int, adapter: torch.dtype, dtype: torch.dtype
) -> tuple[int, torch.dtype]:
    """Adapters are computed in the widest of their dtype, the activations' and float32: PyTorch
    rounds a product before it can be scaled, and in bfloat16 that second rounding shows."""
    return rank, torch.promote_types(torch.promote_types(adapter, dtype), torch.float32)


def factors(
    adapters: list[tuple[Lora, Tensor]], dtype: torch.dtype, backward: bool
) -> list[Factors]:
    """Views: adapters are read where they lie."""
    found = []
    for lora, _ in adapters:
        wide = adapter_intermediate(lora.rank, lora.a_ERI.dtype, dtype)[1]
        narrow, tail = lora.a_ERI, lora.b_ORE.permute(2, 0, 1)
        if backward:
            narrow, tail = lora.b_ORE.permute(2, 1, 0), lora.a_ERI.transpose(1, 2)
        found.append(Factors(narrow, tail, lora.scaling, wide))
    return found


def _read(a: Operand, ragged: Ragged, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """The operand's rows first..last in `dtype`, gathered, weighted and masked."""
    slots = ragged.slot_S[first:last]
    rows = a.rows[slots // ragged.top_k] if a.by_token else a.rows[first:last]
    if a.weight_TK is not None:
        rows = rows * a.weight_TK.reshape(-1)[slots, None]
    rows = rows.to(dtype)
    if a.dropout is not None:
        rows = rows * mask(a.dropout, slots, rows.shape[1], dtype)
    return rows


def _product(a_e: Tensor, w_NK: Tensor, wide: torch.dtype) -> Tensor:
    """a @ w^T in a's dtype, widened: PyTorch rounds float16 and bfloat16 products once."""
    return (a_e @ w_NK.to(a_e.dtype).T).to(wide)


def _add_tail(sum_SN: Tensor, tail: Tail, ragged: Ragged, e: int, first: int, last: int) -> Tensor:
    b = tail.b_ENR[e]
    update = tail.xa_SR[first:last] @ b.T.to(tail.xa_SR.dtype)
    if tail.dropout is not None:
        slots = ragged.slot_S[first:last]
        update = update * mask(tail.dropout, slots, update.shape[1], update.dtype)
    return sum_SN + update


def launch_rows(
    problem: GemmProblem,
    a: Operand,
    w_ENK: Tensor,
    ragged: Ragged,
    dtype: torch.dtype,
    bias_EN: Tensor | None,
    tail: Tail | None,
    epilogue: Activate | ActivateBackward | None,
    scale: float,
    kept: torch.dtype | None = None,
) -> RowsOut:
    """`turnout.experts.gemm.grouped_gemm`, expert by expert; dropped rows are zero.

    Computed in `dtype`, returned in `kept` (None: the same).
    """
    wide = torch.promote_types(dtype, torch.float32)
    out = _allocate(w_ENK, ragged, kept or dtype, epilogue)
    for e, first, last in ragged.segments():
        a_e = _read(a, ragged, first, last, dtype)
        product = _product(a_e, w_ENK[e], wide)
        if scale != 1.0:
            product = product * scale
        if bias_EN is not None:
            product = product + bias_EN[e].to(wide)
        if tail is not None:
            product = _add_tail(product, tail, ragged, e, first, last)
        _store(out, product.to(wide), epilogue, ragged, first, last)
    return out


def _allocate(
    w_ENK: Tensor,
    ragged: Ragged,
    dtype: torch.dtype,
    epilogue: Activate | ActivateBackward | None,
) -> RowsOut:
    width = w_ENK.shape[1]

    def zeros(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return w_ENK.new_zeros(ragged.num_rows, *shape, dtype=like)

    if isinstance(epilogue, Activate):
        half = width // 2 if epilogue.activation.gated else width
        return RowsOut(zeros(half), z_SG=zeros(width) if epilogue.keep_z else None)
    if isinstance(epilogue, ActivateBackward):
        return RowsOut(
            zeros(epilogue.z_SG.shape[1]),
            dot_SP=zeros(1, like=torch.promote_types(dtype, torch.float32)),
            h_SF=zeros(width) if epilogue.keep_h else None,
        )
    return RowsOut(zeros(width))


def _store(
    out: RowsOut,
    product: Tensor,
    epilogue: Activate | ActivateBackward | None,
    ragged: Ragged,
    first: int,
    last: int,
) -> None:
    if isinstance(epilogue, Activate):
        out.out[first:last] = activate(product, epilogue.activation)
        if out.z_SG is not None:
            out.z_SG[first:last] = product
    elif isinstance(epilogue, ActivateBackward):
        assert out.dot_SP is not None
        z = epilogue.z_SG[first:last].to(product.dtype)
        h, dz = activate_backward(z, product, epilogue.activation)
        out.dot_SP[first:last, 0] = (product * h).sum(1)
        if epilogue.weight_TK is not None:
            weight = epilogue.weight_TK.reshape(-1)[ragged.slot_S[first:last], None]
            h, dz = h * weight, dz * weight
        out.out[first:last] = dz
        if out.h_SF is not None:
            out.h_SF[first:last] = h
    else:
        out.out[first:last] = product


def launch_gram(
    problem: GemmProblem,
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    dtype: torch.dtype,
) -> None:
    """`turnout.experts.gemm.grouped_gram`, expert by expert."""
    out_ENK.zero_()
    for e, first, last in ragged.segments():
        a_e = _read(a, ragged, first, last, dtype)[:, : problem.n]
        b_e = _read(b, ragged, first, last, dtype)[:, : problem.k]
        # a matrix product with one column would add the rows one after the other
        out_ENK[e] = (a_e * b_e).sum(0)[:, None] if problem.k == 1 else a_e.T @ b_e
