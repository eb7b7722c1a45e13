"""Every product of one step by itself: FLOPs, bytes, time per back end, and the two ceilings.

    PYTHONPATH=src python3 benchmarks/products.py --shape qwen3-30b --mode lora16

One step runs and the calls that `experts/passes.py` makes are kept with their tensors; then each is
timed alone by `turnout.measure`, in every back end asked for. Bytes are what a call must read and
write once; rows that are gathered count once per row. The ceilings are the dense rate measured
before, and --bandwidth. A product in two back ends is also compared: the relative difference of
their results must be that of two roundings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from turnout.bench.providers import Options, provider_named
from turnout.bench.run import dense_tflops
from turnout.bench.work import GRADIENTS, make_weights, make_work
from turnout.device import device_of
from turnout.experts import passes
from turnout.measure import seconds
from turnout.shapes import shape_named

PRODUCTS = ("grouped_gemm", "grouped_gram")
OTHERS = ("sort_by_expert", "factors", "combine", "combine_and_dots", "slot_dots")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a pass."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def is_product(self) -> bool:
        return self.name in PRODUCTS

    @torch.no_grad()
    def run(self, backend: str | None = None) -> Any:
        kwargs = self.kwargs if backend is None else {**self.kwargs, "backend": backend}
        return self.function(*self.args, **kwargs)


def nbytes(*tensors: Tensor | None) -> int:
    """Of the elements, each once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def count(call: Call) -> tuple[str, int, int]:
    """What it is, FLOPs, bytes."""
    if call.name == "grouped_gemm":
        a, w, ragged = call.args
        (_, n, k), tail, epilogue = w.shape, call.kwargs.get("tail"), call.kwargs.get("epilogue")
        rank = 0 if tail is None else tail.b_ENR.shape[2]
        out = call.run()
        rows = ragged.num_rows
        written = nbytes(out.out, out.z_SG, out.dot_SP, out.h_SF)
        moved = rows * k * a.rows.element_size() + nbytes(w) + written
        if tail is not None:
            moved += nbytes(tail.xa_SR, tail.b_ENR)
        if epilogue is not None and epilogue.name == "activate_backward":
            moved += nbytes(epilogue.z_SG)
        words = [f"{k} -> {n}", *(["gathered"] if a.by_token else [])]
        words += [f"rank {rank}"] if rank else []
        words += [epilogue.name] if epilogue else []
        return " ".join(words), 2 * rows * n * (k + rank), moved
    if call.name == "grouped_gram":
        a, b, ragged, out = call.args
        _, n, k = out.shape
        rows = ragged.num_rows
        moved = rows * (n * a.rows.element_size() + k * b.rows.element_size()) + nbytes(out)
        return f"{n} x {k}", 2 * rows * n * k, moved
    found = call.run()
    inputs = [t for t in call.args if isinstance(t, Tensor)]
    results = found if isinstance(found, tuple) else (found,)
    return "", 0, nbytes(*inputs, *(t for t in results if isinstance(t, Tensor)))


def calls_of(step: Callable[[], object]) -> list[Call]:
    """The calls of `passes` while the step runs; before its kernels are compiled there are more."""
    step()
    found: list[Call] = []

    def keeping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kwargs: Any) -> Any:
            found.append(Call(name, function, args, kwargs))
            return function(*args, **kwargs)

        return kept

    with ExitStack() as stack:
        for name in (*PRODUCTS, *OTHERS):
            function = getattr(passes, name)
            stack.enter_context(patch.object(passes, name, keeping(name, function)))
        step()
    return found


def result_of(call: Call, backend: str) -> Tensor:
    """The first tensor that a product makes."""
    out = call.run(backend)
    made = call.args[3] if out is None else out.out
    if out is not None and call.name == "grouped_gemm":
        made = made[: int(call.args[2].offsets[-1])]  # dropped rows are not defined
    return made.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", default="qwen3-30b", help="of turnout.shapes")
    parser.add_argument("--mode", default="lora16", choices=list(GRADIENTS))
    parser.add_argument("--tokens", type=int, help="other than the shape's")
    parser.add_argument("--backends", default="triton", help="names, joined by commas")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of the memory, TB/s")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device, shape = torch.device(args.device), shape_named(args.shape)
    if args.tokens:
        shape = replace(shape, tokens=args.tokens)
    work = make_work(shape, make_weights(shape, device))
    leaves = work.leaves(args.mode)
    run = provider_named("turnout").prepare(work, args.mode, Options())
    wanted = [getattr(leaves, name) for name in GRADIENTS[args.mode]]

    def step() -> None:
        out = run(leaves)
        if wanted:
            torch.autograd.grad(out, wanted, work.dout_TH)

    dense = dense_tflops(device)
    backends = args.backends.split(",")
    where = f"{device_of(device).name}, {dense:.0f} TFLOP/s"
    print(f"{where}: {shape.name}, T {shape.tokens}, {args.mode}")
    head = "".join(f"{name:>9} ms  TFLOP/s" for name in backends)
    print(f"{'':52}{'GFLOP':>8}{'GB':>7}{'floor':>8}{head}  difference")
    sums = dict.fromkeys([*backends, "floor"], 0.0)
    for call in calls_of(step):
        what, flops, moved = count(call)
        floor = max(flops / dense / 1e9, moved / args.bandwidth / 1e9)
        sums["floor"] += floor
        line = f"{call.name + ' ' + what:<52}{flops / 1e9:8.0f}{moved / 1e9:7.2f}{floor:8.3f}"
        for name in backends:
            chosen = name if call.is_product else None
            timing = seconds(partial(call.run, chosen), device=device, warmup=3, repeats=20)
            sums[name] += timing.median * 1e3
            line += f"{timing.median * 1e3:12.3f}{flops / timing.median / 1e12:9.0f}"
        if call.is_product and len(backends) == 2:
            one, other = (result_of(call, name) for name in backends)
            line += f"  {float((one - other).norm() / other.norm()):.1e}"
        print(line, flush=True)
    print(f"{'sum':<67}{sums['floor']:8.3f}" + "".join(f"{sums[n]:12.3f}{'':9}" for n in backends))


if __name__ == "__main__":
    main()
