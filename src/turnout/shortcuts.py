"""What the code that `torch.compile` writes calls instead of public functions, and for its reason:
each costs a microsecond where the public way costs five to twenty. Where this version of torch has
none of them, the public way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

try:
    _guards: Any = import_module("torch._C._dynamo.guards")
except ImportError:
    _guards = None
_TensorGuards: Any = getattr(_guards, "TensorGuards", None)
_empty_strided_cuda: Any = getattr(_guards, "_empty_strided_cuda", None)
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


def empty_on_gpu(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`torch.empty_strided` on the current GPU, which `device` has to be.

    In torch's deterministic mode that fills the memory, and so it is left to torch.
    """
    quick = _empty_strided_cuda is not None and device.type == "cuda"
    if not quick or torch.are_deterministic_algorithms_enabled():
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    made: Tensor = _empty_strided_cuda(shape, stride, dtype)
    return made
