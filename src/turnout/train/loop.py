"""The two things a run does with a model, both by the Trainer: `fit` and `heldout_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from turnout.train.data import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How to train: what the Trainer's arguments depend on.

    Attributes:
        save_steps: None writes no checkpoint.
        bf16: autocast; the adapters stay float32.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    save_steps: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A finished `fit`: the loss of every step, from the first even after a resume."""

    losses: tuple[float, ...]
    seconds: float
    steps_run: int  # by this process


def fit(
    model: Any,
    data: Packed,
    how: Fit,
    folder: Path | str,
    callbacks: Sequence[TrainerCallback],
    resume_from: Path | None = None,
) -> Fitted:
    """Train what requires a gradient: AdamW without weight decay, linear decay, clipping at 1.

    `resume_from` is a checkpoint of an earlier `fit` with the same arguments.
    """
    started_at = 0
    if resume_from is not None:
        started_at = int(resume_from.name.rpartition("-")[2])
        if started_at == how.steps:
            return _restored(model, resume_from)
    trainer = _trainer(model, how, folder, train_dataset=data, callbacks=list(callbacks))
    result = trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    _unwrap(trainer)
    losses = _losses(trainer.state)
    assert len(losses) == how.steps, f"{len(losses)} losses logged in {how.steps} steps"
    return Fitted(
        losses=losses,
        seconds=float(result.metrics["train_runtime"]),
        steps_run=how.steps - started_at,
    )


def _losses(state: TrainerState) -> tuple[float, ...]:
    return tuple(float(row["loss"]) for row in state.log_history if "loss" in row)


def _restored(model: Any, checkpoint: Path) -> Fitted:
    """The end of a finished run. The Trainer (5.17) would train one step more than asked."""
    set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return Fitted(losses=_losses(state), seconds=0.0, steps_run=0)


def heldout_loss(model: Any, data: Packed, how: Fit, folder: Path | str) -> float:
    """Mean loss per token over `data`, in evaluation mode."""
    trainer = _trainer(model, how, folder)
    loss = float(trainer.evaluate(data)["eval_loss"])
    _unwrap(trainer)
    return loss


def _unwrap(trainer: Trainer) -> None:
    """Take back the autocast that accelerate puts around the model's own forward."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _trainer(model: Any, how: Fit, folder: Path | str, **kwargs: Any) -> Trainer:
    on_gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=how.steps,
        per_device_train_batch_size=how.batch,
        per_device_eval_batch_size=how.batch,
        learning_rate=how.lr,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=1.0,
        seed=how.seed,
        data_seed=how.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no" if how.save_steps is None else "steps",
        save_steps=how.save_steps or how.steps,
        save_total_limit=2,
        bf16=how.bf16,
        use_cpu=not on_gpu,
        gradient_checkpointing=how.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        report_to="none",
        disable_tqdm=True,
    )
    # With several GPUs in sight the Trainer would wrap the model in DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    trainer = Trainer(model=model, args=args, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer
