"""`run`: one fine-tuning, from options to a folder of results.

prepare -> built-in model only: train the base on `sums` -> LoRA with turnout, held-out losses,
adapter -> built-in model only: the same LoRA with stock PEFT -> pictures, report
-> reload without turnout -> claims, summary
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

import turnout
from turnout.integrations.trainer import TurnoutCallback
from turnout.train import builtin, corpus, folder
from turnout.train.checkpoint import add_lora, load_model
from turnout.train.config import TrainConfig, TrainingFailed
from turnout.train.data import PACKING, pack
from turnout.train.loop import Fit, fit, heldout_loss
from turnout.train.plots import plot_experts, plot_loss
from turnout.train.prepare import Job, prepare
from turnout.train.progress import Bar, quiet
from turnout.train.proof import Claim, Reload, claims_of, compare_reloaded
from turnout.train.summary import Stock, Trained, summary_of
from turnout.train.watch import Watch
from turnout.tuning import journal

LOADS = 100  # at most so often the load of the experts is written; every loss is logged


def run(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune as `config` says, write everything to `config.out`, return what summary.json holds.

    Raises:
        ValueError: the options, folder, checkpoint or data are wrong; nothing was written.
        Unsupported: this version of turnout lacks an option, or the architecture.
        TrainingFailed: the loss is not a number, an expert adapter does not learn, or something
            that this run was to prove is not so.
    """
    console = Console()
    with quiet(), _threads(config):
        job = prepare(config, console)
        if job.built_in and not job.base.is_dir():
            _train_base(job)
        trained = _train_lora(job)
        stock = _train_stock(job)
        _write_pictures(job, trained, stock)
        reload = _reload(job, trained)
        claims = _claims(job, trained, stock, reload)
        summary = summary_of(job, trained, stock, reload, claims)
        folder.write_json(job.config.out / "summary.json", summary)
    _conclude(job, claims)
    return summary


@contextmanager
def _threads(config: TrainConfig) -> Iterator[None]:
    """One CPU thread for the built-in model: more gain it little, and its numbers stay the same on
    machines with other numbers of cores."""
    before = torch.get_num_threads()
    if config.model is None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_base(job: Job) -> None:
    """The built-in model learns `sums` with all of its weights and becomes OUT/base."""
    seed, sizes = job.config.seed, job.numbers
    documents = corpus.sums(seed).train
    data = pack(documents, job.tokenizer, sizes.seq_len, "the built-in corpus")
    how = Fit(steps=builtin.BASE_STEPS, batch=sizes.batch, lr=builtin.BASE_LR, seed=seed)
    with TemporaryDirectory() as scratch, Bar(job.console, "base, task 1") as bar:
        fit(job.model, data, how, scratch, [bar])

    def save(path: Any) -> None:
        job.model.to(job.dtype).save_pretrained(path)
        job.tokenizer.save_pretrained(path)

    folder.write_folder(job.base, save)


def _lora_model(job: Job) -> Any:
    base = load_model(job.base, job.dtype) if job.built_in else job.model
    sizes = job.numbers
    return add_lora(base, rank=sizes.rank, alpha=sizes.alpha, seed=job.config.seed)


