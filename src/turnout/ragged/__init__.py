"""Rows sorted by expert: `rows` defines them in PyTorch, `kernels` sorts on the GPU."""

from turnout.ragged.rows import (
    Ragged,
    num_tiles,
    sort_by_expert,
    tile_rows_of,
)

__all__ = ["Ragged", "num_tiles", "sort_by_expert", "tile_rows_of"]
