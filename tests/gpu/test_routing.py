"""The fused router and the sort behind it on a GPU: the definition's choice, two launches.

`fused.route` is called directly, whatever `fused.rejects` says of GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import (
    DEVICE,
    DTYPES,
    MEMORY,
    device_work,
    on_side_stream,
    requested,
    spoil,
    waits_are_errors,
)
from torch import Tensor

import turnout
from problems import assert_same
from route_cases import (
    EXPERTS,
    NATIVE,
    SPECS,
    assert_chosen,
    check,
    native,
    randn,
    tensors_of,
)
from route_cases import run as run_route
from turnout import RouteSpec
from turnout.ragged import Ragged, counts_of, sort_by_expert
from turnout.routing import fused, rules

ON_GPU = DEVICE.type == "cuda"
TOKENS = 1000 if ON_GPU else 150
FLOAT = torch.bfloat16 if ON_GPU else torch.float32
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs CUDA, bfloat16, or a GPU's speed")
# Rule, E, and the dtype of the correction bias, as the models have them.
MODELS: dict[str, tuple[RouteSpec, int, torch.dtype | None]] = {
    "qwen3-30b": (RouteSpec(top_k=8, weights_dtype="logits"), 128, None),
    "deepseek-v3": (
        RouteSpec(top_k=8, score="sigmoid", n_group=8, topk_group=4, eps=1e-20, scale=2.5),
        256,
        torch.float32,
    ),
    "gpt-oss": (RouteSpec(top_k=4, score_dtype="logits", weights_dtype="logits"), 32, None),
}
# T, K, E
SIZES = [
    (0, 2, 8),
    (1, 1, 1),
    (7, 4, 60),
    (5, 5, 5),
    (3000, 1, 1),
    (7, 1, 1024),
    (2000, 6, 6),
    (777, 32, 1024),
    (1001, 32, 1000),
    (40_000, 1, 1023),
    (131_072, 8, 128),
]


def logits_of(
    tokens: int, num_experts: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Drawn on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn = torch.randn(tokens, num_experts, generator=generator, device=DEVICE)
    return drawn.to(dtype)


def model(name: str, tokens: int, seed: int = 0) -> tuple[Tensor, RouteSpec, dict[str, Tensor]]:
    """bfloat16 logits, the rule, and the correction bias."""
    spec, num_experts, bias = MODELS[name]
    logits = logits_of(tokens, num_experts, seed, FLOAT)
    tensors = {} if bias is None else {"bias_E": randn(num_experts, seed=1).to(DEVICE, bias) / 10}
    return logits, spec, tensors


def sorted_behind(experts_TK: Tensor, num_experts: int) -> Ragged:
    return sort_by_expert(experts_TK, num_experts, counts_of(experts_TK, num_experts))


def assert_same_rows(got: Ragged, expected: Ragged) -> None:
    for name in ("slot_S", "row_TK", "offsets", "tiles"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("dtype", "which"), [("fp32", "plain"), ("fp16", "bias"), ("bf16", "bias and scales")]
)
@pytest.mark.parametrize("name", SPECS)
def test_the_fused_router_is_another_rule(name: str, dtype: str, which: str) -> None:
    spec = SPECS[name]
    width = EXPERTS + spec.n_always
    logits = (2 * randn(TOKENS, width)).to(DEVICE, DTYPES[dtype])
    check(logits, spec, **tensors_of(which, logits))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinks", "sigmoid, groups", "sqrtsoftplus"])
def test_gradients_of_large_logits_are_lost(name: str) -> None:
    """Where a sigmoid is almost 1, one less it has few digits."""
    spec = SPECS[name]
    check(2 * randn(TOKENS, EXPERTS + spec.n_always).to(DEVICE) + 8, spec)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_routes_otherwise(name: str) -> None:
    logits, spec, tensors = model(name, 4096 if ON_GPU else 40)
    check(logits, spec, **tensors)


@pytest.mark.parametrize(
    ("dtype", "which"), [("fp16", "plain"), ("bf16", "plain"), ("bf16", "bias")]
)
@pytest.mark.parametrize("name", NATIVE)
def test_a_rule_in_the_logits_dtype_ties_otherwise(name: str, dtype: str, which: str) -> None:
    """Every rounding of the rule decides who is chosen, and one bit of exp may move a score across
    a rounding."""
    logits = (2 * randn(TOKENS, EXPERTS)).to(DEVICE, DTYPES[dtype])
    check(logits, native(name), differing=0.01, **tensors_of(which, logits))


@pytest.mark.parametrize("name", ["softmax", "sigmoid, groups", "sinks", "softcap"])
def test_given_experts_are_chosen_again(name: str) -> None:
    spec = SPECS[name]
    logits = randn(TOKENS, EXPERTS + spec.n_always).to(DEVICE)
    given = randn(TOKENS, EXPERTS, seed=5).argsort(1)[:, : spec.top_k].to(DEVICE)
    check(logits, spec, experts_TK=given)
    check(logits, spec, experts_TK=given.int())
    assert counts_of(fused.route(logits, spec, experts_TK=given).experts_TK, EXPERTS) is None


def test_strided_tensors_are_read_as_if_they_were_not() -> None:
    wide = randn(TOKENS, 2 * EXPERTS).to(DEVICE)
    bias = randn(2 * EXPERTS, seed=1).to(DEVICE)[::2]
    for logits in (wide[:, :EXPERTS], wide[:, ::2], randn(EXPERTS, TOKENS).to(DEVICE).t()):
        check(logits, SPECS["sigmoid, groups"], bias_E=bias)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sigmoid, groups", "softmax, groups"])
def test_a_tie_goes_to_a_higher_index(name: str) -> None:
    """Of five different logits, and two zeros."""
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (TOKENS, EXPERTS), generator=generator).float() / 2
    logits[::5] = torch.where(logits[::5] == 0, -0.0, logits[::5])
    got = fused.route(logits.to(DEVICE), spec).experts_TK
    on = "cpu" if name == "softmax" else DEVICE  # the logits alone decide, so any device does
    assert_chosen(got.to(on), rules.route(logits.to(on), spec).experts_TK)


@needs_gpu
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid, groups", "sqrtsoftplus"])
def test_scores_one_bit_apart_are_ordered_otherwise(name: str) -> None:
    """Neighbouring float32 logits: which of their scores are equal is decided by the last bit of
    each operation. (A softmax is not among them: its sum is added in another order.)"""
    spec = SPECS[name]
    steps = randn(TOKENS, EXPERTS).argsort(1).to(torch.int32)
    first = torch.linspace(-4, 4, TOKENS).view(torch.int32)[:, None]
    logits = (first + steps).view(torch.float32).to(DEVICE)
    assert_chosen(fused.route(logits, spec).experts_TK, rules.route(logits, spec).experts_TK)


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_tie_across_the_kth_place_is_broken_otherwise(name: str) -> None:
    """Of bfloat16 logits some percent of the tokens have one. No bias, which would hide them."""
    logits, spec, _ = model(name, 16384)
    ordered = logits.sort(1, descending=True).values
    tied = (ordered[:, spec.top_k - 1] == ordered[:, spec.top_k]).float().mean().item()
    assert 0.01 < tied < 0.3, tied
    chosen = fused.route(logits, spec).experts_TK
    assert_chosen(chosen, rules.route(logits, spec).experts_TK)
    assert_same_rows(
        sorted_behind(chosen, logits.shape[1]), sort_by_expert(chosen.clone(), logits.shape[1])
    )


def assert_legal(chosen: Tensor, num_experts: int) -> None:
    """In range, and no expert twice."""
    assert chosen.min() >= 0
    assert chosen.max() < num_experts
    ordered = chosen.sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


@pytest.mark.parametrize("name", SPECS)
def test_nan_and_infinite_logits_lead_out_of_range_or_are_lost(name: str) -> None:
    """A weight that is NaN by the definition must not become a number."""
    spec = SPECS[name]
    logits = randn(TOKENS, EXPERTS + spec.n_always)
    logits[::3, 4] = math.nan
    logits[1::3, 5] = math.inf
    logits[2::3] = -math.inf
    logits = logits.to(DEVICE)
    got, rule = fused.route(logits, spec), rules.route(logits, spec)
    assert_legal(got.experts_TK, EXPERTS)
    assert_same_rows(
        sorted_behind(got.experts_TK, EXPERTS), sort_by_expert(got.experts_TK.clone(), EXPERTS)
    )
    assert_chosen(got.experts_TK, rule.experts_TK)
    assert torch.equal(got.weights_TK.isnan(), rule.weights_TK.isnan())


@pytest.mark.parametrize("name", ["qwen3-30b", "deepseek-v3"])
def test_some_bits_lead_out_of_range_or_out_of_order(name: str) -> None:
    """NaN of both signs, infinities, subnormal numbers: any 16 bits, also as float32's upper."""
    spec, num_experts, _ = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (TOKENS, num_experts), generator=generator)
    logits = (bits * 2**16).to(torch.int32).view(torch.float32)
    for dtype in (FLOAT, torch.float32):
        given = logits.to(dtype)
        chosen = fused.route(given.to(DEVICE), spec).experts_TK
        assert_legal(chosen, num_experts)
        assert_same_rows(
            sorted_behind(chosen, num_experts), sort_by_expert(chosen.clone(), num_experts)
        )
        if name == "qwen3-30b":
            assert_chosen(chosen.cpu(), rules.route(given, spec).experts_TK)


