"""What a device is and what it offers: the only file that asks.

Everything that chooses between kernels or configs takes a `Device`, a plain frozen value, so it can
be tested for a GPU that is not there. Nothing here touches CUDA at import.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Facts about one device. On anything but a GPU all sizes are zero.

    `arch` is NVIDIA's compute capability as one number (90 for Hopper); it is None on CPUs and on
    GPUs of other makers, whose numbers mean something else.
    """

    name: str
    arch: int | None
    num_sms: int
    shared_memory: int  # bytes one block can ask for
    memory_bytes: int
    l2_bytes: int


def device_of(device: torch.device) -> Device:
    """The facts about `device`; `cuda` without an index is the current GPU.

    Raises:
        ValueError: `device` is a GPU that this process cannot see.
    """
    if device.type != "cuda":
        return _not_a_gpu(device.type)
    if device.index in _seen:
        return _gpu(device.index)
    if not torch.cuda.is_available():
        raise ValueError(
            f"device is {device}, but torch {torch.__version__} sees no GPU. "
            "Run `turnout doctor` to see why, or use the CPU."
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device is {device}; expected an index below {count}, the visible GPUs.")
    _seen.add(index)
    return _gpu(index)


def visible_gpus() -> tuple[Device, ...]:
    """All GPUs this process can see, in torch's order."""
    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def why_no_gpu() -> str | None:
    """Why torch sees no GPU, or None if it sees one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without GPU support"
    return f"torch {torch.__version__} finds no GPU driver or no visible GPU"


_seen: set[int | None] = set()  # indices that were asked for and exist


@cache
def _not_a_gpu(kind: str) -> Device:
    return Device(name=kind, arch=None, num_sms=0, shared_memory=0, memory_bytes=0, l2_bytes=0)


@cache
def _gpu(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    return Device(
        name=facts.name,
        arch=10 * facts.major + facts.minor if torch.version.hip is None else None,
        num_sms=facts.multi_processor_count,
        shared_memory=facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # in no stub
        memory_bytes=facts.total_memory,
        l2_bytes=facts.L2_cache_size,
    )


@cache
def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver as the driver itself says, or None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)*)\b", text)
    return None if found is None else found[1]
