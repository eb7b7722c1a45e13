"""The kernels of the load-balancing loss in Triton's interpreter."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from balance_cases import SIZES, check, chosen, randn, weights
from turnout.routing import balance, losses
from turnout.routing.losses import load_balancing_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), SIZES)
def test_sums_or_gradients_of_a_size_are_wrong(
    tokens: tuple[int, ...], top_k: int, experts: int, dtype: torch.dtype
) -> None:
    check([randn(t, experts, seed, dtype) for seed, t in enumerate(tokens)], top_k, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_tokens_count_otherwise(dtype: torch.dtype) -> None:
    check([randn(150, 12, seed, dtype) for seed in range(3)], 3, weights(150))


def test_probabilities_of_autocast_are_rounded_to_the_logits_dtype() -> None:
    """Its softmax is float32: other sums and gradients, and fewer equal ones to choose from."""
    made = [randn(150, 60, seed, torch.float16) for seed in range(3)]
    check(made, 3, None, wide=True)
    check(made, 3, weights(150), wide=True)
    counts, sums = balance.sums(made, 3, None, wide=True)
    expected = balance.sums([z.float() for z in made], 3, None)
    assert torch.equal(counts, expected[0])
    assert torch.equal(sums, expected[1])


@pytest.mark.parametrize("in_kernels", [True, False], ids=["kernels", "torch"])
def test_the_loss_under_autocast_is_another(in_kernels: bool) -> None:
    """Autocast is on in the forward pass and off in the backward pass."""
    leaves = [randn(90, 60, seed, torch.float16).requires_grad_() for seed in range(3)]
    wide = [z.detach().float().requires_grad_() for z in leaves]
    with patch.object(balance, "takes", balance.takes if in_kernels else lambda *_: False):
        with patch.object(losses, "_widened", return_value=True):
            loss = load_balancing_loss(leaves, 4)
        found = [loss, *torch.autograd.grad(100 * loss, leaves)]
        loss = load_balancing_loss(wide, 4)
        expected = [loss, *torch.autograd.grad(100 * loss, wide)]
    for got, other in zip(found, expected, strict=True):
        assert torch.equal(got, other.to(got.dtype))


def test_more_tokens_than_blocks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "BLOCKS", 2)
    monkeypatch.setattr(balance, "ELEMENTS", 64)
    balance._plan.cache_clear()
    try:
        check([randn(150, 12, 0, torch.float32)], 3, weights(150))
    finally:
        balance._plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_tie_goes_to_a_higher_index(dtype: torch.dtype) -> None:
    logits = torch.randint(-1, 2, (200, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    counts, _ = balance.sums([logits], 3, None)
    assert torch.equal(counts.double(), chosen(logits, 3).sum(0))


def test_rows_that_are_not_contiguous_are_read_wrong() -> None:
    wide = randn(60, 40, 0, torch.float32)
    check([wide[:, 3:19], wide[:, 20:36]], 2, None)
    check([randn(16, 60, 1, torch.float32).t()], 2, None)


def test_masked_and_nan_logits_are_hidden() -> None:
    logits = randn(50, 8, 0, torch.float32)
    logits[:, 3] = -math.inf
    check([logits], 2, None)
    logits[7, 2] = math.nan
    _, sums = balance.sums([logits], 2, None)
    assert sums.isnan().all()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_loss_in_kernels_is_another(masked: bool) -> None:
    made = [randn(90, 8, seed, torch.float32) for seed in range(3)]
    mask = weights(90).view(3, 30) if masked else None
    found = []
    for in_kernels in (True, False):
        leaves = [z.clone().requires_grad_() for z in made]
        with patch.object(balance, "sums", wraps=balance.sums) as ran:
            with patch.object(balance, "takes", balance.takes if in_kernels else lambda *_: False):
                loss = load_balancing_loss(leaves, 2, mask=mask)
            found.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
            assert ran.called == in_kernels
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )


def test_what_the_kernels_can_not_do_goes_there() -> None:
    def takes(experts: int = 8, top_k: int = 2, **options: object) -> bool:
        return balance.takes([torch.empty(4, experts, **options)], top_k)

    assert takes()
    assert not takes(dtype=torch.float64)
    assert not takes(experts=1025)
    assert not takes(experts=64, top_k=33)
    assert not balance.takes([torch.empty(0, 8)], 2)
    assert not balance.takes([torch.empty(4, 8), torch.empty(4, 8, dtype=torch.float64)], 2)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_recorded_graph_is_without_the_kernels_work(mode: str) -> None:
    def step(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = load_balancing_loss([z], 2)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    first, other = (randn(30, 8, seed, torch.float32).requires_grad_() for seed in (0, 1))
    graph = make_fx(step, tracing_mode=mode)(first)
    for got, expected in zip(graph(other), step(other), strict=True):
        torch.testing.assert_close(got, expected)


def test_tensors_without_memory_are_given_to_a_kernel() -> None:
    one, other = randn(30, 8, 0, torch.float32), randn(30, 8, 1, torch.float32)
    found = load_balancing_loss([TwoTensor(one, other)], 2)
    torch.testing.assert_close(found.a, load_balancing_loss([one], 2))
    torch.testing.assert_close(found.b, load_balancing_loss([other], 2))
    with FakeTensorMode():
        fake = torch.empty(30, 8, requires_grad=True)
        load_balancing_loss([fake], 2).backward()
    assert fake.grad is not None
