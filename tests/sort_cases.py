"""What the tests of the sort compare with."""

from __future__ import annotations

from itertools import pairwise

from turnout.ragged import Ragged


def assert_tiles(ragged: Ragged) -> None:
    """Every expert's rows are cut from its first on; what is left of the table has no expert."""
    assert ragged.tiles is not None
    ends = ragged.offsets.tolist()
    expected = [
        (expert, first)
        for expert, (begin, end) in enumerate(pairwise(ends))
        for first in range(begin, end, ragged.tile_rows)
    ]
    experts, firsts = ragged.tiles.tolist()
    assert list(zip(experts, firsts, strict=True))[: len(expected)] == expected
    assert set(experts[len(expected) :]) <= {-1}
