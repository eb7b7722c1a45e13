"""Everything that is checked and loaded before a run writes its first file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import turnout
from turnout.device import device_of
from turnout.experts import sonic
from turnout.experts.early import check_possible
from turnout.specs import Unsupported
from turnout.train import builtin, corpus, folder
from turnout.train.checkpoint import check_checkpoint, check_fits, load_model, load_tokenizer
from turnout.train.config import Numbers, TrainConfig
from turnout.train.data import Data, load_data, pack
from turnout.train.loop import Fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run, ready to start.

    Attributes:
        numbers: the sizes of the run, decided.
        model: as loaded from the checkpoint; the built-in one before its base training.
        base: the checkpoint that the adapter belongs to.
        resume_from: a checkpoint of the LoRA phase.
    """

    config: TrainConfig
    numbers: Numbers
    data: Data
    tokenizer: Any
    model: Any
    base: Path
    device: torch.device
    dtype: torch.dtype
    resume_from: Path | None
    console: Console

    @property
    def built_in(self) -> bool:
        """The built-in model, which gets its base training here."""
        return self.config.model is None

    @property
    def checked(self) -> bool:
        """The adapter is loaded again without turnout."""
        return self.built_in if self.config.check is None else self.config.check

    def how(self, *, save: bool = False) -> Fit:
        """The Trainer's side of the LoRA phase, the same with turnout and with stock PEFT."""
        return Fit(
            steps=self.numbers.steps,
            batch=self.numbers.batch,
            lr=self.numbers.lr,
            seed=self.config.seed,
            save_steps=self.numbers.save_steps if save else None,
            gradient_checkpointing=self.config.gradient_checkpointing,
            bf16=self.dtype == torch.bfloat16,
        )

    def patch_options(self) -> dict[str, Any]:
        """The keywords of `turnout.patch`."""
        return _patch_options(self.config)


def prepare(config: TrainConfig, console: Console) -> Job:
    """Check folder, checkpoint, data and options; then, and only then, make the folder.

    Raises:
        ValueError, Unsupported: as `turnout.train.run` says.
    """
    _check_installed()
    folder.check_out(config.out, overwrite=config.overwrite, resume=config.resume)
    for name, path in (("model", config.model), ("data", config.data)):
        folder.check_outside(config.out, name, path)
    resume_from = folder.last_checkpoint(config.out) if config.resume else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(config, device)
    _check_backend(config, device, dtype)
    if config.model is not None:
        check_checkpoint(config.model)
        tokenizer = load_tokenizer(config.model)
    else:
        tokenizer = builtin.make_tokenizer()
    data = _data(config, tokenizer)
    if config.model is not None:
        model = load_model(config.model, dtype)
    else:
        model = builtin.make_model(tokenizer, config.seed)
    _check_model(model, data, config)
    numbers = config.numbers(len(data.train))
    marker = {**config.identity(numbers), "data_sha256": data.fingerprint()}
    if config.resume:
        folder.check_same_run(config.out, marker)
    else:
        folder.start(config.out, marker)
    return Job(
        config=config,
        numbers=numbers,
        data=data,
        tokenizer=tokenizer,
        model=model,
        base=config.out / "base" if config.model is None else config.model,
        device=device,
        dtype=dtype,
        resume_from=resume_from,
        console=console,
    )


def _check_installed() -> None:
    missing = [name for name in ("accelerate", "peft", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is not installed; expected the packages of turnout train. "
            "pip install 'turnout[train]'"
        )


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _data(config: TrainConfig, tokenizer: Any) -> Data:
    if config.data is not None:
        return load_data(config.data, tokenizer, config.row_tokens)
    documents = corpus.backwards(config.seed)
    source = "the built-in corpus"
    return Data(
        train=pack(documents.train, tokenizer, config.row_tokens, source),
        heldout=pack(documents.heldout, tokenizer, config.row_tokens, source),
        num_documents=len(documents.train) + len(documents.heldout),
        source=source,
    )


def _check_backend(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """A back end that was named can run here: device and dtype of the whole run are decided."""
    if config.backend in sonic.NAMES:
        raise Unsupported(
            f"--backend is {config.backend!r}; turnout train trains adapters, which SonicMoE has "
            "no products for; expected auto, torch, triton or hopper. docs/sonic.md has what "
            "turnout.patch can do with SonicMoE"
        )
    if config.backend != "auto":
        what = f"this training in {str(dtype).removeprefix('torch.')}"
        check_possible(config.backend, what, [device_of(device)], [dtype])


def _check_model(model: Any, data: Data, config: TrainConfig) -> None:
    """The model has experts to adapt, takes the tokens, and turnout accepts the options for it."""
    check_fits(model, data, config.row_tokens)
    turnout.lora_targets(model)
    turnout.patch(model, **_patch_options(config))
    turnout.unpatch(model)


def _patch_options(config: TrainConfig) -> dict[str, Any]:
    return {
        "backend": config.backend,
        "router": config.router,
        "recompute": config.recompute,
        "expert_dropout": config.expert_dropout,
    }
