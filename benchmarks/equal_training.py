"""Does turnout train as stock transformers and PEFT do? Losses and gradient norms, step by step.

    COMMIT=$(git rev-parse --short HEAD)
    PYTHONPATH=src python3 benchmarks/equal_training.py --jobs 6 --commit $COMMIT

A Qwen3-MoE with random weights learns the built-in corpus by LoRA on attention and experts: five
times in stock code, with the rows of every batch in another order each time, and once in turnout.
In exact arithmetic all six are the same. The five differ by rounding, so the largest deviation of
any of them from their mean at any step is what the sixth is allowed at every step. At the end each
side loads the other's adapter, in float32, where both sides agree. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compare import HERE, git_commit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, set_seed

import turnout
from turnout.bench.musts import Must, show
from turnout.bench.records import slug
from turnout.bench.table import File, Table
from turnout.device import device_of
from turnout.train.builtin import make_tokenizer
from turnout.train.corpus import sums

STOCK_RUNS = 5
OURS = "turnout"
LOGITS = 1e-4  # relative RMS difference of logits in float32, one adapter in both codes
SIZES = {
    "small": {"hidden": 1024, "layers": 4, "experts": 32, "top_k": 4, "width": 512, "rows": 16},
    "tiny": {"hidden": 64, "layers": 2, "experts": 8, "top_k": 2, "width": 48, "rows": 4},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One step of one run: the columns of the CSV."""

    commit: str
    device: str
    torch: str
    triton: str
    transformers: str
    peft: str
    run: str
    step: int
    loss: float
    grad_norm: float


