"""The configs that the search tries, by kernel, row tile, element size, width and shared memory.

At most 24 per family. A list in `configs/*.json` (made by `turnout tune --from-reports`) takes the
place of the one here for its architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from turnout.kernel_facts import power_of_2
from turnout.tuning.key import Ask, Config, Kernel
from turnout.tuning.space import fits

ROOMY = 160_000  # bytes of shared memory: A100, H100, B200, not the RTX cards
MOST = 24
_GROUPS = (4, 16)

# BLOCK_N, BLOCK_K, num_warps, num_stages by row tile.
_ROWS_ROOMY = {
    128: (
        (256, 64, 8, 3), (256, 64, 8, 4), (256, 32, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4),
        (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3), (128, 32, 4, 5), (64, 64, 4, 4),
        (64, 128, 4, 3), (32, 128, 4, 4),
    ),
    64: (
        (256, 64, 8, 3), (256, 64, 4, 3), (256, 64, 4, 4), (128, 64, 4, 3), (128, 64, 4, 4),
        (128, 64, 8, 4), (128, 128, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4),
        (32, 128, 4, 4), (32, 256, 4, 3),
    ),
    16: (
        (256, 64, 4, 3), (256, 64, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 4, 4),
        (64, 128, 4, 4), (64, 256, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (32, 256, 4, 4),
        (64, 64, 4, 5), (16, 256, 4, 4),
    ),
}  # fmt: skip
_ROWS_SMALL = {
    128: (
        (128, 32, 4, 3), (128, 32, 4, 4), (128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 8, 2),
        (128, 64, 8, 3), (64, 32, 4, 4), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3),
        (256, 32, 8, 3), (32, 64, 4, 4),
    ),
    64: (
        (128, 32, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 4),
        (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (256, 32, 8, 3), (32, 64, 4, 4),
        (32, 128, 4, 3), (64, 64, 2, 3),
    ),
    16: (
        (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 4, 2), (64, 64, 4, 4), (64, 128, 4, 3),
        (64, 128, 4, 4), (32, 64, 4, 4), (32, 128, 4, 3), (32, 128, 4, 4), (32, 256, 4, 2),
        (16, 128, 4, 4), (16, 256, 4, 3),
    ),
}  # fmt: skip
_ROWS_FLOAT32 = (
    (64, 16, 4, 3), (64, 16, 8, 3), (64, 16, 8, 4), (64, 32, 4, 3), (64, 32, 8, 3),
    (128, 16, 8, 3), (32, 16, 4, 4), (32, 32, 4, 3), (32, 32, 8, 3), (16, 32, 4, 4),
)  # fmt: skip
# The width is the padded rank, or as narrow; BLOCK_K, num_warps, num_stages.
_ROWS_NARROW = (
    (64, 4, 4), (64, 4, 6), (128, 4, 3), (128, 4, 4), (128, 8, 3), (256, 4, 2), (256, 4, 3),
    (256, 8, 3), (64, 8, 4), (32, 4, 4),
)  # fmt: skip
# BLOCK_N, BLOCK_K, BLOCK_M, num_warps, num_stages.
_GRAM_ROOMY = (
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
    (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4),
    (32, 128, 128, 4, 3), (16, 128, 128, 4, 3), (16, 256, 128, 4, 3), (16, 64, 256, 4, 2),
)  # fmt: skip
_GRAM_SMALL = (
    (64, 64, 32, 4, 3), (64, 64, 32, 4, 4), (64, 64, 64, 4, 3), (128, 64, 32, 4, 3),
    (64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (32, 64, 64, 4, 3), (32, 128, 64, 4, 3),
    (16, 64, 64, 4, 3), (16, 64, 128, 4, 2), (16, 128, 64, 4, 3), (16, 128, 128, 4, 2),
)  # fmt: skip
_GRAM_FLOAT32 = (
    (64, 64, 16, 4, 3), (64, 64, 16, 4, 4), (64, 64, 16, 8, 3), (64, 64, 32, 4, 3),
    (32, 64, 16, 4, 3), (32, 64, 32, 4, 3), (16, 64, 16, 4, 3), (16, 64, 32, 4, 3),
    (16, 32, 32, 4, 3), (16, 128, 16, 4, 3),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What shares a list of candidates.

    Attributes:
        tile_rows: 0 for `gram`.
        item: bytes of the widest element of the product.
        narrow: the power of two that holds N, 16 to 64; 0 for wider products. Most tiles are too
            wide for them, so what they were timed with says nothing of wider ones.
    """

    kernel: Kernel
    tile_rows: int
    item: int
    narrow: int = 0

    @classmethod
    def of(cls, ask: Ask) -> Family:
        return cls.of_sizes(ask.kernel, ask.tile_rows, ask.problem.dtype, ask.problem.n)

    @classmethod
    def of_sizes(cls, kernel: Kernel, tile_rows: int, dtype: str, n: int) -> Family:
        """From what a stored key knows; `n` is the output width."""
        width = max(16, power_of_2(n))
        return cls(
            kernel=kernel,
            tile_rows=tile_rows,
            item=4 if dtype == "float32" else 2,
            narrow=width if width <= 64 else 0,
        )


@cache
def built_in(family: Family, is_roomy: bool) -> tuple[Config, ...]:
    """The list that is written here, whatever the problem."""
    if family.kernel == "gram":
        tiles = _GRAM_FLOAT32 if family.item == 4 else _GRAM_ROOMY if is_roomy else _GRAM_SMALL
        return tuple(
            Config.of(
                {
                    "EXPERT_FIRST": first,
                    "BLOCK_N": n,
                    "BLOCK_K": k,
                    "BLOCK_M": m,
                    "num_warps": warps,
                    "num_stages": stages,
                }
            )
            for n, k, m, warps, stages in tiles
            for first in (0, 1)
        )
    sizes: tuple[tuple[int, int, int, int], ...]
    if family.item == 4:
        sizes = _ROWS_FLOAT32
    elif family.narrow:
        sizes = tuple((family.narrow, *rest) for rest in _ROWS_NARROW)
    else:
        sizes = (_ROWS_ROOMY if is_roomy else _ROWS_SMALL)[family.tile_rows]
    return tuple(
        Config.of(
            {
                "BLOCK_N": n,
                "BLOCK_K": k,
                "GROUP": group,
                "num_warps": warps,
                "num_stages": stages,
            }
        )
        for n, k, warps, stages in sizes
        for group in _GROUPS
    )


def candidates(
    ask: Ask, listed: Iterable[Config] | None = None
) -> tuple[tuple[Config, ...], dict[Config, str]]:
    """(what is tried, what is pruned and why), both in the order of the list.

    Args:
        ask: the problem.
        listed: the shipped list for this family and architecture, or None for the one here.
    """
    if listed is None:
        listed = built_in(Family.of(ask), is_roomy(ask.device.shared_memory))
    kept, pruned = [], {}
    for config in dict.fromkeys(listed):
        reason = fits(ask, config)
        if reason is None:
            kept.append(config)
        else:
            pruned[config] = reason
    return tuple(kept), pruned


def is_roomy(shared_memory: int) -> bool:
    """Shared memory for wide and deep tiles; unknown (0) counts as roomy."""
    return not shared_memory or shared_memory >= ROOMY
