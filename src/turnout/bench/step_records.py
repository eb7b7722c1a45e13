"""The CSV of `turnout bench --step`: one row per provider and case, appended, whole or not at all.

Empty cells were not measured; `note` says why a row has no time. `peak_mb` is MiB above the
weights. `moe_ms` is `step_ms` less that of the identity model of the same run and case.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from turnout.bench.table import File, Table

Provider = Literal[
    "identity", "stock", "eager", "axolotl", "liger", "turnout-sonic", "turnout", "turnout-fused"
]
OURS = ("turnout", "turnout-fused")
PEERS = ("axolotl", "liger", "turnout-sonic")
Switch = Literal["off", "on"]
OUT_OF_MEMORY = "out of memory"
DOES_NOT_RUN = "does not run"


class StepCase(NamedTuple):
    """What all providers were given; see `StepRow`."""

    shape: str
    layers: int
    vocabulary: int
    tokens: int
    sequence: int
    checkpointing: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """The columns, in their order.

    Attributes:
        fla: version of flash-linear-attention, which computes Qwen3.5's linear attention where it
            is installed; empty where transformers' plain PyTorch does.
        vocabulary: words of embedding and head.
        tokens: of a step.
        sequence: tokens of one packed sequence.
        first_s: seconds of the first step, compilation included.
        loss: of the first step.
        gate: whose first step the row was compared with; empty for the identity.
        grad_err: RMS difference of the first step's gradients from its, over all adapters.
    """

    commit: str
    device: str
    torch: str
    triton: str
    transformers: str
    peft: str
    fla: str
    shape: str
    layers: int
    vocabulary: int
    tokens: int
    sequence: int
    checkpointing: str
    provider: str
    step_ms: float | None = None
    moe_ms: float | None = None
    tokens_per_s: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    loss: float | None = None
    gate: str = ""
    grad_err: float | None = None
    note: str = ""

    @property
    def case(self) -> StepCase:
        """What all providers were given."""
        return StepCase(*(getattr(self, name) for name in StepCase._fields))

    @property
    def key(self) -> tuple[StepCase, str]:
        """What was measured: rows with the same key are repetitions."""
        return self.case, self.provider

    @property
    def out_of_memory(self) -> bool:
        """The step did not fit."""
        return self.note.startswith(OUT_OF_MEMORY)

    @property
    def failed(self) -> bool:
        """No time, and not for want of memory or of a peer's support: a red gate or an error."""
        is_without = self.provider in PEERS and self.note.startswith(DOES_NOT_RUN)
        return bool(self.note) and not self.out_of_memory and not is_without


TABLE = Table(
    StepRow,
    {
        "step_ms": ".3f",
        "moe_ms": ".3f",
        "tokens_per_s": ".1f",
        "peak_mb": ".1f",
        "first_s": ".3f",
        "loss": ".5f",
        "grad_err": ".3e",
    },
)
COLUMNS = TABLE.columns
read = TABLE.read


class StepRecord(File[StepRow]):
    """The rows of one run, and the file they go to after every row, if there is one."""

    def __init__(self, path: Path | None) -> None:
        """As `File`."""
        super().__init__(TABLE, path)


def latest(rows: Iterable[StepRow]) -> list[StepRow]:
    """The last row of every key, in the order in which the keys first came."""
    return list({row.key: row for row in rows}.values())
