"""Sorting slots by expert on the GPU: no host sync, stable and deterministic.

Up to BLOCK slots take one launch of one program; more take three:

    1. count    per block of slots: how many go to each expert
    2. scan     over blocks and experts: first row of every (block, expert), offsets
    3. scatter  slot to row and row to slot, inside a block by a sort of (expert, slot); tile table

Where the router's kernel has counted (`counts.py`), one launch does the rest: every program adds up
the counts before its own slots, which takes no second launch because there are few of them.

The tile table cuts each expert's rows into tiles of `tile_rows` rows that never straddle experts,
so that one program of a grouped GEMM belongs to one expert. Its size depends on S and E alone.

Legend: S slots (rows), E experts (bucket E holds the dropped slots), B slots per block.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from turnout.launch import Launch
from turnout.ragged import counts
from turnout.ragged.rows import Ragged, memory_size, num_tiles

BLOCK = counts.SORTED_AT_ONCE
_SCAN_ELEMENTS = 8192
_TILE_ELEMENTS = 8192
PLACE_WARPS = 8


@triton.jit
def _bucket(expert, E):
    """The index as int32; E for whatever is not in 0..E-1 (judged before an int64 is narrowed)."""
    return tl.where((expert < 0) | (expert >= E), E, expert).to(tl.int32)


@triton.jit
def _sorted(key, BLOCK: tl.constexpr):
    """The keys in order: a bitonic sort in loops, of which `tl.sort` compiles every step."""
    place = tl.arange(0, BLOCK)
    size = 2
    while size <= BLOCK:
        apart = size // 2
        while apart > 0:
            other = tl.gather(key, place ^ apart, 0)
            first = ((place & apart) == 0) == ((place & size) == 0)
            key = tl.where(first, tl.minimum(key, other), tl.maximum(key, other))
            apart = apart // 2
        size = size * 2
    return key


@triton.jit(do_not_specialize=["S", "blocks"])
def _count_kernel(
    experts_ptr, counts_ptr, E, S, blocks, BLOCK: tl.constexpr, BUCKETS: tl.constexpr
):
    """Computes counts[block, e] and behind them the exclusive sums over e. Grid: blocks of slots.

    Assumes BUCKETS > E, a power of two. Cost: S reads, 2 * blocks * BUCKETS writes.
    """
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    expert = _bucket(tl.load(experts_ptr + offs, mask=offs < S, other=0), E)
    counts = tl.histogram(expert, BUCKETS, mask=offs < S)
    buckets = tl.arange(0, BUCKETS)
    place = block * BUCKETS + buckets
    tl.store(counts_ptr + place, counts)
    tl.store(counts_ptr + blocks * BUCKETS + place, tl.cumsum(counts, 0) - counts)


@triton.jit(do_not_specialize=["blocks"])
def _scan_kernel(
    offsets_ptr,
    counts_ptr,
    E,
    blocks,
    BUCKETS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes offsets; turns the sums behind the counts into first row minus place in the block.

    Grid: one program. Cost: 3 * blocks * BUCKETS reads and writes.
    """
    starts_ptr = counts_ptr + blocks * BUCKETS
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
    tiles_ptr,
    begins,
    ends,
    tile,
    E,
    tiles,
    TILE_ROWS: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Stores expert (-1 past the last) and first row of these tiles, from the experts' rows."""
    buckets = tl.arange(0, BUCKETS)
    begins = tl.where(buckets < E, begins, 0)
    ends = tl.where(buckets < E, ends, 0)
    count = (ends - begins + TILE_ROWS - 1) // TILE_ROWS
    past_last = tl.cumsum(count, 0)
    past = ((past_last[None, :] <= tile[:, None]) & (buckets < E)[None, :]).to(tl.int32)
    expert = tl.sum(past, 1)
    used = expert < E
    chosen = (buckets[None, :] == expert[:, None]).to(tl.int32)
    begin = tl.sum(chosen * begins[None, :], 1)
    first_tile = tl.sum(chosen * (past_last - count)[None, :], 1)
    row = begin + (tile - first_tile) * TILE_ROWS
    tl.store(tiles_ptr + tile, tl.where(used, expert, -1), mask=tile < tiles)
    tl.store(tiles_ptr + tiles + tile, tl.where(used, row, 0), mask=tile < tiles)


