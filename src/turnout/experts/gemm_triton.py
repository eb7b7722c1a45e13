"""Grouped GEMM in Triton: portable (no TMA), one program per (row tile of one expert, column tile).

Rows are gathered in the load and weights are read in their stored layout. The LoRA tail is one more
step of the contraction: operands [x | xa] and [W | s*B], so it rides in the same pipelined loop. An
epilogue is a jit function applied before the store. No host sync, no atomics, no
`@triton.autotune`. The device code is in `triton_kernels.py`; Triton is imported when the first
kernel is launched.

Legend: S rows, T tokens, E experts, N output width, K contraction, R LoRA rank, F intermediate.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from turnout.device import Device, device_of
from turnout.experts.dropout import Dropout
from turnout.experts.operands import Activate, ActivateBackward, Operand, RowsOut, Tail
from turnout.experts.triton_launch import Launcher
from turnout.ragged import Ragged, interpreting
from turnout.specs import Activation, GemmProblem

NAME = "triton"
_INSTALLED = find_spec("triton") is not None
_DTYPES = ("float16", "bfloat16", "float32")


def rejects(problem: GemmProblem, device: Device) -> str | None:
    """Why this back end can not run the problem, or None."""
    if not _INSTALLED:
        return "Triton is not installed"
    if device.arch is None and not interpreting():
        return "needs an NVIDIA GPU"
    if device.arch is not None and device.arch < 80:
        return f"needs sm_80 or newer, this is sm_{device.arch}"
    if problem.dtype not in _DTYPES or problem.weight_dtype not in _DTYPES:
        return f"takes {', '.join(_DTYPES)}, not {problem.dtype} with {problem.weight_dtype}"
    return None


def adapter_intermediate(
    rank: int, adapter: torch.dtype, dtype: torch.dtype
) -> tuple[int, torch.dtype]:
    """Rows of x A^T are kept in the activations' dtype, padded to 16 elements with zeros."""
    return -(-rank // 16) * 16, dtype


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=1024)
def rows_config(problem: GemmProblem, tile_rows: int, device: Device) -> dict[str, int]:
    """Tile sizes: as wide as registers allow, as deep as shared memory allows."""
    wide_weight = problem.weight_dtype == "float32" and not problem.narrow
    item = 4 if problem.dtype == "float32" or wide_weight else 2
    room = device.shared_memory or 100_000
    small = room < 120_000 or item == 4
    wide = 128 if small else 256
    block_n = max(16, min(64 if small and item == 4 else wide, _power_of_2(problem.n)))
    block_k = 32 if small else 64
    warps = 8 if tile_rows * block_n >= 128 * 128 else 4
    stage = (tile_rows + block_n) * block_k * item
    stages = max(2, min(4, (room - 8192) // stage))
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": 16 if problem.rows >= 12 * tile_rows * problem.experts else 4,
        "num_warps": warps,
        "num_stages": stages,
    }


@lru_cache(maxsize=1024)
def gram_config(problem: GemmProblem, device: Device) -> dict[str, int]:
    """Tile sizes of the products ragged on K."""
    item = 4 if problem.dtype == "float32" else 2
    room = device.shared_memory or 100_000
    small = room < 120_000 or item == 4
    wide = 64 if small else 128
    block_n = max(16, min(wide, _power_of_2(problem.n)))
    block_k = max(16, min(wide, _power_of_2(problem.k)))
    block_m = 32 if small else 128 if min(block_n, block_k) <= 32 else 64
    warps = 8 if block_n * block_k >= 128 * 128 else 4
    stages = max(2, min(4, (room - 8192) // ((block_n + block_k) * block_m * item)))
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_M": block_m,
        "num_warps": warps,
        "num_stages": stages,
    }


def _dropout(dropout: Dropout | None) -> tuple[Tensor | None, int, int, float]:
    """Seed, tag, threshold and factor of a mask."""
    if dropout is None:
        return None, 0, 0, 1.0
    return dropout.seed, dropout.tag, int(dropout.p * 2**32), 1.0 / (1.0 - dropout.p)


def _packed(tail: Tail, width: int, dtype: torch.dtype, k_major: bool) -> Tensor:
    """scaling * b as (E, N, width) in `dtype`, zero past the rank, contiguous along R or N."""
    experts, n, rank = tail.b_ENR.shape
    shape = (experts, n, width) if k_major else (experts, width, n)
    make = torch.zeros if width != rank else torch.empty
    out = make(shape, dtype=dtype, device=tail.b_ENR.device)
    view = out if k_major else out.transpose(1, 2)
    torch.mul(tail.b_ENR, tail.scaling, out=view[..., :rank])
    return view


@lru_cache(maxsize=1024)
def _rows_plan(
    problem: GemmProblem,
    tile_rows: int,
    device: Device,
    flags: tuple[tuple[str, bool], ...],
    tag: int,
    n_major: bool,
) -> tuple[dict[str, Any], int, int, int, int]:
    """Constexprs in the kernel's order, warps, stages, column tiles and half width."""
    a = problem.activation or Activation()
    config = rows_config(problem, tile_rows, device)
    gated = problem.epilogue == "activate" and a.gated
    paired = gated and not a.interleaved
    half = problem.n // 2 if gated else 0
    block_n, block_k = config["BLOCK_N"], config["BLOCK_K"]
    has = dict(flags)
    columns = 2 * half if paired else problem.n
    constants = {
        "EPILOGUE": problem.epilogue or "none",
        **has,
        "TAG": tag,
        "ACT": a.act,
        "ALPHA": a.alpha,
        "LIMIT": a.limit or 0.0,
        "AFTER": a.limit_after,
        "UP_OFFSET": a.up_offset,
        "GATED": a.gated,
        "INTERLEAVED": a.interleaved,
        "PAIRED": paired,
        "EVEN_K": not has["HAS_TAIL"] and problem.k % block_k == 0,
        "EVEN_N": columns % block_n == 0,
        "N_MAJOR": n_major and not paired,
        "PRECISION": "ieee" if problem.dtype == "float32" else "tf32",
        "BLOCK_M": tile_rows,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": config["GROUP"],
    }
    return constants, config["num_warps"], config["num_stages"], -(-columns // block_n), half


def launch_rows(
    problem: GemmProblem,
    a: Operand,
    w_ENK: Tensor,
    ragged: Ragged,
    dtype: torch.dtype,
    bias_EN: Tensor | None,
    tail: Tail | None,
    epilogue: Activate | ActivateBackward | None,
) -> RowsOut:
    """`turnout.experts.gemm.grouped_gemm` on the GPU."""
    rows, gather = _rows_of(a, dtype)
    out, width = _allocate(problem, w_ENK, ragged, dtype, epilogue)
    if not ragged.num_rows:
        if isinstance(epilogue, ActivateBackward):
            return RowsOut(out.out, dot_S=out.out.new_zeros(0), h_SF=out.h_SF)
        return out
    assert ragged.tiles is not None
    if problem.narrow:
        w_ENK = w_ENK.to(dtype).contiguous()  # an adapter, packed for wide loads
    b = None
    if tail is not None:
        b = _packed(tail, tail.xa_SR.shape[1], w_ENK.dtype, w_ENK.stride(2) == 1)
    seed, tag, threshold, keep = _dropout(a.dropout or (tail.dropout if tail else None))
    z = epilogue.z_SG if isinstance(epilogue, ActivateBackward) else out.z_SG
    weight = epilogue.weight_S if isinstance(epilogue, ActivateBackward) else None
    flags = (
        ("GATHER", gather is not None),
        ("HAS_BIAS", bias_EN is not None),
        ("HAS_TAIL", tail is not None),
        ("HAS_WEIGHT", weight is not None),
        ("KEEP_Z", out.z_SG is not None),
        ("KEEP_H", out.h_SF is not None),
        ("DROP_INPUT", a.dropout is not None),
        ("DROP_TAIL", tail is not None and tail.dropout is not None),
    )
    n_major = w_ENK.stride(1) == 1 and w_ENK.stride(2) != 1
    device = device_of(w_ENK.device)
    constants, warps, stages, num_n, half = _rows_plan(
        problem, ragged.tile_rows, device, flags, tag, n_major
    )
    dot = None
    if isinstance(epilogue, ActivateBackward):
        dot = torch.empty(ragged.num_rows, num_n, dtype=torch.float32, device=w_ENK.device)
    tiles = ragged.tiles.shape[1]
    arguments = (
        rows,
        w_ENK,
        out.out,
        gather,
        bias_EN,
        None if tail is None else tail.xa_SR,
        b,
        z,
        out.h_SF,
        dot,
        weight,
        ragged.slot_S,
        seed,
        ragged.tiles[0],
        ragged.tiles[1],
        ragged.offsets,
        problem.n,
        problem.k,
        0 if tail is None else tail.xa_SR.shape[1],
        half,
        rows.stride(0),
        *w_ENK.stride(),
        *((0, 0, 0) if b is None else b.stride()),
        width,
        num_n,
        tiles,
        threshold,
        keep,
    )
    _launcher("rows_kernel")((tiles * num_n, 1, 1), arguments, constants, warps, stages, w_ENK)
    if dot is None:
        return out
    return RowsOut(out.out, dot_S=dot.sum(1), h_SF=out.h_SF)


@cache
def _launcher(name: str) -> Launcher:
    from turnout.experts import triton_kernels

    return Launcher(getattr(triton_kernels, name))


def _rows_of(a: Operand, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows with unit column stride, and the row map; a weighted operand is made (Llama 4 only)."""
    rows, gather = a.rows, a.gather_S
    if a.weight_S is not None:
        rows = rows if gather is None else rows[gather]
        rows, gather = (rows * a.weight_S[:, None]).to(dtype), None
    rows = rows.to(dtype)
    return (rows if rows.stride(1) == 1 else rows.contiguous()), gather


def _allocate(
    problem: GemmProblem,
    w_ENK: Tensor,
    ragged: Ragged,
    dtype: torch.dtype,
    epilogue: Activate | ActivateBackward | None,
) -> tuple[RowsOut, int]:
    """Outputs (kept rows are all written, dropped rows never read) and the width of the first."""

    def empty(width: int) -> Tensor:
        return torch.empty(ragged.num_rows, width, dtype=dtype, device=w_ENK.device)

    n = problem.n
    if isinstance(epilogue, Activate):
        width = n // 2 if epilogue.activation.gated else n
        return RowsOut(empty(width), z_SG=empty(n) if epilogue.keep_z else None), width
    if isinstance(epilogue, ActivateBackward):
        width = epilogue.z_SG.shape[1]
        return RowsOut(empty(width), h_SF=empty(n) if epilogue.keep_h else None), width
    width = adapter_intermediate(n, dtype, dtype)[0] if problem.narrow else n
    return RowsOut(empty(width)), width


def launch_gram(
    problem: GemmProblem,
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    dtype: torch.dtype,
    scale: float,
) -> None:
    """`turnout.experts.gemm.grouped_gram` on the GPU."""
    assert a.dropout is None
    if not ragged.num_rows:
        return
    config = gram_config(problem, device_of(out_ENK.device))
    num_n, num_k = -(-problem.n // config["BLOCK_N"]), -(-problem.k // config["BLOCK_K"])
    rows_a, rows_b = a.rows.to(dtype), b.rows.to(dtype)
    rows_a = rows_a if rows_a.stride(1) == 1 else rows_a.contiguous()
    rows_b = rows_b if rows_b.stride(1) == 1 else rows_b.contiguous()
    seed, tag, threshold, keep = _dropout(b.dropout)
    arguments = (
        rows_a,
        rows_b,
        out_ENK,
        a.gather_S,
        b.gather_S,
        a.weight_S,
        b.weight_S,
        ragged.slot_S,
        seed,
        ragged.offsets,
        problem.n,
        problem.k,
        rows_a.stride(0),
        rows_b.stride(0),
        *out_ENK.stride(),
        num_n,
        num_k,
        float(scale),
        threshold,
        keep,
    )
    constants = {
        "GATHER_A": a.gather_S is not None,
        "GATHER_B": b.gather_S is not None,
        "WEIGHT_A": a.weight_S is not None,
        "WEIGHT_B": b.weight_S is not None,
        "DROP_B": b.dropout is not None,
        "TAG": tag,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_K": config["BLOCK_K"],
        "BLOCK_M": config["BLOCK_M"],
    }
    grid = (ragged.num_experts * num_n * num_k, 1, 1)
    warps, stages = config["num_warps"], config["num_stages"]
    _launcher("gram_kernel")(grid, arguments, constants, warps, stages, out_ENK)
