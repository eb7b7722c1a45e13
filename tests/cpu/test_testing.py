"""The yardstick rejects what a fixed tolerance lets through, and poisoned memory is poisoned."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turnout import testing
from turnout.testing import assert_matches, assert_within, errors, poison_empty

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def product(dtype, seed=0):
    """(a, b, exact, eager) of a product (257, 515) x (515, 129)."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(257, 515, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(515, 129, generator=generator, dtype=torch.float64).to(dtype)
    return a, b, a.double() @ b.double(), a @ b


def test_errors_are_relative_to_the_rms():
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    worst, rms = errors(exact + torch.tensor([0.0, 0.5]), exact)
    assert worst == pytest.approx(0.5 / 12.5**0.5)
    assert rms == pytest.approx((0.25 / 2) ** 0.5 / 12.5**0.5)


def test_errors_of_nothing_are_zero():
    empty = torch.empty(0, 7, dtype=torch.float64)
    assert errors(empty.float(), empty) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("x", "exact"),
    [
        (torch.zeros(3, 1), torch.zeros(3, 4, dtype=torch.float64)),  # would broadcast
        (torch.zeros(3), torch.zeros(3)),
    ],
)
def test_a_truth_that_does_not_fit_is_refused(x, exact):
    with pytest.raises(ValueError, match="expected"):
        errors(x, exact)


class Largest(TorchDispatchMode):
    """The largest float64 tensor with memory of its own that was made within."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and not one._is_view():
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.parametrize("shape", [(300, 7), (5, 4, 9), (2100,), ()], ids=str)
def test_a_large_result_is_judged_as_a_whole_or_wrongly_in_pieces(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = exact.bfloat16()
    whole = errors(x, exact)
    monkeypatch.setattr(testing, "_PIECE", 50)
    with Largest() as largest:
        assert errors(x, exact) == pytest.approx(whole, rel=1e-12)
    assert largest.size <= 50
    if exact.numel() > 1:
        x.view(-1)[-1] = float("nan")
        assert all(one != one for one in errors(x, exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_summation_order_passes(dtype):
    a, b, exact, eager = product(dtype)
    halves = a[:, :250].float() @ b[:250].float() + a[:, 250:].float() @ b[250:].float()
    assert_matches("halves", halves.to(dtype), exact, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda out: out * 0.996, id="factor 0.996"),
        pytest.param(lambda out: out.index_fill(0, torch.tensor([40]), 0), id="missing row"),
        pytest.param(lambda out: out.roll(1, 0), id="shifted rows"),
    ],
)
def test_small_bugs_are_rejected(dtype, spoil):
    _, _, exact, eager = product(dtype)
    with pytest.raises(AssertionError, match=r"spoiled: (max|RMS) error"):
        assert_matches("spoiled", spoil(exact).to(dtype), exact, eager)


def test_sums_in_bfloat16_are_rejected():
    a, b, exact, eager = product(torch.bfloat16)
    out = torch.zeros_like(eager)
    for k in range(a.shape[1]):
        out += a[:, k, None] * b[k]
    with pytest.raises(AssertionError, match=r"bf16 sums: (max|RMS) error"):
        assert_matches("bf16 sums", out, exact, eager)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_rejected(bad):
    _, _, exact, eager = product(torch.float32)
    out = eager.clone()
    out[3, 5] = bad
    with pytest.raises(AssertionError, match="1 of 33153 elements are not finite"):
        assert_matches("out", out, exact, eager)


def test_a_truth_with_a_nan_accepts_nothing():
    _, _, exact, eager = product(torch.float32)
    exact[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        assert_matches("out", eager, exact, eager)


def test_another_dtype_is_rejected():
    """A result in float32 beats bfloat16 and is still not what was asked for."""
    _, _, exact, eager = product(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"float32; expected torch\.bfloat16"):
        assert_matches("out", exact.float(), exact, eager)


def test_eager_that_is_exact_by_luck_leaves_one_rounding():
    exact = torch.linspace(1, 2, 64, dtype=torch.float64)
    assert_within("rounded", exact.float(), exact, (0.0, 0.0))
    one_off = exact.float().nextafter(torch.full((64,), torch.inf))
    with pytest.raises(AssertionError, match="one step off: max error"):
        assert_within("one step off", one_off, exact, (0.0, 0.0))


def test_factor_counts():
    exact = torch.ones(64, dtype=torch.float64)
    out = exact.float() + 0.01
    assert_within("out", out, exact, (0.006, 0.006))
    with pytest.raises(AssertionError, match=r"max error 1\.000e-02; expected at most"):
        assert_within("out", out, exact, (0.006, 0.006), factor=1.5)
    with pytest.raises(AssertionError, match="RMS"):
        assert_within("out", out, exact, (0.006, 0.004))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_way_to_get_memory_is_poisoned(dtype):
    like = torch.ones(3, 4, dtype=dtype)
    with poison_empty():
        tensors = {
            "empty": torch.empty(5, dtype=dtype),
            "new_empty": like.new_empty(2, 3),
            "empty_like": torch.empty_like(like),
            "empty_strided": torch.empty_strided((2, 3), (1, 2), dtype=dtype),
            "resize_": torch.ones(1, dtype=dtype).resize_(6)[1:],
        }
    assert {name: bool(t.isnan().all()) for name, t in tensors.items()} == dict.fromkeys(
        tensors, True
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_poisoned_indices_are_out_of_every_range(dtype):
    with poison_empty():
        assert (torch.empty(4, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_poison_ends_with_the_block_and_restores_the_mode():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(KeyError), poison_empty():
            raise KeyError(torch.is_deterministic_algorithms_warn_only_enabled())
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before)
    with poison_empty():
        pass
    assert torch.are_deterministic_algorithms_enabled() is before
