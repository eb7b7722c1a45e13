"""What `routing.py` times: logits of a model, who routes and sorts them, and the gate before it.

Providers: `hf` has the operations of transformers 5.17 after the logits, in the router module of
the model, and those that `grouped_mm_experts_forward` sorts with; `rules` is turnout's definition;
`turnout` the fused router and the sort by its counts.

Legend: T tokens, K experts per token, S = T*K rows, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
import triton  # noqa: F401 - with it comes whether kernels are interpreted
from torch import Tensor

from turnout.kernel_facts import interpreting
from turnout.ragged import counts_of, sort_by_expert
from turnout.routing import fused, rules
from turnout.specs import RouteSpec
from turnout.testing import assert_matches, errors

Routed = tuple[Tensor, Tensor]  # experts (T, K), weights (T, K)
Results = dict[str, Tensor]
OURS = "turnout"
MODES = ("fwd", "fwd+bwd")
PEER_LIMIT = 5e-2  # RMS error of who rounds where he likes
TIED = 1e-6  # relative; closer scores than this may be ordered either way


def qwen3_moe(logits: Tensor, spec: RouteSpec, bias_E: Tensor | None) -> Routed:
    """`Qwen3MoeTopKRouter.forward` behind its linear layer."""
    router_probs = F.softmax(logits, dtype=torch.float, dim=-1)
    router_top_value, router_indices = torch.topk(router_probs, spec.top_k, dim=-1)
    router_top_value /= router_top_value.sum(dim=-1, keepdim=True)
    router_top_value = router_top_value.to(logits.dtype)
    return router_indices, router_top_value


def deepseek_v3(logits: Tensor, spec: RouteSpec, bias_E: Tensor | None) -> Routed:
    """`DeepseekV3TopkRouter.forward` behind its linear layer, which gives float32."""
    num_group, num_experts = spec.n_group, logits.shape[1]
    scores = logits.sigmoid()
    scores_for_choice = scores + bias_E
    group_scores = (
        scores_for_choice.view(-1, num_group, num_experts // num_group)
        .topk(2, dim=-1)[0]
        .sum(dim=-1)
    )
    group_idx = torch.topk(group_scores, k=spec.topk_group, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    score_mask = (
        group_mask.unsqueeze(-1)
        .expand(-1, num_group, num_experts // num_group)
        .reshape(-1, num_experts)
    )
    scores_for_choice = scores_for_choice.masked_fill(~score_mask.bool(), float("-inf"))
    topk_indices = torch.topk(scores_for_choice, k=spec.top_k, dim=-1, sorted=False)[1]
    topk_weights = scores.gather(1, topk_indices)
    denominator = topk_weights.sum(dim=-1, keepdim=True) + 1e-20
    topk_weights /= denominator
    return topk_indices, topk_weights * spec.scale


def gpt_oss(logits: Tensor, spec: RouteSpec, bias_E: Tensor | None) -> Routed:
    """`GptOssTopKRouter.forward` behind its linear layer."""
    router_top_value, router_indices = torch.topk(logits, spec.top_k, dim=-1)
    return router_indices, F.softmax(router_top_value, dim=1, dtype=router_top_value.dtype)


def stock_sort(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Row to slot and the last row + 1 of each expert, as `grouped_mm_experts_forward` gets them.

    What it does besides is not here, so it costs the stock path nothing: the order back, the mask
    of dropped rows, and the token and weight of each row.
    """
    expert_ids_g, perm = torch.sort(experts_TK.reshape(-1))
    histc_input = expert_ids_g.float() if experts_TK.device.type == "cpu" else expert_ids_g.int()
    tokens_per_expert = torch.histc(histc_input, bins=num_experts, min=0, max=num_experts - 1)
    return perm, torch.cumsum(tokens_per_expert, dim=0, dtype=torch.int32)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A router of a model. `hf_dtype`: what its own linear layer gives, if not `dtype`."""

    name: str
    rule: str
    spec: RouteSpec
    experts: int
    hf: Callable[[Tensor, RouteSpec, Tensor | None], Routed]
    has_bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    hf_dtype: torch.dtype | None = None


_DEEPSEEK = RouteSpec.sigmoid(8, n_group=8, topk_group=4, routed_scaling_factor=2.5)
_SIGMOID = "sigmoid+bias+4 of 8 groups"
SHAPES = (
    Shape(
        name="qwen3-30b",
        rule="softmax",
        spec=RouteSpec(top_k=8, weights_dtype="logits"),
        experts=128,
        hf=qwen3_moe,
    ),
    Shape(
        name="deepseek-v3",
        rule=_SIGMOID,
        spec=_DEEPSEEK,
        experts=256,
        hf=deepseek_v3,
        has_bias=True,
        hf_dtype=torch.float32,
    ),
    Shape(
        name="deepseek-v3-fp32",
        rule=_SIGMOID,
        spec=_DEEPSEEK,
        experts=256,
        hf=deepseek_v3,
        has_bias=True,
        dtype=torch.float32,
    ),
    Shape(
        name="gptoss-20b",
        rule="softmax in the dtype of the logits",
        spec=RouteSpec(top_k=4, score_dtype="logits", weights_dtype="logits"),
        experts=32,
        hf=gpt_oss,
    ),
)


def shape_named(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ValueError: there is none.
    """
    for shape in SHAPES:
        if shape.name == name:
            return shape
    names = ", ".join(shape.name for shape in SHAPES)
    raise ValueError(f"shape is {name!r}; expected one of {names}")


