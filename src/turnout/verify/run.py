"""`verify`: one row per architecture or checkpoint, a table, JSON, and docs/support.md."""

from __future__ import annotations

import copy
import platform
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from turnout._version import __version__
from turnout.integrations.architectures import Stock, expert_modules
from turnout.integrations.routers import own_router
from turnout.integrations.versions import check_versions
from turnout.specs import RouterChoice, check_choice
from turnout.verify import checks, routing, tiny

# Largest relative errors in float32 that are rounding. bfloat16 is judged against the model's own.
FORWARD, GRADIENT, ROUTING, ROUTING_HALF = 1e-5, 1e-4, 1e-5, 2.0**-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result for one architecture. Errors are relative; None where there is nothing to compare.

    `status`: ok | stock | fail; `reason` says why it is not ok, from `StockReason` when stock.
    `own_router`: why `router="fused"` leaves the router alone; empty if it is swapped.
    """

    model_type: str
    router: str
    experts: str
    routing_err: float | None
    forward_err: float | None
    grad_err: float | None
    lora_err: float | None
    status: Literal["ok", "stock", "fail"]
    own_router: str = ""
    reason: str = ""
    note: str = ""
    routing_bf16_err: float | None = None
    bf16_err: float | None = None
    bf16_stock_err: float | None = None
    lora_bf16_err: float | None = None
    lora_bf16_peft_err: float | None = None


def check_model(model: Any, inputs: checks.Inputs, key: str, router: RouterChoice = "model") -> Row:
    """Every check on one model in float32 eager; the model comes back as it was."""
    layers = list(expert_modules(model))
    stock = [layout for _, _, layout in layers if isinstance(layout, Stock)]
    theirs = checks.run(model, inputs)
    nudged = None
    if "inputs_embeds" not in inputs and "decoder_input_ids" not in inputs:
        nudged = checks.run(model, inputs, nudge=2.0**-23)
    ours, report = checks.patched_pass(model, inputs, router)
    parity, half_parity, rule = _routing(model, inputs)
    lora, note, half = None, "", None
    if not stock:
        lora, note = checks.lora_error(model, inputs, router)
        half = _half(model, inputs)
    values: dict[str, Any] = {
        "forward_err": checks.output_error(ours, theirs),
        "grad_err": checks.gradient_error(ours, theirs, nudged),
        "lora_err": lora,
        "routing_err": None if parity is None else max(parity.value, parity.grad),
        "routing_bf16_err": None if half_parity is None else half_parity.value,
    }
    if half is not None:
        values |= {"bf16_err": half.ours, "bf16_stock_err": half.stock}
        values |= {"lora_bf16_err": half.lora, "lora_bf16_peft_err": half.lora_peft}
    problems = _problems(values)
    status = "fail" if problems else "stock" if stock else "ok"
    return Row(
        model_type=key,
        router=rule,
        experts=stock[0].detail if stock else report.layers[0].activation or "",
        status=status,  # type: ignore[arg-type]
        own_router=checks.own_routers(model),
        reason="; ".join(problems) or (stock[0].reason if stock else ""),
        note=note,
        **values,
    )


def _problems(values: dict[str, Any]) -> list[str]:
    limits = {"forward_err": FORWARD, "grad_err": GRADIENT, "lora_err": GRADIENT}
    limits |= {"routing_err": ROUTING, "routing_bf16_err": ROUTING_HALF}
    if values.get("bf16_stock_err") is not None:
        limits["bf16_err"] = 2 * values["bf16_stock_err"] + 2.0**-8
    if values.get("lora_bf16_peft_err") is not None:
        limits["lora_bf16_err"] = 2 * values["lora_bf16_peft_err"] + 2.0**-8
    return [
        f"{name} {values[name]:.1e} > {limit:.1e}"
        for name, limit in limits.items()
        if values.get(name) is not None and not values[name] <= limit
    ]


def _forward(model: Any, inputs: checks.Inputs) -> Any:
    options = {} if "decoder_input_ids" in inputs else {"use_cache": False}
    return model(**inputs, **options)


def _worst(parities: Iterable[routing.Parity]) -> routing.Parity | None:
    found = list(parities)
    if not found:
        return None
    value, grad = max(p.value for p in found), max(p.grad for p in found)
    return routing.Parity(value, grad, found[-1].rule)


def _routing(
    model: Any, inputs: checks.Inputs
) -> tuple[routing.Parity | None, routing.Parity | None, str]:
    """Parity in float32 and in bfloat16, and the rule in words."""
    calls = routing.record(model, lambda: _forward(model, inputs))
    parity = _worst(routing.check(call) for call in calls)
    if parity is None:
        return None, None, own_router(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half_inputs = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()
    }
    half_calls = routing.record(half, lambda: _forward(half, half_inputs))
    return parity, _worst(routing.check(call) for call in half_calls), parity.rule


def _half(model: Any, inputs: checks.Inputs) -> checks.Half | None:
    """The layer where ours is worst compared with the model's own bfloat16."""
    calls = checks.record_layers(model, lambda: _forward(model, inputs))
    found = [checks.half_errors(module, args) for module, args in calls]
    return max(found, key=lambda half: half.ours / max(half.stock, 1e-30)) if found else None


def verify_types(
    keys: Iterable[str],
    device: str = "cpu",
    console: Console | None = None,
    router: RouterChoice = "model",
) -> list[Row]:
    """Rows for tiny random models of these architectures, patched with that `router`.

    Raises:
        ValueError: an architecture that is not in `TINY`, or a too old transformers or PEFT.
    """
    check_versions()
    keys = list(keys)
    unknown = [key for key in keys if key not in tiny.TINY]
    if unknown:
        raise ValueError(f"unknown architectures {unknown}; expected some of {sorted(tiny.TINY)}")
    rows = []
    shown = track(keys, "verify", console=console, transient=True) if console else keys
    for key in shown:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = tiny.build(key).to(device)
            inputs = {k: v.to(device) for k, v in tiny.make_inputs(key).items()}
            rows.append(check_model(model, inputs, key, router))
    return rows