def test_nan_logits_are_no_error_in_debug_mode() -> None:
    logits = randn(20, EXPERTS).to(DEVICE)
    logits[7, 3] = math.nan
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(ValueError, match=r"NaN in 1 of 20 rows, first in row 7"),
    ):
        turnout.route(logits, SPECS["softmax"])


def test_a_bias_gets_a_gradient() -> None:
    bias = randn(EXPERTS).to(DEVICE).requires_grad_()
    logits = randn(9, EXPERTS).to(DEVICE).requires_grad_()
    fused.route(logits, SPECS["sigmoid"], bias_E=bias).weights_TK.sum().backward()
    assert bias.grad is None


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "T{}-K{}-E{}".format(*size))
def test_a_size_is_routed_or_sorted_otherwise(size: tuple[int, int, int]) -> None:
    tokens, top_k, num_experts = size
    spec = RouteSpec(top_k=top_k)
    logits = logits_of(tokens, num_experts).requires_grad_()
    got = fused.route(logits, spec)
    assert_chosen(got.experts_TK, rules.route(logits.detach(), spec).experts_TK)
    expected = rules.route(logits, spec, experts_TK=got.experts_TK)
    g = logits_of(tokens, top_k, 7)
    (dlogits,) = torch.autograd.grad(got.weights_TK, logits, g)
    (rule_dlogits,) = torch.autograd.grad(expected.weights_TK, logits, g)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.weights_TK.detach(), expected.weights_TK.detach(), **close)
    torch.testing.assert_close(dlogits, rule_dlogits, **close)
    counted = counts_of(got.experts_TK, num_experts)
    assert (counted is not None) == (tokens * top_k > 1024)
    if counted is not None:
        expected_counts = torch.bincount(got.experts_TK.flatten(), minlength=counted.shape[1])
        assert torch.equal(counted.sum(0), expected_counts)
        with_counts = sort_by_expert(got.experts_TK, num_experts, counted)
        assert_same_rows(with_counts, sort_by_expert(got.experts_TK.clone(), num_experts))