def _train_lora(job: Job) -> Trained:
    model = _lora_model(job)
    report = turnout.patch(model, **job.patch_options())
    _announce(job, model, report)
    watch = Watch(model, job.numbers.seq_len)
    if job.resume_from is not None:
        watch.restore(job.resume_from)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    checkpoints = job.config.out / "checkpoints"
    record = TurnoutCallback(
        job.config.out / journal.NAME, load_steps=-(-job.numbers.steps // LOADS)
    )
    with watch.attached(), Bar(job.console, "LoRA, turnout") as bar:
        how = job.how(save=True)
        fitted = fit(model, job.data.train, how, checkpoints, [bar, watch, record], job.resume_from)
    peak_memory = _peak_memory(job.device)
    folder.write_folder(job.config.out / "adapter", model.save_pretrained)
    heldout = None
    if job.data.heldout is not None:
        after = heldout_loss(model, job.data.heldout, job.how(), checkpoints)
        with model.disable_adapter():
            before = heldout_loss(model, job.data.heldout, job.how(), checkpoints)
        heldout = (before, after)
    return Trained(
        model=model,
        report=report,
        watch=watch,
        fitted=fitted,
        heldout=heldout,
        peak_memory=peak_memory,
    )


def _announce(job: Job, model: Any, report: Any) -> None:
    """What is about to run, and what of the model is left out."""
    data, sizes = job.data, job.numbers
    heldout = 0 if data.heldout is None else len(data.heldout)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"data: {data.source}, {len(data.train)} sequences of {sizes.seq_len} tokens, "
        f"{heldout} more held out; {PACKING}",
        f"LoRA: rank {sizes.rank}, {trainable:,} trainable parameters; experts fused in "
        f"{report.counts.get('fused', 0)} of {len(report.layers)} MoE layers",
    ]
    lines += [
        f"not fused: {row.name}: {row.reason} ({row.detail})"
        for row in report.layers
        if row.status != "fused"
    ]
    if not model.peft_config["default"].target_modules:
        lines.append("attention: no projection of a known name, so LoRA is on the experts only")
    for line in lines:
        job.console.print(Text(line), soft_wrap=True)


def _train_stock(job: Job) -> Stock | None:
    """The same start, data and seed without turnout; not for a user's checkpoint.

    Stock PEFT has no dropout on experts, so a run with it has nothing to be compared with.
    """
    if not job.built_in or job.config.expert_dropout > 0:
        return None
    assert job.data.heldout is not None
    model = _lora_model(job)
    with TemporaryDirectory() as scratch:
        with Bar(job.console, "LoRA, stock PEFT") as bar:
            fitted = fit(model, job.data.train, job.how(), scratch, [bar])
        return Stock(
            losses=fitted.losses,
            heldout=heldout_loss(model, job.data.heldout, job.how(), scratch),
        )


def _write_pictures(job: Job, trained: Trained, stock: Stock | None) -> None:
    out = job.config.out
    losses = None if stock is None else stock.losses
    folder.write_file(
        out / "loss.png",
        lambda path: plot_loss(path, trained.fitted.losses, losses, trained.heldout),
    )
    counts = trained.watch.counts()
    if counts:  # a few architectures give their experts no indices
        folder.write_file(out / "experts.png", lambda path: plot_experts(path, counts))
    folder.write_json(out / "report.json", trained.report.to_dict())


def _reload(job: Job, trained: Trained) -> Reload | None:
    if not job.checked:
        return None
    data = job.data.train if job.data.heldout is None else job.data.heldout
    adapter = job.config.out / "adapter"
    return compare_reloaded(trained.model, job.base, adapter, job.dtype, data.ids)


def _claims(job: Job, trained: Trained, stock: Stock | None, reload: Reload | None) -> list[Claim]:
    return claims_of(
        heldout=trained.heldout,
        stock=None if stock is None else stock.heldout,
        # One step leaves A without a gradient by right, so nothing can be said.
        tensors=trained.watch.num_tensors()[1:] if len(trained.fitted.losses) > 1 else None,
        reload=reload,
        new_task=job.built_in and job.config.data is None,
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the LoRA phase on a GPU, of the process so far on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _conclude(job: Job, claims: list[Claim]) -> None:
    """Say what was proven, or raise."""
    failed = [claim.text for claim in claims if not claim.holds]
    if failed:
        raise TrainingFailed(
            f"not proven: {' '.join(failed)} The numbers are in {job.config.out / 'summary.json'}."
        )
    print_ = job.console.print
    print_("\n[bold]What this run proved[/bold]", highlight=False)
    for number, claim in enumerate(claims, start=1):
        print_(f" {number}. {claim.text}", highlight=False, soft_wrap=True)
    out = job.config.out
    names = ("loss.png", "experts.png", "report.json", journal.NAME, "summary.json")
    files = [name for name in names if (out / name).exists()]
    print_(
        f"\nEverything is in {out}: adapter/ (plain PEFT), {', '.join(files)}.",
        highlight=False,
        soft_wrap=True,
    )