@dataclass(frozen=True)
class Work:
    """Logits of a shape, and the gradient of the weights, which is the same number in any dtype."""

    shape: Shape
    tokens: int
    logits: Tensor
    bias_E: Tensor | None
    g_TK: Tensor

    @cached_property
    def experts_TK(self) -> Tensor:
        """The definition's choice."""
        return rules.route(self.logits, self.shape.spec, bias_E=self.bias_E).experts_TK

    @cached_property
    def tied_T(self) -> Tensor:
        """Tokens whose scores k and k + 1 are as good as equal, or those of two groups are."""
        spec = self.shape.spec
        z = self.logits if spec.score_dtype == "logits" else self.logits.float()
        s = rules.score(z, spec)
        values = rules.choice(z, s, spec, self.bias_E)
        tied = _near(values, spec.top_k)
        if spec.n_group > 1:
            values = s if self.bias_E is None else s + self.bias_E
            best = values.unflatten(-1, (spec.n_group, -1)).topk(2, dim=-1).values
            tied = tied | _near(best.sum(-1), spec.topk_group)
        return tied


def _near(values: Tensor, k: int) -> Tensor:
    """The kth largest of each row is close to the next one."""
    if k == values.shape[1]:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    last, following = values.float().topk(k + 1, dim=-1).values[:, -2:].unbind(-1)
    return last - following <= TIED * last.abs()


