"""What is installed, what the GPU can do, which back ends are usable and why not.

`examine` collects plain facts, `show` prints them. Versions are read from the installed metadata:
nothing is imported to ask for its version, so this works with the base installation alone.
"""

from __future__ import annotations

import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from turnout._version import __version__
from turnout.device import Device, device_of, visible_gpus, why_no_gpu
from turnout.experts import gemm, sonic
from turnout.integrations.versions import MINIMUM
from turnout.specs import BackendName, ExpertSpec, GemmProblem

# name, oldest version that works (None: any), what it is for
PACKAGES = (
    ("torch", "2.9", "everything"),
    ("triton", None, "GPU kernels"),
    ("transformers", MINIMUM["transformers"], "turnout.patch, train, verify"),
    ("peft", MINIMUM["peft"], "LoRA on experts, train, adapter"),
    ("accelerate", None, "train"),
    ("sonic-moe", None, "SonicMoE, for backend='sonic' and as a peer"),
    ("kernels", None, "kernels from the Hugging Face hub"),
    ("bitsandbytes", None, "4-bit weights"),
)

# from this compute capability on, the GPU has it
FEATURES = (
    (80, "bf16 tensor cores"),
    (89, "fp8 tensor cores"),
    (90, "TMA"),
)
# these belong to one generation
GENERATION = {9: "wgmma", 10: "tcgen05"}


def examine() -> dict[str, Any]:
    """The facts as a dict of plain values, the content of `--json`."""
    gpus = visible_gpus()
    where = device_of(torch.device("cuda" if gpus else "cpu"))
    return {
        "turnout": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [_package(*row) for row in PACKAGES],
        "gpus": [{**asdict(gpu), "features": features(gpu)} for gpu in gpus],
        "why_no_gpu": why_no_gpu(),
        "backends": backends(where),
    }


def backends(device: Device) -> list[dict[str, Any]]:
    """Each back end's name, whether it runs a plain problem on `device`, and why not.

    `sonic` runs no adapters; that is no reason here.
    """
    problem = GemmProblem(
        ragged="m",
        rows=4096,
        experts=8,
        n=1536,
        k=2048,
        dtype="bfloat16" if device.arch is not None else "float32",
        weight_dtype="bfloat16" if device.arch is not None else "float32",
    )
    layer = sonic.Problem(
        spec=ExpertSpec(activation=sonic.ACTIVATION),
        experts=problem.experts,
        hidden=problem.k,
        intermediate=problem.n // 2,
        dtype="bfloat16",
        compute="bfloat16",
    )
    reasons = {module.NAME: module.rejects(problem, device) for module in gemm.BACKENDS}
    reasons[sonic.NAME] = sonic.rejects(layer, device)
    rows = []
    for name in (n for n in get_args(BackendName) if n not in ("auto", sonic.MERGED)):
        reason = reasons.get(name, "not in this version")
        rows.append({"name": name, "usable": reason is None, "reason": reason})
    return rows


def features(gpu: Device) -> list[str]:
    """What the kernels can use on this GPU, in words."""
    if gpu.arch is None:
        return []
    words = [name for arch, name in FEATURES if gpu.arch >= arch]
    return words + [name for major, name in GENERATION.items() if gpu.arch // 10 == major]


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints the facts as tables."""
    console.print(
        Group(
            Text(f"turnout {facts['turnout']}, Python {facts['python']}, {facts['platform']}"),
            _packages_table(facts["packages"]),
            _gpus_table(facts["gpus"])
            if facts["gpus"]
            else Text(f"No GPU: {facts['why_no_gpu']}."),
            _backends_table(facts["backends"]),
        )
    )


def _package(name: str, oldest: str | None, purpose: str) -> dict[str, Any]:
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    if found is None:
        status = "not installed"
    elif oldest is not None and release(found) < release(oldest):
        status = "too old"
    else:
        status = "ok"
    return {
        "name": name,
        "version": found,
        "needs": None if oldest is None else f">={oldest}",
        "status": status,
        "for": purpose,
    }


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version: 5.17.0.dev0 is (5, 17, 0). A pre-release counts as its release."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    assert numbers is not None, f"version {text!r} does not start with a number"
    return tuple(int(number) for number in numbers.group().split("."))


def _packages_table(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="Packages", title_justify="left")
    for heading in ("package", "version", "needs", "status", "for"):
        table.add_column(heading)
    colours = {"ok": "green", "not installed": "dim", "too old": "red"}
    for row in rows:
        status = Text(row["status"], style=colours[row["status"]])
        table.add_row(row["name"], row["version"] or "", row["needs"] or "", status, row["for"])
    return table


def _gpus_table(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="GPUs", title_justify="left")
    for heading in ("gpu", "arch", "SMs", "memory", "shared/block", "L2", "has"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["name"],
            "" if row["arch"] is None else f"sm_{row['arch']}",
            str(row["num_sms"]),
            f"{row['memory_bytes'] / 2**30:.0f} GiB",
            f"{row['shared_memory'] / 2**10:.0f} KiB",
            f"{row['l2_bytes'] / 2**20:.0f} MiB",
            ", ".join(row["features"]),
        )
    return table


def _backends_table(rows: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="Back ends", title_justify="left")
    for heading in ("back end", "usable", "why not"):
        table.add_column(heading)
    for row in rows:
        usable = Text("yes", style="green") if row["usable"] else Text("no", style="dim")
        table.add_row(row["name"], usable, row["reason"] or "")
    return table