def verify_checkpoint(
    path: str, device: str = "cpu", tokens: int = 32, router: RouterChoice = "model"
) -> Row:
    """The row of a local checkpoint, on random token ids, in float32.

    Raises:
        ValueError: the path is not a checkpoint, or the model has no MoE layer.
    """
    from transformers import AutoModelForCausalLM

    check_versions()
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--model is {path!r}, which has no config.json; expected the folder of a local "
            "Hugging Face checkpoint"
        )
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    options["local_files_only"] = True
    model = AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
    layers = list(expert_modules(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} in {path!r} has no MoE layer that turnout knows")
    if all(hasattr(module, "is_concatenated") for _, module, _ in layers):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (2, tokens // 2), generator=generator).to(device)
    return check_model(model, {"input_ids": ids}, model.config.model_type, router)


def versions() -> dict[str, str]:
    """What the rows were made with."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"turnout": __version__, "python": platform.python_version(), **found}


def to_dict(rows: list[Row]) -> dict[str, Any]:
    """Versions and rows as plain values."""
    return {"versions": versions(), "rows": [asdict(row) for row in rows]}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _ratio(ours: float | None, other: float | None) -> str:
    return "-" if ours is None or not other else f"{ours / other:.2f}"


def table(rows: list[Row]) -> Table:
    """The rows for a terminal: relative errors, and our bfloat16 error as a share of the other's.

    The rules are in JSON and in docs/support.md.
    """
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    heads = ("architecture", "rout-\ning", "for-\nward", "grad", "LoRA")
    for head in (*heads, "bf16\n/own", "LoRA\n/PEFT"):
        out.add_column(head, no_wrap=True)
    out.add_column("status")
    for row in rows:
        numbers = (row.routing_err, row.forward_err, row.grad_err, row.lora_err)
        style = {"ok": "green", "stock": "yellow", "fail": "red"}[row.status]
        half = _ratio(row.bf16_err, row.bf16_stock_err)
        lora = _ratio(row.lora_bf16_err, row.lora_bf16_peft_err)
        status = " ".join(word for word in (row.status, row.reason, row.note) if word)
        cells = [_number(value) for value in numbers]
        out.add_row(row.model_type, *cells, half, lora, status, style=style)
    return out


def support_page(rows: list[Row]) -> str:
    """docs/support.md: what runs fused and what stays stock. No number that differs by machine."""
    found = versions()
    lines = [
        "# Supported architectures",
        "",
        "Generated by `turnout verify --all --support docs/support.md`; do not edit. Made with "
        f"transformers {found['transformers']} and PEFT {found['peft']}.",
        "",
        "`ok`: with turnout the tiny model of the architecture gives the model's own outputs and "
        "gradients. `stock`: the layer keeps the model's own code, and why. Adapters: `fused`, or "
        "`PEFT path` where PEFT's own fold runs. Router: the rule that `turnout.route` reproduces. "
        '`router="fused"`: whether `patch` swaps the forward for one on `turnout.route`; '
        "where it does not, the model's own runs.",
        "",
        '| architecture | router | `router="fused"` | experts | adapters | status |',
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        adapters = "" if row.status != "ok" else row.note or "fused"
        status = row.status if row.status == "ok" else f"{row.status}: {row.reason}"
        swapped = f"no: {row.own_router}" if row.own_router else "yes"
        cells = (f"`{row.model_type}`", row.router, swapped, row.experts, adapters, status)
        lines.append("| " + " | ".join(cells) + " |")
    counts = {
        status: sum(row.status == status for row in rows) for status in ("ok", "stock", "fail")
    }
    lines += ["", ", ".join(f"{count} {status}" for status, count in counts.items()) + ".", ""]
    return "\n".join(lines)


SHORT = ("qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "nemotron_h", "llama4_text")


def main(
    types: list[str] | None = None,
    *,
    everything: bool = False,
    model: Path | None = None,
    support: Path | None = None,
    device: str = "cpu",
    router: str = "model",
) -> dict[str, Any]:
    """The `verify` command: check, print the table, write the support page, return `to_dict`.

    Raises:
        ValueError: contradicting or bad arguments.
    """
    if model is not None and (types or everything):
        raise ValueError("--model checks one checkpoint; give it without --all and architectures")
    if support is not None and not everything:
        raise ValueError("--support writes the page of all architectures; give it with --all")
    check_choice("--router", router, RouterChoice)
    choice: RouterChoice = "fused" if router == "fused" else "model"
    console = Console()
    if model is not None:
        rows = [verify_checkpoint(str(model), device, router=choice)]
    else:
        keys = list(tiny.TINY) if everything else types or list(SHORT)
        rows = verify_types(keys, device, Console(stderr=True), choice)
    console.print(table(rows))
    counts = Counter(row.status for row in rows)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
    closer = [r for r in rows if r.lora_bf16_err is not None and r.lora_bf16_peft_err is not None]
    if closer:
        ratios = [(r.lora_bf16_err or 0.0) / (r.lora_bf16_peft_err or 1.0) for r in closer]
        ratio = sum(ratios) / len(ratios)
        console.print(
            f"bfloat16 with adapters, RMS error against float32: {ratio:.2f} times that of PEFT's "
            f"fold (mean of {len(closer)})"
        )
    if support is not None:
        write_text(support, support_page(rows))
    return to_dict(rows)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
