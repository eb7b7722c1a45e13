"""Many measurements in one process: cases in, rows out, each saved as it comes.

Weights are built once per shape, a batch once per tokens and routing, the truth once for `fwd` and
`full` and once for `lora16`. Each is dropped before the next is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import torch

from turnout.bench.providers import PROVIDERS, Options, provider_named
from turnout.bench.records import Record, Row
from turnout.bench.run import Measured, dense_tflops, measure
from turnout.bench.truth import Judge, make_judge
from turnout.bench.work import Mode, Routing, Weights, Work, make_weights, make_work
from turnout.device import device_of
from turnout.shapes import Shape
from turnout.specs import BackendName, Recompute

FEW_TOKENS = 32  # up to here batched_mm is a provider by default

OnRow = Callable[[Row, Measured], None]
Guard = Callable[[str, Callable[[], None]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One mode of one batch, and who runs it, all of them `runs` times in turn.

    `recompute` is turnout's; peers have none.
    """

    shape: Shape
    mode: Mode
    providers: tuple[str, ...]
    routing: Routing = "uniform"
    recompute: Recompute = "none"
    runs: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all cases share."""

    device: torch.device
    commit: str
    backend: BackendName = "auto"
    repeats: int = 20
    graph: bool = False


def default_providers(tokens: int) -> tuple[str, ...]:
    """Everyone but turnout's portable back end by itself; batched_mm only where copying the weights
    of every row is thinkable."""
    left_out = {"turnout-portable"} | (set() if tokens <= FEW_TOKENS else {"batched_mm"})
    return tuple(name for name in PROVIDERS if name not in left_out)


def missing(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Those of `names` that can not run here, and why."""
    reasons = {name: provider_named(name).missing(device) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def plainly(what: str, work: Callable[[], None]) -> None:
    """The guard that guards nothing: an exception ends the run."""
    work()


def sweep(
    cases: Sequence[Case],
    setting: Setting,
    record: Record,
    on_row: OnRow,
    guard: Guard = plainly,
) -> None:
    """Runs the cases and puts their rows into `record`.

    Cases of one shape run together, in the order in which the shapes first come.

    Args:
        cases: what to run; modes that a provider does not have are left out.
        setting: what all share.
        record: where the rows go.
        on_row: called with every new row.
        guard: runs one piece of work, given its name; it decides what an exception means.
    """
    names = list(dict.fromkeys(case.shape.name for case in cases))
    ordered = sorted(cases, key=lambda case: _order(case, names))
    run = _Run(setting, record, on_row, guard, missing(_names(cases), setting.device))
    record.saw_dense(dense_tflops(setting.device))
    for name, of_shape in groupby(ordered, lambda case: case.shape.name):
        same_shape = list(of_shape)
        guard(name, lambda same_shape=same_shape: run.shape(same_shape))  # type: ignore[misc]
        guard(f"dense after {name}", lambda: record.saw_dense(dense_tflops(setting.device)))


def _names(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for case in cases for name in case.providers))


def _order(case: Case, names: list[str]) -> tuple[int, int, str, bool]:
    is_lora = case.mode == "lora16"
    return names.index(case.shape.name), -case.shape.tokens, case.routing, is_lora


@dataclass(frozen=True, slots=True)
class _Run:
    """One level per method; what a level builds is gone when it returns."""

    setting: Setting
    record: Record
    on_row: OnRow
    guard: Guard
    missing: dict[str, str]

    def shape(self, cases: list[Case]) -> None:
        weights = make_weights(cases[0].shape, self.setting.device)
        for batch, of_batch in groupby(cases, lambda case: (case.shape, case.routing)):
            same_batch = list(of_batch)
            what = f"{batch[0].name} {batch[0].tokens} {batch[1]}"
            self.guard(what, lambda same=same_batch: self.batch(same, weights))  # type: ignore[misc]

    def batch(self, cases: list[Case], weights: Weights) -> None:
        work = make_work(cases[0].shape, weights, cases[0].routing)
        for is_lora, of_truth in groupby(cases, lambda case: case.mode == "lora16"):
            self.truth(list(of_truth), work, is_lora)

    def truth(self, cases: list[Case], work: Work, is_lora: bool) -> None:
        gradients = any(case.mode != "fwd" for case in cases)
        judge = make_judge(work, lora=is_lora, gradients=gradients)
        for case in cases:
            for name in case.providers * case.runs:
                if case.mode not in PROVIDERS[name].modes or name in self.missing:
                    continue
                what = f"{case.shape.name} {case.mode} {name}"
                self.guard(
                    what,
                    lambda name=name, case=case: self.provider(name, case, work, judge),  # type: ignore[misc]
                )

    def provider(self, name: str, case: Case, work: Work, judge: Judge) -> None:
        provider, setting = PROVIDERS[name], self.setting
        recompute: Recompute = case.recompute if provider.is_ours else "none"
        options = Options(backend=setting.backend, recompute=recompute)
        for measured in measure(
            provider,
            work,
            case.mode,
            judge,
            options,
            repeats=setting.repeats,
            graph=setting.graph,
        ):
            row = self.row(case, recompute, measured)
            if measured.is_row:
                self.record.add(row)
            self.on_row(row, measured)

    def row(self, case: Case, recompute: Recompute, measured: Measured) -> Row:
        return Row(
            commit=self.setting.commit,
            device=device_of(self.setting.device).name,
            torch=torch.__version__,
            triton=version_of("triton"),
            shape=case.shape.name,
            tokens=case.shape.tokens,
            mode=case.mode,
            routing=case.routing,
            recompute=recompute,
            router="given",  # the router is no part of the work
            backend=measured.backend,
            provider=measured.provider,
            ms=measured.ms,
            tflops=measured.tflops,
            dense_tflops=self.record.dense,
            saved_mb=measured.saved_mb,
            peak_mb=measured.peak_mb,
            rel_err=measured.rel_err,
            config_source=measured.config_source,
            first_s=measured.first_s,
        )


def line(row: Row, measured: Measured) -> str:
    """One row as one line of text."""
    what = f"{row.shape:12s} {row.tokens:6d} {row.mode:6s} {row.routing:10s} {row.provider:16s}"
    if row.recompute != "none":
        what += f" recompute={row.recompute}"
    if row.ms is None or row.fraction is None:
        return f"{what} no time: {measured.reason}"
    parts = [f"{row.ms:9.3f} ms {row.tflops:7.4g} TFLOP/s {row.fraction:5.2f}"]
    if row.saved_mb is not None and row.peak_mb is not None:
        parts.append(f"saved {row.saved_mb:7.0f} peak {row.peak_mb:7.0f} MiB")
    parts.append(f"err {row.rel_err:.1e}")
    if measured.first_s is not None:
        parts.append(f"first_s {measured.first_s:.1f}")
    return " ".join([what, *parts, row.backend])


def with_tokens(shape: Shape, tokens: int | None) -> Shape:
    """The shape with another T."""
    return shape if tokens is None else replace(shape, tokens=tokens)


def version_of(package: str) -> str:
    """The installed version, empty without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
