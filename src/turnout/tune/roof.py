"""Measured peaks of a GPU, the roof of `turnout report`'s picture.

dense   2 * 8192^3 FLOP / time of a bf16 matmul of 8192^3
copy    2 * bytes / time of copying a buffer of 1 GiB
"""

from __future__ import annotations

from typing import Any

import torch

from turnout.device import device_of
from turnout.measure import seconds

_SIDE = 8192
_BYTES = 2**30


def roof(device: torch.device) -> dict[str, Any]:
    """The `roof` event of a report."""
    a = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    matmul = seconds(lambda: a @ a, device=device, warmup=3, repeats=10).median
    source = torch.empty(_BYTES, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device=device, warmup=3, repeats=10).median
    return {
        "event": "roof",
        "device": device_of(device).name,
        "dense_tflops": 2 * _SIDE**3 / matmul / 1e12,
        "copy_gb_s": 2 * _BYTES / copy / 1e9,
    }
