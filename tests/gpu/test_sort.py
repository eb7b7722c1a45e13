"""Rows sorted by expert on the GPU: three launches, no host sync, the rows of a stable sort."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DEVICE, device_work, waits_are_errors
from torch import Tensor

from sort_cases import assert_tiles
from turnout.ragged import Ragged, sort_by_expert

INT64 = torch.iinfo(torch.int64)
# T, K, E
SIZES = [
    (0, 1, 1),
    (0, 8, 128),
    (1, 1, 1),
    (257, 1, 1),
    (7, 1, 1024),
    (1, 32, 1024),
    (64, 32, 3),
    (777, 32, 1024),
    (5000, 8, 128),
    (16384, 8, 128),
    (40_000, 1, 1023),
]


def indices(tokens: int, top_k: int, num_experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """-1..E+1: most of them experts, some dropped."""
    generator = torch.Generator().manual_seed(tokens + top_k)
    drawn = torch.randint(-1, num_experts + 2, (tokens, top_k), generator=generator)
    return drawn.to(dtype).to(DEVICE)


def assert_sorted(ragged: Ragged, experts_TK: Tensor, num_experts: int) -> None:
    """Against PyTorch's stable sort on the CPU."""
    flat = experts_TK.cpu().reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    slot_S = flat.sort(stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    row_S = torch.empty_like(slot_S)
    row_S[slot_S] = torch.arange(slot_S.numel())
    assert ragged.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert torch.equal(ragged.slot_S.cpu().long(), slot_S)
    assert torch.equal(ragged.row_TK.cpu().long(), row_S.view(experts_TK.shape))
    kept = (experts_TK >= 0) & (experts_TK < num_experts)
    assert torch.equal(ragged.kept_TK, kept)
    if flat.numel():
        assert_tiles(ragged)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "T{}-K{}-E{}".format(*size))
def test_a_row_is_lost_or_out_of_order(size: tuple[int, int, int]) -> None:
    experts = indices(*size)
    assert_sorted(sort_by_expert(experts, size[2]), experts, size[2])


@pytest.mark.parametrize("fill", [0, 2, 3, 4, -1], ids=lambda fill: f"all {fill}")
def test_one_bucket_takes_all_and_overflows(fill: int) -> None:
    experts = torch.full((3000, 2), fill, device=DEVICE)
    assert_sorted(sort_by_expert(experts, 4), experts, 4)


def test_int32_indices_are_read_as_int64() -> None:
    for size in ((64, 32, 3), (5000, 8, 128)):
        experts = indices(*size, dtype=torch.int32)
        assert_sorted(sort_by_expert(experts, size[2]), experts, size[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_index_far_out_of_range_is_taken_for_an_expert(dtype: torch.dtype) -> None:
    """2^32 + 1 is no expert, though its lower half is."""
    info = torch.iinfo(dtype)
    far = [info.min, info.max, info.min + 1, -(2**31), 2**31 - 1, -1, 3]
    if dtype == torch.int64:
        far += [2**32, 2**32 + 1, -(2**32), 2**31, 2**40 + 2]
    experts = torch.tensor([[e % 3, value] for e, value in enumerate(far)], dtype=dtype)
    experts = experts.to(DEVICE)
    assert_sorted(sort_by_expert(experts, 3), experts, 3)


def test_a_strided_view_of_the_indices_is_read_in_memory_order() -> None:
    wide = indices(64, 32, 3)
    for view in (wide[:, ::2], wide.t(), wide[1:, 3:7]):
        assert_sorted(sort_by_expert(view, 3), view, 3)


def test_two_sorts_differ() -> None:
    experts = indices(16384, 8, 128)
    one, other = sort_by_expert(experts, 128), sort_by_expert(experts, 128)
    for name in ("slot_S", "row_TK", "token_S", "offsets", "tiles"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_the_callers_indices_are_changed() -> None:
    experts = indices(5000, 8, 128)
    before = experts.clone()
    sort_by_expert(experts, 128)
    assert torch.equal(experts, before)


@pytest.mark.unpoisoned
def test_the_sort_waits_for_the_device() -> None:
    experts = indices(5000, 8, 128)
    sort_by_expert(experts, 128)
    with waits_are_errors():
        sort_by_expert(experts, 128)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [(64, 32, 3), (5000, 8, 128), (777, 32, 1024)], ids=str)
def test_the_sort_takes_more_than_three_launches(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    experts = indices(*size, dtype=dtype)
    work = device_work(lambda: sort_by_expert(experts, size[2]))
    assert 1 <= len(work) <= 3, work


@pytest.mark.unpoisoned
def test_the_meter_of_launches_misses_some() -> None:
    x = torch.zeros(1000, device=DEVICE)
    work = device_work(lambda: [x.add(1), torch.empty_like(x).copy_(x), x.sort(), x.cumsum(0)])
    assert len(work) >= 4, work
    assert not device_work(lambda: x.view(10, 100))
