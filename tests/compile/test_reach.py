"""Which kernels the tests that need a GPU reach on Hopper, by their recorded launches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Launch, chip, recording

import turnout
from problems import run
from turnout.ragged import counts_of, sort_by_expert
from turnout.routing import balance, fused

GPU_TESTS = Path(__file__).parents[1] / "gpu"
JITTED = re.compile(r"^@(?:triton|gluon)\.jit[^\n]*\ndef (\w+_kernel)\(", re.MULTILINE)


@pytest.fixture(autouse=True)
def _their_problems_without_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GPU_TESTS)
    import cuda_cases
    import test_addresses

    for module in (cuda_cases, test_addresses):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))


def kernels(found: Iterable[Launch]) -> set[str]:
    return {f"{one.kernel.__module__}.{one.kernel.__name__}" for one in found}


def all_kernels() -> set[str]:
    source = Path(turnout.__file__).parent
    return {
        ".".join((*path.relative_to(source.parent).with_suffix("").parts, name))
        for path in source.rglob("*.py")
        for name in JITTED.findall(path.read_text(encoding="utf-8"))
    }


def test_a_kernel_never_runs_under_the_sanitizer() -> None:
    import sanitizer_case
    from cuda_cases import make

    with recording(chip(90)) as found:
        for shape, dtype, options in sanitizer_case.CASES:
            run(make(shape, dtype), **options)
        for spec, tokens, experts in sanitizer_case.ROUTES.values():
            logits = torch.empty(tokens, experts + spec.n_always, requires_grad=True)
            out = fused.route(logits, spec)
            out.weights_TK.sum().backward()
            counted = counts_of(out.experts_TK, experts)
            sort_by_expert(out.experts_TK, experts, counted)
        for tokens, top_k, experts in sanitizer_case.BALANCES:
            layers = [torch.empty(tokens, experts) for _ in range(2)]
            weight = torch.empty(tokens)
            _, sums = balance.sums(layers, top_k, weight)
            balance.gradients(layers, weight, sums)
    assert all_kernels() - kernels(found.values()) == set()


@pytest.mark.parametrize("large", ["rows", "experts"])
def test_hopper_never_reads_or_writes_past_2_31_elements(large: str) -> None:
    """Of its four products each, and of both gradients of the stacks."""
    import test_addresses as cases

    with recording(chip(90)) as found:
        for experts, *sizes in problems_of(cases, large):
            run(cases.problem_of(experts, *sizes))
    own = hoppers(found.values())
    epilogues = {one.by_name["EPILOGUE"] for one in own if one.kernel.__name__ == "rows_kernel"}
    assert epilogues == {"none", "activate", "activate_backward"}
    assert "gram_kernel" in {one.kernel.__name__ for one in own}


def hoppers(found: Iterable[Launch]) -> list[Launch]:
    return [one for one in found if "hopper" in one.kernel.__module__]


def test_a_capture_or_a_repetition_passes_by_one_of_hoppers_products() -> None:
    """Up, down, both of their gradients, and those of both stacks; the shape has the name."""
    from cuda_cases import HOPPER, make

    with recording(chip(90)) as found:
        run(make(HOPPER))
    own = hoppers(found.values())
    assert len(own) == 6, [str(one) for one in own]


def problems_of(cases: Any, large: str) -> list[Any]:
    """Indices, and the sizes that `problem_of` takes."""
    if large == "rows":
        experts = torch.zeros(cases.TOKENS, cases.TOP_K, dtype=torch.int64)
        return [(experts, 4, *sizes) for sizes in cases.ROWS.values()]
    sizes = (cases.NUM_EXPERTS, cases.HIDDEN, cases.INTERMEDIATE)
    counts = cases.EXPERT_TOKENS.values()
    return [(torch.zeros(tokens, 3, dtype=torch.int64), *sizes) for tokens in counts]
