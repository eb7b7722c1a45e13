"""The expert MLP behind the fused router: rows sorted by its counts, and the chain of both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cuda_cases import BASE, DEVICE, make, on_side_stream, spoil
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from problems import Problem, assert_same, output_gradient, run
from turnout import RouteSpec, replay
from turnout.experts import ops
from turnout.launch import recording
from turnout.ragged import counts_of
from turnout.routing import fused

ON_GPU = DEVICE.type == "cuda"
FLOAT = torch.bfloat16 if ON_GPU else torch.float32
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs CUDA itself")
CALLS = 4  # as it is, recorded, replayed, replayed
SORTS = {"_sort_kernel", "_count_kernel", "_scan_kernel", "_scatter_kernel", "_place_kernel"}


def logits_of(problem: Problem, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    size = len(problem.experts), problem.num_experts
    return torch.randn(*size, generator=generator, device=DEVICE)


def routed(seed: int = 0) -> tuple[Problem, Problem]:
    """A problem with the fused router's choice and weights, and the same with uncounted indices."""
    problem = make(BASE, FLOAT, seed=seed)
    num_experts, top_k = problem.num_experts, problem.experts.shape[1]
    logits = logits_of(problem, seed)
    routing = fused.route(logits, RouteSpec(top_k=top_k))
    counted = problem.changed(experts=routing.experts_TK, weights_TK=routing.weights_TK)
    plain = counted.changed(experts=routing.experts_TK.clone())
    assert counts_of(counted.experts, num_experts) is not None
    assert counts_of(plain.experts, num_experts) is None
    return counted, plain


def test_the_expert_mlp_sorts_by_counts_otherwise() -> None:
    counted, plain = routed()
    names: set[str] = set()
    with recording(lambda launch, tensors: names.add(launch.kernel.__name__)):
        got = run(counted, backend="triton")
    assert names & SORTS == {"_place_kernel"}
    assert_same(got, run(plain, backend="triton"))


@needs_gpu
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
def test_a_replay_of_counted_indices_differs(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call with another routing, and one with indices that nobody counted in between."""
    monkeypatch.setattr(replay, "_programs", type(replay._programs)())
    for seed in range(CALLS):
        counted, plain = routed(seed)
        options = {"needs": counted.trained_by_lora, "recompute": recompute}
        got = run(counted, **options)
        assert_same(got, run(plain, **options))
        with monkeypatch.context() as patch:
            patch.setattr(ops, "replayed", lambda key, inputs, function, known=False: function())
            assert_same(got, run(plain, **options))
    programs = [p for p in replay._programs.values() if p is not None]
    assert all(isinstance(p, replay._Program) for p in programs), programs
    assert len(programs) >= 3, "forward with and without counts, and backward"


@dataclass(frozen=True)
class Chain:
    """Router and experts. `counted` is False where the experts get a clone of the indices."""

    problem: Problem
    logits: Tensor
    counted: bool
    options: dict[str, Any]

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = fused.route(logits, RouteSpec(top_k=self.problem.experts.shape[1]))
        experts = routing.experts_TK
        return experts if self.counted else experts.clone(), routing.weights_TK

    def experts(self, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        problem = self.problem.changed(experts=experts_TK, weights_TK=weights_TK)
        return problem.call(**self.options)

    def forward(self, logits: Tensor) -> Tensor:
        return self.experts(*self.route(logits))

    @property
    def leaves(self) -> list[Tensor]:
        names = [n for n in self.problem.trained_by_lora if n != "weights_TK"]
        return [self.logits, *(self.problem[name] for name in names)]

    def step(self, dout: Tensor | None = None) -> tuple[Tensor, ...]:
        """The output, and the gradients of logits, x and adapters."""
        out = self.forward(self.logits)
        dout = output_gradient(self.problem) if dout is None else dout
        return out.detach(), *torch.autograd.grad(out, self.leaves, dout)


def chain(counted: bool, seed: int = 0, **options: Any) -> Chain:
    problem = make(BASE, FLOAT, seed=seed).mapped(Tensor.detach)
    for name in problem.trained_by_lora:
        problem[name].requires_grad_()
    logits = logits_of(problem, seed).requires_grad_()
    return Chain(problem, logits, counted, options)


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("around", ["router and experts", "experts"])
def test_activation_checkpointing_changes_bits(
    around: str, use_reentrant: bool, recompute: str
) -> None:
    """A second forward pass may find no counts on the indices: these are then sorted in full."""
    one = chain(counted=True, recompute=recompute)
    if around == "experts":
        out = checkpoint(one.experts, *one.route(one.logits), use_reentrant=use_reentrant)
    else:
        out = checkpoint(one.forward, one.logits, use_reentrant=use_reentrant)
    out.backward(output_gradient(one.problem))
    expected, *grads = chain(counted=False, recompute=recompute).step()
    assert torch.equal(out, expected)
    for leaf, grad in zip(one.leaves, grads, strict=True):
        assert torch.equal(leaf.grad, grad)


@needs_gpu
def test_a_captured_chain_replays_something_else() -> None:
    both = chain(counted=True)
    dout = output_gradient(both.problem)  # drawn here: a generator on the GPU is not captured
    step = partial(both.step, dout)
    on_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in (0, 1):
        spoil(got)
        with torch.no_grad():
            both.logits.copy_(logits_of(both.problem, seed))
        graph.replay()
        for one, other in zip(got, step(), strict=True):
            assert torch.equal(one, other)


@needs_gpu
def test_another_stream_reads_too_early() -> None:
    expected = chain(counted=False).step()
    both = chain(counted=True)
    logits, here = both.logits.detach().clone(), torch.cuda.current_stream()
    side = torch.cuda.Stream()
    for _ in range(CALLS):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            with torch.no_grad():
                both.logits.zero_()
                torch.cuda._sleep(10_000_000)  # whoever uses the default stream is too early
                both.logits.copy_(logits)
            got = both.step()
        here.wait_stream(side)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