@needs_gpu
def test_the_most_experts_and_choices_are_too_many() -> None:
    tokens, spec, num_experts = 131_072, RouteSpec(top_k=32), 1024
    logits = logits_of(tokens, num_experts, dtype=torch.bfloat16)
    chosen = fused.route(logits, spec).experts_TK
    for got, piece in zip(chosen.split(16384), logits.split(16384), strict=True):
        assert_chosen(got, rules.route(piece, spec).experts_TK)
    assert_same_rows(
        sorted_behind(chosen, num_experts), sort_by_expert(chosen.clone(), num_experts)
    )


@needs_gpu
@pytest.mark.unpoisoned
@MEMORY["medium"]
def test_an_address_past_two_to_the_31_wraps_around() -> None:
    """2^31 logits and their gradients; the last tokens are the definition's."""
    tokens, spec, num_experts = 2**21 + 1000, RouteSpec(top_k=1, norm=False), 1024
    assert tokens * num_experts > 2**31
    logits = torch.empty(tokens, num_experts, device=DEVICE, dtype=torch.bfloat16)
    for piece in logits.split(2**18):
        piece.normal_()
    logits.requires_grad_()
    g = logits_of(tokens, 1, 7)
    got = fused.route(logits, spec)
    (dlogits,) = torch.autograd.grad(got.weights_TK, logits, g)
    for rows in (slice(0, 2000), slice(tokens - 2000, tokens)):
        part = logits.detach()[rows].clone().requires_grad_()
        expected = rules.route(part, spec)
        (rule_dlogits,) = torch.autograd.grad(expected.weights_TK, part, g[rows])
        assert_chosen(got.experts_TK[rows], expected.experts_TK)
        torch.testing.assert_close(got.weights_TK[rows], expected.weights_TK)
        torch.testing.assert_close(dlogits[rows], rule_dlogits)
    assert_same_rows(
        sorted_behind(got.experts_TK, num_experts),
        sort_by_expert(got.experts_TK.clone(), num_experts),
    )


