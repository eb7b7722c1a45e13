"""Grouped GEMM in Triton: portable (no TMA), one program per (row tile of one expert, column tile).

Rows are gathered in the load and weights are read in their stored layout. The LoRA tail is one more
step of the contraction: operands [x | xa] and [W | B], so it rides in the same pipelined loop. An
epilogue is named by a constexpr and is a branch before the store that is compiled alone; its
formulas are jit functions of `triton_math.py`. (A jit function as the constexpr itself would have
to take the operands of every epilogue.) No host sync, no atomics, no `@triton.autotune`. The device
code is in `triton_kernels.py` and `triton_movement.py`, the tile sizes are in `triton_config.py`;
Triton is imported when the first kernel is launched.

Legend: S rows, T tokens, E experts, N output width, K contraction, R LoRA rank, F intermediate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turnout.device import Device, device_of
from turnout.experts.dropout import Dropout
from turnout.experts.operands import Activate, ActivateBackward, Factors, Operand, RowsOut, Tail
from turnout.experts.triton_config import gram_config, rows_config
from turnout.experts.weights import Lora
from turnout.kernel_facts import INSTALLED, interpreting, power_of_2
from turnout.launch import Launch
from turnout.ragged import Ragged, num_tiles
from turnout.specs import Activation, GemmProblem
from turnout.tuning import first_use
from turnout.tuning.key import Ask, Config
from turnout.tuning.report import choose

NAME = "triton"
_DTYPES = ("float16", "bfloat16", "float32")


def rejects(problem: GemmProblem, device: Device) -> str | None:
    """Why this back end can not run the problem, or None."""
    if not INSTALLED:
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


def factors(
    adapters: list[tuple[Lora, Tensor]], dtype: torch.dtype, backward: bool
) -> list[Factors]:
    """Both factors of one or two adapters, packed in one launch.

    The narrow product reads its factor in the activations' dtype with the contraction contiguous;
    the tail, read in the loop of the base weight beside it, has that weight's order, and its dtype
    unless that would round it more (bfloat16 weights in a float16 product).
    """
    tensors: list[Tensor | None] = []
    found, sizes = [], []
    for lora, w_ENK in adapters:
        k_major = w_ENK.stride(2) == 1
        (experts, rank, inputs), outputs = lora.a_ERI.shape, lora.b_ORE.shape[0]
        width = adapter_intermediate(rank, dtype, dtype)[0]
        # of A in backward and of B in forward, the rank is what the tail contracts
        a_last, b_last = backward and k_major, not backward and k_major
        device = lora.a_ERI.device
        tail_dtype = w_ENK.dtype if w_ENK.dtype in (dtype, torch.float32) else dtype
        kinds = (tail_dtype, dtype) if backward else (dtype, tail_dtype)
        a = torch.empty(_packed(experts, width, inputs, a_last), dtype=kinds[0], device=device)
        b = torch.empty(_packed(experts, width, outputs, b_last), dtype=kinds[1], device=device)
        tensors += [lora.a_ERI, lora.b_ORE, a, b]
        strides = (*lora.a_ERI.stride(), *lora.b_ORE.stride())
        sizes.append((rank, inputs, outputs, strides, width, a_last, b_last))
        narrow, tail = (b, a if a_last else a.transpose(1, 2)) if backward else (a, b)
        if not backward and not b_last:
            tail = b.transpose(1, 2)
        found.append(Factors(narrow, tail, lora.scaling, dtype))
    if len(adapters) < 2:
        tensors += [None] * 4
    _pack_launch(experts, tuple(sizes))(*tensors)
    return found


def _packed(experts: int, width: int, size: int, rank_last: bool) -> tuple[int, int, int]:
    return (experts, size, width) if rank_last else (experts, width, size)


@lru_cache(maxsize=256)
def _pack_launch(experts: int, sizes: tuple[tuple[Any, ...], ...]) -> Launch:
    from turnout.experts.triton_movement import pack_kernel

    numbers: list[int] = []
    constants: dict[str, Any] = {}
    programs = []
    for (rank, inputs, outputs, strides, width, a_last, b_last), mark in zip(
        sizes, ("", "2"), strict=False
    ):
        config = {
            "RANK": width,
            "A_RANK_LAST": a_last,
            "B_RANK_LAST": b_last,
            "BLOCK_I": min(256, max(16, power_of_2(inputs))),
            "BLOCK_O": min(8 if b_last else 32, max(4, power_of_2(outputs))),
            "BLOCK_R": 16 if b_last else 4,
            "BLOCK_E": 32,
        }
        a_programs = experts * -(-inputs // config["BLOCK_I"])
        b_programs = -(-outputs // config["BLOCK_O"]) * -(-experts // config["BLOCK_E"])
        programs.append(a_programs + b_programs)
        numbers += [rank, inputs, outputs, *strides]
        constants |= {name + mark: value for name, value in config.items()}
    if len(sizes) < 2:
        numbers += [0] * 9
        constants |= {name + "2": 0 for name in list(constants)}
    grid = (sum(programs), 1, 1)
    return Launch(pack_kernel, grid, (experts, programs[0], *numbers), constants, 4)


def _dropout(dropout: Dropout | None) -> tuple[Tensor | None, tuple[int, int, float]]:
    """Seed, and tag, threshold and factor of a mask."""
    if dropout is None:
        return None, (0, 0, 1.0)
    return dropout.seed, (dropout.tag, int(dropout.p * 2**32), 1.0 / (1.0 - dropout.p))


class _Rows(NamedTuple):
    """What a launch of `rows_kernel` depends on besides its tensors and config."""

    problem: GemmProblem
    device: torch.device
    tile_rows: int
    top_k: int
    row_stride: int
    w_strides: tuple[int, ...]
    tail_strides: tuple[int, ...]
    width: int
    scale: float
    weighted: bool
    keep_z: bool
    keep_h: bool
    drop_input: bool
    drop_tail: bool
    drop: tuple[int, int, float]

    def ask(self) -> tuple[Ask, Config]:
        """The question for a config, and the answer when nothing is stored."""
        problem, device, rows = self.problem, device_of(self.device), self.tile_rows
        ask = Ask(kernel="rows", problem=problem, device=device, tile_rows=rows, top_k=self.top_k)
        return ask, Config.of(rows_config(problem, rows, device))


@lru_cache(maxsize=4096)
def _rows_launch(facts: _Rows) -> tuple[Launch, int]:
    """What is launched, and its column tiles."""
    event = choose(*facts.ask())
    launch, num_n = _build_rows(facts, event.config)
    launch.chosen = event
    return launch, num_n


def _build_rows(facts: _Rows, config: Config) -> tuple[Launch, int]:
    from turnout.experts.triton_kernels import rows_kernel

    problem, tile_rows, w_strides = facts.problem, facts.tile_rows, facts.w_strides
    a = problem.activation or Activation()
    gated = problem.epilogue == "activate" and a.gated
    paired = gated and not a.interleaved
    half = problem.n // 2 if gated else 0
    block_n, block_k = config["BLOCK_N"], config["BLOCK_K"]
    columns = 2 * half if paired else problem.n
    num_n = -(-columns // block_n)
    tag, threshold, keep = facts.drop
    constants = {
        "EPILOGUE": problem.epilogue or "none",
        "GATHER": problem.gathered,
        "TOP_K": facts.top_k,
        "HAS_SCALE": facts.scale != 1.0,
        "HAS_BIAS": problem.bias,
        "HAS_TAIL": problem.rank > 0,
        "HAS_WEIGHT": facts.weighted,
        "KEEP_Z": facts.keep_z,
        "KEEP_H": facts.keep_h,
        "DROP_INPUT": facts.drop_input,
        "DROP_TAIL": facts.drop_tail,
        "TAG": tag,
        "ACT": a.act,
        "ALPHA": a.alpha,
        "LIMIT": -1.0 if a.limit is None else a.limit,
        "AFTER": a.limit_after,
        "UP_OFFSET": a.up_offset,
        "GATED": a.gated,
        "INTERLEAVED": a.interleaved,
        "PAIRED": paired,
        "EVEN_K": problem.rank == 0 and problem.k % block_k == 0,
        "EVEN_N": columns % block_n == 0,
        "N_MAJOR": w_strides[1] == 1 and w_strides[2] != 1 and not paired,
        "PRECISION": "ieee" if problem.dtype == "float32" else "tf32",
        "BLOCK_M": tile_rows,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": config["GROUP"],
    }
    tiles = num_tiles(problem.rows, problem.experts, tile_rows)
    sizes = (problem.n, problem.k, problem.rank, half, facts.row_stride, *w_strides)
    sizes += (*facts.tail_strides, facts.width)
    numbers = (*sizes, num_n, facts.scale, threshold, keep, tiles)
    grid = (tiles * num_n, 1, 1)
    warps, stages = config["num_warps"], config["num_stages"]
    return Launch(rows_kernel, grid, numbers, constants, warps, stages), num_n


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
    """`turnout.experts.gemm.grouped_gemm` on the GPU."""
    if not ragged.num_rows:
        return _no_rows(problem, w_ENK, dtype, epilogue)
    rows, by_token = rows_of(a, ragged, dtype)
    if by_token != problem.gathered:
        problem = replace(problem, gathered=by_token)
    backward = epilogue if isinstance(epilogue, ActivateBackward) else None
    keep_z = isinstance(epilogue, Activate) and epilogue.keep_z
    keep_h = backward is not None and backward.keep_h
    weight_TK = None if backward is None else backward.weight_TK
    tail_drop = None if tail is None else tail.dropout
    seed, drop = _dropout(a.dropout or tail_drop)
    bias_EN = None if bias_EN is None else bias_EN.contiguous()
    assert backward is None or backward.z_SG.is_contiguous()
    width = width_of(problem, epilogue)
    facts = _Rows(
        problem,
        w_ENK.device,
        ragged.tile_rows,
        ragged.top_k,
        rows.stride(0),
        w_ENK.stride(),
        (0, 0, 0) if tail is None else tail.b_ENR.stride(),
        width,
        scale,
        weight_TK is not None,
        keep_z,
        keep_h,
        a.dropout is not None,
        tail_drop is not None,
        drop,
    )

    assert ragged.tiles is not None
    run = partial(
        _run_rows,
        facts,
        dtype,
        (rows, w_ENK),
        (bias_EN, None if tail is None else tail.xa_SR, None if tail is None else tail.b_ENR),
        None if backward is None else backward.z_SG,
        (weight_TK, ragged.slot_S, seed, ragged.tiles, ragged.offsets),
    )
    tuner = first_use.current()
    if tuner is not None and tuner.wants(facts.ask()[0]):
        from turnout.experts.triton_tuning import rows_trial

        read = replace(a, rows=rows, by_token=by_token, weight_TK=None)
        operands = (read, w_ENK, ragged, dtype, bias_EN, tail, epilogue, scale)
        trial = rows_trial(problem, *operands, lambda c: partial(run, *_build_rows(facts, c)))
        tuner.tune(*facts.ask(), trial)
        _rows_launch.cache_clear()
    return run(*_rows_launch(facts))


def _run_rows(
    facts: _Rows,
    dtype: torch.dtype,
    product: tuple[Tensor, Tensor],
    added: tuple[Tensor | None, Tensor | None, Tensor | None],
    z_SG: Tensor | None,
    routing: tuple[Tensor | None, ...],
    launch: Launch,
    num_n: int,
) -> RowsOut:
    """Allocates the outputs and launches; the groups of tensors are in the kernel's order."""
    count, n, device = facts.problem.rows, facts.problem.n, facts.device
    out = torch.empty(count, facts.width, dtype=dtype, device=device)
    h = torch.empty(count, n, dtype=dtype, device=device) if facts.keep_h else None
    if z_SG is not None:
        dot = torch.empty(count, num_n, dtype=torch.float32, device=device)
        launch(*product, out, *added, z_SG, h, dot, *routing)
        return RowsOut(out, None, dot, h)
    z = torch.empty(count, n, dtype=dtype, device=device) if facts.keep_z else None
    launch(*product, out, *added, z, h, None, *routing)
    return RowsOut(out, z, None, h)


