"""A model with turnout against the model's own eager code: forward, gradients, adapters, bfloat16.

Errors are relative: outputs to their largest value, gradients as `gradient_error` says. bfloat16 is
judged layer by layer, on the same routing, against float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from turnout.integrations.architectures import Layout, expert_modules
from turnout.integrations.patching import lora_targets, patch, unpatch
from turnout.integrations.report import Report
from turnout.specs import RouterChoice
from turnout.verify.tiny import out_tensor

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward and backward: output, gradients by parameter name, gradient of the input."""

    out: Tensor
    grads: dict[str, Tensor]


def run(model: Any, inputs: Inputs, nudge: float = 0.0) -> Pass:
    """Forward and backward of a fixed linear loss; every trainable parameter and the input.

    `nudge` changes the embeddings by that relative amount, with alternating sign.
    """
    model.zero_grad(set_to_none=True)
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        if nudge:
            signs = torch.ones_like(out)
            signs.view(-1)[::2] = -1
            out = out * (1 + nudge * signs)
        out = out.clone() if out.requires_grad else out.detach().requires_grad_()
        out.retain_grad()
        found.append(out)
        return out

    if "inputs_embeds" in inputs:
        inputs = {**inputs, "inputs_embeds": inputs["inputs_embeds"].detach().requires_grad_()}
        found.append(inputs["inputs_embeds"])
        handle = None
    else:
        handle = model.get_input_embeddings().register_forward_hook(keep)
    options = {} if "decoder_input_ids" in inputs else {"use_cache": False}
    torch.manual_seed(7)
    try:
        out = out_tensor(model(**inputs, **options)).float()
    finally:
        if handle is not None:
            handle.remove()
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    ((out * cotangent).sum() / out.shape[0]).backward()
    grads = {n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None}
    if found and found[0].grad is not None:
        grads["(input)"] = found[0].grad.detach()
    return Pass(out.detach(), grads)


def output_error(ours: Pass, theirs: Pass) -> float:
    """Largest difference over the largest value."""
    return float((ours.out - theirs.out).abs().max() / theirs.out.abs().max())


