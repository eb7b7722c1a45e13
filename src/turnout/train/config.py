"""What a training run is asked for, checked before anything is read or written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from turnout.specs import BackendName, Recompute, RouterChoice, check_choice

Dtype = Literal["auto", "float32", "bfloat16"]

# Options that name a place or say how to start: a resumed run may give them anew.
_NOT_PART_OF_THE_RUN = ("out", "resume", "overwrite", "save_steps", "check")


class TrainingFailed(RuntimeError):
    """The run ended without the result it was meant to have; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The sizes of a run, decided: `TrainConfig` says what each is."""

    steps: int
    batch: int
    seq_len: int
    lr: float
    rank: int
    alpha: float
    save_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of `turnout train`. What is None depends on the model and the data, as said below.

    Attributes:
        out: folder of everything the run writes.
        model: folder of a Hugging Face checkpoint; None is the built-in tiny Qwen3-MoE.
        data: a text file, or `.jsonl` of {"text": ...} or {"messages": [...]}; None is the built-in
            corpus (built-in model only).
        steps: optimizer steps; None is one pass over the data, and 240 with the built-in model.
        lr: peak learning rate, decaying to zero; None is 2e-4, and 5e-3 with the built-in model.
        rank, alpha: LoRA rank and alpha (scaling alpha / rank); alpha None is twice the rank.
        seq_len: tokens of one packed sequence; None is 1024, and 128 with the built-in model.
        batch: sequences of one step; None is 1, and 16 with the built-in model.
        seed: of the adapters' initial values, the order of the data and the built-in corpus.
        dtype: of the frozen weights; auto is bfloat16 on a GPU and float32 on a CPU.
        gradient_checkpointing: keep only each decoder layer's input for the backward pass.
        expert_dropout: LoRA dropout on the experts' inputs, which stock PEFT does not have.
        backend, router, recompute: as in `turnout.patch`.
        save_steps: steps between checkpoints; None is a quarter of the run.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace an earlier run in `out`.
        check: reload the adapter without turnout at the end and compare logits in float32, which
            takes one float32 copy of the model; None is: with the built-in model.
    """

    out: Path = Path("runs/demo")
    model: Path | None = None
    data: Path | None = None
    steps: int | None = None
    lr: float | None = None
    rank: int = 8
    alpha: float | None = None
    seq_len: int | None = None
    batch: int | None = None
    seed: int = 0
    dtype: Dtype = "auto"
    gradient_checkpointing: bool = False
    expert_dropout: float = 0.0
    backend: BackendName = "auto"
    router: RouterChoice = "model"
    recompute: Recompute = "none"
    save_steps: int | None = None
    resume: bool = False
    overwrite: bool = False
    check: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "seq_len", "batch", "save_steps"):
            _check_at_least(name, getattr(self, name), 2 if name == "seq_len" else 1)
        for name in ("lr", "alpha"):
            _check_positive(name, getattr(self, name))
        _check_at_least("seed", self.seed, 0)
        if not _is_number(self.expert_dropout) or not 0.0 <= self.expert_dropout < 1.0:
            raise ValueError(
                f"expert_dropout is {self.expert_dropout!r}; expected 0 <= expert_dropout < 1."
            )
        check_choice("dtype", self.dtype, Dtype)
        check_choice("backend", self.backend, BackendName)
        check_choice("router", self.router, RouterChoice)
        check_choice("recompute", self.recompute, Recompute)
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite are both set; expected one: resume goes on with the run in "
                f"{self.out}, overwrite deletes it."
            )
        if self.model is not None and self.data is None:
            raise ValueError(
                f"model is {self.model} but data is not given. Name a text or .jsonl file with "
                "--data; the built-in corpus goes with the built-in model only."
            )

    @property
    def row_tokens(self) -> int:
        """Tokens of one packed sequence."""
        return self.seq_len or (128 if self.model is None else 1024)

    def numbers(self, rows: int) -> Numbers:
        """Every number decided, for `rows` sequences to train on."""
        tiny = self.model is None
        batch = self.batch or (16 if tiny else 1)
        steps = self.steps or (240 if tiny else -(-rows // batch))
        return Numbers(
            steps=steps,
            batch=batch,
            seq_len=self.row_tokens,
            lr=self.lr or (5e-3 if tiny else 2e-4),
            rank=self.rank,
            alpha=self.alpha or 2.0 * self.rank,
            save_steps=self.save_steps or -(-steps // 4),
        )

    def identity(self, numbers: Numbers) -> dict[str, Any]:
        """The options that decide the result, as JSON values: a resumed run must repeat them."""
        options = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _NOT_PART_OF_THE_RUN
        }
        for name in ("model", "data"):
            if options[name] is not None:
                options[name] = str(options[name].resolve())
        decided = dataclasses.asdict(numbers)
        del decided["save_steps"]
        return {**options, **decided}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_at_least(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")


def _check_positive(name: str, value: object) -> None:
    if value is None:
        return
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; expected a number above 0.")
