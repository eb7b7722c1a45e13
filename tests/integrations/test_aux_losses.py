"""Auxiliary losses against transformers' own: value, gradient, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from turnout.routing import losses
from turnout.routing.losses import (
    load_balancing_loss,
    router_z_loss,
    switch_load_balancing_loss,
)

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6}


TOKENS, EXPERTS, TOP_K = 150, 8, 2


def padding(seed: int = 0) -> Tensor:
    """(batch, sequence) with about a third of the tokens masked out."""
    kept = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed)) > 0.3
    return kept.long()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def agree(ours: Tensor, theirs: Tensor, leaves: list[list[Tensor]], dtype: torch.dtype) -> None:
    limit = LIMITS[dtype]
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=limit, atol=0)
    mine = torch.autograd.grad(3 * ours, leaves[0])
    for got, expected in zip(mine, torch.autograd.grad(3 * theirs, leaves[1]), strict=True):
        assert got.dtype == expected.dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=limit, atol=limit * scale)


def twins(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [[t.detach().clone().requires_grad_() for t in tensors] for _ in range(2)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layers", [1, 3])
def test_load_balancing_is_not_transformers(layers: int, masked: bool, dtype: torch.dtype) -> None:
    both = twins([randn(TOKENS, EXPERTS, seed=s, dtype=dtype) for s in range(layers)])
    mask = padding() if masked else None
    ours = load_balancing_loss(both[0], TOP_K, mask=mask)
    theirs = load_balancing_loss_func(tuple(both[1]), EXPERTS, TOP_K, mask)
    # theirs adds up in float32 even for float64 logits
    agree(ours, theirs, both, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("seed", range(5))
def test_bf16_logits_are_more_wrong_than_transformers(seed: int, masked: bool) -> None:
    ours, theirs = twins([randn(TOKENS, EXPERTS, seed=seed, dtype=torch.bfloat16)])
    mask = padding(seed) if masked else None
    # the choice is made in bf16, everything after it in float64
    chosen = ours[0].detach().softmax(-1).topk(TOP_K, dim=-1).indices
    exact = ours[0].detach().double().requires_grad_()
    truth = load_balancing_loss((exact,), TOP_K, mask=mask, experts=(chosen,))
    (expected,) = torch.autograd.grad(truth, exact)
    errors = []
    for logits, loss in (
        (ours, load_balancing_loss(ours, TOP_K, mask=mask)),
        (theirs, load_balancing_loss_func(tuple(theirs), EXPERTS, TOP_K, mask)),
    ):
        (gradient,) = torch.autograd.grad(loss, logits[0])
        assert gradient.dtype == torch.bfloat16
        rms = ((gradient.double() - expected).norm() / expected.norm()).item()
        errors.append((abs(loss.item() / truth.item() - 1), rms))
    (ours_loss, ours_rms), (theirs_loss, theirs_rms) = errors
    assert ours_rms <= 1.1 * theirs_rms < 0.1
    assert ours_loss <= 1.1 * theirs_loss + 1e-3


def test_pieces_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def value() -> tuple[Tensor, Tensor]:
        logits = randn(100, 6, dtype=torch.float64).requires_grad_()
        loss = load_balancing_loss((logits,), 2) + router_z_loss(logits)
        layers = (logits[:30], logits[30:40], logits[40:], logits.float())  # of unequal sizes
        loss = loss + load_balancing_loss(layers, 2)
        weights = torch.arange(50) % 3
        loss = loss + load_balancing_loss(
            (logits[:50], logits[50:], logits[25:75]), 3, mask=weights
        )
        given = [logits.detach()[piece].topk(2).indices for piece in (slice(50), slice(50, 100))]
        loss = loss + load_balancing_loss((logits[:50], logits[50:]), 2, experts=given)
        chosen = torch.arange(100).view(20, 5) % 6
        loss = loss + switch_load_balancing_loss(logits.view(20, 5, 6), chosen)
        chosen = chosen.view(4, 25)
        loss = loss + switch_load_balancing_loss(logits.view(4, 25, 6), chosen)
        return loss, torch.autograd.grad(loss, logits)[0]

    whole = value()
    for piece in (7, 16):  # one and three of the short groups at a time
        monkeypatch.setattr(losses, "PIECE", piece)
        monkeypatch.setattr(losses, "ELEMENTS", 40 * piece)  # in part one layer, in part two
        for one, other in zip(whole, value(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_given_experts_are_not_counted() -> None:
    logits = randn(64, 8)
    chosen = logits.softmax(-1).topk(2).indices
    expected = load_balancing_loss((logits,), 2)
    torch.testing.assert_close(load_balancing_loss((logits,), 2, experts=(chosen,)), expected)
    other = load_balancing_loss((logits,), 2, experts=(torch.zeros_like(chosen),))
    assert not torch.isclose(other, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_switch_is_not_transformers(top_k: int | None, dtype: torch.dtype) -> None:
    logits = randn(4, 30, 8, dtype=dtype)
    shape = (4, 30) if top_k is None else (4, 30, top_k)
    chosen = torch.randint(8, shape, generator=torch.Generator().manual_seed(1))
    both = twins([logits])
    ours = switch_load_balancing_loss(both[0][0], chosen)
    theirs = switch.load_balancing_loss_func(both[1][0].softmax(-1), chosen)
    agree(ours, theirs, both, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_z_loss_is_not_transformers(dtype: torch.dtype) -> None:
    both = twins([randn(4, 30, 8, dtype=dtype)])
    agree(router_z_loss(both[0][0]), switch.router_z_loss_func(both[1][0]), both, dtype)


@pytest.mark.parametrize("which", ["Mixtral", "Switch", "z"])
def test_small_bfloat16_logits_are_rounded_under_cudas_autocast(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax and logsumexp are float32 there, and in their gradients, which run outside of it."""
    logits = (0.05 * randn(4, 30, 8)).bfloat16()
    chosen = torch.randint(8, (4, 30, 2), generator=torch.Generator().manual_seed(1))
    both = twins([logits])
    wide = both[1][0].float()
    monkeypatch.setattr(losses, "_widened", lambda z: True)
    if which == "Mixtral":
        ours = load_balancing_loss((both[0][0].flatten(0, 1),), 2)
        theirs = load_balancing_loss_func((wide.flatten(0, 1),), 8, 2)
    elif which == "Switch":
        ours = switch_load_balancing_loss(both[0][0], chosen)
        theirs = switch.load_balancing_loss_func(wide.softmax(-1), chosen)
    else:
        ours, theirs = router_z_loss(both[0][0]), switch.router_z_loss_func(wide)
    monkeypatch.setattr(losses, "_widened", lambda z: False)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    (got,), (expected,) = (
        torch.autograd.grad(loss, leaf) for loss, leaf in zip((ours, theirs), both, strict=True)
    )
    assert (got.double() - expected.double()).norm() < 0.004 * expected.double().norm()