@pytest.mark.parametrize("name", ["deepseek-v3", "sinks"])
def test_two_runs_differ(name: str) -> None:
    if name in MODELS:
        logits, spec, tensors = model(name, 16384 if ON_GPU else 300)
    else:
        logits, spec = randn(TOKENS, EXPERTS + 2).to(DEVICE), SPECS[name]
        tensors = tensors_of("bias and scales", logits)
    assert_same(
        run_route(fused.route, logits, spec, **tensors),
        run_route(fused.route, logits, spec, **tensors),
    )


def step_of(name: str, tokens: int, backward: bool) -> tuple[Tensor, Callable[[], Any]]:
    """The logits; and route, sort and the gradient of the logits, all inputs made before."""
    logits, spec, tensors = model(name, tokens)
    logits.requires_grad_(backward)
    g = logits_of(tokens, spec.top_k, 7)
    g = g if spec.weights_dtype == "float32" else g.to(logits.dtype)

    def step() -> tuple[Tensor, ...]:
        got = fused.route(logits, spec, **tensors)
        ragged = sorted_behind(got.experts_TK, logits.shape[1])
        grads = torch.autograd.grad(got.weights_TK, logits, g) if backward else ()
        sort = (ragged.slot_S, ragged.row_TK, ragged.offsets, ragged.tiles)
        return (got.experts_TK, got.weights_TK.detach(), *sort, *grads)

    return logits, step


@needs_gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("tokens", [64, 16384, 131_072])
@pytest.mark.parametrize("name", MODELS)
def test_routing_and_sorting_take_more_than_two_launches(
    name: str, tokens: int, backward: bool
) -> None:
    work = device_work(step_of(name, tokens, backward)[1])
    assert len(work) == 2 + backward, work


