"""`turnout adapter check` and `turnout adapter convert`.

`check_adapter` says what a LoRA adapter of PEFT holds: which layout, which parameter each tensor
belongs to, ranks, and what is wrong with it. `convert_adapter` rewrites the expert factors of
PEFT 0.18.0 to 0.19.0 to the layout of PEFT 0.19.1 and later, into a new folder. The layouts and
their formulas are in `adapter_layout.py`. dW of every expert stays the same: entries are moved and
never computed. Nothing is decided by the size of a dimension; what can not be told is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from turnout.integrations.adapter_files import (
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    AdapterFolder,
    base_module,
    load_base_model,
    read_folder,
)
from turnout.integrations.adapter_health import examine_tensors
from turnout.integrations.adapter_layout import (
    FIRST_OF_TODAY,
    NEWEST_READ,
    BaseModule,
    Layout,
    Reading,
    Slot,
    agreed,
    is_newer_than_known,
    layout_of,
    readings_with_model,
    readings_without_model,
    split_key,
    swap_factors,
)
from turnout.integrations.adapter_report import (
    AdaptedParameter,
    AdapterReport,
    Finding,
    error,
    print_report,
    warning,
)

__all__ = [
    "AdaptedParameter",
    "AdapterReport",
    "Finding",
    "check_adapter",
    "convert_adapter",
    "print_report",
]

_MARK = "turnout_converted_from"  # in the metadata of the safetensors file
_FLOATS = ("F64", "F32", "F16", "BF16")
_NOT_COPIED = re.compile(
    r"^(adapter_model[.-]|adapter_config\.json$|optimizer|scheduler|scaler|rng_state"
    r"|trainer_state|training_args|pytorch_model)"
)


def check_adapter(path: str | Path, model: str | Path | nn.Module | None = None) -> AdapterReport:
    """Say what the adapter in the folder `path` holds. Reads every tensor, changes nothing.

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors` (or its shards).
        model: the base model, or a local folder with its `config.json`. With it every tensor gets
            its parameter's name and the shapes are compared; without it, what follows from the
            files alone.

    Raises:
        ValueError: the folder holds no readable LoRA adapter, or `model` no readable model.
    """
    folder = read_folder(Path(path))
    config = folder.config
    layout, reason = layout_of(config.peft_version)
    slots, others, findings = _collect_slots(folder)
    base = None if model is None else load_base_model(model, {slot.module for slot in slots})
    parameters: list[AdaptedParameter] = []
    linear: list[AdaptedParameter] = []
    for chain in _chains(slots):
        names, readings, found = _read_chain(config, layout, chain, base)
        findings.extend(found)
        rows = [_row(folder, slot, i, readings) for i, slot in enumerate(chain)]
        (parameters if names else linear).extend(rows)
    for row in (*parameters, *linear):
        findings.extend(examine_tensors(row, folder.tensor(row.a_key), folder.tensor(row.b_key)))
    findings.extend(_examine_version(config, layout, reason, bool(parameters)))
    return AdapterReport(
        path=str(path),
        model=_model_name(model),
        peft_version=config.peft_version,
        layout=layout,
        layout_reason=reason,
        converted_from=folder.metadata.get(_MARK),
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        target_parameters=config.target_parameters,
        parameters=tuple(parameters),
        linear_modules=tuple(linear),
        other_tensors=tuple(others),
        findings=tuple(findings),
    )


def convert_adapter(
    src: str | Path, dst: str | Path, model: str | Path | nn.Module | None = None
) -> AdapterReport:
    """Write the adapter `src` in today's layout to the new folder `dst`; return its report.

    The folder is written beside `dst` and renamed when complete; `src` is only read. The new
    `peft_version` is 0.19.1, the first release of today's layout. Ordinary files (tokenizer, model
    card) are copied; sub-folders and the training state are not: the moments of an optimizer are
    in the old layout.

    Args:
        src: as `path` of `check_adapter`.
        dst: a folder that does not exist or is empty.
        model: as in `check_adapter`; needed where the files alone do not tell what to swap.

    Raises:
        ValueError: `dst` is taken, or the adapter is of today's layout already, broken, or of a
            layout that can not be told.
    """
    source, target = Path(src), Path(dst)
    _check_target(source, target)
    report = check_adapter(source, model)
    _check_convertible(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        _write_converted(read_folder(source), report, partial)
        written = check_adapter(partial, model)
        assert not written.errors, written.errors
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(written, path=str(dst))


def _model_name(model: str | Path | nn.Module | None) -> str | None:
    if model is None or isinstance(model, str):
        return model
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def _collect_slots(folder: AdapterFolder) -> tuple[list[Slot], list[str], list[Finding]]:
    """Pair the LoRA tensors. Every other tensor is named, and copied as it is."""
    pairs: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    others, findings = [], []
    for key in sorted(folder.files):
        parts = split_key(key)
        if parts is None:
            others.append(key)
            continue
        if parts.adapter is not None:
            message = f"the key names the adapter {parts.adapter!r}; PEFT loads keys without it"
            findings.append(error("adapter_name_in_key", key, message))
        pairs[parts.module, parts.level][parts.side] = key
    slots = []
    for (module, level), keys in sorted(pairs.items()):
        problem = _pair_problem(folder, keys)
        if problem is None:
            slots.append(_slot(folder, module, level, keys["A"], keys["B"]))
        else:
            findings.append(problem)
            others.extend(keys.values())
    if not pairs:
        findings.append(error("no_tensors", str(folder.path), "no lora_A or lora_B in the file"))
    return slots, others, findings


def _pair_problem(folder: AdapterFolder, keys: dict[str, str]) -> Finding | None:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in keys:
            return error("missing_partner", keys[other], f"there is no lora_{side} beside it")
    for key in keys.values():
        shape = folder.shapes[key]
        if len(shape) < 2 or 0 in shape:
            return error("bad_shape", key, f"shape {shape}: a shard that was never gathered")
        if folder.dtypes[key] not in _FLOATS:
            message = f"dtype {folder.dtypes[key]}; expected one of {', '.join(_FLOATS)}"
            return error("bad_dtype", key, message)
    return None


def _slot(folder: AdapterFolder, module: str, level: int, a_key: str, b_key: str) -> Slot:
    return Slot(
        module=module,
        level=level,
        a_key=a_key,
        b_key=b_key,
        a_shape=folder.shapes[a_key],
        b_shape=folder.shapes[b_key],
    )


def _chains(slots: list[Slot]) -> Iterator[tuple[Slot, ...]]:
    """The slots of each module, innermost first."""
    modules: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        modules[slot.module].append(slot)
    for chain in modules.values():
        yield tuple(sorted(chain, key=lambda slot: -slot.level))


def _read_chain(
    config: AdapterConfig, layout: Layout, chain: tuple[Slot, ...], base: nn.Module | None
) -> tuple[tuple[str, ...], list[Reading], list[Finding]]:
    """The targeted parameters of one module (none: an ordinary module), and their readings."""
    module = chain[0].module
    names = () if config.is_module_target(module) else config.names_on(module)
    if [slot.level for slot in chain] != list(reversed(range(len(chain)))):
        return names, [], [error("missing_wrapper", module, "a wrapper inside has no tensors")]
    found = None
    if base is not None:
        found = base_module(base, module, config)
        if found is None:
            return names, [], [error("unknown_module", module, "the model has no such module")]
        names = tuple(found.shapes)
    if not names:
        return names, *_read_linear(config, chain)
    if found is not None:
        readings, problem = _read_with_model(config, layout, chain, found)
    else:
        readings = readings_without_model(chain, names, layout, config.rank)
        problem = f"ranks and shapes {_shapes(chain)} do not fit target_parameters {list(names)}"
    if not readings:
        return names, [], [error("misfit", module, problem)]
    if agreed(reading.swap for reading in readings) is None:
        return names, readings, [warning("cannot_tell", module, _why_untold(layout, found))]
    return names, readings, []


def _read_with_model(
    config: AdapterConfig, layout: Layout, chain: tuple[Slot, ...], found: BaseModule
) -> tuple[list[Reading], str]:
    """The readings that fit the model, and what to say where none does."""
    targets = config.target_parameters
    readings = readings_with_model(chain, found, layout, config.rank, targets)
    problem = f"A and B {_shapes(chain)} (innermost first) do not fit the model's {found.shapes}"
    if not readings and readings_with_model(chain, found, "unknown", config.rank, targets):
        problem += (
            f" in layout {layout}; they do with A over the other axis. Either peft_version does "
            "not describe this file, or is_transposed was declared otherwise in training"
        )
    return readings, problem


def _read_linear(
    config: AdapterConfig, chain: tuple[Slot, ...]
) -> tuple[list[Reading], list[Finding]]:
    slot = chain[0]
    if len(chain) > 1:
        message = f"{len(chain)} nested wrappers, and no entry of target_parameters names one"
        return [], [error("misfit", slot.module, message)]
    rank = config.rank(slot.module)
    if slot.a_shape[0] != rank or slot.b_shape[1] != rank:
        message = f"A and B {_shapes(chain)} do not fit rank {rank} of the config"
        return [], [error("misfit", slot.module, message)]
    return [Reading(parameters=(None,), experts=(1,), axis=None, swap=False)], []


def _shapes(chain: tuple[Slot, ...]) -> str:
    return ", ".join(f"{list(slot.a_shape)} {list(slot.b_shape)}" for slot in chain)


def _why_untold(layout: Layout, found: BaseModule | None) -> str:
    if layout == "unknown":
        return "can not tell which axis A runs over: the layout is unknown"
    if found is None:
        return "can not tell whether today's PEFT wants A and B swapped: pass the base model"
    return (
        "can not tell which axis A runs over: the weights are square, and this module did not "
        "declare is_transposed before transformers 5.0"
    )


def _row(
    folder: AdapterFolder, slot: Slot, nesting: int, readings: list[Reading]
) -> AdaptedParameter:
    config = folder.config
    names = {reading.parameters[nesting] for reading in readings}
    full = [slot.module if name is None else f"{slot.module}.{name}" for name in names]
    experts = agreed(reading.experts[nesting] for reading in readings)
    return AdaptedParameter(
        module=slot.module,
        parameter=agreed(names),
        nesting=nesting,
        a_key=slot.a_key,
        b_key=slot.b_key,
        a_shape=slot.a_shape,
        b_shape=slot.b_shape,
        dtype="/".join(sorted({folder.dtypes[slot.a_key], folder.dtypes[slot.b_key]})),
        rank=agreed(config.rank(name) for name in full),
        alpha=agreed(config.alpha(name) for name in full),
        scaling=agreed(config.scaling(name) for name in full),
        num_experts=experts,
        a_axis=None if experts == 1 else agreed(reading.axis for reading in readings),
        swap=False if experts == 1 else agreed(reading.swap for reading in readings),
    )


def _examine_version(
    config: AdapterConfig, layout: Layout, reason: str, has_parameters: bool
) -> Iterator[Finding]:
    if not has_parameters:
        return
    if layout == "unknown":
        yield warning("unknown_layout", CONFIG, reason)
    elif config.peft_version is not None and is_newer_than_known(config.peft_version):
        message = f"PEFT {config.peft_version} is newer than {NEWEST_READ}, the newest we checked"
        yield warning("newer_peft", CONFIG, message)


def _check_target(source: Path, target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists; expected a folder that does not exist or is empty.")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies inside {source}; expected a place outside of it.")


def _check_convertible(report: AdapterReport) -> None:
    """Raise `ValueError` unless every factor's place in today's layout is known."""
    if report.errors:
        first = report.errors[0]
        raise ValueError(
            f"{report.path} is broken: {first.where}: {first.message}"
            f" ({len(report.errors)} errors; turnout adapter check lists them)."
        )
    if not report.parameters:
        raise ValueError(
            f"{report.path} adapts no parameters, only modules; nothing to convert: every version "
            "of PEFT reads it the same way."
        )
    if report.layout == "peft>=0.19.1":
        raise ValueError(
            f"{report.path} was written by PEFT {report.peft_version}, which is today's layout; "
            "nothing to convert."
        )
    if report.layout == "unknown":
        raise ValueError(
            f"{report.path}: {report.layout_reason}; expected 0.17.0 to 0.19.0. If you know the "
            f"version, write it into a copy of the {CONFIG}."
        )
    untold = [finding for finding in report.findings if finding.code == "cannot_tell"]
    if untold:
        raise ValueError(f"{report.path}: {untold[0].where}: {untold[0].message}.")


def _write_converted(folder: AdapterFolder, report: AdapterReport, out: Path) -> None:
    swapped = {row.a_key: row for row in report.parameters if row.swap}
    tensors = {key: folder.tensor(key) for key in sorted(folder.files)}
    for row in swapped.values():
        assert row.num_experts is not None
        old = tensors[row.a_key], tensors[row.b_key]
        new = swap_factors(*old, row.num_experts)
        back = swap_factors(*new, row.num_experts)
        assert all(torch.equal(x, y) for x, y in zip(old, back, strict=True)), row
        tensors[row.a_key], tensors[row.b_key] = new
    marks = {"format": "pt", _MARK: str(report.peft_version)}
    save_file(tensors, out / WEIGHTS, metadata=marks)
    config = json.dumps(
        {**folder.config.raw, "peft_version": FIRST_OF_TODAY}, indent=2, sort_keys=True
    )
    (out / CONFIG).write_text(config, encoding="utf-8")
    for file in sorted(folder.path.iterdir()):
        if file.is_file() and not _NOT_COPIED.match(file.name):
            shutil.copy2(file, out / file.name)
