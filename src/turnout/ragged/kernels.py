"""Sorting slots by expert on the GPU: three launches, no host sync, stable and deterministic.

    1. count    per block of slots: how many go to each expert
    2. scan     over blocks and experts: first row of every (block, expert), offsets
    3. scatter  slot to row and row to slot, inside a block by a sort of (expert, slot); tile table

The tile table cuts each expert's rows into tiles of `tile_rows` rows that never straddle experts,
so that one program of a grouped GEMM belongs to one expert. Its size depends on S and E alone.

Legend: S slots (rows), E experts (bucket E holds the dropped slots), B slots per block.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turnout.ragged.rows import num_tiles

BLOCK = 1024
_SCAN_BLOCKS = 32


@triton.jit
def _count_kernel(
    experts_ptr, counts_ptr, starts_ptr, S, E, BLOCK: tl.constexpr, BUCKETS: tl.constexpr
):
    """Computes counts[block, e] and the exclusive sum over e. Grid: blocks of slots.

    Assumes BUCKETS > E, a power of two. Cost: S reads, 2 * blocks * BUCKETS writes.
    """
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + offs, mask=offs < S, other=0).to(tl.int32)
    expert = tl.where((expert < 0) | (expert >= E), E, expert)
    counts = tl.histogram(expert, BUCKETS, mask=offs < S)
    buckets = tl.arange(0, BUCKETS)
    place = block * BUCKETS + buckets
    tl.store(counts_ptr + place, counts)
    tl.store(starts_ptr + place, tl.cumsum(counts, 0) - counts)


@triton.jit
def _scan_kernel(
    counts_ptr,
    starts_ptr,
    offsets_ptr,
    blocks,
    E,
    BUCKETS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes offsets; turns `starts` into the first row minus the place in the block.

    Grid: one program. Cost: 3 * blocks * BUCKETS reads and writes.
    """
    buckets = tl.arange(0, BUCKETS)
    total = tl.zeros([BUCKETS], tl.int32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        place = rows[:, None] * BUCKETS + buckets[None, :]
        total += tl.sum(tl.load(counts_ptr + place, mask=rows[:, None] < blocks, other=0), 0)
    ends = tl.cumsum(total, 0)
    begins = ends - total
    tl.store(offsets_ptr + buckets, begins, mask=buckets <= E)
    running = begins
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        place = rows[:, None] * BUCKETS + buckets[None, :]
        mask = rows[:, None] < blocks
        counts = tl.load(counts_ptr + place, mask=mask, other=0)
        before = tl.cumsum(counts, 0) - counts
        starts = tl.load(starts_ptr + place, mask=mask, other=0)
        tl.store(starts_ptr + place, running[None, :] + before - starts, mask=mask)
        running += tl.sum(counts, 0)


@triton.jit
def _tile_table(
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile,
    E,
    tiles,
    TILE_ROWS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Stores expert and first row of these tiles; expert -1 past the last."""
    buckets = tl.arange(0, BUCKETS)
    begins = tl.load(offsets_ptr + buckets, mask=buckets < E, other=0)
    ends = tl.load(offsets_ptr + buckets + 1, mask=buckets < E, other=0)
    count = (ends - begins + TILE_ROWS - 1) // TILE_ROWS
    past_last = tl.cumsum(count, 0)
    past = ((past_last[None, :] <= tile[:, None]) & (buckets < E)[None, :]).to(tl.int32)
    expert = tl.sum(past, 1)
    used = expert < E
    chosen = (buckets[None, :] == expert[:, None]).to(tl.int32)
    begin = tl.sum(chosen * begins[None, :], 1)
    first_tile = tl.sum(chosen * (past_last - count)[None, :], 1)
    row = begin + (tile - first_tile) * TILE_ROWS
    tl.store(tile_expert_ptr + tile, tl.where(used, expert, -1), mask=tile < tiles)
    tl.store(tile_row_ptr + tile, tl.where(used, row, 0), mask=tile < tiles)


@triton.jit
def _scatter_kernel(
    experts_ptr,
    starts_ptr,
    slot_ptr,
    row_ptr,
    token_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    S,
    E,
    TOP_K,
    blocks,
    tiles,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Computes slot and token of each row, row of each slot; the last programs the tile table.

    Grid: blocks of slots, then blocks of tiles. Cost: S reads, 3 S writes, 2 tiles writes.
    """
    block = tl.program_id(0)
    if block >= blocks:
        _tile_table(
            offsets_ptr,
            tile_expert_ptr,
            tile_row_ptr,
            (block - blocks) * TILE_BLOCK + tl.arange(0, TILE_BLOCK),
            E,
            tiles,
            TILE_ROWS,
            BUCKETS,
        )
        return
    local = tl.arange(0, BLOCK)
    offs = block * BLOCK + local
    expert = tl.load(experts_ptr + offs, mask=offs < S, other=0).to(tl.int32)
    expert = tl.where((expert < 0) | (expert >= E), E, expert)
    expert = tl.where(offs < S, expert, BUCKETS)
    key = tl.sort(expert * BLOCK + local)
    expert = key // BLOCK
    slot = block * BLOCK + key % BLOCK
    mask = expert < BUCKETS
    start = tl.load(starts_ptr + block * BUCKETS + expert, mask=mask, other=0)
    row = start + local
    tl.store(slot_ptr + row, slot.to(tl.int64), mask=mask)
    tl.store(token_ptr + row, (slot // TOP_K).to(tl.int64), mask=mask)
    tl.store(row_ptr + slot, row.to(tl.int64), mask=mask)


def launch_sort(
    experts_TK: Tensor, num_experts: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """slot_S, row_TK, token_S, offsets and the tile table; S must be at least 1."""
    flat = experts_TK.reshape(-1).contiguous()
    rows, device = flat.numel(), flat.device
    blocks, buckets = triton.cdiv(rows, BLOCK), triton.next_power_of_2(num_experts + 1)
    tiles = num_tiles(rows, num_experts, tile_rows)
    scratch = torch.empty(2, blocks, buckets, dtype=torch.int32, device=device)
    slot_S = torch.empty(rows, dtype=torch.int64, device=device)
    token_S = torch.empty(rows, dtype=torch.int64, device=device)
    row_TK = torch.empty(experts_TK.shape, dtype=torch.int64, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    table = torch.empty(2, tiles, dtype=torch.int32, device=device)
    sizes = {"BLOCK": BLOCK, "BUCKETS": buckets}
    _count_kernel[(blocks,)](flat, scratch[0], scratch[1], rows, num_experts, **sizes, num_warps=4)
    scan_rows = max(1, min(_SCAN_BLOCKS, 8192 // buckets))
    _scan_kernel[(1,)](
        scratch[0],
        scratch[1],
        offsets,
        blocks,
        num_experts,
        BUCKETS=buckets,
        ROWS=scan_rows,
        num_warps=8,
    )
    tile_block = max(1, min(32, 8192 // buckets))
    _scatter_kernel[(blocks + triton.cdiv(tiles, tile_block),)](
        flat,
        scratch[1],
        slot_S,
        row_TK,
        token_S,
        offsets,
        table[0],
        table[1],
        rows,
        num_experts,
        experts_TK.shape[1],
        blocks,
        tiles,
        TILE_ROWS=tile_rows,
        TILE_BLOCK=tile_block,
        **sizes,
        num_warps=4,
    )
    return slot_S, row_TK, token_S, offsets, table