@needs_gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", [*MODELS, "sinks"])
def test_the_router_waits_for_the_device(name: str) -> None:
    if name in MODELS:
        _, step = step_of(name, 4096, backward=True)
    else:
        logits = randn(TOKENS, EXPERTS + 2).to(DEVICE).requires_grad_()
        tensors = tensors_of("bias and scales", logits)
        leaves = [logits, *(tensors[n].requires_grad_() for n in ("expert_scale_E", "scale"))]

        def step() -> Any:
            out = fused.route(logits, SPECS["sinks"], **tensors)
            return torch.autograd.grad((out.weights_TK * out.always_TA.sum()).sum(), leaves)

    step()
    torch.cuda.synchronize()
    with waits_are_errors():
        step()


@pytest.mark.parametrize("name", ["qwen3-30b", "deepseek-v3"])
def test_something_of_size_T_E_is_saved(name: str) -> None:
    """Beyond the logits."""
    logits, spec, tensors = model(name, 16384 if ON_GPU else 300)
    logits.requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused.route(logits, spec, **tensors)
    others = [t for t in saved if t.data_ptr() != logits.data_ptr()]
    assert len(others) < len(saved)
    assert all(t.numel() <= out.experts_TK.numel() for t in others)


@needs_gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["qwen3-30b", "deepseek-v3"])
def test_something_of_size_T_E_is_allocated(name: str) -> None:
    """Neither kept nor for a moment; the results and the counts are."""
    logits, spec, tensors = model(name, 131_072)
    logits.requires_grad_()
    fused.route(logits, spec, **tensors)
    before = requested()
    torch.cuda.reset_peak_memory_stats()
    out = fused.route(logits, spec, **tensors)
    counted = counts_of(out.experts_TK, logits.shape[1])
    assert counted is not None
    results = sum(t.numel() * t.element_size() for t in (out.experts_TK, out.weights_TK, counted))
    most = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert requested() - before <= results + 4096
    assert most <= results + 4096
    assert results < logits.numel() * logits.element_size() / 2


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_captured_router_replays_something_else(name: str) -> None:
    """Also after new logits were written into its input."""
    logits, step = step_of(name, 4096, backward=True)
    expected = on_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in (0, 1):
        spoil(got)
        with torch.no_grad():
            logits.copy_(model(name, 4096, seed)[0])
        graph.replay()
        later = step()
        for one, other in zip(got, later, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(later[1], expected[1]) == (seed == 0)


@needs_gpu
def test_a_graph_sorts_by_the_counts_of_other_indices() -> None:
    """Counted before the capture, and then copied into: what a graph's inputs are for."""
    spec, num_experts = RouteSpec(top_k=4), 16
    experts, later = (
        fused.route(logits_of(TOKENS, num_experts, seed), spec).experts_TK for seed in (0, 1)
    )
    assert counts_of(experts, num_experts) is not None
    on_side_stream(lambda: sorted_behind(experts, num_experts))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sorted_behind(experts, num_experts)
    experts.copy_(later)
    graph.replay()
    assert_same_rows(got, sort_by_expert(later.clone(), num_experts))


def test_inference_mode_routes_otherwise() -> None:
    logits = randn(TOKENS, EXPERTS).to(DEVICE)
    expected = fused.route(logits, SPECS["sigmoid"])
    with torch.inference_mode():
        got = fused.route(logits, SPECS["sigmoid"])
        assert_same_rows(
            sorted_behind(got.experts_TK, EXPERTS), sorted_behind(expected.experts_TK, EXPERTS)
        )
    assert torch.equal(got.experts_TK, expected.experts_TK)
    assert torch.equal(got.weights_TK, expected.weights_TK)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible; needs two")
def test_a_second_gpu_routes_on_the_first() -> None:
    logits, spec, tensors = model("deepseek-v3", 4096)
    expected = run_route(fused.route, logits, spec, **tensors)
    moved = {name: tensor.to("cuda:1") for name, tensor in tensors.items()}
    got = run_route(fused.route, logits.to("cuda:1"), spec, **moved)
    assert torch.cuda.current_device() == 0
    assert_same({name: value.to(DEVICE) for name, value in got.items()}, expected)
