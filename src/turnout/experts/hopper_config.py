"""What the Hopper kernels are compiled for: one value per kernel, with its tile sizes.

Legend: M rows of a tile, N output width, K contraction.
"""

from __future__ import annotations

from typing import NamedTuple

from turnout.kernel_facts import power_of_2
from turnout.specs import Activation, GemmProblem

ROWS = 128  # of a tile: the sort's, and two warpgroups'
DEPTH = 64  # of a stage, columns of a box: 128 bytes, the widest swizzle
BOUND = 2**30  # rows of a map that ends at an expert's last row
MANY = 0x7FFF0000  # more than any index of a map's outer dims


class RowsRule(NamedTuple):
    """The constexprs of `hopper_kernels.rows_kernel`.

    Attributes:
        epilogue, gather, top_k, bias, weighted, keep_z, keep_h: what the product is.
        tail: columns of a stage that the adapter takes: the rank, or block_k, or 0.
        act, alpha, limit (-1 is none), after, up_offset, gated, interleaved: the activation.
        paired: a column tile is half gate, half up columns.
        n_major: N is the contiguous dim of the weights.
        even_n: column tiles end where the columns do.
        rest: columns that the last column tile is cut to, or 0 if it is as wide as the others.
        z_boxes: stages of a whole tile that the backward epilogue reads z from, DEPTH columns each.
        block_m, block_n, block_k, stages, group: tile sizes; row tiles that run together.
    """

    epilogue: str
    gather: bool
    top_k: int
    bias: bool
    tail: int
    weighted: bool
    keep_z: bool
    keep_h: bool
    act: str
    alpha: float
    limit: float
    after: bool
    up_offset: float
    gated: bool
    interleaved: bool
    paired: bool
    n_major: bool
    even_n: bool
    rest: int
    z_boxes: int
    block_m: int
    block_n: int
    block_k: int
    stages: int
    group: int


class GramRule(NamedTuple):
    """The constexprs of `hopper_gram.gram_kernel`.

    Attributes:
        gather_a: the first operand is read by token, else the second.
        top_k: K of the routing.
        even_n, even_k: tiles end where the result does.
        box: columns that are stored at once.
        block_m, block_n, block_k, stages: rows of a stage, tile of the result.
    """

    gather_a: bool
    top_k: int
    even_n: bool
    even_k: bool
    box: int
    block_m: int
    block_n: int
    block_k: int
    stages: int


def rest_of(n: int, block_n: int, epilogue: str | None) -> int:
    """Columns that the last column tile is cut to: a half or a quarter, where that holds the rest.

    A tile of the forward epilogue has its gate and its up columns half and half, and stays whole.
    """
    rest = -(-(n % block_n) // DEPTH) * DEPTH
    return rest if rest <= block_n // 2 and epilogue != "activate" else 0


def rows_rule(
    problem: GemmProblem,
    top_k: int,
    *,
    weighted: bool,
    keep_z: bool,
    keep_h: bool,
) -> RowsRule:
    """The rule of a problem."""
    a = problem.activation or Activation()
    paired = problem.epilogue == "activate" and a.gated and not a.interleaved
    backward = problem.epilogue == "activate_backward"
    block_n = 256
    many = problem.rows >= 12 * ROWS * problem.experts
    return RowsRule(
        epilogue=problem.epilogue or "none",
        gather=problem.gathered,
        top_k=top_k,
        bias=problem.bias,
        tail=min(DEPTH, power_of_2(problem.rank)) if problem.rank else 0,
        weighted=weighted,
        keep_z=keep_z,
        keep_h=keep_h,
        act=a.act,
        alpha=a.alpha,
        limit=-1.0 if a.limit is None else a.limit,
        after=a.limit_after,
        up_offset=a.up_offset,
        gated=a.gated,
        interleaved=a.interleaved,
        paired=paired,
        n_major=not problem.weight_k_major,
        even_n=problem.n % block_n == 0,
        rest=rest_of(problem.n, block_n, problem.epilogue),
        z_boxes=block_n // DEPTH * (2 if a.gated else 1) if backward else 0,
        block_m=ROWS,
        block_n=block_n,
        block_k=DEPTH,
        stages=4,
        # the rows of a group stay in L2 while all column tiles pass
        group=16 if many and problem.k <= 8192 else 4,
    )


def gram_rule(n: int, k: int, top_k: int, gather_a: bool, out_bytes: int) -> GramRule:
    """The rule of a product of width n x k, of elements of `out_bytes`; the operand that is
    gathered is the narrow one."""
    block_n, block_k = (128, 256) if gather_a else (256, 128)
    return GramRule(
        gather_a=gather_a,
        top_k=top_k,
        even_n=n % block_n == 0,
        even_k=k % block_k == 0,
        box=2 * DEPTH // out_bytes,
        block_m=DEPTH,
        block_n=block_n,
        block_k=block_k,
        stages=4,
    )
