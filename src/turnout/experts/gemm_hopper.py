"""Grouped GEMM for Hopper: TMA, wgmma, a producer and two consumers per multiprocessor.

The wide products run here; the narrow ones of adapters, which are bound by memory, and whatever a
copy by TMA can not read (`_why_portable`, `_why_portable_gram`) run in the portable kernels. The
device code is in `hopper_kernels.py` and `hopper_gram.py`.

Legend: S rows, T tokens, E experts, N output width, K contraction, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from turnout.device import Device, device_of
from turnout.experts import gemm_triton
from turnout.experts.hopper_config import (
    BOUND,
    DEPTH,
    MANY,
    ROWS,
    GramRule,
    RowsRule,
    gram_rule,
    rows_rule,
)
from turnout.experts.operands import Activate, ActivateBackward, Operand, RowsOut, Tail
from turnout.kernel_facts import INSTALLED, has_gluon, interpreting
from turnout.launch import Launch, TensorMap
from turnout.ragged import Ragged, num_tiles
from turnout.specs import Activation, GemmProblem
from turnout.tuning.key import Ask, Config
from turnout.tuning.report import fixed

NAME = "hopper"
COUNTED = 16  # elements: of numbers, Triton knows whether they are multiples of it, and of no other
GATHERED = 3 * ROWS // 2  # rows per expert, from which on gathering them is as fast as elsewhere
WARPS = 12  # of a block: a producer and two consumers of 4 each

adapter_intermediate = gemm_triton.adapter_intermediate
factors = gemm_triton.factors


def rejects(problem: GemmProblem, device: Device) -> str | None:
    """Why this back end can not run the problem, or None."""
    if not INSTALLED:
        return "Triton is not installed"
    if interpreting():
        return "Gluon has no interpreter"
    if device.arch != 90:
        return "needs sm_90" if device.arch is None else f"needs sm_90, this is sm_{device.arch}"
    if not has_gluon():
        return "needs Triton 3.6 or newer"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16, not {problem.dtype}"
    return gemm_triton.rejects(problem, device)  # which run what these kernels do not


def _why_portable(
    problem: GemmProblem, a: Operand, w_ENK: Tensor, ragged: Ragged, tail: Tail | None
) -> str | None:
    """Why the portable kernel runs this product, or None."""
    experts, n, k = w_ENK.shape
    e, major, minor = w_ENK.stride() if problem.weight_k_major else _swapped(w_ENK).stride()
    length = n if problem.weight_k_major else k
    paired = problem.epilogue == "activate" and not (problem.activation or Activation()).interleaved
    if problem.narrow:
        return "narrow products are bound by memory"
    if problem.dropout or a.weight_TK is not None:
        return "operands are not changed on the way"
    if problem.weight_dtype != problem.dtype or (
        tail is not None and tail.b_ENR.dtype != w_ENK.dtype
    ):
        return "TMA does not convert"
    if ragged.num_rows >= BOUND:
        return "an expert's rows end below 2^30"
    if ragged.tile_rows != ROWS:
        return "few rows per expert are bound by reading weights"
    if problem.gathered and ragged.num_rows < GATHERED * experts:
        return "the gather of one tile per expert is not hidden behind another's"
    if minor != 1 or major % 8 or e != length * major or experts * length >= 2**31:
        return "TMA reads all experts as one matrix with aligned rows"
    if k % DEPTH and (problem.gathered or not problem.weight_k_major):
        return f"K is no multiple of {DEPTH}"
    if k % 8 or a.rows.stride(0) % 8 or n % (16 if paired else 8):
        return "TMA reads rows aligned to 16 bytes"
    if problem.gathered and a.rows.stride(0) % COUNTED:
        return "rows are gathered 16 bytes at a time"
    if (a.rows.data_ptr() | w_ENK.data_ptr()) % 16:
        return "TMA and cp.async read from addresses aligned to 16 bytes"
    if paired and not problem.weight_k_major:
        return "gate and up columns of one tile are not contiguous"
    if tail is not None and not _dense_tail(tail.b_ENR, problem.weight_k_major):
        return "the adapter does not lie as the weight does"
    if not problem.weight_k_major and problem.rank not in (0, 16, 32) and problem.rank % DEPTH:
        return "the tail's stage would reach into the next expert's adapter"
    return None


def _swapped(w_ENK: Tensor) -> Tensor:
    return w_ENK.transpose(1, 2)


def _dense_tail(b_ENR: Tensor, k_major: bool) -> bool:
    return (b_ENR if k_major else _swapped(b_ENR)).is_contiguous()


@lru_cache(maxsize=4096)
def _rows_launch(
    problem: GemmProblem,
    device: torch.device,
    top_k: int,
    row_stride: int,
    weight_stride: int,
    width: int,
    weighted: bool,
    keep_z: bool,
    keep_h: bool,
) -> tuple[Launch, int, bool]:
    """What is launched, its column tiles, and whether the last one is narrow."""
    from turnout.experts.hopper_kernels import rows_kernel

    rule = rows_rule(problem, top_k, weighted=weighted, keep_z=keep_z, keep_h=keep_h)
    n, k, rank, experts = problem.n, problem.k, problem.rank, problem.experts
    half = n // 2 if problem.epilogue == "activate" and rule.gated else 0
    num_n = -(-(2 * half if rule.paired else n) // rule.block_n)
    rows_box = (rule.block_m, rule.block_k)
    box_n = rule.block_n // 2 if rule.paired else rule.block_n

    def weights(width_k: int, stride: int, columns: int) -> TensorMap:
        if rule.n_major:
            return TensorMap((experts * width_k, n), (stride, 1), (rule.block_k, columns))
        return TensorMap((experts * n, width_k), (stride, 1), (columns, rule.block_k))

    maps = {1: weights(k, weight_stride, box_n)}
    if rule.rest:
        maps[13] = weights(k, weight_stride, rule.rest)
    if not rule.gather:
        maps[0] = TensorMap((problem.rows, k), (row_stride, 1), rows_box)
    if rank:
        maps[4] = TensorMap((problem.rows, rank), (rank, 1), rows_box)
        b_stride = n if rule.n_major else rank
        maps[5] = weights(rank, b_stride, box_n)
        if rule.rest:
            maps[14] = weights(rank, b_stride, rule.rest)
    wide = 2 * n if rule.gated else n  # of z and dz in the backward pass
    sides = 2 if rule.gated and not rule.interleaved else 1
    if rule.z_boxes:
        maps[2] = _stored(wide, sides)
        maps[6] = TensorMap((problem.rows, wide), (wide, 1), rows_box)
        if keep_h:
            maps[7] = _stored(n)
    else:
        maps[2] = _stored(width)
        if keep_z:
            maps[6] = _stored(n, sides)
    chip = device_of(device)
    ask = Ask(
        kernel="hopper_rows", problem=problem, device=chip, tile_rows=rule.block_m, top_k=top_k
    )
    event = fixed(ask, _config(rule, GROUP=rule.group))
    tiles = num_tiles(problem.rows, experts, rule.block_m)
    numbers = (n, k, rank, half, row_stride, num_n, tiles)
    grid = (min(chip.num_sms, tiles * num_n), 1, 1)
    launch = Launch(rows_kernel, grid, numbers, {"RULE": rule}, 4, maps=maps, chosen=event)
    return launch, num_n, rule.rest > 0


def _stored(width: int, sides: int = 1) -> TensorMap:
    """A result of `width` columns, as `hopper_epilogues` describes it."""
    side = width // sides
    return TensorMap(
        (MANY, MANY, BOUND, sides, side),
        (2**64 // BOUND - width, width, width, side, 1),
        (1, 1, ROWS // 2, 1, DEPTH),
    )


def _config(rule: RowsRule | GramRule, **more: int) -> Config:
    """What a report says of a rule."""
    sizes = {
        "BLOCK_M": rule.block_m,
        "BLOCK_N": rule.block_n,
        "BLOCK_K": rule.block_k,
        "num_warps": WARPS,
        "num_stages": rule.stages,
    }
    return Config.of(sizes | more)


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
) -> RowsOut:
    """`turnout.experts.gemm.grouped_gemm` on Hopper."""
    read = a
    if a.weight_TK is None:
        rows, by_token = gemm_triton.rows_of(a, ragged, dtype)
        read = replace(a, rows=rows, by_token=by_token)
    if not ragged.num_rows or _why_portable(problem, read, w_ENK, ragged, tail) is not None:
        return gemm_triton.launch_rows(
            problem, read, w_ENK, ragged, dtype, bias_EN, tail, epilogue, scale
        )
    assert scale == 1.0
    assert tail is None or tail.xa_SR.is_contiguous()
    rows = read.rows
    backward = epilogue if isinstance(epilogue, ActivateBackward) else None
    keep_z = isinstance(epilogue, Activate) and epilogue.keep_z
    keep_h = backward is not None and backward.keep_h
    weight_TK = None if backward is None else backward.weight_TK
    width = gemm_triton.width_of(problem, epilogue)
    launch, num_n, has_rest = _rows_launch(
        problem,
        w_ENK.device,
        ragged.top_k,
        rows.stride(0),
        w_ENK.stride(1 if problem.weight_k_major else 2),
        width,
        weight_TK is not None,
        keep_z,
        keep_h,
    )
    count, device = ragged.num_rows, w_ENK.device
    out = torch.empty(count, width, dtype=dtype, device=device)
    z = torch.empty(count, problem.n, dtype=dtype, device=device) if keep_z else None
    h = torch.empty(count, problem.n, dtype=dtype, device=device) if keep_h else None
    b_ENR = None if tail is None else tail.b_ENR
    dot = None
    if backward is not None:
        dot = torch.empty(count, num_n, dtype=torch.float32, device=device)
    launch(
        rows,
        w_ENK,
        out,
        None if bias_EN is None else bias_EN.contiguous(),
        None if tail is None else tail.xa_SR,
        b_ENR,
        z if backward is None else backward.z_SG,
        h,
        dot,
        weight_TK,
        ragged.slot_S,
        ragged.tiles,
        ragged.offsets,
        w_ENK if has_rest else None,
        b_ENR if has_rest else None,
    )
    return RowsOut(out, z, dot, h)


def _why_portable_gram(problem: GemmProblem, a: Operand, b: Operand, out_ENK: Tensor) -> str | None:
    """Why the portable kernel runs this product, or None."""
    if problem.n < 128 or problem.k < 128:
        return "narrow products are bound by memory"
    if problem.dropout or a.weight_TK is not None or b.weight_TK is not None:
        return "operands are not changed on the way"
    if a.by_token == b.by_token:
        return "one operand is gathered, the other is not"
    widths = problem.n, problem.k, a.rows.stride(0), b.rows.stride(0)
    if any(width % COUNTED for width in widths):
        return "rows are copied 16 bytes at a time"
    if (a.rows.data_ptr() | b.rows.data_ptr()) % 16:
        return "TMA and cp.async read from addresses aligned to 16 bytes"
    if 1 not in out_ENK.stride()[1:]:
        return "the result has no contiguous dim"
    if out_ENK.element_size() not in (2, 4):
        return "results have 2 or 4 bytes"
    if out_ENK.data_ptr() % 16 or any(stride % 8 for stride in out_ENK.stride() if stride != 1):
        return "TMA writes rows aligned to 16 bytes"
    return None


@lru_cache(maxsize=4096)
def _gram_launch(
    problem: GemmProblem,
    n: int,
    k: int,
    device: torch.device,
    top_k: int,
    gather_a: bool,
    row_strides: tuple[int, int],
    out_strides: tuple[int, int],
    out_bytes: int,
) -> Launch:
    from turnout.experts.hopper_gram import gram_kernel

    rule = gram_rule(n, k, top_k, gather_a, out_bytes)
    rows, experts, chip = problem.rows, problem.experts, device_of(device)
    ask = Ask(kernel="hopper_gram", problem=problem, device=chip, top_k=top_k)
    event = fixed(ask, _config(rule))
    if gather_a:
        maps = {3: TensorMap((rows, k), (row_strides[1], 1), (rule.block_m, rule.block_k))}
    else:
        maps = {2: TensorMap((rows, n), (row_strides[0], 1), (rule.block_m, rule.block_n))}
    maps[4] = TensorMap((experts, n, k), (*out_strides, 1), (1, DEPTH, rule.box))
    num_n, num_k = -(-n // rule.block_n), -(-k // rule.block_k)
    numbers = (n, k, *row_strides, num_n, num_k, experts)
    grid = (min(chip.num_sms, experts * num_n * num_k), 1, 1)
    return Launch(gram_kernel, grid, numbers, {"RULE": rule}, 4, maps=maps, chosen=event)


def launch_gram(
    problem: GemmProblem,
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    dtype: torch.dtype,
) -> None:
    """`turnout.experts.gemm.grouped_gram` on Hopper."""
    a = replace(a, rows=gemm_triton.plain(a.rows, dtype))
    b = replace(b, rows=gemm_triton.plain(b.rows, dtype))
    if not ragged.num_rows or _why_portable_gram(problem, a, b, out_ENK) is not None:
        gemm_triton.launch_gram(problem, a, b, ragged, out_ENK, dtype)
        return
    if out_ENK.stride(2) != 1:
        a, b, out_ENK = b, a, _swapped(out_ENK)
    _, n, k = out_ENK.shape
    launch = _gram_launch(
        problem,
        n,
        k,
        out_ENK.device,
        ragged.top_k,
        a.by_token,
        (a.rows.stride(0), b.rows.stride(0)),
        out_ENK.stride()[:2],
        out_ENK.element_size(),
    )
    launch(
        a.rows,
        b.rows,
        None if a.by_token else a.rows,
        b.rows if a.by_token else None,
        out_ENK,
        ragged.slot_S,
        ragged.offsets,
    )
