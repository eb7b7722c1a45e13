"""Tile sizes of the Triton kernels when nothing was tuned: a pure function of problem and device.

Legend: N output width, K contraction.
"""

from __future__ import annotations

from functools import lru_cache

from turnout.device import Device
from turnout.kernel_facts import power_of_2
from turnout.ragged import num_tiles
from turnout.specs import GemmProblem


@lru_cache(maxsize=1024)
def rows_config(problem: GemmProblem, tile_rows: int, device: Device) -> dict[str, int]:
    """Tile sizes: as wide as registers allow, as deep as shared memory allows.

    Few rows are bound by reading the weights: then column tiles are cut until every
    multiprocessor has some. Float32 is summed in short chains, or it would be less exact than
    cuBLAS.
    """
    item = 4 if "float32" in (problem.dtype, problem.weight_dtype) else 2
    room = device.shared_memory or 100_000
    small = room < 120_000 or item == 4
    widest = (64 if item == 4 else 128) if small else 256
    mixed = problem.weight_dtype not in (problem.dtype, "float32")
    if problem.rank and (problem.dropout or mixed):
        widest = min(widest, 128)  # the tail is summed beside the product
    block_n = max(16, min(widest, power_of_2(problem.n)))
    tiles = num_tiles(problem.rows, problem.experts, tile_rows)
    while block_n > 32 and tiles * -(-problem.n // block_n) < 2 * device.num_sms:
        block_n //= 2
    block_k = 16 if problem.dtype == "float32" else 32 if small else 64
    if tile_rows <= 64 and block_n <= 64 and item == 2:
        block_k = 128 if small else 256 if block_n <= 32 else 128
        block_k = min(block_k, max(32, power_of_2(problem.k)))
    if problem.narrow and not (small or problem.gathered) and tile_rows > 64:
        block_k = 128  # bound by memory: longer pieces of contiguous rows
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
    block_n = max(16, min(wide, power_of_2(problem.n)))
    block_k = max(16, min(wide, power_of_2(problem.k)))
    narrow = min(block_n, block_k) <= 32 and not small
    block_m = 32 if small else 128 if narrow else 64
    if problem.dtype == "float32":
        block_m = 16  # sums of short chains, as in `rows_config`
    deepest = 4
    if narrow and not problem.gathered and max(block_n, block_k) == wide:
        # bound by memory: longer pieces of fewer rows
        block_n, block_k = (2 * b if b == wide else b for b in (block_n, block_k))
        block_m, deepest = 64, 3
    warps = 8 if block_n * block_k >= 128 * 128 else 4
    stages = max(2, min(deepest, (room - 8192) // ((block_n + block_k) * block_m * item)))
    return {
        "EXPERT_FIRST": min(problem.n, problem.k) <= 256,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_M": block_m,
        "num_warps": warps,
        "num_stages": stages,
    }
