"""What the code that `torch.compile` writes calls instead of public functions, and for its reason:
each costs a microsecond where the public way costs five to twenty. Where this version of torch has
none of them, the public way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torch._C._dynamo import guards

    _TensorGuards: Any = guards.TensorGuards
    _empty_strided_cuda: Any = guards._empty_strided_cuda  # type: ignore[attr-defined]  # no stub
except (ImportError, AttributeError):  # torch moved them
    _TensorGuards = _empty_strided_cuda = None
_PLAIN = (Tensor, torch.nn.Parameter)


def same_kind(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A function that tells whether other tensors, as many, are like these.

    Alike are type, dtype, device, shape, strides, `requires_grad` and the dispatch keys. None where
    there is no quick way to know.
    """
    if _TensorGuards is None or any(type(t) not in _PLAIN for t in tensors):
        return None
    check: Callable[..., bool] = _TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check
    return check


def empty_on(device: torch.device) -> Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]:
    """Makes what `torch.empty_strided` does, from shape, strides and dtype.

    Made for one stretch of work: on a GPU, which has to be the current one, while it is that, and
    while torch's deterministic mode stays as it is. That mode fills memory, so it is left to torch.
    """
    quick = _empty_strided_cuda is not None and device.type == "cuda"
    if quick and not torch.are_deterministic_algorithms_enabled():
        found: Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor] = _empty_strided_cuda
        return found
    return lambda shape, stride, dtype: torch.empty_strided(
        shape, stride, dtype=dtype, device=device
    )
