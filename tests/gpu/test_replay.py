"""Replayed passes against direct ones: the same bits, whatever changes between two calls."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DEVICE, make

from problems import Problem, assert_same, output_gradient, run
from turnout import replay
from turnout.experts import ops
from turnout.shortcuts import empty_on

CALLS = 4  # as it is, recorded, replayed, replayed


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_programs", type(replay._programs)())


def direct(problem: Problem, **options: object) -> dict[str, torch.Tensor | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "replayed", lambda key, inputs, function, known=False: function())
        return run(problem, **options)


def programs() -> int:
    return sum(isinstance(p, replay._Program) for p in replay._programs.values())


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
@pytest.mark.parametrize("needs", ["LoRA", "full"])
@pytest.mark.parametrize("shape", ["T600-E16-K4-R33", "T257-E8-K2-H515", "not-gated"])
def test_a_replay_differs(shape: str, needs: str, recompute: str) -> None:
    for seed in range(CALLS):
        problem = make(shape, seed=seed)
        names = problem.trained_by_lora if needs == "LoRA" else tuple(problem.leaves)
        dout = output_gradient(problem, seed)
        options = {"needs": names, "dout": dout, "recompute": recompute}
        assert_same(run(problem, **options), direct(problem, **options))
    if needs == "LoRA" and shape != "T257-E8-K2-H515":
        assert programs() == 2, "forward and backward"


@pytest.mark.unpoisoned
@pytest.mark.parametrize("needs", ["LoRA", "full"])
def test_memory_made_quickly_differs(needs: str) -> None:
    """Elsewhere here torch's deterministic mode is on, in which torch itself makes the memory."""
    made: list[torch.Tensor] = []
    for seed in range(CALLS):
        problem = make("T600-E16-K4-R33", seed=seed)
        names = problem.trained_by_lora if needs == "LoRA" else tuple(problem.leaves)
        options = {"needs": names, "dout": output_gradient(problem, seed)}
        assert_same(run(problem, **options), direct(problem, **options))
        made.append(empty_on(torch.device(DEVICE))((3, 5), (1, 3), torch.bfloat16))
    assert {(m.shape, m.stride(), m.dtype, m.device.type) for m in made} == {
        ((3, 5), (1, 3), torch.bfloat16, "cuda")
    }


def test_dropped_slots_come_back() -> None:
    for seed in range(CALLS):
        problem = make("T600-E16-K4-R33", seed=seed)
        experts = problem.experts.clone()
        experts[seed::3, 0] = problem.num_experts
        problem = problem.changed(experts=experts)
        assert_same(run(problem), direct(problem))


@pytest.mark.parametrize("first", [torch.int32, torch.int64], ids=str)
def test_a_replay_reads_indices_of_another_dtype(first: torch.dtype) -> None:
    """One launch serves both; a replay once ran what was compiled for the first."""
    second = torch.int64 if first == torch.int32 else torch.int32
    problem = make("T600-E16-K4-R33")
    for dtype in (first, second) * CALLS:
        changed = problem.changed(experts=problem.experts.to(dtype))
        assert_same(run(changed), direct(changed))


def test_a_replay_reads_weights_of_another_dtype() -> None:
    problem = make("T600-E16-K4-R33")
    for dtype in (torch.float32, torch.bfloat16) * CALLS:
        changed = problem.changed(weights_TK=problem["weights_TK"].to(dtype))
        assert_same(run(changed), direct(changed))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible; needs two")
def test_a_replay_works_on_the_current_device_only() -> None:
    problem = make("T600-E16-K4-R33").mapped(lambda t: t.to("cuda:1"))
    problem = problem.changed(experts=problem.experts.to("cuda:1"))
    for device in (0, 1, 0, 1, 1):
        with torch.cuda.device(device):
            assert_same(run(problem), direct(problem))


def test_two_streams_share_the_memory_of_one_replay() -> None:
    problem = make("T600-E16-K4-R33")
    expected = direct(problem)
    for _ in range(CALLS):
        run(problem)
    streams = [torch.cuda.Stream(DEVICE) for _ in range(4)]
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(run(problem))
    torch.cuda.synchronize()
    for got in found:
        assert_same(got, expected)
