"""Problems of a recorded run, launched again on random operands so that they are tuned here.

Which of two operands of a Gram product was gathered is not recorded; the second one is.

Legend: S rows, T tokens, K experts per token, E experts, N output width, K contraction, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from turnout.device import device_of
from turnout.experts import gemm_triton
from turnout.experts.dropout import Dropout, draw_seed
from turnout.experts.operands import Activate, ActivateBackward, Operand, Tail
from turnout.ragged import Ragged, sort_by_expert
from turnout.specs import Activation, GemmProblem
from turnout.tuning.journal import Journal
from turnout.tuning.key import FIXED, TILES, checked

_P = 0.1  # of a dropout whose probability is not part of the problem


def problems(
    journal: Journal, device: torch.device
) -> tuple[list[tuple[GemmProblem, int]], list[str]]:
    """(problem, experts per token) of every kernel event that can run on `device`, each once, and
    what was left out."""
    found: dict[tuple[GemmProblem, int], None] = {}
    faults = list(journal.faults)
    for line in journal.of("kernel"):
        kernel = str(line.get("kernel"))
        if kernel in FIXED:
            continue
        if kernel not in TILES:
            faults.append(f"kernel {kernel!r} is not in this version; it is left out")
            continue
        try:
            problem, top_k = _problem(checked(line, "problem", dict)), checked(line, "top_k", int)
        except (TypeError, ValueError) as error:
            faults.append(f"a problem can not be read ({error}); it is left out")
            continue
        reason = gemm_triton.rejects(problem, device_of(device))
        if reason is None:
            found[problem, top_k] = None
        else:
            faults.append(f"a problem can not run here: the back end {reason}; it is left out")
    return list(found), faults


def _problem(values: dict[str, Any]) -> GemmProblem:
    names = {f.name for f in fields(GemmProblem) if f.init}
    known = {name: value for name, value in values.items() if name in names}
    for name in ("rows", "experts", "n", "k"):
        if checked(known, name, int) < 1:
            raise ValueError(f"{name} is {known[name]}; expected at least 1")
    if known.get("activation") is not None:
        known["activation"] = Activation(**checked(known, "activation", dict))
    return GemmProblem(**known)


def launch(problem: GemmProblem, top_k: int, device: torch.device) -> None:
    """Runs the problem once through the Triton back end."""
    dtype, weight_dtype = getattr(torch, problem.dtype), getattr(torch, problem.weight_dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, device=device, generator=generator, dtype=kind)

    tokens = max(1, problem.rows // top_k)
    scores = torch.rand(tokens, problem.experts, device=device, generator=generator)
    ragged = sort_by_expert(scores.argsort(1)[:, :top_k].contiguous(), problem.experts)
    dropout = Dropout(_P, draw_seed(device), 0) if problem.dropout else None
    if problem.ragged == "k":
        _gram(problem, ragged, dropout, normal, weight_dtype, tokens)
        return
    a = Operand(
        normal(tokens if problem.gathered else ragged.num_rows, problem.k),
        problem.gathered,
        dropout=None if problem.rank else dropout,
    )
    tail = None
    if problem.rank:
        xa = normal(ragged.num_rows, problem.rank)
        tail = Tail(xa, _stack(problem, problem.rank, normal, weight_dtype), dropout)
    bias = normal(problem.experts, problem.n) if problem.bias else None
    gemm_triton.launch_rows(
        problem,
        a,
        _stack(problem, problem.k, normal, weight_dtype),
        ragged,
        dtype,
        bias,
        tail,
        _epilogue(problem, ragged, normal, tokens, top_k),
        2.0 if problem.narrow else 1.0,
    )


def _stack(
    problem: GemmProblem, depth: int, normal: Callable[..., Tensor], kind: torch.dtype
) -> Tensor:
    """(E, N, depth) in the weight's order of dimensions."""
    if problem.weight_k_major:
        return normal(problem.experts, problem.n, depth, kind=kind)
    return normal(problem.experts, depth, problem.n, kind=kind).transpose(1, 2)


def _epilogue(
    problem: GemmProblem, ragged: Ragged, normal: Callable[..., Tensor], tokens: int, top_k: int
) -> Activate | ActivateBackward | None:
    activation = problem.activation
    if activation is None:
        return None
    if problem.epilogue == "activate":
        return Activate(activation, keep_z=True)
    width = problem.n * (2 if activation.gated else 1)
    weight_TK = normal(tokens, top_k).softmax(1)
    return ActivateBackward(activation, normal(ragged.num_rows, width), weight_TK, keep_h=True)


def _gram(
    problem: GemmProblem,
    ragged: Ragged,
    dropout: Dropout | None,
    normal: Callable[..., Tensor],
    kind: torch.dtype,
    tokens: int,
) -> None:
    rows = ragged.num_rows
    a = Operand(normal(rows, problem.n))
    b = Operand(
        normal(tokens if problem.gathered else rows, problem.k), problem.gathered, None, dropout
    )
    out = torch.empty(problem.experts, problem.n, problem.k, dtype=kind, device=a.rows.device)
    gemm_triton.launch_gram(problem, a, b, ragged, out, a.rows.dtype)
