"""The gate: the truth of a work in float64, the yardstick, and the verdict on a result.

The truth is `turnout.reference.expert_mlp` in float64, one expert at a time, so that no float64
copy of a stack exists. The yardstick is the same definition in bf16, called whole. Of the gradients
of the two weight stacks, four experts are compared, from the least to the most loaded; of
everything else, all.

Two gates. Ours is law 2: every tensor at most twice as wrong as the yardstick, in maximum and in
RMS (`turnout.testing`). A peer rounds where it likes, so its gate asks for finite results with an
RMS error of at most 5e-2 per tensor: enough for merged bf16 weights, not for a missing row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.bench.work import (
    ADAPTERS,
    GRADIENTS,
    SCALING,
    SPEC,
    Leaves,
    Mode,
    Work,
    make_work,
)
from turnout.experts.reference import expert_mlp
from turnout.experts.weights import ExpertWeights, Lora, LoraWeights, halves
from turnout.testing import assert_within, errors

PEER_LIMIT = 5e-2
SAMPLED_EXPERTS = 4
FEW_TOKENS = 256  # below that the maximum error of one batch is luck
MORE_BATCHES = 3

Results = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Judge:
    """Truth and yardstick of one work.

    Attributes:
        truth: output (`out`) and gradients in float64; `gate_up` and `down` of `sample` only.
        allowed: (max, RMS) error of the yardstick, per tensor.
        sample: the experts whose weight gradients are compared.
    """

    truth: Results
    allowed: dict[str, tuple[float, float]]
    sample: tuple[int, ...]

    def verdict(self, results: Results, *, is_ours: bool) -> tuple[float, str | None]:
        """(worst RMS error, None or why the gate is red). `results` as `sampled` gives them."""
        worst, reason = 0.0, None
        for name, value in results.items():
            exact = self.truth[name]
            if value.shape != exact.shape:
                shapes = f"{tuple(value.shape)}; expected {tuple(exact.shape)}"
                return math.nan, f"{name} has shape {shapes}"
            _, rms = errors(value, exact)
            worst = rms if math.isnan(rms) else max(worst, rms)
            reason = reason or self._rejects(name, value, rms, is_ours)
            if math.isnan(worst):
                break
        return worst, reason

    def _rejects(self, name: str, value: Tensor, rms: float, is_ours: bool) -> str | None:
        if is_ours:
            try:
                assert_within(name, value, self.truth[name], self.allowed[name])
            except AssertionError as error:
                return str(error)
            return None
        if rms <= PEER_LIMIT:
            return None
        return f"{name}: RMS error {rms:.3e}; expected at most {PEER_LIMIT:.0e}"


def make_judge(work: Work, *, lora: bool, gradients: bool) -> Judge:
    """Truth and yardstick of `work`, with adapters or without, with gradients or without."""
    mode: Mode = "lora16" if lora else "full"
    sample = _sample(work)
    truth = _truth(work, mode, gradients, sample)
    allowed = _yardstick(work, mode, truth, sample)
    if work.shape.tokens < FEW_TOKENS:
        for seed in range(1, MORE_BATCHES + 1):
            other = make_work(work.shape, work.weights, work.routing, seed)
            more = _yardstick(other, mode, _truth(other, mode, gradients, sample), sample)
            for name, (largest, _) in more.items():
                allowed[name] = (max(largest, allowed[name][0]), allowed[name][1])
    return Judge(truth, allowed, sample)


def sampled(results: Results, sample: tuple[int, ...], *, interleaved: bool = False) -> Results:
    """`results` with the weight gradients of the sampled experts only, gate and up in two halves.

    Args:
        results: output and gradients of one step, by name.
        sample: the experts to keep.
        interleaved: rows of gate_up alternate between gate and up in the provider's layout.
    """
    found = {}
    for name, value in results.items():
        if name in ("gate_up", "down"):
            value = value[list(sample)]
        if interleaved and name in ("gate_up", "b_up"):
            value = halves(value, 1 if name == "gate_up" else 0)
        found[name] = value
    return found


def bundles(leaves: Leaves) -> tuple[ExpertWeights, LoraWeights]:
    """The leaves as turnout's own bundles, nothing copied."""
    lora = LoraWeights()
    if leaves.adapters is not None:
        a_up, b_up, a_down, b_down = leaves.adapters
        lora = LoraWeights(Lora(a_up, b_up, SCALING), Lora(a_down, b_down, SCALING))
    return ExpertWeights(leaves.gate_up, leaves.down), lora


