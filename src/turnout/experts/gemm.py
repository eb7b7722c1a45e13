"""Grouped GEMM: the contract between the expert MLP and its back ends.

Two shapes of work, both over rows sorted by expert (`turnout.ragged.Ragged`):

    grouped_gemm   out[row] = epilogue(a[row] @ w[e]^T + bias[e] + scaling * xa[row] @ b[e]^T)
    grouped_gram   out[e]   = scale * sum over the rows of e of a[row]^T b[row]

A back end is a module with `NAME`, `rejects(problem, device) -> str | None`, `launch_rows` (ragged
on M), `launch_gram` (ragged on K; two launches because their operands differ) and
`adapter_intermediate`, which says how it keeps x A^T. `BACKENDS` is in
order of preference; the choice is a pure function, and nothing is tried and caught.

Legend: S rows, T tokens, E experts, N and K output and contracted width, R LoRA rank.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from turnout.device import Device, device_of
from turnout.experts import gemm_torch, gemm_triton
from turnout.experts.operands import Activate, ActivateBackward, Operand, RowsOut, Tail
from turnout.ragged import Ragged, interpreting
from turnout.specs import GemmProblem, Unsupported

BACKENDS: tuple[ModuleType, ...] = (gemm_triton, gemm_torch)


def backend_named(name: str) -> ModuleType:
    """The back end module called `name`.

    Raises:
        Unsupported: this version has no such back end.
    """
    for module in BACKENDS:
        if name == module.NAME:
            return module
    names = ", ".join(module.NAME for module in BACKENDS)
    raise Unsupported(
        f"backend={name!r} is not in this version of turnout; it has: {names}. Use backend='auto'"
    )


def select(problem: GemmProblem, device: Device, backend: str = "auto") -> ModuleType:
    """The first back end that accepts the problem, or the named one.

    Raises:
        Unsupported: with the reason of every back end asked.
    """
    return _select(BACKENDS, interpreting(), problem, device, backend)


@lru_cache(maxsize=4096)
def _select(
    backends: tuple[ModuleType, ...],
    interpreted: bool,
    problem: GemmProblem,
    device: Device,
    backend: str,
) -> ModuleType:
    """The choice, once per problem; the first two arguments are there to be part of the key."""
    candidates = BACKENDS if backend == "auto" else (backend_named(backend),)
    reasons = []
    for module in candidates:
        reason = module.rejects(problem, device)
        if reason is None:
            return module
        reasons.append(f"{module.NAME}: {reason}")
    raise Unsupported(f"no back end runs {problem}: " + "; ".join(reasons))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def adapter_intermediate(
    rank: int, adapter: torch.dtype, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[int, torch.dtype]:
    """Width and dtype of x A^T as the chosen back end keeps it."""
    problem = GemmProblem(
        ragged="m",
        rows=1,
        experts=1,
        n=rank,
        k=1,
        dtype=_name(dtype),
        weight_dtype=_name(adapter),
        narrow=True,
    )
    module = select(problem, device_of(device), backend)
    found: tuple[int, torch.dtype] = module.adapter_intermediate(rank, adapter, dtype)
    return found


def grouped_gemm(
    a: Operand,
    w_ENK: Tensor,
    ragged: Ragged,
    *,
    dtype: torch.dtype,
    bias_EN: Tensor | None = None,
    tail: Tail | None = None,
    epilogue: Activate | ActivateBackward | None = None,
    narrow: bool = False,
    backend: str = "auto",
) -> RowsOut:
    """out[row] = epilogue(a[row] @ w[e]^T + bias[e] + tail), rows of expert e times weight of e.

    Args:
        a: the rows, (S, K), or (T, K) read through the row map.
        w_ENK: (E, N, K), any strides; converted to `dtype` as it is read.
        ragged: which rows belong to which expert.
        dtype: what the product is computed in and stored as; sums are at least float32.
        bias_EN: (E, N).
        tail: the adapter's second factor.
        epilogue: an activation or its backward; None stores the sum.
        narrow: the product is an adapter's intermediate; the back end may pad its width with zeros.

    Returns:
        `RowsOut`; rows that were dropped are zero.
    """
    problem = GemmProblem(
        ragged="m",
        rows=ragged.num_rows,
        experts=ragged.num_experts,
        n=w_ENK.shape[1],
        k=w_ENK.shape[2],
        rank=0 if tail is None else tail.b_ENR.shape[2],
        dtype=_name(dtype),
        weight_dtype=_name(w_ENK.dtype),
        epilogue=None if epilogue is None else epilogue.name,
        activation=None if epilogue is None else epilogue.activation,
        gathered=a.gather_S is not None,
        weight_k_major=w_ENK.stride(2) == 1,
        bias=bias_EN is not None,
        dropout=a.dropout is not None or (tail is not None and tail.dropout is not None),
        narrow=narrow,
    )
    module = select(problem, device_of(w_ENK.device), backend)
    out: RowsOut = module.launch_rows(problem, a, w_ENK, ragged, dtype, bias_EN, tail, epilogue)
    return out


def grouped_gram(
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    *,
    dtype: torch.dtype,
    scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """out[e] = scale * sum over the rows of e of a[row]^T b[row]; experts without rows keep zero.

    Args:
        a, b: the rows, (S, N) and (S, K), or read through the row map.
        out_ENK: zeros (E, N, K), any strides, written in place in its own dtype.
        dtype: what the products are computed in.
    """
    problem = GemmProblem(
        ragged="k",
        rows=ragged.num_rows,
        experts=ragged.num_experts,
        n=out_ENK.shape[1],
        k=out_ENK.shape[2],
        dtype=_name(dtype),
        weight_dtype=_name(out_ENK.dtype),
        gathered=a.gather_S is not None or b.gather_S is not None,
        dropout=a.dropout is not None or b.dropout is not None,
    )
    module = select(problem, device_of(out_ENK.device), backend)
    module.launch_gram(problem, a, b, ragged, out_ENK, dtype, scale)