def largest_allocation(tokens: int) -> int:
    logits = [randn(tokens, 64).requires_grad_()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = load_balancing_loss(logits, 2) + router_z_loss(logits[0])
        loss.backward()
    return max(event.self_cpu_memory_usage for event in profiled.events())


def test_long_sequences_cost_more_than_their_gradient() -> None:
    tokens = 40_000
    gradient = tokens * 64 * 4
    assert largest_allocation(tokens) <= gradient


class Large(TorchDispatchMode):
    """Counts the tensors of at least `least` bytes that operations allocate."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.numel() * t.element_size() >= self.least:
                self.found += t.untyped_storage().data_ptr() not in known
        return out


@pytest.mark.parametrize("shape", [(1, 20_000), (2, 10_000), (50, 400)], ids=str)
def test_a_batch_of_short_sequences_is_worked_on_at_once(shape: tuple[int, int]) -> None:
    """In Switch's loss; what is as large as half of the gradient is the gradient."""
    logits = randn(*shape, 64).requires_grad_()
    chosen = torch.randint(64, shape, generator=torch.Generator().manual_seed(1))
    with Large(logits.numel() * logits.element_size() // 2) as large:
        torch.autograd.grad(switch_load_balancing_loss(logits, chosen), logits)
    assert large.found == 1


def test_what_is_kept_for_backward_grows_with_the_experts() -> None:
    tokens, kept = 20_000, []
    logits = randn(tokens, 64).requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        load_balancing_loss((logits,), 2) + router_z_loss(logits)
    assert sum(kept) <= 4 * tokens


class Operators(TorchDispatchMode):
    """Counts the operators that run, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_many_layers_take_as_many_launches_as_transformers(masked: bool) -> None:
    """In PyTorch's operations: a fourth of them at 1024 tokens, and more with the tokens."""
    counts, mask = [], torch.ones(1, 1024) if masked else None
    for loss in (load_balancing_loss, lambda z, k, mask: load_balancing_loss_func(z, 64, k, mask)):
        logits = tuple(randn(1024, 64, seed=seed).requires_grad_() for seed in range(24))
        with Operators() as operators:
            loss(logits, 8, mask=mask).backward()
        counts.append(operators.ran)
    assert 4 * counts[0] < counts[1]


def test_a_loss_reads_a_value_on_the_host() -> None:
    """Tensors without values have none to wait for."""
    with torch.device("meta"):
        logits = torch.empty(30, 8, requires_grad=True)
        mask, chosen = torch.ones(3, 10), torch.zeros(3, 10, 2, dtype=torch.int64)
        loss = load_balancing_loss((logits, logits), 2, mask=mask) + router_z_loss(logits)
        loss = loss + load_balancing_loss((logits,), 2, experts=(chosen.flatten(0, 1),))
        loss = loss + switch_load_balancing_loss(logits.view(3, 10, 8), chosen)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.shape == logits.shape


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_balancing_loss(randn(4, 8), 2), "as a sequence"),
        (lambda: load_balancing_loss((), 2), "at least one layer"),
        (lambda: load_balancing_loss((randn(4, 8), randn(4, 6)), 2), "logits[1]"),
        (lambda: load_balancing_loss((randn(4, 8),), 9), "top_k is 9"),
        (lambda: load_balancing_loss((randn(4, 8),), 2, mask=torch.ones(5)), "mask has 5 tokens"),
        (
            lambda: load_balancing_loss((randn(4, 8), randn(5, 8)), 2, mask=torch.ones(4)),
            "mask has 4 tokens; expected 5, as logits[1]",
        ),
        (
            lambda: load_balancing_loss((randn(4, 8),), 2, mask=torch.ones(4, device="meta")),
            "mask is on meta; expected cpu",
        ),
        (
            lambda: load_balancing_loss((randn(4, 8),), 2, mask=torch.ones(4, requires_grad=True)),
            "mask wants a gradient",
        ),
        (lambda: switch_load_balancing_loss(randn(4, 8), torch.zeros(4)), "(batch, sequence, E)"),
    ],
)
def test_bad_input_is_taken(call: object, words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()  # type: ignore[operator]
    assert words in str(error.value)
