"""The kernels of the load-balancing loss against its definition: interpreter and GPU tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.routing import balance, kernels_balance
from turnout.testing import errors

assert kernels_balance  # imported, so that it is known whether Triton interprets

# (T of each layer), K, E
SIZES = [
    ((150,), 2, 8),
    ((1,), 1, 1),
    ((7, 7), 5, 5),
    ((130, 1, 66), 8, 60),
    ((3, 40), 32, 1000),
    ((5,), 1, 1024),
]
MODELS = {"qwen3-30b": (8, 128), "deepseek-v3": (8, 256), "mixtral": (2, 8)}


def randn(
    tokens: int, experts: int, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, experts, generator=generator)).to(device, dtype)


def weights(tokens: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Of tokens: a third is padding, some count in part."""
    drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.3, 0.0, torch.where(drawn < 0.5, 0.5, 1.0)).to(device)


def chosen(logits: Tensor, top_k: int) -> Tensor:
    """(T, E) of 0 and 1: the K largest probabilities in the dtype of z, the first of equal ones."""
    p = logits.softmax(-1)
    first = p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros(p.shape, dtype=torch.float64, device=p.device).scatter_(1, first, 1.0)


def check(logits: Sequence[Tensor], top_k: int, weight: Tensor | None, wide: bool = False) -> None:
    """Counts, sums and gradients; softmax may be a bit off, so one choice may be another."""
    assert balance.takes(logits, top_k)
    counts, sums = balance.sums(logits, top_k, weight, wide)
    assert counts.dtype == sums.dtype == torch.float32
    w = torch.ones(len(logits[0]), device=logits[0].device) if weight is None else weight
    # without a weight layers may have different numbers of tokens
    ws = [w.double() if weight is not None else z.new_ones(len(z)).double() for z in logits]
    pairs = list(zip([z.float() if wide else z for z in logits], ws, strict=True))
    expected = sum((chosen(z, top_k) * one[:, None]).sum(0) for z, one in pairs)
    assert (counts.double() - expected).abs().sum() <= 2, (counts, expected)
    exact = sum((z.double().softmax(-1) * one[:, None]).sum(0) for z, one in pairs)
    stock = sum((z.softmax(-1).float() * one[:, None].float()).sum(0) for z, one in pairs)
    near(sums, stock, exact, torch.finfo(torch.float32).eps)

    dsums = torch.randn(logits[0].shape[1], generator=torch.Generator().manual_seed(9)).to(w.device)
    found = balance.gradients(logits, weight, dsums, wide)
    for (z, one), got, given in zip(pairs, found, logits, strict=True):
        assert got.dtype == given.dtype
        assert got.shape == given.shape
        truth, stock = (gradient(z.to(to), dsums, one) for to in (torch.float64, z.dtype))
        near(got, stock.to(got.dtype), truth, torch.finfo(got.dtype).eps)


def near(got: Tensor, stock: Tensor, truth: Tensor, eps: float) -> None:
    """Law 2 in RMS; the maximum of a small tensor is luck, so it may be four times PyTorch's."""
    if not truth.any():
        assert not got.any()
        return
    worst, rms = errors(got, truth)
    most, usual = errors(stock, truth)
    assert worst <= 4 * most + 4 * eps, (worst, most)
    assert rms <= 2 * usual + eps, (rms, usual)


def gradient(logits: Tensor, dsums: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own, in the logits' dtype."""
    z = logits.detach().requires_grad_()
    value = (z.softmax(-1) * weight[:, None].to(z.dtype)).sum(0) @ dsums.to(z.dtype)
    return torch.autograd.grad(value, z)[0]
