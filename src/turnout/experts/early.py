"""A back end that was named is refused before anything runs, where nothing can make it possible.

The first product would refuse it too (`turnout.experts.gemm.select`), but only once a model is
loaded and its first step begins. The reason is the back end's own, from its `rejects`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.device import Device, device_of, visible_gpus
from turnout.experts.gemm import backend_named
from turnout.specs import GemmProblem, Unsupported

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def places_of(device: torch.device) -> tuple[Device, ...]:
    """Where weights that lie on `device` may run.

    On the CPU, or not loaded (meta): there, or on any GPU in sight (asking starts CUDA).
    Elsewhere: there.
    """
    return (*visible_gpus(), device_of(CPU)) if _may_move(device) else (device_of(device),)


def dtypes_of(weights: Tensor) -> tuple[torch.dtype, ...]:
    """What products with these weights may be computed in.

    On the CPU or not loaded: in anything, since who moves them may convert them. Elsewhere: in
    their own dtype, or in one that autocast asks for, which leaves float64 alone.
    """
    if _may_move(weights.device):
        return DTYPES
    own = weights.dtype
    return (own,) if own == torch.float64 else (own, torch.bfloat16, torch.float16)


def _may_move(device: torch.device) -> bool:
    return device.type in ("cpu", "meta")


def check_possible(
    backend: str, what: str, places: Sequence[Device], dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """Raise `Unsupported` if the named back end rejects every dtype in every place.

    Args:
        backend: a name of `turnout.experts.gemm.BACKENDS`.
        what: what it is to run, in words, for the message.
        places: where that may be.
        dtypes: what it may be computed in, the likeliest first.
    """
    module = backend_named(backend)
    reasons = []
    for device in places:
        found = [module.rejects(_any_problem(dtype), device) for dtype in dtypes]
        if None in found:
            return
        reasons.append(f"{found[0]} ({device.name})")
    raise Unsupported(
        f"backend={backend!r} can not run {what}: {'; '.join(dict.fromkeys(reasons))}. Use "
        "backend='auto'; `turnout doctor` says which back ends run here"
    )


def _any_problem(dtype: torch.dtype) -> GemmProblem:
    """A plain product: no back end refuses for its sizes."""
    name = str(dtype).removeprefix("torch.")
    return GemmProblem(
        ragged="m", rows=4096, experts=8, n=1536, k=2048, dtype=name, weight_dtype=name
    )
