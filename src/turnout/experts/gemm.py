"""Grouped GEMM: the contract between the expert MLP and its back ends.

Two shapes of work, both over rows sorted by expert (`turnout.ragged.Ragged`):

    grouped_gemm   out[row] = epilogue(scale * a[row] @ w[e]^T + bias[e] + xa[row] @ b[e]^T)
    grouped_gram   out[e]   = sum over the rows of e of a[row]^T b[row]

A back end is a module with `NAME`, `rejects(problem, device) -> str | None`, `launch_rows` (ragged
on M), `launch_gram` (ragged on K; two launches because their operands differ), `factors`, which
makes adapters ready to be read, and `adapter_intermediate`, which says how x A^T is kept.
`BACKENDS` is in order of preference; the choice is a pure function, and nothing is tried and
caught.

Legend: S rows, T tokens, E experts, N and K output and contracted width, R LoRA rank.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from turnout.device import Device, device_of
from turnout.experts import gemm_hopper, gemm_torch, gemm_triton
from turnout.experts.operands import Activate, ActivateBackward, Factors, Operand, RowsOut, Tail
from turnout.experts.weights import Lora
from turnout.kernel_facts import interpreting
from turnout.ragged import Ragged
from turnout.specs import Activation, GemmProblem, Unsupported

BACKENDS: tuple[ModuleType, ...] = (gemm_hopper, gemm_triton, gemm_torch)


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


@lru_cache(maxsize=1024)
def _narrow_backend(
    backends: tuple[ModuleType, ...],
    interpreted: bool,
    rank: int,
    adapter: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> ModuleType:
    """Who computes an adapter's intermediate; the first two are there to be part of the key."""
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
    return select(problem, device_of(device), backend)


def adapter_intermediate(
    rank: int, adapter: torch.dtype, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[int, torch.dtype]:
    """Width and dtype of x A^T as the chosen back end keeps it."""
    module = _narrow_backend(BACKENDS, interpreting(), rank, adapter, dtype, device, backend)
    found: tuple[int, torch.dtype] = module.adapter_intermediate(rank, adapter, dtype)
    return found


def factors(
    adapters: list[tuple[Lora, Tensor]], dtype: torch.dtype, *, backward: bool, backend: str
) -> list[Factors]:
    """Adapters as the chosen back end reads them, A then B, or (backward) B then A.

    Args:
        adapters: each with the base weight w_ENK that it is added to in this pass; at most two.
        dtype: of the activations.
        backward: the product with w is a gradient's, so the adapter's factors change places.
    """
    if not adapters:
        return []
    lora, w_ENK = adapters[0]
    a = lora.a_ERI
    module = _narrow_backend(
        BACKENDS, interpreting(), lora.rank, a.dtype, dtype, w_ENK.device, backend
    )
    found: list[Factors] = module.factors(adapters, dtype, backward)
    return found


@lru_cache(maxsize=4096)
def _rows_choice(
    backends: tuple[ModuleType, ...],
    interpreted: bool,
    backend: str,
    device: torch.device,
    rows: int,
    experts: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    epilogue: Literal["activate", "activate_backward"] | None,
    activation: Activation | None,
    gathered: bool,
    k_major: bool,
    bias: bool,
    dropout: bool,
    narrow: bool,
) -> tuple[GemmProblem, ModuleType]:
    """The problem and who runs it; the first two are there to be part of the key."""
    problem = GemmProblem(
        ragged="m",
        rows=rows,
        experts=experts,
        n=n,
        k=k,
        rank=rank,
        dtype=_name(dtype),
        weight_dtype=_name(weight_dtype),
        epilogue=epilogue,
        activation=activation,
        gathered=gathered,
        weight_k_major=k_major,
        bias=bias,
        dropout=dropout,
        narrow=narrow,
    )
    return problem, select(problem, device_of(device), backend)


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
    scale: float = 1.0,
    backend: str = "auto",
) -> RowsOut:
    """out[row] = epilogue(scale * a[row] @ w[e]^T + bias[e] + tail), rows of e times weight of e.

    Args:
        a: the rows, (S, K), or (T, K) read by token.
        w_ENK: (E, N, K), any strides; converted to `dtype` as it is read.
        ragged: which rows belong to which expert.
        dtype: what the product is computed in and stored as; sums are at least float32.
        bias_EN: (E, N).
        tail: the adapter's second factor.
        epilogue: an activation or its backward; None stores the sum.
        narrow: the product is an adapter's intermediate.
        scale: multiplies the product, before it is rounded; with `narrow` only.

    Returns:
        `RowsOut`; what it holds for dropped rows is not defined and never read.
    """
    assert narrow or scale == 1.0
    _, n, k = w_ENK.shape
    weight_dtype = w_ENK.dtype
    if tail is not None and tail.b_ENR.dtype == torch.float64:
        weight_dtype = torch.float64  # who runs it has to take the adapter as well
    problem, module = _rows_choice(
        BACKENDS,
        interpreting(),
        backend,
        w_ENK.device,
        ragged.num_rows,
        ragged.num_experts,
        n,
        k,
        0 if tail is None else tail.b_ENR.shape[2],
        dtype,
        weight_dtype,
        None if epilogue is None else epilogue.name,
        None if epilogue is None else epilogue.activation,
        a.by_token,
        w_ENK.stride(2) == 1,
        bias_EN is not None,
        a.dropout is not None or (tail is not None and tail.dropout is not None),
        narrow,
    )
    out: RowsOut = module.launch_rows(
        problem, a, w_ENK, ragged, dtype, bias_EN, tail, epilogue, scale
    )
    return out


@lru_cache(maxsize=4096)
def _gram_choice(
    backends: tuple[ModuleType, ...],
    interpreted: bool,
    backend: str,
    device: torch.device,
    rows: int,
    experts: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    gathered: bool,
    dropout: bool,
) -> tuple[GemmProblem, ModuleType]:
    """The problem and who runs it; the first two are there to be part of the key."""
    problem = GemmProblem(
        ragged="k",
        rows=rows,
        experts=experts,
        n=n,
        k=k,
        dtype=_name(dtype),
        weight_dtype=_name(out_dtype),
        gathered=gathered,
        dropout=dropout,
    )
    return problem, select(problem, device_of(device), backend)


def grouped_gram(
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    *,
    dtype: torch.dtype,
    backend: str = "auto",
) -> None:
    """out[e] = sum over the rows of e of a[row]^T b[row]; zero for experts without rows.

    Args:
        a, b: the rows, (S, N) and (S, K), or read by token; further columns are not read.
        out_ENK: (E, N, K), any strides, overwritten in its own dtype.
        dtype: what the products are computed in.
    """
    _, n, k = out_ENK.shape
    problem, module = _gram_choice(
        BACKENDS,
        interpreting(),
        backend,
        out_ENK.device,
        ragged.num_rows,
        ragged.num_experts,
        n,
        k,
        dtype,
        out_ENK.dtype,
        a.by_token or b.by_token,
        a.dropout is not None or b.dropout is not None,
    )
    module.launch_gram(problem, a, b, ragged, out_ENK, dtype)
