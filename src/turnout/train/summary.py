"""summary.json: the numbers of a run, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from turnout.device import device_of
from turnout.experts.gemm import select
from turnout.specs import GemmProblem
from turnout.train.data import PACKING
from turnout.train.loop import Fitted
from turnout.train.prepare import Job
from turnout.train.proof import Claim, Reload
from turnout.train.watch import Watch

_PACKAGES = ("turnout", "torch", "transformers", "peft", "accelerate")
_ENDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The LoRA phase with turnout, done. `heldout` is the loss of the base and after LoRA."""

    model: Any
    report: Any
    watch: Watch
    fitted: Fitted
    heldout: tuple[float, float] | None
    peak_memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """The same LoRA phase with stock PEFT."""

    losses: tuple[float, ...]
    heldout: float


def _tokens(job: Job, fitted: Fitted) -> int:
    """Tokens of the steps of this process; the last batch of a pass over the data may be small."""
    sizes, rows = job.numbers, len(job.data.train)
    per_pass = -(-rows // sizes.batch)

    def sequences(steps: int) -> int:
        passes, rest = divmod(steps, per_pass)
        return passes * rows + rest * sizes.batch

    run = sequences(sizes.steps) - sequences(sizes.steps - fitted.steps_run)
    return run * sizes.seq_len


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _backend(job: Job, report: Any) -> str:
    """The back end that the up-projection of the first fused layer runs on; `stock` without one."""
    rows = [row for row in report.layers if row.status == "fused"]
    if not rows:
        return "stock"
    row = rows[0]
    problem = GemmProblem(
        ragged="m",
        rows=job.numbers.batch * job.numbers.seq_len,
        experts=row.num_experts,
        n=2 * row.intermediate,
        k=row.hidden,
        rank=job.numbers.rank,
        dtype=row.dtype,
        weight_dtype=row.dtype,
        epilogue="activate",
        gathered=True,
    )
    name: str = select(problem, device_of(job.device), job.config.backend).NAME
    return name


def summary_of(
    job: Job, trained: Trained, stock: Stock | None, reload: Reload | None, claims: list[Claim]
) -> dict[str, Any]:
    """What summary.json holds; what was not measured is null.

    `loss_start` and `loss_end` are means of the first and the last ten steps of the LoRA phase.
    """
    fitted = trained.fitted
    total, _, with_gradient = trained.watch.num_tensors()
    base, lora = trained.heldout or (None, None)
    return {
        "steps": job.numbers.steps,
        "loss_start": _mean(fitted.losses[:_ENDS]),
        "loss_end": _mean(fitted.losses[-_ENDS:]),
        "heldout_loss_base": base,
        "heldout_loss_lora": lora,
        "heldout_loss_stock_peft": None if stock is None else stock.heldout,
        "tokens_per_second": _tokens(job, fitted) / fitted.seconds if fitted.steps_run else None,
        "peak_memory_bytes": trained.peak_memory,
        "device": device_of(job.device).name,
        "backend": _backend(job, trained.report),
        "expert_lora_tensors": total,
        "expert_lora_tensors_with_gradient": with_gradient,
        "plain_peft_max_abs_diff": None if reload is None else reload.plain_peft,
        "merged_max_abs_diff": None if reload is None else reload.merged,
        "proven": [claim.text for claim in claims if claim.holds],
        "not_proven": [claim.text for claim in claims if not claim.holds],
        "packing": PACKING,
        "data": job.data.source,
        "documents": job.data.num_documents,
        "train_sequences": len(job.data.train),
        "heldout_sequences": 0 if job.data.heldout is None else len(job.data.heldout),
        "lora_attention_modules": sorted(trained.model.peft_config["default"].target_modules or ()),
        "layers": trained.report.counts,
        "options": job.config.identity(job.numbers),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
