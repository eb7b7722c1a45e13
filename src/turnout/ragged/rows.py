"""Rows sorted by expert: offsets, row map and its inverse.

A slot is one (token, choice) pair, numbered s = t*K + k. A row is a slot's place after a stable
sort by expert, so the rows of one expert are contiguous and in slot order:

    rows of expert e = [offsets[e], offsets[e+1])        kept rows = offsets[E]

Slots whose index is not in 0..E-1 (E is the expert-parallel sentinel) sort behind the kept rows and
are dropped: no GEMM touches them and `combine` counts them as zero. All shapes depend on T, K and E
only, never on the routing.

Legend: T tokens, K experts per token, S = T*K rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from turnout.kernel_facts import INSTALLED, interpreting
from turnout.launch import needs_values, nothing_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """Slots sorted by expert.

    Attributes:
        slot_S: row to slot, int64.
        row_TK: slot to row, int64.
        offsets: (E + 1,) int32, first row of each expert; the last entry counts the kept rows.
        tiles: (2, tiles) int32, expert (-1 past the last) and first row of each row tile; None
            where no kernel asks for it.
        tile_rows: rows of a tile.
        memory: int32; all of these are views of it, so that to keep one tensor is to keep them.
            None where they have memory of their own, which takes the host less time to make.
    """

    slot_S: Tensor
    row_TK: Tensor
    offsets: Tensor
    tiles: Tensor | None
    tile_rows: int
    memory: Tensor | None = None

    @staticmethod
    def over(memory: Tensor, tokens: int, top_k: int, num_experts: int, tile_rows: int) -> Ragged:
        """The views of `memory`, which has `memory_size` elements; it need not be filled yet."""
        rows, tiles = tokens * top_k, 0
        if memory.numel() != memory_size(rows, num_experts, 0):
            tiles = num_tiles(rows, num_experts, tile_rows)
        second, third, fourth = _starts(rows, tiles)
        return Ragged(
            slot_S=memory[: 2 * rows].view(torch.int64),
            row_TK=memory[second : second + 2 * rows].view(torch.int64).view(tokens, top_k),
            offsets=memory[fourth:],
            tiles=memory[third : third + 2 * tiles].view(2, tiles) if tiles else None,
            tile_rows=tile_rows,
            memory=memory,
        )

    @property
    def num_experts(self) -> int:
        return self.offsets.numel() - 1

    @property
    def num_rows(self) -> int:
        return self.slot_S.numel()

    @property
    def top_k(self) -> int:
        return self.row_TK.shape[1]

    @property
    def token_S(self) -> Tensor:
        """Row to token, int64; the kernels divide by K themselves."""
        return self.slot_S // max(self.top_k, 1)

    def by_row(self, values_TK: Tensor) -> Tensor:
        """Per-slot values in row order: (T, K) to (S,)."""
        return values_TK.reshape(-1)[self.slot_S]

    def by_slot(self, values_S: Tensor) -> Tensor:
        """Per-row values in slot order: (S,) to (T, K), zero where the slot was dropped."""
        values = (
            values_S[self.row_TK] if values_S.numel() else values_S.new_zeros(self.row_TK.shape)
        )
        return torch.where(self.kept_TK, values, torch.zeros_like(values))

    @property
    def kept_TK(self) -> Tensor:
        """True where the slot has an expert."""
        return self.row_TK < self.offsets[-1]

    def segments(self) -> list[tuple[int, int, int]]:
        """(expert, first row, last row + 1) of every expert with rows, as host integers.

        On a GPU this waits for the device; only `gemm_torch` uses it.
        """
        needs_values()
        pairs = pairwise(self.offsets.tolist())
        return [(e, first, last) for e, (first, last) in enumerate(pairs) if last > first]


def tile_rows_of(rows: int, num_experts: int) -> int:
    """Rows of a tile, from the mean number of rows per expert, which the host knows."""
    mean = rows / num_experts
    return 128 if mean > 96 else 64 if mean > 12 else 16


def num_tiles(rows: int, num_experts: int, tile_rows: int) -> int:
    """Entries of the tile table: enough for any routing of `rows` slots."""
    return min(rows, -(-rows // tile_rows) + num_experts)


def memory_size(rows: int, num_experts: int, tiles: int) -> int:
    """Elements of `Ragged.memory`; `tiles` is 0 where there is no table of them."""
    return _starts(rows, tiles)[2] + num_experts + 1


def _starts(rows: int, tiles: int) -> tuple[int, int, int]:
    """Where rows, tiles and offsets begin; the slots do at 0."""
    slots = _padded(2 * rows)
    return slots, 2 * slots, 2 * slots + _padded(2 * tiles)


def _padded(elements: int) -> int:
    """To 16 bytes, as kernels want addresses."""
    return -(-elements // 4) * 4


@cache
def _launch_sort() -> Callable[..., Ragged]:
    """The device code: Triton is imported when the first rows are sorted."""
    from turnout.ragged.kernels import launch_sort

    return launch_sort


def sort_by_expert(
    experts_TK: Tensor,
    num_experts: int,
    counted: Tensor | None = None,
    *,
    together: bool = False,
) -> Ragged:
    """Stable sort of the slots by expert, without a host sync.

    Args:
        experts_TK: (T, K) int32 or int64; anything outside 0..E-1 is dropped.
        num_experts: E.
        counted: what `counts_of` says of these experts; saves the kernels two launches.
        together: the result is in one piece of memory.
    """
    rows = experts_TK.numel()
    tile_rows = tile_rows_of(rows, num_experts)
    if rows and INSTALLED and (experts_TK.is_cuda or interpreting()):
        ragged = _launch_sort()(experts_TK, num_experts, tile_rows, counted, together)
        if nothing_runs():  # and PyTorch may index with them
            for index in (ragged.slot_S, ragged.row_TK, ragged.offsets, ragged.tiles):
                if index is not None:
                    index.zero_()
        return ragged
    flat = experts_TK.reshape(-1).long()
    dropped = (flat < 0) | (flat >= num_experts)
    flat = torch.where(dropped, num_experts, flat)
    sorted_experts, slot_S = flat.sort(stable=True)
    memory = experts_TK.new_empty(memory_size(rows, num_experts, 0), dtype=torch.int32)
    tokens, top_k = experts_TK.shape
    ragged = Ragged.over(memory, tokens, top_k, num_experts, tile_rows)
    ragged.slot_S.copy_(slot_S)
    ragged.row_TK.view(-1)[slot_S] = torch.arange(rows, device=flat.device)
    edges = torch.arange(num_experts + 1, device=flat.device)
    ragged.offsets.copy_(torch.searchsorted(sorted_experts, edges))
    return ragged
