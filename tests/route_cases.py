"""Rules of routing, and one way to run and judge the fused router against the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from turnout import RouteSpec
from turnout.routing import fused, rules
from turnout.routing.rules import Routing
from turnout.testing import assert_within, errors

EXPERTS = 12
YARDSTICKS = 16
SMALL = 100  # elements; of fewer the RMS is luck as well
SPECS: dict[str, RouteSpec] = {
    "softmax": RouteSpec(top_k=3),
    "softmax, not normalised": RouteSpec(top_k=3, norm=False),
    "softmax, groups": RouteSpec(top_k=3, n_group=4, topk_group=2, eps=1e-20, group_fill=0.0),
    "softmax, best of a group": RouteSpec(
        top_k=2, n_group=3, topk_group=2, group_score="max", norm=False, scale=16.0
    ),
    "sigmoid": RouteSpec(top_k=4, score="sigmoid"),
    "sigmoid, groups": RouteSpec(
        top_k=4, score="sigmoid", n_group=4, topk_group=2, eps=1e-20, scale=2.5
    ),
    "sigmoid, clamped": RouteSpec(top_k=2, score="sigmoid", eps=1.25, eps_mode="clamp"),
    "sigmoid, not normalised": RouteSpec(top_k=1, score="sigmoid", norm=False),
    "sqrtsoftplus": RouteSpec(top_k=3, score="sqrtsoftplus", scale=1.5),
    "softcap": RouteSpec(top_k=3, softcap=3.0, score="sigmoid", eps=0.25),
    "softcap, softmax": RouteSpec(top_k=3, softcap=3.0, norm=False),
    "sinks": RouteSpec(top_k=3, score="sigmoid", n_always=2),
    "sinks, softmax": RouteSpec(top_k=3, n_always=1, eps=1e-3),
    "sinks, not normalised": RouteSpec(top_k=2, n_always=1, norm=False),
    "all": RouteSpec(top_k=12, score="sigmoid"),
}
# Families that models score in the logits' own dtype.
NATIVE = ("softmax", "softmax, not normalised", "softmax, groups", "sigmoid", "sigmoid, groups")


def native(name: str) -> RouteSpec:
    """A rule in the logits' dtype; 1e-20 is 0 in float16."""
    spec = replace(SPECS[name], score_dtype="logits", weights_dtype="logits")
    return replace(spec, eps=0.0 if spec.eps < 1e-6 else spec.eps)


def randn(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def tensors_of(which: str, logits: Tensor, num_experts: int = EXPERTS) -> dict[str, Tensor]:
    """What `which` names of a correction bias and of scales, in the logits' dtype and place."""
    like = {"dtype": logits.dtype, "device": logits.device}
    found = {}
    if "bias" in which:
        found["bias_E"] = randn(num_experts, seed=1, **like)
    if "scales" in which:
        found["expert_scale_E"] = randn(num_experts, seed=2, **like)
        found["scale"] = randn(1, seed=3, **like)
    return found


def _random_sum(values: Tensor, seed: int) -> Tensor:
    # of bfloat16's numbers, so that the gradient is the same in every dtype
    return (values * randn(*values.shape, seed=seed, dtype=torch.bfloat16).to(values)).sum()


def run(
    function: Callable[..., Routing], logits: Tensor, spec: RouteSpec, **tensors: Tensor
) -> dict[str, Tensor]:
    """Choice, weights, and the gradients of a random sum of the weights."""
    leaves = {"logits": logits.detach().clone().requires_grad_()}
    for name in ("expert_scale_E", "scale"):
        if name in tensors:
            leaves[name] = tensors[name].detach().clone().requires_grad_()
    rest = {n: t for n, t in tensors.items() if n not in leaves}
    options = {n: t for n, t in leaves.items() if n != "logits"}
    out = function(leaves["logits"], spec, **options, **rest)
    found = {"experts": out.experts_TK, "weights": out.weights_TK.detach()}
    loss = _random_sum(out.weights_TK, 7)
    if out.always_TA is not None:
        found["always"] = out.always_TA.detach()
        loss = loss + _random_sum(out.always_TA, 8)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def assert_chosen(got: Tensor, expected: Tensor, differing: float = 0.0) -> None:
    """The same experts in the same order, but for this share of the tokens."""
    assert got.shape == expected.shape
    differ = (got != expected).any(1)
    share = differ.float().mean().item() if differ.numel() else 0.0
    if share > differing:
        row = int(differ.nonzero()[0])
        raise AssertionError(
            f"{int(differ.sum())} of {len(got)} tokens go to other experts; expected at most a "
            f"share of {differing:g}. Token {row} goes to {got[row].tolist()}, by the definition "
            f"to {expected[row].tolist()}"
        )


def check(logits: Tensor, spec: RouteSpec, differing: float = 0.0, **tensors: Tensor) -> None:
    """Equal choice, and values by law 2; the worst maximum of all yardsticks counts.

    The weights and gradients of tokens that may choose otherwise are those of the kernel's choice.
    """
    got = run(fused.route, logits, spec, **tensors)
    assert_chosen(got["experts"], rules.route(logits, spec, **tensors).experts_TK, differing)
    yardsticks = []
    for seed in range(YARDSTICKS):
        other, given = logits, {**tensors, "experts_TK": got["experts"]}
        if seed:
            other = 2 * randn(*logits.shape, seed=100 + seed).to(logits)
            given["experts_TK"] = rules.route(other, spec, **tensors).experts_TK
        exact = run(rules.route, other.double(), spec, **double(given))
        yardsticks.append((run(rules.route, other, spec, **given), exact))
    eager, exact = yardsticks[0]
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        if name == "experts":
            continue
        if value.numel() == 1:  # one number has no typical error
            torch.testing.assert_close(value, exact[name].to(value), rtol=1e-5, atol=1e-6)
            continue
        found = [errors(one[name], true[name]) for one, true in yardsticks]
        rms = max(rms for _, rms in found) if value.numel() < SMALL else found[0][1]
        assert_within(name, value, exact[name], (max(worst for worst, _ in found), rms))
