"""Many steps in one process: shapes in, rows out, each saved as it comes.

Every provider gets a model of its own, built from the same seed and dropped before the next; the
identity comes first, because the MoE part of the others is counted from it. Of several rounds each
provider keeps its fastest: others on the same host slow it, and nothing makes it faster. The
reference of the gate is one stock step with checkpointing, which computes the same and fits where
little does; if it does not run either, a step of turnout's plain PyTorch back end.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from turnout.bench.step_fit import layers_that_fit
from turnout.bench.step_gate import Gate
from turnout.bench.step_models import StepModel, build
from turnout.bench.step_records import (
    DOES_NOT_RUN,
    OUT_OF_MEMORY,
    Provider,
    StepRecord,
    StepRow,
    Switch,
)
from turnout.bench.step_run import Measured, Step, make_ids, measure
from turnout.bench.sweep import version_of
from turnout.device import device_of
from turnout.kernel_facts import INSTALLED
from turnout.specs import BackendName, Unsupported

OnRow = Callable[[StepRow], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSetting:
    """What all shapes share. `layers` None means as many as fit the free memory of the GPU."""

    device: torch.device
    commit: str
    providers: tuple[Provider, ...]
    layers: int | None = None
    tokens: int = 8192
    sequence: int = 4096
    checkpointing: tuple[Switch, ...] = ("off", "on")
    attention: str = "auto"
    repeats: int = 20
    rounds: int = 1


def choose_layers(shape: StepModel, setting: StepSetting) -> int:
    """The layers asked for, or as many as fit; those of tiny on a machine without a GPU.

    Raises:
        ValueError: there is no GPU whose memory could be counted.
    """
    if setting.layers is not None:
        return setting.layers
    if shape.name == "tiny":
        return shape.layers
    if setting.device.type != "cuda":
        raise ValueError(
            f"--layers is not given and the device is {setting.device}; expected a number of "
            f"layers, as only a GPU's free memory is counted. Give --layers, at most {shape.layers}"
        )
    free, _ = torch.cuda.mem_get_info(setting.device)
    everything_kept = "off" in setting.checkpointing
    return layers_that_fit(shape, setting.tokens, free, checkpointing=not everything_kept)


def sweep(
    shapes: Sequence[StepModel], setting: StepSetting, record: StepRecord, on_row: OnRow
) -> None:
    """Runs all and puts the rows into `record`; `on_row` is called with each."""
    for shape in shapes:
        _Shape(shape, choose_layers(shape, setting), setting, record, on_row).run()


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """The result, or why there is none. What a user does (an interrupt) ends the run."""
    try:
        return work(), ""
    except _failures() as error:
        return None, _note(error)


def _failures() -> tuple[type[Exception], ...]:
    """What the libraries under test may raise; one that fails must not take the others with it."""
    found: tuple[type[Exception], ...] = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,  # also torch's out of memory, and `Unsupported`
        TypeError,
        ValueError,
    )
    if INSTALLED:
        from triton.errors import TritonError

        found = (*found, TritonError)
    return found


def _note(error: Exception) -> str:
    """Why there is no row: memory, or the error and the line that raised it."""
    text = " ".join(str(error).split())
    lacks = "out of memory" in text or "ALLOC_FAILED" in text  # of the driver, Triton, cuBLAS
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and lacks):
        return OUT_OF_MEMORY
    if isinstance(error, Unsupported):
        return f"{DOES_NOT_RUN}: {text[:200]}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    return f"failed: {type(error).__name__}: {text[:200]} ({where})"


@dataclass(frozen=True, slots=True)
class _Shape:
    """One shape; what a method builds is gone when it returns."""

    shape: StepModel
    layers: int
    setting: StepSetting
    record: StepRecord
    on_row: OnRow

    def run(self) -> None:
        gate, missing = None, ""
        if set(self.setting.providers) != {"identity"}:
            gate, missing = self.attempt(lambda: self.reference("stock"))
            if gate is None:
                gate, missing = self.attempt(lambda: self.reference("torch"))
        names = sorted(self.setting.providers, key=lambda name: name != "identity")
        for checkpointing in self.setting.checkpointing:
            found: dict[Provider, Measured] = {}
            for left in reversed(range(self.setting.rounds)):
                for name in names:
                    measured = self.measure(name, checkpointing, gate, missing)
                    found[name] = found[name].or_faster(measured) if name in found else measured
                    if not left:
                        identity = found["identity"].step_ms if "identity" in found else None
                        row = self.row(name, checkpointing, found[name], identity, gate)
                        self.record.add(row)
                        self.on_row(row)

    def attempt(self, work: Callable[[], T]) -> tuple[T | None, str]:
        found = attempt(work)
        gc.collect()  # PEFT's wrappers and their modules refer to each other
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def step(
        self, provider: Provider, checkpointing: Switch, backend: BackendName = "auto"
    ) -> Step:
        built = build(
            self.shape,
            self.layers,
            provider,
            self.setting.device,
            checkpointing=checkpointing == "on",
            attention=self.setting.attention,
            backend=backend,
        )
        gc.collect()  # the blocks that the identity has no use for
        vocabulary = self.shape.config(self.layers).vocab_size
        ids = make_ids(vocabulary, self.setting.tokens, self.setting.sequence, self.setting.device)
        return Step(built, ids)

    def reference(self, name: str) -> Gate:
        step = self.step("stock", "on") if name == "stock" else self.step("turnout", "on", "torch")
        step.run()
        return Gate(step.sample().on_cpu(), name)

    def measure(
        self, provider: Provider, checkpointing: Switch, gate: Gate | None, missing: str
    ) -> Measured:
        gated = provider != "identity"
        if gated and gate is None:
            return Measured(note=f"{missing}, in the step that the gate compares with")
        measured, note = self.attempt(
            lambda: measure(
                self.step(provider, checkpointing),
                gate if gated else None,
                repeats=self.setting.repeats,
            )
        )
        return Measured(note=note) if measured is None else measured

    def row(
        self,
        provider: Provider,
        checkpointing: Switch,
        found: Measured,
        identity: float | None,
        gate: Gate | None,
    ) -> StepRow:
        moe = per_s = None
        if found.step_ms is not None:
            per_s = self.setting.tokens / found.step_ms * 1e3
            if provider != "identity" and identity is not None:
                moe = found.step_ms - identity
        return StepRow(
            commit=self.setting.commit,
            device=device_of(self.setting.device).name,
            torch=torch.__version__,
            triton=version_of("triton"),
            transformers=version_of("transformers"),
            peft=version_of("peft"),
            fla=version_of("fla-core"),
            shape=self.shape.name,
            layers=self.layers,
            vocabulary=self.shape.config(self.layers).vocab_size,
            tokens=self.setting.tokens,
            sequence=self.setting.sequence,
            checkpointing=checkpointing,
            provider=provider,
            step_ms=found.step_ms,
            moe_ms=moe,
            tokens_per_s=per_s,
            peak_mb=found.peak_mb,
            first_s=found.first_s,
            loss=found.loss,
            gate="" if gate is None or provider == "identity" else gate.name,
            grad_err=found.grad_err,
            note=found.note,
        )


def line(row: StepRow) -> str:
    """One row as one line of text."""
    what = (
        f"{row.shape:12s} {row.layers:2d} layers {row.tokens:6d}/{row.sequence} "
        f"ckpt {row.checkpointing:3s} {row.provider:14s}"
    )
    if row.step_ms is None:
        return f"{what} no time: {row.note}"
    parts = [f"{row.step_ms:9.2f} ms"]
    if row.moe_ms is not None:
        parts.append(f"MoE {row.moe_ms:9.2f}")
    parts.append(f"{row.tokens_per_s:9.0f} tokens/s")
    if row.peak_mb is not None:
        parts.append(f"peak {row.peak_mb:7.0f} MiB")
    parts.append(f"first_s {row.first_s:.1f} loss {row.loss:.4f}")
    if row.grad_err is not None:
        parts.append(f"grad_err {row.grad_err:.3f}")
    return " ".join([what, *parts])