def make_work(shape: Shape, tokens: int, device: torch.device, seed: int = 0) -> Work:
    """Normal logits (float32 in Triton's interpreter, which has no bfloat16)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    dtype = torch.float32 if device.type == "cpu" else shape.dtype
    logits = normal(tokens, shape.experts).to(dtype)
    bias = normal(shape.experts) / 10 if shape.has_bias else None
    return Work(shape, tokens, logits, bias, normal(tokens, shape.spec.top_k).bfloat16())


def by_hf(work: Work, logits: Tensor) -> tuple[Tensor, ...]:
    experts, weights = work.shape.hf(logits, work.shape.spec, work.bias_E)
    return experts, weights, *stock_sort(experts, work.shape.experts)


def by_rules(work: Work, logits: Tensor) -> tuple[Tensor, ...]:
    found = rules.route(logits, work.shape.spec, bias_E=work.bias_E)
    ragged = sort_by_expert(found.experts_TK, work.shape.experts)
    return found.experts_TK, found.weights_TK, ragged.slot_S, ragged.offsets


def by_turnout(work: Work, logits: Tensor) -> tuple[Tensor, ...]:
    found = fused.route(logits, work.shape.spec, bias_E=work.bias_E)
    experts, num_experts = found.experts_TK, work.shape.experts
    ragged = sort_by_expert(experts, num_experts, counts_of(experts, num_experts))
    return experts, found.weights_TK, ragged.slot_S, ragged.offsets


PROVIDERS = {"hf": by_hf, "rules": by_rules, OURS: by_turnout}


def missing(provider: str, device: torch.device) -> str | None:
    """Why a provider does not run here, or None."""
    if provider == OURS and device.type != "cuda" and not interpreting():
        return "needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment"
    return None


class Step:
    """A provider's step on its own leaf: experts, weights, the sort, and in `fwd+bwd` dlogits."""

    def __init__(self, work: Work, provider: str, mode: str) -> None:
        self.work, self.provider, self.backward = work, provider, mode == "fwd+bwd"
        logits = work.logits
        if provider == "hf" and work.shape.hf_dtype is not None:
            logits = logits.to(work.shape.hf_dtype)
        self.logits = logits.detach().requires_grad_(self.backward)
        self._g: Tensor | None = None

    def __call__(self) -> Results:
        with torch.set_grad_enabled(self.backward):
            found = PROVIDERS[self.provider](self.work, self.logits)
        experts, weights, order, ends = found
        results = {"experts": experts, "weights": weights, "order": order, "ends": ends}
        if self.backward:
            results["weights"] = weights.detach()
            if self._g is None:
                self._g = self.work.g_TK.to(weights.dtype)
            (results["dlogits"],) = torch.autograd.grad(weights, self.logits, self._g)
        return results


def verdict(work: Work, found: Results, is_ours: bool) -> tuple[float, str | None]:
    """(rel_err, why the gate is red or None).

    The set of experts must be the definition's, the sort one of these experts, and weights and
    gradient right for them: ours by law 2, those of others to a RMS error of `PEER_LIMIT`.
    """
    reason = _wrong_choice(work, found["experts"]) or _wrong_sort(work, found, stable=is_ours)
    if reason is not None:
        return float("nan"), reason
    exact = _by_definition(work, work.logits.double(), found)
    eager = _by_definition(work, work.logits, found) if is_ours else {}
    worst = 0.0
    for name, true in exact.items():
        rms = errors(found[name], true)[1]
        worst = max(worst, rms)
        if is_ours:
            try:
                assert_matches(name, found[name], true, eager[name])
            except AssertionError as error:
                reason = reason or str(error)
        elif not rms <= PEER_LIMIT:
            reason = reason or f"{name}: RMS error {rms:.1e}; expected at most {PEER_LIMIT:g}"
    return worst, reason


def _by_definition(work: Work, logits: Tensor, found: Results) -> Results:
    """Weights of these experts and their gradient, in the dtype of the logits."""
    leaf = logits.detach().requires_grad_()
    out = rules.route(leaf, work.shape.spec, experts_TK=found["experts"])
    results = {"weights": out.weights_TK.detach()}
    if "dlogits" in found:
        g = work.g_TK.to(out.weights_TK.dtype)
        (results["dlogits"],) = torch.autograd.grad(out.weights_TK, leaf, g)
    return results


def _wrong_choice(work: Work, experts_TK: Tensor) -> str | None:
    if experts_TK.shape != work.experts_TK.shape:
        return f"experts have shape {tuple(experts_TK.shape)}"
    differ = (experts_TK.sort(1).values != work.experts_TK.sort(1).values).any(1) & ~work.tied_T
    strays = int(differ.sum())
    return f"{strays} of {work.tokens} tokens go to other experts" if strays else None


def _wrong_sort(work: Work, found: Results, stable: bool) -> str | None:
    flat, order = found["experts"].reshape(-1), found["order"]
    if stable and not torch.equal(order, flat.sort(stable=True).indices):
        return "rows are not in the order of a stable sort"
    if not torch.equal(order.sort().values, torch.arange(len(flat), device=flat.device)):
        return "the order is no permutation of the slots"
    if (flat[order].diff() < 0).any():
        return "rows are not sorted by expert"
    ends = torch.bincount(flat, minlength=work.shape.experts).cumsum(0)
    given = found["ends"][-work.shape.experts :].long()  # offsets begin with a zero
    return None if torch.equal(given, ends) else "an expert has other rows"
