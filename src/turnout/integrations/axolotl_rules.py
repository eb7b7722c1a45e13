"""What `TurnoutPlugin` decides without axolotl: conflicts, the options of `patch`, the summary.

`cfg` is axolotl's config, or any mapping of its keys; a key that is missing counts as not set.

    refusals(cfg)       sentences: a key gives the routed experts to somebody else
    notes(cfg)          sentences: a key that stays on, and what it still does
    unknown(cfg)        sentences: a key that starts with `turnout_` and is none of ours
    patch_options(cfg)  keyword arguments of `turnout.patch`
    report_path(cfg)    where `TurnoutCallback` writes; None without one
    summary(report)     lines for the log

The names of the keys are those of axolotl 0.19. It drops keys that it does not know without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from turnout.integrations.report import Report

DEFAULTS: dict[str, Any] = {
    "turnout_backend": "auto",
    "turnout_router": "model",
    "turnout_aux_loss": "model",
    "turnout_recompute": "none",
    "turnout_tune": None,
    "turnout_report": False,
}
# transformers' own; they go on running the layers that turnout leaves stock
OWN_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# where the forwards of `lora_mlp_kernel` come from
LORA_KERNELS = "axolotl.kernels."

# model types whose routed experts Liger 0.8 takes with `liger_glu_activation`; not qwen3_5_moe,
# for which axolotl has its own
LIGER_EXPERTS = (
    "glm4v_moe",
    "hunyuan_v1_moe",
    "mixtral",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)

Config = Mapping[str, Any]


def refusals(cfg: Config) -> list[str]:
    """One sentence per key that gives the routed experts to another code than turnout."""
    found = []
    for key in ("use_scattermoe", "use_sonicmoe"):
        if cfg.get(key):
            found.append(_refused(key, cfg[key], "not set", "hands the routed experts to a kernel"))
    backend = cfg.get("expert_backend")
    if backend is not None and str(backend).lower() in ("scattermoe", "sonicmoe"):
        why = "hands the routed experts to a kernel"
        found.append(_refused("expert_backend", backend, "not set, eager or builtin", why))
    implementation = cfg.get("experts_implementation")
    if implementation is not None and implementation not in OWN_IMPLEMENTATIONS:
        wanted = f"not set, {', '.join(OWN_IMPLEMENTATIONS[:-1])} or {OWN_IMPLEMENTATIONS[-1]}"
        why = "names a kernel for the routed experts"
        found.append(_refused("experts_implementation", implementation, wanted, why))
    if (cfg.get("expert_parallel_size") or 1) > 1:
        size, why = cfg["expert_parallel_size"], "spreads the experts of a layer over processes"
        found.append(_refused("expert_parallel_size", size, "1", why))
    if cfg.get("dense_mixer"):
        why = "replaces the forward of the MoE blocks by one that runs every expert"
        found.append(_refused("dense_mixer", cfg["dense_mixer"], "not set", why))
    model_type = cfg.get("model_config_type")  # axolotl sets it before it loads the model
    if cfg.get("liger_glu_activation") and model_type in LIGER_EXPERTS:
        why = f"gives the routed experts of {model_type} to Liger"
        found.append(_refused("liger_glu_activation", True, "false", why))
    return found


def _refused(key: str, got: object, expected: str, why: str) -> str:
    return (
        f"{key} is {got!r}; expected {expected} with TurnoutPlugin: it {why}, and turnout is "
        f"to run them. Remove {key}, or turnout.integrations.axolotl.TurnoutPlugin from plugins"
    )


def notes(cfg: Config) -> list[str]:
    """One sentence per key that stays as it is beside turnout, with what it does and what not."""
    found = []
    implementation = cfg.get("experts_implementation")
    if implementation in OWN_IMPLEMENTATIONS:
        found.append(
            f"experts_implementation={implementation!r} stays for layers that turnout leaves "
            "stock; on fused layers turnout takes its place"
        )
    if cfg.get("lora_mlp_kernel"):
        found.append(
            "lora_mlp_kernel stays on for dense MLPs with LoRA on gate_proj, up_proj and "
            "down_proj; the routed experts and their adapters are turnout's. An MoE block that it "
            "takes over is refused after loading"
        )
    if cfg.get("liger_glu_activation") and cfg.get("model_config_type") not in LIGER_EXPERTS:
        found.append(
            "liger_glu_activation stays on for dense and shared MLPs; the routed experts are "
            "turnout's, see the summary after loading"
        )
    if cfg.get("use_kernels"):
        found.append(
            "use_kernels=True lets transformers replace whole blocks by kernels of the Hub; the "
            "experts of such a block do not run in turnout. Set use_kernels: false to be sure"
        )
    if cfg.get("quantize_moe_experts"):
        found.append(
            "quantize_moe_experts=True stores the experts in 8 or 4 bits, which turnout leaves "
            "stock; see the summary after loading"
        )
    return found


def unknown(cfg: Iterable[str]) -> list[str]:
    """One sentence per key that starts with `turnout_` and is not in `DEFAULTS`."""
    found = []
    for key in cfg:
        if key.startswith("turnout_") and key not in DEFAULTS:
            near = get_close_matches(key, DEFAULTS, n=1)
            do = f"Did you mean {near[0]}?" if near else "Remove it."
            found.append(f"{key} is no option of turnout; expected {', '.join(DEFAULTS)}. {do}")
    return found


def patch_options(cfg: Config) -> dict[str, Any]:
    """The options of `turnout.patch` that the keys stand for; None is the default."""
    options = {}
    for name in ("backend", "router", "aux_loss", "recompute", "tune"):
        got = cfg.get(f"turnout_{name}")
        options[name] = DEFAULTS[f"turnout_{name}"] if got is None else got
    return options


@dataclass(frozen=True)
class ReportPath:
    """`path` of `TurnoutCallback`: None is the usual file in the output folder."""

    path: Path | None


def report_path(cfg: Config) -> ReportPath | None:
    """What `turnout_report` asks for; None if it asks for no callback."""
    got = cfg.get("turnout_report")
    if got is None or got is False:
        return None
    return ReportPath(None if got is True else Path(got))


def taken_blocks(model: nn.Module, report: Report) -> list[str]:
    """Names of modules around fused experts whose forward is one of axolotl's LoRA kernels."""
    modules: dict[str, Any] = dict(model.named_modules())
    names = {""}
    for row in report.layers:
        parts = row.name.split(".")
        if row.status == "fused":
            names.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    found = []
    for name in sorted(names & modules.keys()):
        forward = vars(modules[name]).get("forward")
        # a partial or another callable object has no __module__ of a function
        if str(getattr(forward, "__module__", "")).startswith(LORA_KERNELS):
            found.append(name)
    return found


def summary(report: Report) -> list[str]:
    """Lines: how many layers are fused, each reason for stock, what adapters and routers do."""
    rows = report.layers
    num_fused = sum(row.status == "fused" for row in rows)
    lines = [
        f"turnout: {num_fused} of {len(rows)} MoE layers fused; back end {report.backend}, "
        f"router {report.router}, recompute {report.recompute}"
    ]
    reasons: Counter[str] = Counter()
    for row in rows:
        if row.status != "fused":
            why = f"{row.reason} ({row.detail})" if row.reason else row.detail
            reasons[f"{row.status}: {row.experts_class}: {why}"] += 1
    lines += [f"turnout: {count} x {what}" for what, count in reasons.items()]
    adapters = Counter(report.adapters.values())
    lines += [f"turnout: {count} adapted weights: {path}" for path, count in adapters.items()]
    if report.router != "model":
        routers = Counter(f"{row.status} ({row.detail})" for row in report.routers)
        lines += [f"turnout: {count} routers: {what}" for what, count in routers.items()]
    if report.aux_loss != "model":
        lines += [
            f"turnout: load-balancing loss of {loss.model_class}: {loss.status} ({loss.detail})"
            for loss in report.aux_losses
        ]
    return lines
