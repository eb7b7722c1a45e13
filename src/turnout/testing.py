"""How wrong a result may be, and uninitialised memory that shows itself.

A result is judged against the truth, the same computation in float64, and by a yardstick, plain
PyTorch in the result's own dtype. With d = out - exact and s = sqrt(mean(exact^2)):

    max = max |d| / s        rms = sqrt(mean d^2) / s
    passes if  max(out) <= factor * max(eager) + eps
          and  rms(out) <= max(factor * rms(eager), eps / 4)

eps is that of the result's dtype: rounding the truth once costs about eps / 4 in RMS, and eager may
happen to be exact. A fixed tolerance is either too lax for small errors everywhere or too strict
for large sums; this one grows with the number of terms as rounding does, and shows a missing row or
a factor of 0.996 in bfloat16, which one eps more in RMS would hide.

The RMS is the sharper of the two. The maximum of one small tensor is luck in both results: judge
small cases by `assert_within`, with the largest error eager makes on several problems of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 24  # elements; their copies in float64 take 128 MiB each


def errors(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """(max |x - exact|, RMS(x - exact)), both divided by RMS(exact).

    Args:
        x: any shape and float dtype.
        exact: the truth, same shape, float64.

    Returns:
        Two numbers; (0, 0) for empty tensors, NaN where `x` or `exact` holds a NaN.

    Raises:
        ValueError: shapes differ (broadcasting would hide it), or `exact` is not float64.
    """
    if x.shape != exact.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected {tuple(exact.shape)} as exact")
    if exact.dtype != torch.float64:
        raise ValueError(f"exact is {exact.dtype}; expected float64. Compute the truth in float64")
    return errors_of(pieces(x, exact))


def pieces(x: Tensor, exact: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both cut along the first dim in the same way: of large tensors all copies in float64 would
    not fit beside them."""
    if not x.ndim or not x.numel():
        yield x, exact
        return
    count = max(1, _PIECE * x.shape[0] // x.numel())
    yield from zip(x.split(count), exact.split(count), strict=True)


def errors_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """As `errors`, of pieces of a result and of its truth.

    Args:
        pairs: piece and truth, each of the same shape; the truth is judged as float64.
    """
    count, found = 0, None
    for x, exact in pairs:
        count += x.numel()
        if not x.numel():
            continue
        truth = exact.detach().double()
        difference = x.detach().double() - truth
        largest, squares = difference.abs().max(), difference.square_().sum()
        power = truth.square().sum()
        if found is not None:
            largest = torch.maximum(largest, found[0])
            squares, power = squares + found[1], power + found[2]
        found = largest, squares, power
    if found is None:
        return 0.0, 0.0
    largest, squares, power = found
    scale = (power / count).sqrt().clamp_min(1e-30)
    return (largest / scale).item(), ((squares / count).sqrt() / scale).item()


def assert_within(
    name: str, out: Tensor, exact: Tensor, allowed: tuple[float, float], factor: float = 2.0
) -> None:
    """Check that `out` is at most `factor` times as wrong as `allowed`, in maximum and in RMS.

    The limits are those of the module's docstring.

    Args:
        name: what `out` is, for the message.
        out: the result to judge.
        exact: the truth, float64: the definition evaluated on the same inputs as float64.
        allowed: (max, RMS) error of the yardstick, from `errors`.
        factor: how many times as wrong as the yardstick `out` may be.

    Raises:
        AssertionError: `out` is too wrong, or not finite.
        ValueError: shapes differ, or `exact` is not float64.
    """
    assert_errors(name, out, lambda: errors(out, exact), allowed, factor)


def assert_errors(
    name: str,
    out: Tensor,
    found: Callable[[], tuple[float, float]],
    allowed: tuple[float, float],
    factor: float = 2.0,
) -> None:
    """As `assert_within`, of errors that are computed elsewhere.

    Args:
        name: what `out` is, for the message.
        out: the result to judge.
        found: its (max, RMS) error; asked where all of `out` is finite.
        allowed: (max, RMS) error of the yardstick.
        factor: how many times as wrong as the yardstick `out` may be.

    Raises:
        AssertionError: `out` is too wrong, or not finite.
    """
    if not out.isfinite().all():
        bad = int((~out.isfinite()).sum())
        raise AssertionError(f"{name}: {bad} of {out.numel()} elements are not finite")
    eps = torch.finfo(out.dtype).eps
    limits = factor * allowed[0] + eps, max(factor * allowed[1], eps / 4)
    judged = zip(("max", "RMS"), found(), allowed, limits, strict=True)
    for kind, got, yardstick, limit in judged:
        if not got <= limit:
            raise AssertionError(
                f"{name}: {kind} error {got:.3e}; expected at most {limit:.3e}, from {factor:g} "
                f"times the yardstick's {yardstick:.3e} and eps {eps:.1e} of {out.dtype}"
            )


def assert_matches(
    name: str, out: Tensor, exact: Tensor, eager: Tensor, factor: float = 2.0
) -> None:
    """Check that `out` is at most `factor` times as wrong as `eager`, in maximum and in RMS.

    The limits are those of the module's docstring.

    Args:
        name: what `out` is, for the message.
        out: the result to judge.
        exact: the truth, float64: the definition evaluated on the same inputs as float64.
        eager: the yardstick: the definition evaluated in the dtype of `out`.
        factor: how many times as wrong as `eager` the result may be.

    Raises:
        AssertionError: `out` is too wrong, not finite, or of another dtype than `eager`.
        ValueError: shapes differ, or `exact` is not float64.
    """
    if out.dtype != eager.dtype:
        raise AssertionError(f"{name} is {out.dtype}; expected {eager.dtype} as eager PyTorch's")
    assert_within(name, out, exact, errors(eager, exact), factor)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Within it, torch's uninitialised tensors hold NaN (integers: their largest value).

    Holds for `torch.empty`, `new_empty`, `empty_like`, `empty_strided` and `resize_` on every
    device, from Python and from C++ operators that call them. A result that reads memory nobody
    wrote becomes NaN, or an index out of range, instead of being right by luck.

    Uses torch's deterministic mode (operators without a deterministic version warn) and restores
    the previous mode on the way out.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its property is in no stub
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