def base_model(size: dict[str, int], vocabulary: int, dtype: torch.dtype) -> Any:
    """Random weights, the same at every call."""
    set_seed(0)
    heads = max(2, size["hidden"] // 128)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=size["hidden"] // heads,
        moe_intermediate_size=size["width"],
        num_experts=size["experts"],
        num_experts_per_tok=size["top_k"],
        norm_topk_prob=True,
        initializer_range=0.05,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def batches(tokenizer: Any, steps: int, rows: int, length: int) -> list[Tensor]:
    """The corpus joined by EOS, cut into rows and taken round and round."""
    ids: list[int] = []
    for text in sums(seed=0).train:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    needed = steps * rows * length
    ids = (ids * -(-needed // len(ids)))[:needed]
    return list(torch.tensor(ids).view(steps, rows, length))


def train(model: Any, data: Sequence[Tensor], order: int, lr: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; `order` 0 leaves the rows as they are."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=lr)
    generator = torch.Generator().manual_seed(order)
    found: list[tuple[Tensor, Tensor]] = []
    for batch in data:
        if order:
            batch = batch[torch.randperm(len(batch), generator=generator)]
        ids = batch.to(adapters[0].device)
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.detach(), norm))
    return [(float(loss), float(norm)) for loss, norm in found]


def adapted(model: Any) -> Any:
    """With LoRA of rank 16, drawn from one seed."""
    set_seed(1)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=turnout.lora_targets(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


@dataclass(frozen=True, slots=True)
class Plan:
    """What all runs share: names and numbers, so that a process of its own can be told."""

    size: str
    steps: int
    length: int
    lr: float
    device: str

    def base(self) -> Any:
        """The base model on the device, in bfloat16 on a GPU."""
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        model = base_model(SIZES[self.size], len(make_tokenizer()), dtype)
        return model.to(self.device)

    def model(self) -> Any:
        """The same with adapters."""
        return adapted(self.base())

    def data(self) -> list[Tensor]:
        """The batches, in their own order."""
        return batches(make_tokenizer(), self.steps, SIZES[self.size]["rows"], self.length)

    def run(self, order: int) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
        """(loss, gradient norm) of every step, and the adapters after it; `order` 0 is ours."""
        base = self.base()
        report = None if order else turnout.patch(base)
        model = adapted(base)
        if report is not None:
            report.require("fused")
        steps = train(model, self.data(), order, self.lr)
        return steps, {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def with_adapters(model: Any, trained: dict[str, Tensor]) -> Any:
    """The model, its adapters as they were trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(trained[name])
    return model


def band(stock: Sequence[Sequence[float]], ours: Sequence[float]) -> tuple[float, float]:
    """(largest deviation of ours from the mean of the stock runs, largest of any of those)."""
    runs = torch.tensor(stock, dtype=torch.float64)
    mean = runs.mean(0)
    mine = torch.tensor(ours, dtype=torch.float64)
    return float((mine - mean).abs().max()), float((runs - mean).abs().max())


def by_the_others(stock: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(least, most) of the ratio below, for each stock run as if it were ours: what chance does."""
    found = []
    for index, run in enumerate(stock):
        mine, allowed = band([*stock[:index], *stock[index + 1 :]], run)
        found.append(mine / allowed if allowed else float("inf"))
    return min(found), max(found)


def demands(rows: Sequence[Row]) -> list[Must]:
    """Ours within the band, in loss and in gradient norm."""
    found = []
    for name in ("loss", "grad_norm"):
        runs: dict[str, list[float]] = {}
        for row in rows:
            runs.setdefault(row.run, []).append(getattr(row, name))
        ours = runs.pop(OURS)
        stock = list(runs.values())
        mine, allowed = band(stock, ours)
        least, most = by_the_others(stock)
        note = f"{mine:.2e} of {allowed:.2e}, {len(ours)} steps; each stock run by the other "
        note += f"{len(stock) - 1}: {least:.2f} to {most:.2f}"
        ratio = mine / allowed if allowed else float("inf")
        found.append(Must(f"{name}: ours / largest of {len(stock)} stock", ratio, 1.0, False, note))
    return found


@torch.no_grad()
def exchange(models: dict[str, Any], fresh: Callable[[], Any], batch: Tensor) -> list[Must]:
    """Each side's adapter, saved, and loaded in both codes: the same tensors, the same logits?

    Args:
        models: trained ones, of `turnout` and of stock.
        fresh: makes their base model in float32. In bfloat16 the sides would differ by rounding:
            stock rounds W + s * B A, turnout does not.
        batch: tokens.
    """
    found = []
    for name, model in models.items():
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = {code: _load(fresh(), folder, code) for code in ("stock", OURS)}
        ids = batch.to(next(model.parameters()).device)
        stock, ours = (one.eval()(ids).logits.double() for one in loaded.values())
        difference = float((ours - stock).norm() / stock.norm())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        got = dict(loaded[OURS if name == "stock" else "stock"].named_parameters())
        lost = [n for n, p in trained.items() if not torch.equal(got[n], p.to(got[n].dtype))]
        note = f"{len(lost)} tensors differ, {lost[0]} first" if lost else "the same tensors"
        found.append(
            Must(
                f"adapter of {name} in both codes: logits",
                float("inf") if lost else difference,
                LOGITS,
                False,
                note,
            )
        )
    return found


def _load(base: Any, folder: str, code: str) -> Any:
    if code == OURS:
        turnout.patch(base)
    return PeftModel.from_pretrained(base, folder)


def main() -> int:
    """Run, save, judge; 1 if a demand is missed."""
    started = time.perf_counter()
    args = arguments()
    name = device_of(torch.device(args.device)).name
    out = Path(args.out) if args.out else HERE / "results" / f"training_{slug(name)}.csv"
    file = File(Table(Row, {}), out)
    plan = Plan(args.size, args.steps, args.length, args.lr, args.device)
    facts = (
        args.commit or git_commit(),
        name,
        *(version(p) for p in ("torch", "triton", "transformers", "peft")),
    )
    trained: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        if args.jobs > 1:
            processes = ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"))
            runs = stack.enter_context(processes).map(plan.run, range(STOCK_RUNS + 1))
        else:
            runs = map(plan.run, range(STOCK_RUNS + 1))
        for order, (steps, adapters) in enumerate(runs):
            run = OURS if order == 0 else f"stock {order}"
            file.add(*[Row(*facts, run, i, loss, norm) for i, (loss, norm) in enumerate(steps)])
            print(f"{run:8s} loss {steps[0][0]:.4f} to {steps[-1][0]:.4f}", flush=True)
            trained[run if run == OURS else "stock"] = adapters
    models = {code: with_adapters(plan.model(), found) for code, found in trained.items()}
    found = demands(file.rows) + exchange(models, lambda: plan.base().float(), plan.data()[0])
    print(f"\n{len(file.rows)} rows in {out}\n\n{show(found)}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 0 if all(must.passed for must in found) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--size", default="small", choices=list(SIZES))
    add("--steps", type=int, default=200)
    add("--length", type=int, default=256, help="tokens of a row")
    add("--lr", type=float, default=1e-3)
    add("--jobs", type=int, default=1, help="runs at the same time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="the CSV; benchmarks/results/training_<gpu>.csv by default")
    add("--commit", help="for the first column; asked of git by default")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
