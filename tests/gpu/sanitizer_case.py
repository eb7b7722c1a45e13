"""Every kernel on odd sizes, and indices far out of range: what compute-sanitizer watches.

`test_sanitizer.py` runs this file in a process of its own. With `--broken` it runs one kernel that
reads past the end of its input, to show that the watcher sees it. The shapes are those of the other
tests, so that most kernels come from Triton's cache.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from cuda_cases import BASE, DEVICE, make

from problems import Problem, run
from turnout.testing import poison_empty

# Shape, dtype, options of the call.
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("T257-E8-K2-H515", torch.bfloat16, {}),
    (BASE, torch.bfloat16, {"expert_dropout": 0.3}),
    ("gpt-oss", torch.bfloat16, {"recompute": "gate_up"}),
    ("not-gated", torch.float32, {}),
    ("llama4", torch.bfloat16, {}),
]


@triton.jit
def _overrun(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Reads and writes BLOCK elements, whatever there are."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


def with_garbage(problem: Problem) -> Problem:
    """Some indices below 0, at E, above E and far above; they are dropped."""
    num_experts = problem.num_experts
    values = [-1, num_experts, num_experts + 1, 10**6, -(10**9), 2**40]
    flat = problem.experts.flatten()
    flat[:: len(values)] = torch.tensor(values, device=flat.device)[
        torch.arange(len(flat[:: len(values)]), device=flat.device) % len(values)
    ]
    return problem.changed(experts=flat.view(problem.experts.shape))


def main() -> None:
    if sys.argv[1:] == ["--broken"]:
        x = torch.zeros(33, device=DEVICE)
        _overrun[(1,)](x, torch.empty(64, device=DEVICE), BLOCK=64)
        torch.cuda.synchronize()
        return
    for shape, dtype, options in CASES:
        with poison_empty():
            got = run(with_garbage(make(shape, dtype)), **options)
        wrong = [name for name, value in got.items() if not value.isfinite().all()]
        assert not wrong, f"{shape}: {wrong} read memory that nobody wrote"
        print(shape, "done", flush=True)


if __name__ == "__main__":
    main()