def _sample(work: Work) -> tuple[int, ...]:
    """Experts at even steps of the order by load, the least and the most loaded among them."""
    load = torch.bincount(work.experts_TK.flatten(), minlength=work.shape.experts)
    order = load.argsort(stable=True).tolist()
    count = min(SAMPLED_EXPERTS, len(order))
    last = len(order) - 1
    return tuple(order[step * last // max(1, count - 1)] for step in range(count))


def _truth(work: Work, mode: Mode, gradients: bool, sample: tuple[int, ...]) -> Results:
    """Output and gradients in float64, one expert at a time."""
    top_k = work.shape.top_k
    exact = _zeros(work, mode if gradients else "fwd", sample)
    flat_experts, flat_weights = work.experts_TK.flatten(), work.weights_TK.flatten()
    for expert in range(work.shape.experts):
        slot = torch.where(flat_experts == expert)[0]
        if not slot.numel():
            continue
        token = slot // top_k
        one = _one_expert(work.leaves(mode), expert, token, flat_weights[slot])
        zero = torch.zeros(len(slot), 1, dtype=torch.int64, device=slot.device)
        weights, lora = bundles(one)
        with torch.set_grad_enabled(gradients):
            out = expert_mlp(one.x, zero, one.weights_TK, weights, SPEC, lora=lora)
        exact["out"].index_add_(0, token, out.detach())
        if not gradients:
            continue
        names = [n for n in GRADIENTS[mode] if n not in ("gate_up", "down") or expert in sample]
        wanted = [getattr(one, name) for name in names]
        found = torch.autograd.grad(out, wanted, work.dout_TH[token].double())
        for name, grad in zip(names, found, strict=True):
            if name == "x":
                exact["x"].index_add_(0, token, grad)
            elif name == "weights_TK":
                exact["weights_TK"].view(-1)[slot] = grad[:, 0]
            elif name in ("gate_up", "down"):
                exact[name][sample.index(expert)] = grad[0]
            elif name in ("a_up", "a_down"):
                exact[name][expert] = grad[0]
            else:
                exact[name][:, :, expert] = grad[:, :, 0]
    return exact


def _one_expert(leaves: Leaves, expert: int, token: Tensor, weight: Tensor) -> Leaves:
    """float64 leaves of a layer with one expert, one row per slot."""
    sliced: dict[str, Tensor | None] = {
        "x": leaves.x[token],
        "weights_TK": weight[:, None],
        "gate_up": leaves.gate_up[expert, None],
        "down": leaves.down[expert, None],
    }
    if leaves.adapters is not None:
        for name, tensor in zip(ADAPTERS, leaves.adapters, strict=True):
            is_a = name.startswith("a_")
            sliced[name] = tensor[expert, None] if is_a else tensor[:, :, expert, None]
    double = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in sliced.items()
        if tensor is not None
    }
    return Leaves(**double)


def _zeros(work: Work, mode: Mode, sample: tuple[int, ...]) -> Results:
    leaves = work.leaves(mode)
    exact = {"out": torch.zeros_like(work.x_TH, dtype=torch.float64)}
    for name in GRADIENTS[mode]:
        like = getattr(leaves, name).detach()
        if name in ("gate_up", "down"):
            like = like[: len(sample)]
        exact[name] = torch.zeros_like(like, dtype=torch.float64)
    return exact


def _yardstick(
    work: Work, mode: Mode, truth: Results, sample: tuple[int, ...]
) -> dict[str, tuple[float, float]]:
    """(max, RMS) error of the definition in bf16."""
    leaves = work.leaves(mode)
    weights, lora = bundles(leaves)
    names = [name for name in truth if name != "out"]
    with torch.set_grad_enabled(bool(names)):
        out = expert_mlp(leaves.x, work.experts_TK, leaves.weights_TK, weights, SPEC, lora=lora)
    results = {"out": out.detach()}
    if names:
        grads = torch.autograd.grad(out, [getattr(leaves, n) for n in names], work.dout_TH)
        results.update(zip(names, grads, strict=True))
    found = sampled(results, sample)
    return {name: errors(value, truth[name]) for name, value in found.items()}
