"""Rows sorted by expert: `rows` defines them in PyTorch, `kernels` sorts on the GPU, `counts` is
what a router's kernel leaves for it."""

from turnout.ragged.counts import counts_of
from turnout.ragged.rows import (
    Ragged,
    memory_size,
    num_tiles,
    sort_by_expert,
    tile_rows_of,
)

__all__ = ["Ragged", "counts_of", "memory_size", "num_tiles", "sort_by_expert", "tile_rows_of"]
