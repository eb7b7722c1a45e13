"""The load-balancing loss in kernels on a GPU: the definition's value and gradient, two launches a
layer, nothing kept, no wait."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from cuda_cases import (
    DEVICE,
    DTYPES,
    MEMORY,
    device_work,
    on_side_stream,
    peak,
    requested,
    spoil,
    waits_are_errors,
)
from torch import Tensor

from balance_cases import MODELS, SIZES, check, randn, weights
from turnout.routing import balance
from turnout.routing.losses import (
    load_balancing_loss,
    router_z_loss,
    switch_load_balancing_loss,
)

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA or bfloat16")
TOKENS = 1000 if DEVICE.type == "cuda" else 100


def layers(count: int, tokens: int, experts: int, seed: int = 0) -> list[Tensor]:
    """bfloat16 logits drawn on the device; they want a gradient."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options = {"generator": generator, "device": DEVICE}
    drawn = [torch.randn(tokens, experts, **options) for _ in range(count)]
    return [z.bfloat16().requires_grad_() for z in drawn]


def step(logits: list[Tensor], top_k: int, mask: Tensor | None = None) -> list[Tensor]:
    loss = load_balancing_loss(logits, top_k, mask=mask)
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=needs_gpu if d == "bf16" else ()) for d in DTYPES]
)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), SIZES)
def test_sums_or_gradients_of_a_size_are_wrong(
    tokens: tuple[int, ...], top_k: int, experts: int, dtype: str
) -> None:
    made = [randn(t, experts, seed, DTYPES[dtype], DEVICE) for seed, t in enumerate(tokens)]
    check(made, top_k, None)
    if len(set(tokens)) == 1:
        check(made, top_k, weights(tokens[0], DEVICE) + 0.25)


@needs_gpu
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_loss_is_another(name: str, masked: bool) -> None:
    top_k, experts = MODELS[name]
    logits = layers(3, 4096, experts)
    check([z.detach() for z in logits], top_k, weights(4096, DEVICE) if masked else None)
    mask = weights(4096, DEVICE).view(2, 2048) if masked else None
    ours = step(logits, top_k, mask)
    with patch.object(balance, "takes", lambda *_: False):
        expected = step(logits, top_k, mask)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-4, atol=0)
    for got, other in zip(ours[1:], expected[1:], strict=True):
        apart = (got.double() - other.double()).norm() / other.double().norm()
        # equal probabilities of bfloat16 fall to other experts in PyTorch's top-k
        assert apart < 0.05, apart


@needs_gpu
@pytest.mark.parametrize("in_kernels", [True, False], ids=["kernels", "torch"])
def test_the_loss_under_autocast_is_another(in_kernels: bool) -> None:
    """The definition under the same autocast, whose softmax of bfloat16 is float32."""
    logits = [(0.05 * z.detach()).requires_grad_() for z in layers(3, 4096, 128)]  # as at first
    with torch.autocast("cuda", dtype=torch.bfloat16):
        p = torch.cat(logits).softmax(-1)
        assert p.dtype == torch.float32
        # of equal probabilities the kernels choose the first, and PyTorch's top-k what it does
        order = p.sort(dim=-1, descending=True, stable=True) if in_kernels else p.topk(8)
        share = torch.bincount(order.indices[:, :8].flatten(), minlength=128) / len(p)
        expected = 128 * (share * p.mean(0)).sum()
        with patch.object(balance, "takes", balance.takes if in_kernels else lambda *_: False):
            got = load_balancing_loss(logits, 8)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(loss, logits) for loss in (got, expected)]
    for one, other in zip(*grads, strict=True):
        assert (one.double() - other.double()).norm() < 0.01 * other.double().norm()


@needs_gpu
@pytest.mark.parametrize("which", ["Switch", "z"])
def test_the_other_losses_under_autocast_round_what_is_float32(which: str) -> None:
    logits = (0.05 * layers(1, 4096, 128)[0].detach()).view(4, 1024, 128).requires_grad_()
    chosen = logits.detach().topk(2).indices
    with torch.autocast("cuda", dtype=torch.bfloat16):
        if which == "z":
            got, expected = router_z_loss(logits), torch.logsumexp(logits, -1).square().mean()
        else:
            share = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, chosen, 1).mean(1)
            expected = (share * logits.softmax(-1).mean(1)).mean() * 128**2
            got = switch_load_balancing_loss(logits, chosen)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (got, expected))
    assert (ours.double() - theirs.double()).norm() < 0.01 * theirs.double().norm()


@needs_gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_more_than_two_launches_a_layer_are_taken_or_waited_for(masked: bool) -> None:
    mask = weights(512, DEVICE) if masked else None
    few, many = (layers(count, 512, 128) for count in (2, 12))
    step(few, 8, mask)
    with waits_are_errors():
        step(many, 8, mask)
    work = [len(device_work(lambda made=made: step(made, 8, mask))) for made in (few, many)]
    assert work[1] - work[0] == 2 * 10, work


@needs_gpu
@pytest.mark.unpoisoned
def test_something_besides_the_gradient_is_allocated() -> None:
    logits = layers(2, 65536, 128)
    gradient = sum(z.numel() * z.element_size() for z in logits)
    assert peak(lambda: step(logits, 8)) <= gradient + 2 * 2 * 264 * 128 * 4 + 16384
    before = requested()
    loss = load_balancing_loss(logits, 8)
    assert requested() - before <= 16384
    del loss


def test_two_runs_have_other_bits() -> None:
    logits = [z.detach().float().requires_grad_() for z in layers(2, TOKENS, 60)]
    for one, other in zip(step(logits, 4), step(logits, 4), strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_a_graph_replays_the_loss_of_its_capture() -> None:
    logits, mask = layers(2, 640, 64), weights(640, DEVICE)
    on_side_stream(lambda: step(logits, 4, mask))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(logits, 4, mask)
    for seed in (0, 1):
        spoil(got)
        with torch.no_grad():
            for z, drawn in zip(logits, layers(2, 640, 64, seed), strict=True):
                z.copy_(drawn)
        graph.replay()
        for one, other in zip(got, step(logits, 4, mask), strict=True):
            assert torch.equal(one, other)


@needs_gpu
@pytest.mark.unpoisoned
@MEMORY["medium"]
def test_an_address_past_two_to_the_31_wraps_around() -> None:
    """2^31 logits and their gradients; the last tokens are as alone, those before weigh nothing."""
    tokens, experts = 2**21 + 1000, 1024
    logits = torch.empty(tokens, experts, device=DEVICE, dtype=torch.bfloat16)
    for piece in logits.split(2**18):
        piece.normal_()
    weight = torch.zeros(tokens, device=DEVICE)
    weight[-900:] = 1.0
    last = [logits[-900:].clone()]
    counts, sums = balance.sums([logits], 8, weight)
    expected_counts, expected_sums = balance.sums(last, 8, None)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums)
    dsums = torch.randn(experts, device=DEVICE)
    (got,) = balance.gradients([logits], weight, dsums)
    assert torch.equal(got[-900:], balance.gradients(last, None, dsums)[0])
    assert not got[:-900].any()
