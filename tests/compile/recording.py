"""What the host code would launch on a GPU that is not there, and what the compiler makes of it.

`recording(device)` lets the real host code run on tensors without storage: `device_of` answers with
`device`, and Triton's own hook takes every launch when all arguments are specialised, before
anything is compiled or run. So no signature, no config and no specialisation is written down twice.
`compiled` then compiles one launch for its architecture, and `rejects` says why it can not run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction

from turnout.device import Device

KIB = 1024
# Compute capability: shared memory one block can ask for (NVIDIA's tuning guides for Ampere, Ada,
# Hopper and Blackwell, "Occupancy") and multiprocessors of one such GPU (A100, RTX 3090, RTX 4090,
# H100, B200, RTX 5090). Configs are chosen by both.
SHARED_MEMORY = {
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    120: 99 * KIB,
}
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
REGISTERS = 65536  # of a block
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor of sm_100
# Constexprs that indices are computed with; no tile's size depends on them.
COUNTS = ("TOP_K", "TAG", "GROUP")

_indices = count(100)


def chip(arch: int) -> Device:
    """A GPU of that compute capability."""
    return Device(
        name=f"sm_{arch}",
        arch=arch,
        num_sms=MULTIPROCESSORS[arch],
        shared_memory=SHARED_MEMORY[arch],
        memory_bytes=80 * KIB**3,
        l2_bytes=50 * KIB**2,
    )


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with what Triton specialises it on, and its options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    arch: int

    @property
    def key(self) -> str:
        """Equal for launches that share compiled code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.kernel.__name__} {parts}"

    @property
    def by_name(self) -> dict[str, Any]:
        """The constexprs."""
        names = self.kernel.arg_names
        of = {names[path[0]]: value for path, value in self.constants.items()}
        found = {name: of[name] for name, kind in self.signature.items() if kind == "constexpr"}
        rule = found.pop("RULE", None)  # the Hopper kernels have all of theirs in one
        return found if rule is None else found | {n.upper(): v for n, v in rule._asdict().items()}

    @property
    def pointers(self) -> dict[str, str]:
        """Dtypes of the tensors."""
        return {name: kind for name, kind in self.signature.items() if kind.startswith("*")}

    @property
    def code_and_tiles(self) -> str:
        """Equal for launches that differ in alignments, strides and counts alone."""
        code = {n: v for n, v in self.by_name.items() if n.isupper() and n not in COUNTS}
        options = (self.options["num_warps"], self.options["num_stages"])
        return f"{self.kernel.__name__} {self.pointers} {code} {options}"

    @property
    def family(self) -> tuple[Any, ...]:
        """Kernel, dtypes of the first two tensors, epilogue, and whether rows are gathered."""
        first, second, *_ = self.pointers.values()
        has = self.by_name.get
        return self.kernel.__name__, first, second, has("EPILOGUE"), has("GATHER_A")

    @property
    def volume(self) -> int:
        """Grows with tiles and stages."""
        volume = self.options["num_stages"]
        for name, value in self.by_name.items():
            if "BLOCK" in name or name in ("BUCKETS", "ROWS", "TILE_ROWS"):
                volume *= value
        return volume

    @property
    def switches(self) -> int:
        """How many are on."""
        return sum(value is True for value in self.by_name.values())

    @property
    def aligned(self) -> int:
        """How many arguments are multiples of 16."""
        return sum(bool(found) for found in self.attributes.values())

    def changed(self, num_stages: int, **constants: Any) -> Launch:
        """The same launch with other options and constexprs."""
        places = {(self.kernel.arg_names.index(name),): v for name, v in constants.items()}
        return Launch(
            self.kernel,
            self.signature,
            self.constants | places,
            self.attributes,
            self.options | {"num_stages": num_stages},
            self.arch,
        )

    def __str__(self) -> str:
        switches = " ".join(f"{n}={v}" for n, v in self.by_name.items() if v not in (False, None))
        pointers = sorted({kind for kind in self.signature.values() if kind.startswith("*")})
        options = f"num_warps={self.options['num_warps']} num_stages={self.options['num_stages']}"
        return f"{self.kernel.__name__}({' '.join(pointers)}) {switches} {options}"


@contextmanager
def recording(device: Device) -> Iterator[dict[str, Launch]]:
    """Inside, tensors have no storage and kernels are not run; yields the launches by key."""
    found: dict[str, Launch] = {}
    arch = device.arch
    assert arch is not None

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        assert options["arch"] == f"sm{arch}"
        launch = Launch(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            options,
            arch,
        )
        found.setdefault(launch.key, launch)
        return True  # neither compile nor launch

    # A new index every time: Triton remembers by index what it compiled for.
    index = next(_indices)
    driver = SimpleNamespace(
        get_current_device=lambda: index,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    through_triton = JITFunction.run

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        through_triton(kernel, *args, **kwargs)
        return MagicMock()  # in the place of the compiled kernel

    with ExitStack() as stack:
        for change in (
            patch("turnout.device._not_a_gpu", lambda kind: device),
            patch("turnout.experts.ops.reads_values", lambda tensor: False),
            patch("turnout.experts.ops.compile_ahead", lambda key, device, dry: None),
            patch.object(triton.runtime.driver, "_active", driver),
            patch.object(JITFunction, "run", run),
            patch.object(FakeTensor, "is_cuda", True),
            patch("torch.cuda.is_current_stream_capturing", lambda: False),
            patch.object(FakeTensor, "get_device", lambda tensor: index, create=True),
            patch.object(Tensor, "data_ptr", _address, create=True),
            triton.knobs.runtime.scope(),
            FakeTensorMode(),
        ):
            stack.enter_context(change)
        triton.knobs.runtime.jit_cache_hook = record
        _forget()
        stack.callback(_forget)
        yield found


def _forget() -> None:
    """Clear what the package remembers of a device, or of Triton's driver."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "turnout":
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _address(tensor: Tensor) -> int:
    """As CUDA's allocator would align it."""
    return (1 << 20) + tensor.storage_offset() * tensor.element_size()


def compiled(launch: Launch) -> CompiledKernel:
    """The machine code; from Triton's cache if it was compiled before."""
    source = launch.kernel.ASTSource(
        launch.kernel, launch.signature, launch.constants, launch.attributes
    )
    target = GPUTarget("cuda", launch.arch, 32)
    return triton.compile(source, target=target, options=launch.options)


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers of a thread (REG) and its bytes of local memory (STACK), among others."""
    files = kernel.metadata_group.items()
    cubin = next(path for name, path in files if Path(name).suffix == ".cubin")
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def rejects(launch: Launch, device: Device) -> str | None:
    """Why the launch can not run on the device, or None."""
    try:
        with redirect_stdout(StringIO()):  # Triton prints all of the PTX when ptxas fails
            kernel = compiled(launch)
    except (TritonError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if len(line.strip()) > 1]
        text = " / ".join(line for line in lines[-4:] if not line.startswith("Repro command"))
        return f"{launch} does not compile for {device.name}: {text}"
    shared, columns = kernel.metadata.shared, kernel.metadata.tmem_size or 0
    registers = resources(kernel)["REG"] * 32 * launch.options["num_warps"]
    for needed, available, what in (
        (shared, device.shared_memory, "bytes of shared memory"),
        (columns, TENSOR_MEMORY_COLUMNS, "columns of tensor memory"),
        (registers, REGISTERS, "registers"),
    ):
        if needed > available:
            return f"{launch} needs {needed} {what}; {device.name} has {available}"
    return None