def gradient_error(ours: Pass, theirs: Pass, nudged: Pass | None = None) -> float:
    """Worst gradient error; a missing gradient is infinite.

    A gradient's error is relative to the largest of: its norm, a thousandth of the median norm, and
    100 000 times what nudging the input by one rounding does to it in the model itself (`nudged`).
    The last matters only where the model itself defines a gradient to three digits or fewer.
    """
    norms = {name: float(grad.norm()) for name, grad in theirs.grads.items()}
    if set(norms) != set(ours.grads):
        return float("inf")
    ordered = sorted(norms.values())
    floor = 1e-3 * ordered[len(ordered) // 2] + 1e-30
    worst = 0.0
    for name, norm in norms.items():
        noise = 0.0 if nudged is None else float((nudged.grads[name] - theirs.grads[name]).norm())
        error = float((ours.grads[name] - theirs.grads[name]).norm())
        worst = max(worst, error / max(norm, floor, 1e5 * noise))
    return worst


def with_adapters(model: Any, targets: list[str], seed: int = 0) -> Any:
    """A PEFT model around `model` with random rank-4 adapters on `targets`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    return get_peft_model(model, config)


def lora_error(
    model: Any, inputs: Inputs, router: RouterChoice = "model"
) -> tuple[float | None, str]:
    """Adapters on the experts, turnout against stock PEFT; None and a note where PEFT's runs."""
    adapted = with_adapters(copy.deepcopy(model), lora_targets(model))
    theirs = run(adapted, inputs)
    report = patch(adapted, router=router)
    ours = run(adapted, inputs)
    paths = set(report.adapters.values())
    unpatch(adapted)
    error = max(output_error(ours, theirs), gradient_error(ours, theirs))
    if all(path.startswith("fused") for path in paths):
        return error, ""
    assert error == 0.0 or router == "fused", f"PEFT's own path differs by {error}"
    return None, "PEFT path"


class _Holder(nn.Module):
    """A parent for one experts module, so that PEFT can wrap it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Any) -> Any:
        return self.experts(*args)


@dataclass(frozen=True)
class Half:
    """bfloat16 RMS errors against float32, ours and the model's own; with adapters also PEFT's."""

    ours: float
    stock: float
    lora: float | None
    lora_peft: float | None


def record_layers(model: nn.Module, forward: Callable[[], Any]) -> list[tuple[nn.Module, Any]]:
    """(module, positional arguments) of every layer that turnout can run, of one forward."""
    calls: list[tuple[nn.Module, Any]] = []
    handles = []
    for _, module, layout in list(expert_modules(model)):
        if isinstance(layout, Layout):

            def keep(module: nn.Module, args: Any) -> None:
                calls.append((module, tuple(a.detach() for a in args)))

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return calls


def _cast(args: Any, dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if a.is_floating_point() else a for a in args]


def _layer_pass(holder: nn.Module, args: list[Any]) -> tuple[Tensor, Tensor]:
    """(output, input gradient) in float32."""
    x = args[0].detach().clone().requires_grad_()
    out = holder(x, *args[1:])
    out = out[0] if isinstance(out, tuple) else out
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    (grad,) = torch.autograd.grad((out.float() * cotangent).sum(), x)
    return out.detach().float(), grad.float()


def _rms_error(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    pairs = zip(got, exact, strict=True)
    return max(float((g - e).norm() / e.norm().clamp_min(1e-30)) for g, e in pairs)


def half_errors(module: nn.Module, args: Any) -> Half:
    """bfloat16 errors of one experts module on recorded arguments.

    The truth is the model's own code in float32 on the bfloat16 weights and inputs. Adapters are
    float32, rank 4, with an update of about half a percent of the weight's norm.
    """
    low = _Holder(copy.deepcopy(module).to(torch.bfloat16))
    high = copy.deepcopy(low).float()
    inputs = _cast(args, torch.bfloat16)
    wide = _cast(inputs, torch.float32)
    exact = _layer_pass(high, wide)
    stock = _rms_error(_layer_pass(low, inputs), exact)
    patch(low)
    ours = _rms_error(_layer_pass(low, inputs), exact)
    unpatch(low)
    lora = lora_peft = None
    if all(layout.fused_lora for _, _, layout in expert_modules(low) if isinstance(layout, Layout)):
        targets = lora_targets(low)
        low_lora, high_lora = with_adapters(low, targets), with_adapters(high, targets)
        _shrink(low_lora, high_lora)
        exact = _layer_pass(high_lora, wide)
        lora_peft = _rms_error(_layer_pass(low_lora, inputs), exact)
        patch(low_lora)
        lora = _rms_error(_layer_pass(low_lora, inputs), exact)
    return Half(ours, stock, lora, lora_peft)


@torch.no_grad()
def _shrink(low: nn.Module, high: nn.Module) -> None:
    """Small float32 adapters, the same in both models."""
    source = dict(high.named_parameters())
    for name, parameter in low.named_parameters():
        if "lora_" in name:
            if "lora_B" in name:
                source[name].mul_(0.02)
            parameter.data = source[name].detach().clone()


def patched_pass(model: Any, inputs: Inputs, router: RouterChoice = "model") -> tuple[Pass, Report]:
    """One pass with turnout, unpatched afterwards."""
    report = patch(model, router=router)
    try:
        return run(model, inputs), report
    finally:
        unpatch(model)


def own_routers(model: Any) -> str:
    """Why `router="fused"` leaves routers of this model alone, or an empty string."""
    try:
        rows = patch(model, router="fused").routers
    finally:
        unpatch(model)
    return "; ".join(dict.fromkeys(row.detail for row in rows if row.status != "fused"))
