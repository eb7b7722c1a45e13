"""A router as a loop over tokens on Python floats: the truth that `turnout.route` is held to.

Written from the sentences of `RouteSpec`'s docstring, not from `turnout.routing.rules`.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from turnout import RouteSpec


def scores_of(z: list[float], name: str) -> list[float]:
    if name == "softmax":
        top = max(z)
        powers = [math.exp(v - top) for v in z]
        total = math.fsum(powers)
        return [p / total for p in powers]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v)) for v in z]
    return [math.sqrt(max(v, 0.0) + math.log1p(math.exp(-abs(v)))) for v in z]


def best(values: list[float], k: int) -> list[int]:
    """The k largest, largest first, the lower index first on a tie."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def masked(values: list[float], spec: RouteSpec) -> list[float]:
    size = len(values) // spec.n_group
    groups = [sorted(values[g * size : (g + 1) * size]) for g in range(spec.n_group)]
    group_scores = [g[-1] if spec.group_score == "max" else g[-1] + g[-2] for g in groups]
    kept = best(group_scores, spec.topk_group)
    return [v if e // size in kept else spec.group_fill for e, v in enumerate(values)]


def naive_token(
    z: list[float],
    spec: RouteSpec,
    bias: list[float] | None,
    expert_scale: list[float] | None,
    scale: float,
    given: list[int] | None,
) -> tuple[list[int], list[float], list[float]]:
    if spec.softcap:
        z = [spec.softcap * math.tanh(v / spec.softcap) for v in z]
    scores = scores_of(z, spec.score)
    experts = len(scores) - spec.n_always
    s, always = scores[:experts], scores[experts:]
    corrected = s if bias is None else [a + b for a, b in zip(s, bias, strict=True)]
    if spec.n_group > 1:
        corrected = masked(corrected, spec)
    chosen = best(corrected, spec.top_k) if given is None else given
    den = 1.0
    if spec.norm:
        den = sum(s[e] for e in chosen) + sum(always)
        den = den + spec.eps if spec.eps_mode == "add" else max(den, spec.eps)
    factor = spec.scale * scale / den
    weights = [s[e] * factor * (1.0 if expert_scale is None else expert_scale[e]) for e in chosen]
    return chosen, weights, [a * factor for a in always]


def naive_route(
    logits: Tensor,
    spec: RouteSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    scale: Tensor | None = None,
    experts_TK: Tensor | None = None,
) -> Any:
    """Lists `experts`, `weights` and `always`, one row a token."""
    bias = None if bias_E is None else bias_E.tolist()
    expert_scale = None if expert_scale_E is None else expert_scale_E.tolist()
    factor = 1.0 if scale is None else float(scale)
    rows = [
        naive_token(z, spec, bias, expert_scale, factor, None if experts_TK is None else given)
        for z, given in zip(
            logits.tolist(),
            [[]] * len(logits) if experts_TK is None else experts_TK.tolist(),
            strict=True,
        )
    ]
    return SimpleNamespace(
        experts=[r[0] for r in rows], weights=[r[1] for r in rows], always=[r[2] for r in rows]
    )
