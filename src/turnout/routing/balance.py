"""The sums of the load-balancing loss in one launch per layer, their gradient in another.

The host side of `kernels_balance.py`. `losses.py` has the definition and the autograd function.
Beyond the logits and their gradient a layer takes up to BLOCKS rows of E for a moment: no atomics,
the same bits every time.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from turnout.device import device_of
from turnout.kernel_facts import INSTALLED, interpreting, power_of_2
from turnout.launch import Launch
from turnout.library import traced
from turnout.routing.fused import MOST_CHOSEN, MOST_EXPERTS

BLOCKS = 264  # of tokens: two on each multiprocessor of an H100
ELEMENTS = 4096  # of the logits that a program holds
WARPS = 8
_DTYPES = torch.float32, torch.bfloat16, torch.float16
_PLAIN = Tensor, torch.nn.Parameter


def takes(logits: Sequence[Tensor], top_k: int) -> bool:
    """The kernels can work on these layers; else `losses.py` does it in torch's operations.

    That is also where tensors have no memory of their own (fake ones, wrappers), and where what
    runs is recorded as operations, among which a kernel would be missing.
    """
    if torch.compiler.is_compiling() or not INSTALLED or top_k > MOST_CHOSEN:
        return False
    if traced() or any(type(z) not in _PLAIN for z in logits):
        return False
    first = logits[0]
    if not interpreting() and device_of(first.device).arch is None:
        return False
    return first.shape[1] <= MOST_EXPERTS and all(
        z.dtype in _DTYPES and z.device == first.device and z.shape[0] for z in logits
    )


class _Plan(NamedTuple):
    """The launch, its blocks of tokens, and the columns of what they write."""

    launch: Launch
    blocks: int
    columns: int


@cache
def _kernels() -> tuple[Any, Any]:
    """The device code: Triton is imported when the first kernel is asked for."""
    from turnout.routing.kernels_balance import balance_backward_kernel, balance_kernel

    return balance_kernel, balance_backward_kernel


@lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    stride: int,
    dtype: torch.dtype,
    top_k: int,
    narrow: bool,
    weighted: bool,
    libdevice: bool,
) -> _Plan:
    """For the sums; with `top_k` 0 for the gradient. The dtype tells apart what is kept."""
    tokens, num_experts = shape
    columns = power_of_2(num_experts)
    block_t = max(1, ELEMENTS // columns)
    tiles = -(-tokens // block_t)
    constants: dict[str, Any] = {"BLOCK_T": block_t, "BLOCK_E": columns}
    rest = {"NARROW": narrow, "WEIGHTED": weighted, "LIBDEVICE": libdevice}
    numbers: tuple[float, ...] = (num_experts, stride, tokens)
    if top_k:
        steps = -(-tiles // BLOCKS)
        tiles = -(-tiles // steps)
        numbers = (*numbers, steps)
        constants = {"TOP_K": top_k, **constants}
    kernel = _kernels()[0 if top_k else 1]
    launch = Launch(kernel, (tiles, 1, 1), numbers, constants | rest, WARPS, same_dtypes=True)
    return _Plan(launch, tiles, columns)


def _rows(logits_TE: Tensor) -> Tensor:
    return logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()


def _plans(rows: Sequence[Tensor], top_k: int, weight_T: Tensor | None, wide: bool) -> list[_Plan]:
    _kernels()  # before anyone asks whether they are interpreted
    found = []
    for z in rows:
        options = not wide and z.dtype.itemsize == 2, weight_T is not None, not interpreting()
        found.append(_plan(z.shape, z.stride(0), z.dtype, top_k, *options))
    return found


def sums(
    logits: Sequence[Tensor], top_k: int, weight_T: Tensor | None, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """(E,) weighted counts of the tokens that chose each expert and (E,) sums of softmax(z).

    Args:
        logits: (T, E) of each layer, of which `takes` says yes.
        top_k: K. weight_T: float32, of the tokens of every layer; None is one for each.
        wide: softmax(z) stays float32, else it is rounded to the logits' dtype.

    Returns:
        Two float32 tensors, added up in float64.
    """
    rows = [_rows(z.detach()) for z in logits]
    plans = _plans(rows, top_k, weight_T, wide)
    columns = plans[0].columns
    blocks = sum(plan.blocks for plan in plans)
    parts = rows[0].new_empty(blocks, 2, columns, dtype=torch.float32)
    weight = None if weight_T is None else weight_T.contiguous()
    for z, plan, part in zip(rows, plans, parts.split([p.blocks for p in plans]), strict=True):
        plan.launch(z, weight, part)
    counts, probabilities = parts.sum(0, dtype=torch.float64)[:, : rows[0].shape[1]].float()
    return counts, probabilities


def gradients(
    logits: Sequence[Tensor], weight_T: Tensor | None, dsums_E: Tensor, wide: bool = False
) -> list[Tensor]:
    """Of the sums of softmax(z) with respect to each layer's logits, in the logits' dtype."""
    rows = [_rows(z.detach()) for z in logits]
    found = [z.new_empty(z.shape) for z in rows]
    weight = None if weight_T is None else weight_T.contiguous()
    dsums = dsums_E.float().contiguous()
    for z, plan, out in zip(rows, _plans(rows, 0, weight_T, wide), found, strict=True):
        plan.launch(z, weight, dsums, out)
    return found
