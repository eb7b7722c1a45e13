"""How it is called: captured, compiled, checkpointed, with autocast, on another stream or GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from cuda_cases import (
    BASE,
    DEVICE,
    HOPPER,
    REPLAYED,
    make,
    on_side_stream,
    step_of,
    waits_are_errors,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import turnout
from problems import assert_same, judge, output_gradient, run
from turnout import compile_ahead, replay

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": "gate_up"},
    "dropout": {"expert_dropout": 0.3},
    "recompute and dropout": {"recompute": "gate_up", "expert_dropout": 0.3},
}


# Dropout has kernels of its own: one shape of them is enough.
RUNS = [(BASE, name) for name in OPTIONS] + [
    (shape, name) for shape in ("gpt-oss", "llama4", HOPPER) for name in ("plain", "recompute")
]


def seeded(problem: Any, needs: Any = None, seed: int = 3, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    return run(problem, needs, **options)


@pytest.mark.parametrize(("shape", "options"), RUNS)
def test_two_runs_differ(shape: str, options: str) -> None:
    problem = make(shape)
    assert_same(seeded(problem, **OPTIONS[options]), seeded(problem, **OPTIONS[options]))


@pytest.mark.parametrize("shape", [BASE, "gpt-oss", "llama4", "T1000-E4", HOPPER])
def test_recompute_changes_bits(shape: str) -> None:
    problem = make(shape)
    assert_same(run(problem, recompute="gate_up"), run(problem))


def test_the_masks_of_two_calls_are_the_same() -> None:
    problem = make(BASE)
    one, other = (seeded(problem, (), seed=seed, expert_dropout=0.5)["out"] for seed in (3, 4))
    assert not torch.equal(one, other)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("needs", ["LoRA", "full"])
@pytest.mark.parametrize(("shape", "options"), RUNS)
def test_forward_or_backward_waits_for_the_device(shape: str, options: str, needs: str) -> None:
    problem = make(shape)
    names = problem.trained_by_lora if needs == "LoRA" else problem.leaves
    step = step_of(problem, names, **OPTIONS[options])
    step()
    torch.cuda.synchronize()
    with waits_are_errors():
        for _ in range(REPLAYED):
            step()


@pytest.mark.unpoisoned
def test_autocast_waits_for_the_device() -> None:
    problem = make(BASE, torch.float32)
    step = under_autocast(step_of(problem, problem.trained_by_lora))
    step()
    torch.cuda.synchronize()
    with waits_are_errors():
        for _ in range(REPLAYED):
            step()


@pytest.mark.parametrize("shape", [BASE, HOPPER])
@pytest.mark.parametrize("options", ["plain", "recompute"])
def test_a_captured_graph_replays_something_else(options: str, shape: str) -> None:
    """Also after new tokens, another routing and other adapters were written into its inputs."""
    problem, later = make(shape), make(shape, seed=1)
    step = step_of(problem, problem.leaves, **OPTIONS[options])
    expected = on_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.fill_(float("nan"))
    graph.replay()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    problem.experts.copy_(later.experts)
    for name, leaf in problem.leaves.items():
        leaf.copy_(later[name])
    graph.replay()
    for one, other in zip(got, step(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(got[0], expected[0])


def test_another_stream_reads_too_early() -> None:
    problem = make("T1000-E4")
    expected = run(problem)
    side = torch.cuda.Stream()
    for _ in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # whoever uses the default stream is too early
            got = run(problem.mapped(torch.clone))
        torch.cuda.current_stream().wait_stream(side)
        assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible; needs two")
@pytest.mark.parametrize("options", OPTIONS)
def test_a_second_gpu_runs_on_the_first(options: str) -> None:
    """The current device stays 0; the tensors are on 1."""
    problem = make(BASE)
    expected = run(problem, **OPTIONS["recompute" if "recompute" in options else "plain"])
    moved = problem.mapped(lambda t: t.to("cuda:1")).changed(experts=problem.experts.to("cuda:1"))
    got = seeded(moved, **OPTIONS[options])
    assert torch.cuda.current_device() == 0
    assert {value.device for value in got.values()} == {torch.device("cuda:1")}
    assert_same(got, seeded(moved, **OPTIONS[options]))
    if "dropout" not in options:
        assert_same({name: value.to(DEVICE) for name, value in got.items()}, expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "LoRA": (BASE, "LoRA", "aot_eager", {}),
    "LoRA, inductor": (BASE, "LoRA", "inductor", {}),
    "full, recompute, inductor": ("gpt-oss", "full", "inductor", {"recompute": "gate_up"}),
    "full": ("gpt-oss", "full", "aot_eager", {}),
    "dropout": (BASE, "LoRA", "aot_eager", {"expert_dropout": 0.3}),
    "full, Hopper's kernels, inductor": (HOPPER, "full", "inductor", {}),
    "weight on the input": ("llama4", "full", "aot_eager", {}),
}


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_forward_or_backward_is_not_eager(case: str) -> None:
    """Whole graphs. Inductor checks what the ops return against the sizes of their fakes."""
    shape, which, backend, options = COMPILED[case]
    problem = make(shape)
    needs = problem.trained_by_lora if which == "LoRA" else None
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend=backend)
    got = seeded(problem, needs, function=compiled, **options)
    assert_same(got, seeded(problem, needs, **options))


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_compiler")
def test_a_new_number_of_tokens_compiles_again_and_again() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend=counter)
    for tokens in (600, 632, 664, 728):
        problem = make(BASE, tokens=tokens)
        needs = problem.trained_by_lora
        assert_same(run(problem, needs, function=compiled), run(problem, needs))
    assert counter.frame_count <= 2


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_autocast_is_not_eager() -> None:
    problem = make(BASE, torch.float32)
    needs = problem.trained_by_lora
    compiled = torch.compile(turnout.expert_mlp, fullgraph=True, backend="aot_eager")
    got = run(problem, needs, function=under_autocast(compiled))
    assert_same(got, run(problem, needs, function=under_autocast(turnout.expert_mlp)))


def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return function(*args, **options)

    return call


@pytest.mark.parametrize("needs", ["LoRA", "full"])
@pytest.mark.parametrize("shape", [BASE, "gpt-oss"])
def test_autocast_computes_something_else(shape: str, needs: str) -> None:
    """bfloat16 autocast over float32 weights, against the definition under the same autocast."""
    problems = [make(shape, torch.float32, seed) for seed in range(8)]
    names = problems[0].trained_by_lora if needs == "LoRA" else tuple(problems[0].leaves)
    got = run(problems[0], names, function=under_autocast(turnout.expert_mlp))
    assert got["out"].dtype == torch.float32
    cases = ((problem, output_gradient(problem)) for problem in problems)
    judge(got, cases, names, eager=under_autocast(turnout.reference.expert_mlp))


def test_autocast_around_the_backward_pass_changes_gradients() -> None:
    problem = make(BASE, torch.float32)
    outside = step_of(problem, problem.trained_by_lora)
    fresh = problem.mapped(Tensor.detach)
    leaves = [fresh[name].requires_grad_() for name in problem.trained_by_lora]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = fresh.call()
    grads = torch.autograd.grad(out, leaves, output_gradient(problem))
    for got, expected in zip(under_autocast(outside)(), (out.detach(), *grads), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("options", OPTIONS)
def test_activation_checkpointing_changes_bits(options: str, use_reentrant: bool) -> None:
    """With dropout, the second forward pass must draw the mask of the first."""
    problem = make(BASE)

    def in_checkpoint(x: Tensor, *rest: Any, **options: Any) -> Any:
        return checkpoint(
            lambda x: turnout.expert_mlp(x, *rest, **options), x, use_reentrant=use_reentrant
        )

    needs = problem.trained_by_lora
    got = seeded(problem, needs, function=in_checkpoint, **OPTIONS[options])
    assert_same(got, seeded(problem, needs, **OPTIONS[options]))
    if "dropout" in options:
        assert not torch.equal(got["out"], run(problem, needs)["out"])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("trained", ["LoRA", "full"])
def test_a_kernel_is_compiled_when_it_is_launched(
    trained: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first step of a layer compiles all of its kernels before it launches one, most of them in
    other processes."""
    problem = make("T1000-E4")
    knobs = triton.knobs.runtime
    compiled: list[bool] = []
    shared: list[tuple[int, int]] = []
    share = compile_ahead.share

    def note_share(sources: Any, num_workers: int) -> int:
        shared.append((len(sources), share(sources, num_workers)))
        return shared[-1][1]

    def note(*, is_manual_warmup: bool, **_: Any) -> None:
        compiled.append(is_manual_warmup)

    for value in _values():  # what other tests compiled
        if hasattr(value, "device_caches"):
            value.device_caches.clear()
        elif hasattr(value, "cache_clear") and "launch" in value.__name__:
            value.cache_clear()
    compile_ahead._met.clear()
    replay.forget()
    monkeypatch.setattr(knobs, "jit_post_compile_hook", note)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(compile_ahead, "_num_workers", lambda: 4)
    monkeypatch.setattr(compile_ahead, "share", note_share)
    got = run(problem, problem.trained_by_lora if trained == "LoRA" else None)
    assert got["out"] is not None
    assert len(compiled) >= 8, "nothing was compiled at all"
    assert all(compiled), f"{compiled.count(False)} of {len(compiled)} kernels were not foreseen"
    [(given, done)] = shared
    assert given == done >= 5


def _values() -> list[Any]:
    """All that the package's modules define."""
    modules = [m for name, m in sys.modules.items() if name.startswith("turnout.")]
    return [value for module in modules for value in vars(module).values()]
