"""Trials for the search of a config: how to run one problem with it, and whether the result is
right.

The gate is law 2 of docs/design.md: truth is the `torch` back end in float64 on the same operands,
the yardstick is the same in the problem's dtype, and a candidate may be twice as wrong as that, in
maximum and in RMS. The maximum of few elements is luck, so at least what n normal errors of the
yardstick's RMS reach, RMS * sqrt(2 ln n), is allowed.

At large T memory decides whether a problem can be judged at all. The truth is computed in float64
one expert after the other and kept, for results of two bytes, in float32, whose rounding is 2^-13
of theirs and less; it is compared piece by piece.

Legend: S rows, E experts, N output width, K contraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from turnout.compile_ahead import Wanted, fill_cache
from turnout.experts import gemm_torch
from turnout.experts.operands import Activate, ActivateBackward, Operand, RowsOut, Tail
from turnout.launch import noting
from turnout.ragged import Ragged
from turnout.specs import GemmProblem
from turnout.testing import assert_errors, errors_of, pieces
from turnout.tuning.key import Config

Outputs = dict[str, Tensor]


def failures() -> tuple[type[Exception], ...]:
    """What a config that does not compile or run may raise."""
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


class GemmTrial:
    """One problem on given operands.

    Args:
        device: where it runs.
        make: a config to a function that launches once and returns the outputs.
        compute: the outputs by the `torch` back end in a dtype.
    """

    def __init__(
        self,
        device: torch.device,
        make: Callable[[Config], Callable[[], Outputs]],
        compute: Callable[[torch.dtype], Outputs],
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self.failures = failures()
        self.prepare = make
        self._compute, self._dtype = compute, dtype

    def compile(self, configs: Sequence[Config]) -> None:
        """On a GPU, into Triton's cache, by worker processes."""
        if self.device.type != "cuda":
            return
        wanted: list[Wanted] = []
        for config in configs:
            with suppress(*self.failures), noting(wanted):
                self.prepare(config)()
        with torch.cuda.device(self.device), suppress(OSError, *self.failures):
            fill_cache(list(dict.fromkeys(wanted)))

    @cached_property
    def _judge(self) -> tuple[Outputs, dict[str, tuple[float, float]]]:
        """Truth and the yardstick's (max, RMS) errors."""
        truth = self._compute(torch.float64)
        allowed = {}
        for name, value in self._compute(self._dtype).items():
            largest, rms = _errors(value, truth[name])
            luck = rms * math.sqrt(2 * math.log(max(2, value.numel())))
            allowed[name] = (max(largest, luck), rms)
        return truth, allowed

    def rejects(self, outputs: Any) -> str | None:
        """Why these outputs are wrong, or None."""
        truth, allowed = self._judge
        for name, value in outputs.items():
            if not value.numel():
                continue
            try:
                assert_errors(name, value, partial(_errors, value, truth[name]), allowed[name])
            except AssertionError as error:
                return str(error)
        return None


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    return errors_of(pieces(value, truth))


def _kept(into: torch.dtype, out: torch.dtype) -> torch.dtype:
    """What results in `out` are kept in when they are computed in `into`."""
    if into != torch.float64:
        return out
    return torch.float32 if out.itemsize == 2 else torch.float64


def rows_trial(
    problem: GemmProblem,
    a: Operand,
    w_ENK: Tensor,
    ragged: Ragged,
    dtype: torch.dtype,
    bias_EN: Tensor | None,
    tail: Tail | None,
    epilogue: Activate | ActivateBackward | None,
    scale: float,
    make: Callable[[Config], Callable[[], RowsOut]],
) -> GemmTrial:
    """The trial of a product ragged on M; the arguments are those of `gemm_triton.launch_rows`."""
    kept = int(ragged.offsets[-1])

    def named(out: RowsOut) -> Outputs:
        dots = None if out.dot_SP is None else out.dot_SP[:kept].sum(1)
        found = {"out": out.out[:kept], "dots": dots}
        found |= {
            name: None if t is None else t[:kept] for name, t in (("z", out.z_SG), ("h", out.h_SF))
        }
        return {name: t for name, t in found.items() if t is not None}

    def compute(into: torch.dtype) -> Outputs:
        wide = None if tail is None else replace(tail, xa_SR=tail.xa_SR.to(into))
        return named(
            gemm_torch.launch_rows(
                problem, a, w_ENK, ragged, into, bias_EN, wide, epilogue, scale, _kept(into, dtype)
            )
        )

    def prepare(config: Config) -> Callable[[], Outputs]:
        launch = make(config)
        return lambda: named(launch())

    return GemmTrial(w_ENK.device, prepare, compute, dtype)


def gram_trial(
    problem: GemmProblem,
    a: Operand,
    b: Operand,
    ragged: Ragged,
    out_ENK: Tensor,
    dtype: torch.dtype,
    make: Callable[[Config], Callable[[], None]],
) -> GemmTrial:
    """The trial of a product ragged on K, which overwrites `out_ENK` at every launch."""

    def compute(into: torch.dtype) -> Outputs:
        out = torch.empty_like(out_ENK, dtype=_kept(into, out_ENK.dtype))
        gemm_torch.launch_gram(problem, a, b, ragged, out, into)
        return {"out": out}

    def prepare(config: Config) -> Callable[[], Outputs]:
        launch = make(config)

        def run() -> Outputs:
            launch()
            return {"out": out_ENK}

        return run

    return GemmTrial(out_ENK.device, prepare, compute, dtype)