def _no_rows(
    problem: GemmProblem,
    w_ENK: Tensor,
    dtype: torch.dtype,
    epilogue: Activate | ActivateBackward | None,
) -> RowsOut:
    """Empty results of the right widths."""
    n, z, dot, h = problem.n, None, None, None
    if isinstance(epilogue, Activate):
        z = w_ENK.new_empty(0, n, dtype=dtype) if epilogue.keep_z else None
        n = n // 2 if epilogue.activation.gated else n
    elif epilogue is not None:
        dot = w_ENK.new_empty(0, 1, dtype=torch.float32)
        h = w_ENK.new_empty(0, n, dtype=dtype) if epilogue.keep_h else None
        n = epilogue.z_SG.shape[1]
    return RowsOut(w_ENK.new_empty(0, n, dtype=dtype), z, dot, h)


def width_of(problem: GemmProblem, epilogue: Activate | ActivateBackward | None) -> int:
    """Columns of the result."""
    if isinstance(epilogue, ActivateBackward):
        return epilogue.z_SG.shape[1]
    gated = epilogue is not None and epilogue.activation.gated
    return problem.n // 2 if gated else problem.n


def rows_of(a: Operand, ragged: Ragged, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Rows with unit column stride, and whether they are read by token.

    A weighted operand is made (Llama 4 only)."""
    rows, by_token = a.rows, a.by_token
    if a.weight_TK is not None:
        rows = rows[ragged.token_S] if by_token else rows
        rows, by_token = rows * ragged.by_row(a.weight_TK)[:, None], False
    return plain(rows, dtype), by_token


def plain(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, with contiguous columns; nothing is called where nothing is to be done."""
    if rows.dtype != dtype:
        rows = rows.to(dtype)
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _Gram(NamedTuple):
    """What a launch of `gram_kernel` depends on besides its tensors and config."""

    problem: GemmProblem
    device: torch.device
    top_k: int
    row_strides: tuple[int, int]
    out_strides: tuple[int, ...]
    flags: tuple[bool, bool, bool, bool, bool]
    drop: tuple[int, int, float]

    def ask(self) -> tuple[Ask, Config]:
        """The question for a config, and the answer when nothing is stored."""
        problem, device = self.problem, device_of(self.device)
        ask = Ask(kernel="gram", problem=problem, device=device, top_k=self.top_k)
        return ask, Config.of(gram_config(problem, device))


@lru_cache(maxsize=4096)
def _gram_launch(facts: _Gram) -> Launch:
    event = choose(*facts.ask())
    launch = _build_gram(facts, event.config)
    launch.chosen = event
    return launch


def _build_gram(facts: _Gram, config: Config) -> Launch:
    from turnout.experts.triton_kernels import gram_kernel

    problem = facts.problem
    names = ("GATHER_A", "GATHER_B", "WEIGHT_A", "WEIGHT_B", "DROP_B")
    tag, threshold, keep = facts.drop
    constants = {
        "EXPERT_FIRST": bool(config["EXPERT_FIRST"]),
        "TOP_K": facts.top_k,
        **dict(zip(names, facts.flags, strict=True)),
        "TAG": tag,
        "PRECISION": "ieee" if problem.dtype == "float32" else "tf32",
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_K": config["BLOCK_K"],
        "BLOCK_M": config["BLOCK_M"],
    }
    num_n = -(-problem.n // config["BLOCK_N"])
    num_k = -(-problem.k // config["BLOCK_K"])
    sizes = (problem.n, problem.k, *facts.row_strides, *facts.out_strides)
    sizes += (num_n, num_k, problem.experts)
    grid = (problem.experts * num_n * num_k, 1, 1)
    warps, stages = config["num_warps"], config["num_stages"]
    return Launch(gram_kernel, grid, (*sizes, threshold, keep), constants, warps, stages)


def launch_gram(
    problem: GemmProblem,
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    dtype: torch.dtype,
) -> None:
    """`turnout.experts.gemm.grouped_gram` on the GPU."""
    assert a.dropout is None
    if not ragged.num_rows:
        out_ENK.zero_()
        return
    target = out_ENK
    if 1 not in out_ENK.stride()[1:]:  # the experts are innermost, as in PEFT's B
        shape = (problem.experts, problem.k, problem.n)
        target = torch.empty(shape, dtype=out_ENK.dtype, device=out_ENK.device).transpose(1, 2)
    product, made = problem, target
    if problem.k < problem.n and problem.k <= 128 and b.dropout is None:
        # the tensor cores like the narrow operand first; a row's weight goes to either
        product, made = replace(problem, n=problem.k, k=problem.n), target.transpose(1, 2)
        a, b = b, a
        if a.weight_TK is None:
            a, b = replace(a, weight_TK=b.weight_TK), replace(b, weight_TK=None)
    rows_a, rows_b = plain(a.rows, dtype), plain(b.rows, dtype)
    seed, drop = _dropout(b.dropout)
    flags = (
        a.by_token,
        b.by_token,
        a.weight_TK is not None,
        b.weight_TK is not None,
        b.dropout is not None,
    )
    facts = _Gram(
        product,
        out_ENK.device,
        ragged.top_k,
        (rows_a.stride(0), rows_b.stride(0)),
        made.stride(),
        flags,
        drop,
    )
    tensors = (rows_a, rows_b, made, a.weight_TK, b.weight_TK, ragged.slot_S, seed, ragged.offsets)
    tuner = first_use.current()
    if tuner is not None and tuner.wants(facts.ask()[0]):
        from turnout.experts.triton_tuning import gram_trial

        operands = (product, a, b, ragged, made, dtype)
        trial = gram_trial(*operands, lambda c: partial(_build_gram(facts, c), *tensors))
        tuner.tune(*facts.ask(), trial)
        _gram_launch.cache_clear()
    _gram_launch(facts)(*tensors)
    if target is not out_ENK:
        _spread_launch(*out_ENK.shape, *out_ENK.stride())(target, out_ENK)


@lru_cache(maxsize=256)
def _spread_launch(e: int, n: int, k: int, stride_e: int, stride_n: int, stride_k: int) -> Launch:
    from turnout.experts.triton_movement import spread_kernel

    block_e, block_n = min(128, max(4, power_of_2(e))), min(32, max(4, power_of_2(n)))
    grid = (-(-n // block_n), -(-e // block_e), k)
    constants = {"BLOCK_E": block_e, "BLOCK_N": block_n}
    return Launch(spread_kernel, grid, (e, n, k, stride_e, stride_n, stride_k), constants, 4)
