"""What is known of a LoRA adapter: plain data, and how it is printed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console

from turnout.integrations.adapter_layout import Axis, Layout

_SHOWN = 3  # places named per finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something to know about an adapter. An `error` keeps it from being loaded or converted."""

    severity: Literal["error", "warning"]
    code: str
    where: str
    message: str


def error(code: str, where: str, message: str) -> Finding:
    """A finding that keeps the adapter from being loaded or converted."""
    return Finding(severity="error", code=code, where=where, message=message)


def warning(code: str, where: str, message: str) -> Finding:
    """A finding that leaves the adapter loadable."""
    return Finding(severity="warning", code=code, where=where, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedParameter:
    """One pair of LoRA tensors. None means: can not be told from what was given.

    `nesting` counts wrappers from the innermost, 0. `a_axis` is the axis of (E, dim1, dim2) that A
    runs over (None also for a plain matrix); `swap` says whether today's PEFT wants the other one.
    """

    module: str
    parameter: str | None
    nesting: int
    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    num_experts: int | None
    a_axis: Axis | None
    swap: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """What `check_adapter` found. `parameters` were adapted through `target_parameters`,
    `linear_modules` through `target_modules`; `layout` concerns the former only."""

    path: str
    model: str | None
    peft_version: str | None
    layout: Layout
    layout_reason: str
    converted_from: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...]
    parameters: tuple[AdaptedParameter, ...]
    linear_modules: tuple[AdaptedParameter, ...]
    other_tensors: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that keep the adapter from being loaded or converted."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)


def print_report(report: AdapterReport, console: Console | None = None) -> None:
    """Print what the adapter is, one row per kind of parameter, then what was found."""
    out = console or Console()
    for line in _summary(report):
        out.print(line, highlight=False, markup=False)
    for (name, *facts), count in Counter(map(_facts, _all_rows(report))).items():
        out.print(f"\n{name}", style="bold", highlight=False, markup=False)
        times = "" if count == 1 else f"{count} times: "
        out.print(f"    {times}{', '.join(facts)}", highlight=False, markup=False)
    out.print()
    for line, style in _finding_lines(report):
        out.print(line, style=style, highlight=False, markup=False)


def _summary(report: AdapterReport) -> list[str]:
    lines = [
        f"adapter   {report.path}",
        f"model     {report.model or 'not given'}",
        f"layout    {report.layout} ({report.layout_reason})",
        f"LoRA      r {report.r}, alpha {report.lora_alpha:g}"
        + (", rsLoRA" if report.use_rslora else "")
        + (f", rank_pattern {report.rank_pattern}" if report.rank_pattern else "")
        + (f", alpha_pattern {report.alpha_pattern}" if report.alpha_pattern else ""),
        f"holds     {len(report.parameters)} parameters and {len(report.linear_modules)} modules"
        + (f", {len(report.other_tensors)} other tensors" if report.other_tensors else ""),
    ]
    if not report.parameters:
        lines.append("          no adapted parameters: every PEFT reads this the same way")
    if report.converted_from is not None:
        lines.append(f"converted by turnout from the layout of PEFT {report.converted_from}")
    return lines


def _all_rows(report: AdapterReport) -> tuple[AdaptedParameter, ...]:
    return (*report.parameters, *report.linear_modules)


def _facts(row: AdaptedParameter) -> tuple[str, ...]:
    """The name, with layer numbers as stars, and what there is to say of it."""
    name = row.module if row.parameter is None else f"{row.module}.{row.parameter}"
    if row.parameter is None and row.num_experts != 1:
        name += f".? (wrapper {row.nesting}, 0 is innermost)"
    facts = [
        f"rank {_text(row.rank)}",
        "scaling ?" if row.scaling is None else f"scaling {row.scaling:.4g}",
        f"A {list(row.a_shape)}",
        f"B {list(row.b_shape)}",
        row.dtype,
    ]
    if row.num_experts != 1:
        told = {True: "over the other axis", False: "the same", None: "not told"}[row.swap]
        facts.insert(0, f"{_text(row.num_experts)} experts")
        axis = [] if row.a_axis is None else [f"A over {row.a_axis}"]
        facts.extend((*axis, f"in today's PEFT: {told}"))
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name), *facts


def _text(value: int | None) -> str:
    return "?" if value is None else str(value)


def _finding_lines(report: AdapterReport) -> list[tuple[str, str]]:
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for finding in report.findings:
        places[finding.severity, finding.message].append(finding.where)
    if not places:
        return [("nothing wrong found", "green")]
    lines = []
    for (severity, message), where in sorted(places.items()):
        more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
        text = f"{severity}: {message} [{', '.join(where[:_SHOWN])}{more}]"
        lines.append((text, "red" if severity == "error" else "yellow"))
    return lines