@triton.jit(do_not_specialize=["S", "blocks", "tiles"])
def _scatter_kernel(
    experts_ptr,
    counts_ptr,
    slot_ptr,
    row_ptr,
    offsets_ptr,
    tiles_ptr,
    E,
    S,
    blocks,
    tiles,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Computes slot of each row and row of each slot; the last programs the tile table.

    Grid: blocks of slots, then blocks of tiles. Cost: S reads, 2 S writes, 2 tiles writes.
    """
    block = tl.program_id(0)
    if block >= blocks:
        tile = (block - blocks) * TILE_BLOCK + tl.arange(0, TILE_BLOCK)
        buckets = tl.arange(0, BUCKETS)
        begins = tl.load(offsets_ptr + buckets, mask=buckets < E, other=0)
        ends = tl.load(offsets_ptr + buckets + 1, mask=buckets < E, other=0)
        _tile_table(tiles_ptr, begins, ends, tile, E, tiles, TILE_ROWS, BUCKETS)
        return
    local = tl.arange(0, BLOCK)
    offs = block * BLOCK + local
    expert = _bucket(tl.load(experts_ptr + offs, mask=offs < S, other=0), E)
    expert = tl.where(offs < S, expert, BUCKETS)
    key = _sorted(expert * BLOCK + local, BLOCK)
    expert = key // BLOCK
    slot = block * BLOCK + key % BLOCK
    mask = expert < BUCKETS
    starts_ptr = counts_ptr + blocks * BUCKETS
    start = tl.load(starts_ptr + block * BUCKETS + expert, mask=mask, other=0)
    row = start + local
    tl.store(slot_ptr + row, slot.to(tl.int64), mask=mask)
    tl.store(row_ptr + slot, row.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["S", "tiles"])
def _sort_kernel(
    experts_ptr,
    slot_ptr,
    row_ptr,
    offsets_ptr,
    tiles_ptr,
    E,
    S,
    tiles,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Computes everything for a few slots.

    Grid: one program. Assumes S <= BLOCK. Cost: S reads, 2 S writes, 2 tiles writes.
    """
    local = tl.arange(0, BLOCK)
    mask = local < S
    expert = _bucket(tl.load(experts_ptr + local, mask=mask, other=0), E)
    buckets = tl.arange(0, BUCKETS)
    counts = tl.histogram(expert, BUCKETS, mask=mask)
    ends = tl.cumsum(counts, 0)
    begins = ends - counts
    tl.store(offsets_ptr + buckets, begins, mask=buckets <= E)
    for first in range(0, tiles, TILE_BLOCK):
        tile = first + tl.arange(0, TILE_BLOCK)
        _tile_table(tiles_ptr, begins, ends, tile, E, tiles, TILE_ROWS, BUCKETS)
    # sorted by (expert, slot), a slot's place is its row: experts stand in order, without gaps
    slot = _sorted(tl.where(mask, expert, BUCKETS) * BLOCK + local, BLOCK) % BLOCK
    tl.store(slot_ptr + local, slot.to(tl.int64), mask=mask)
    tl.store(row_ptr + slot, local.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["S", "blocks", "own_blocks", "own_slots", "programs", "tiles"])
def _place_kernel(
    experts_ptr,
    counts_ptr,
    slot_ptr,
    row_ptr,
    offsets_ptr,
    tiles_ptr,
    E,
    S,
    blocks,
    own_blocks,
    own_slots,
    programs,
    tiles,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """Computes everything from the counts of `blocks` blocks of slots, none of them dropped.

    Grid: programs that place own_blocks blocks, own_slots slots each; then blocks of tiles.
    Cost: blocks * BUCKETS reads by every program, S reads, 2 S writes, 2 tiles writes.
    """
    program = tl.program_id(0)
    first_block = program * own_blocks
    buckets = tl.arange(0, BUCKETS)
    # added up over the rows behind the loop: inside it, threads would wait for each other
    total_rows = tl.zeros([ROWS, BUCKETS], tl.int32)
    before_rows = tl.zeros([ROWS, BUCKETS], tl.int32)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)[:, None]
        place = block * BUCKETS + buckets[None, :]
        counts = tl.load(counts_ptr + place, mask=block < blocks, other=0)
        total_rows += counts
        before_rows += tl.where(block < first_block, counts, 0)
    total, before = tl.sum(total_rows, 0), tl.sum(before_rows, 0)
    ends = tl.cumsum(total, 0)
    begins = ends - total
    if program >= programs:
        tile = (program - programs) * TILE_BLOCK + tl.arange(0, TILE_BLOCK)
        _tile_table(tiles_ptr, begins, ends, tile, E, tiles, TILE_ROWS, BUCKETS)
        return
    if program == 0:
        tl.store(offsets_ptr + buckets, begins, mask=buckets < E)
        tl.store(offsets_ptr + E, S)
    next_row = begins + before
    last = tl.minimum(S, (program + 1) * own_slots)
    local = tl.arange(0, BLOCK)
    for first in range(program * own_slots, last, BLOCK):
        mask = first + local < last
        expert = tl.load(experts_ptr + first + local, mask=mask, other=0).to(tl.int32)
        counts = tl.histogram(expert, BUCKETS, mask=mask)
        key = _sorted(tl.where(mask, expert, BUCKETS) * BLOCK + local, BLOCK)
        expert = key // BLOCK
        mask = expert < BUCKETS
        # what is sorted stands at local: the first of its expert at the sum of the counts before
        start = next_row - (tl.cumsum(counts, 0) - counts)
        row = tl.gather(start, tl.where(mask, expert, 0), 0) + local
        slot = first + key % BLOCK
        tl.store(slot_ptr + row, slot.to(tl.int64), mask=mask & (row >= 0) & (row < S))
        tl.store(row_ptr + slot, row.to(tl.int64), mask=mask)
        next_row += counts


@lru_cache(maxsize=1024)
def _launches(rows: int, num_experts: int, tile_rows: int) -> tuple[int, tuple[Launch, ...]]:
    """Blocks to count in, and what is launched: one, or count, scan and scatter."""
    buckets = triton.next_power_of_2(num_experts + 1)
    tiles = num_tiles(rows, num_experts, tile_rows)
    block = max(16, min(BLOCK, triton.next_power_of_2(rows)))
    sizes = {"BLOCK": block, "BUCKETS": buckets}
    tile_block = max(1, min(32, _TILE_ELEMENTS // buckets))
    table = {"TILE_ROWS": tile_rows, "TILE_BLOCK": tile_block, **sizes}
    if rows <= BLOCK:
        return 0, (Launch(_sort_kernel, (1, 1, 1), (num_experts, rows, tiles), table, 4),)
    blocks = triton.cdiv(rows, block)
    scan = {"BUCKETS": buckets, "ROWS": max(1, min(32, _SCAN_ELEMENTS // buckets))}
    grid = (blocks + triton.cdiv(tiles, tile_block), 1, 1)
    return (
        blocks,
        (
            Launch(_count_kernel, (blocks, 1, 1), (num_experts, rows, blocks), sizes, 4),
            Launch(_scan_kernel, (1, 1, 1), (num_experts, blocks), scan, 8),
            Launch(_scatter_kernel, grid, (num_experts, rows, blocks, tiles), table, 4),
        ),
    )


@lru_cache(maxsize=1024)
def _place_launch(
    tokens: int, top_k: int, num_experts: int, tile_rows: int, dtype: torch.dtype
) -> Launch:
    """What is launched where the router has counted experts of this dtype."""
    rows = tokens * top_k
    blocks, buckets = counts.shape(tokens, num_experts)
    slots = counts.block_tokens(tokens) * top_k
    own = max(1, BLOCK // slots)
    programs = triton.cdiv(blocks, own)
    tiles = num_tiles(rows, num_experts, tile_rows)
    tile_block = max(1, min(32, _TILE_ELEMENTS // buckets))
    constants = {
        "ROWS": max(1, min(64, _SCAN_ELEMENTS // buckets)),
        "TILE_ROWS": tile_rows,
        "TILE_BLOCK": tile_block,
        "BLOCK": BLOCK,
        "BUCKETS": buckets,
    }
    grid = (programs + triton.cdiv(tiles, tile_block), 1, 1)
    numbers = (num_experts, rows, blocks, own, own * slots, programs, tiles)
    return Launch(_place_kernel, grid, numbers, constants, PLACE_WARPS, same_dtypes=True)


def launch_sort(
    experts_TK: Tensor,
    num_experts: int,
    tile_rows: int,
    counted: Tensor | None = None,
    together: bool = False,
) -> Ragged:
    """`sort_by_expert` on a GPU; S must be at least 1."""
    if not experts_TK.is_contiguous():
        experts_TK = experts_TK.contiguous()
    tokens, top_k = experts_TK.shape
    rows, new_empty = tokens * top_k, experts_TK.new_empty
    tiles = num_tiles(rows, num_experts, tile_rows)
    if together:
        memory = new_empty(memory_size(rows, num_experts, tiles), dtype=torch.int32)
        ragged = Ragged.over(memory, tokens, top_k, num_experts, tile_rows)
    else:
        # sizes as separate arguments and no dtype again: PyTorch takes longer to read more
        slot_S = new_empty(rows, dtype=torch.int64)
        offsets = new_empty(num_experts + 1, dtype=torch.int32)
        ragged = Ragged(
            slot_S=slot_S,
            row_TK=slot_S.new_empty(tokens, top_k),
            offsets=offsets,
            tiles=offsets.new_empty(2, tiles),
            tile_rows=tile_rows,
        )
    out = ragged.slot_S, ragged.row_TK, ragged.offsets, ragged.tiles
    if counted is not None:
        place = _place_launch(tokens, top_k, num_experts, tile_rows, experts_TK.dtype)
        place(experts_TK, counted, *out)
        return ragged
    blocks, launches = _launches(rows, num_experts, tile_rows)
    if not blocks:
        launches[0](experts_TK, *out)
        return ragged
    count, scan, scatter = launches
    buckets = scan.constants["BUCKETS"]
    made = new_empty(2, blocks, buckets, dtype=torch.int32)
    count(experts_TK, made)
    scan(ragged.offsets, made)
    scatter(experts_TK, made, *out)
    return ragged
