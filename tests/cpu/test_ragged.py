"""Rows sorted by expert, against a loop: nothing lost, nothing twice, nothing out of range kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnout.ragged import Ragged, sort_by_expert
from turnout.testing import poison_empty


def naive(experts_TK, num_experts):
    """Slots by expert in slot order, then the dropped ones, by plain loops."""
    flat = experts_TK.reshape(-1).tolist()
    by_expert = [[s for s, e in enumerate(flat) if e == expert] for expert in range(num_experts)]
    dropped = [s for s, e in enumerate(flat) if not 0 <= e < num_experts]
    offsets = [0]
    for slots in by_expert:
        offsets.append(offsets[-1] + len(slots))
    return [s for slots in by_expert for s in slots] + dropped, offsets


def agree(experts_TK, num_experts):
    ragged = sort_by_expert(experts_TK, num_experts)
    slots, offsets = naive(experts_TK, num_experts)
    top_k = experts_TK.shape[1]
    assert ragged.slot_S.tolist() == slots
    assert ragged.offsets.tolist() == offsets
    assert ragged.token_S.tolist() == [s // top_k for s in slots]
    assert ragged.row_TK.shape == experts_TK.shape
    assert ragged.row_TK.reshape(-1)[ragged.slot_S].tolist() == list(range(len(slots)))
    kept = (experts_TK >= 0) & (experts_TK < num_experts)
    assert torch.equal(ragged.kept_TK, kept)
    assert (ragged.num_experts, ragged.num_rows) == (num_experts, experts_TK.numel())
    assert ragged.segments() == [
        (e, offsets[e], offsets[e + 1]) for e in range(num_experts) if offsets[e + 1] > offsets[e]
    ]
    dtypes = (ragged.slot_S.dtype, ragged.row_TK.dtype, ragged.offsets.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.int32)


def random_indices(tokens, top_k, low, high, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (tokens, top_k), generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"),
    [
        (0, 1, 1),
        (0, 8, 128),
        (1, 1, 1),
        (257, 1, 1),
        (7, 1, 1024),
        (33, 32, 1024),
        (257, 8, 96),
        (64, 32, 3),
        (500, 2, 5),
    ],
    ids=lambda size: str(size),
)
def test_rows_agree_with_a_loop(tokens, top_k, num_experts):
    agree(random_indices(tokens, top_k, 0, num_experts - 1), num_experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sentinel_and_out_of_range_are_dropped(dtype):
    agree(random_indices(50, 4, -3, 9, dtype=dtype), 6)
    agree(torch.full((5, 2), 6, dtype=dtype), 6)
    far = torch.tensor([[torch.iinfo(dtype).min, 0], [torch.iinfo(dtype).max, 1]], dtype=dtype)
    agree(far, 2)


@given(data=st.data())
def test_any_routing_agrees_with_a_loop(data):
    tokens, top_k = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 32))
    num_experts = data.draw(st.integers(1, 40))
    index = st.integers(-2, num_experts + 2)
    rows = data.draw(
        st.lists(st.lists(index, min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens)
    )
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    agree(torch.tensor(rows, dtype=dtype).reshape(tokens, top_k), num_experts)


def test_slots_of_one_expert_keep_their_order():
    """A sort that is not stable makes sums differ from run to run."""
    ragged = sort_by_expert(torch.zeros(4000, 2, dtype=torch.int64), 3)
    assert torch.equal(ragged.slot_S, torch.arange(8000))


def test_shapes_do_not_depend_on_the_routing():
    """Activation checkpointing compares the shapes of what two forward passes saved."""

    def shapes(experts_TK):
        r = sort_by_expert(experts_TK, 4)
        return [t.shape for t in (r.slot_S, r.row_TK, r.offsets, r.kept_TK, r.token_S)]

    routings = [random_indices(9, 3, 0, 3), torch.zeros(9, 3, dtype=torch.int64)]
    routings.append(torch.full((9, 3), 4))
    assert shapes(routings[0]) == shapes(routings[1]) == shapes(routings[2])


def test_a_strided_view_of_the_indices_is_read_in_slot_order():
    wide = random_indices(12, 6, 0, 4)
    agree(wide[:, ::2], 4)
    agree(wide.t(), 5)


def test_the_callers_indices_are_not_changed():
    experts = random_indices(20, 3, -1, 5)
    before = experts.clone()
    sort_by_expert(experts, 4)
    assert torch.equal(experts, before)


def test_values_travel_to_rows_and_back():
    experts = random_indices(11, 3, 0, 4)  # 4 is the sentinel
    ragged = sort_by_expert(experts, 4)
    values = torch.arange(33.0).view(11, 3) + 1
    rows = ragged.by_row(values)
    assert rows.tolist() == [values.reshape(-1)[s].item() for s in ragged.slot_S.tolist()]
    expected = torch.where(experts < 4, values, torch.zeros_like(values))
    assert torch.equal(ragged.by_slot(rows), expected)


def test_nan_of_a_dropped_row_does_not_come_back():
    ragged = sort_by_expert(torch.tensor([[0, 2], [2, 1]]), 2)
    rows = torch.tensor([1.0, 2.0, float("nan"), float("nan")])
    assert ragged.by_slot(rows).tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_values_of_no_tokens_keep_their_shape():
    ragged = sort_by_expert(torch.zeros(0, 3, dtype=torch.int64), 4)
    assert ragged.by_slot(torch.zeros(0)).shape == (0, 3)
    assert ragged.by_row(torch.zeros(0, 3)).shape == (0,)


def test_every_entry_of_the_inverse_is_written():
    with poison_empty():
        agree(random_indices(40, 4, -1, 8), 8)


def test_a_bundle_can_not_be_changed():
    ragged = sort_by_expert(torch.zeros(2, 1, dtype=torch.int64), 1)
    assert isinstance(ragged, Ragged)
    with pytest.raises(AttributeError):
        ragged.slot_S = torch.zeros(2)
