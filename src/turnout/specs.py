"""Frozen facts: what a router computes, what an expert computes, what a grouped GEMM is asked for.

Specs are hashable and hold no tensor; the tensors travel beside them. Nothing here imports anything
of the package.

Legend: T tokens, K experts per token, S = T*K routed rows, E experts, H hidden, F intermediate,
G = 2F gate and up (F when there is no gate), R LoRA rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["top2sum", "max"]
Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"]
Recompute = Literal["none", "gate_up"]
RouterChoice = Literal["model", "fused"]
AuxLossChoice = Literal["model", "fused"]
BackendName = Literal["auto", "torch", "triton", "hopper", "sonic", "sonic-merged"]


class Unsupported(NotImplementedError):
    """turnout can not do this. The message gives the reason and the remedy."""


def check_choice(what: str, got: object, choices: object) -> None:
    """Raise `ValueError` unless `got` is one of the values of the `Literal` type `choices`."""
    allowed = get_args(choices)
    if got not in allowed:
        raise ValueError(f"{what} is {got!r}; expected one of {', '.join(map(repr, allowed))}")


def _check_positive(what: str, got: int) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise ValueError(f"{what} is {got!r}; expected an integer of at least 1")


def _check_bool(what: str, got: bool) -> None:
    if not isinstance(got, bool):
        raise ValueError(f"{what} is {got!r}; expected True or False")


def _check_finite(what: str, got: float, low: float = -math.inf) -> None:
    if isinstance(got, bool) or not isinstance(got, (int, float)) or not math.isfinite(got):
        raise ValueError(f"{what} is {got!r}; expected a finite number")
    if got < low:
        raise ValueError(f"{what} is {got!r}; expected at least {low:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSpec:
    """One router rule: logits (T, E) to `top_k` experts and their weights per token.

    With z the logits and s = score(softcap * tanh(z / softcap)):

        chosen  = the top_k largest of mask(s + bias), lowest index first on a tie
        weights = scale * expert_scale[chosen] * s[chosen] / den
        den     = sum of s over chosen and always-on experts, + eps or clamped to eps; 1 without
        norm

    The bias and the group mask decide who is chosen and never reach the weights or a gradient.
    Softmax over the chosen logits only (topk, then softmax) is the same rule as softmax with
    `norm=True`, so there is no second name for it.

    Attributes:
        top_k: experts per token (K).
        score: what turns a logit into a score.
        score_dtype: `float32`, or `logits` for models that score in the logits' own dtype.
        softcap: tanh cap on the logits before scoring; 0 is none.
        n_group: expert groups of equal size; 1 is none.
        topk_group: groups that may be chosen from.
        group_score: a group's score: sum of its two best, or its best.
        group_fill: what a masked expert's score becomes: -inf, or 0.0 (which admits a masked
            expert when biased scores are negative; mistral4, axk2 and deepseek_v2 do that).
        norm: divide by the sum of the chosen scores.
        eps, eps_mode: added to that sum, or its lower bound (`clamp`).
        scale: factor on the weights.
        n_always: trailing logits that belong to always-on experts; they are not selectable but
            share the normalisation (Inkling's sinks).
        weights_dtype: dtype of the weights: `float32`, or `logits`.
        output_scale: factor that the *block* applies to the sum of its experts (minimax_m3,
            step3p7, laguna). `route` ignores it.
    """

    top_k: int
    score: Score = "softmax"
    score_dtype: Literal["float32", "logits"] = "float32"
    softcap: float = 0.0
    n_group: int = 1
    topk_group: int = 1
    group_score: GroupScore = "top2sum"
    group_fill: float = -math.inf
    norm: bool = True
    eps: float = 0.0
    eps_mode: Literal["add", "clamp"] = "add"
    scale: float = 1.0
    n_always: int = 0
    weights_dtype: Literal["float32", "logits"] = "float32"
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top_k", "n_group", "topk_group"):
            _check_positive(f"RouteSpec.{name}", getattr(self, name))
        check_choice("RouteSpec.score", self.score, Score)
        check_choice("RouteSpec.group_score", self.group_score, GroupScore)
        check_choice("RouteSpec.eps_mode", self.eps_mode, Literal["add", "clamp"])
        for name in ("score_dtype", "weights_dtype"):
            dtypes = Literal["float32", "logits"]
            check_choice(f"RouteSpec.{name}", getattr(self, name), dtypes)
        if self.topk_group > self.n_group:
            raise ValueError(
                f"RouteSpec.topk_group is {self.topk_group}; expected at most n_group, which is "
                f"{self.n_group}"
            )
        if self.group_fill not in (-math.inf, 0.0):
            raise ValueError(f"RouteSpec.group_fill is {self.group_fill!r}; expected -inf or 0.0")
        for name in ("softcap", "eps"):
            _check_finite(f"RouteSpec.{name}", getattr(self, name), low=0.0)
        for name in ("scale", "output_scale"):
            _check_finite(f"RouteSpec.{name}", getattr(self, name))
        _check_bool("RouteSpec.norm", self.norm)
        always = self.n_always
        if isinstance(always, bool) or not isinstance(always, int) or always < 0:
            raise ValueError(f"RouteSpec.n_always is {always!r}; expected an integer, 0 or more")

    @classmethod
    def softmax(
        cls,
        top_k: int,
        *,
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int | None = None,
        routed_scaling_factor: float = 1.0,
        group_fill: float = 0.0,
    ) -> RouteSpec:
        """softmax(z), top-k, optional renormalisation: Mixtral, Qwen-MoE, OLMoE; grouped: Mistral4.

        The keywords have the names that blocks carry themselves. A missing `topk_group` means all
        groups. With groups the sum is renormalised with eps 1e-20 and masked scores become
        `group_fill`, as in transformers' `mistral4`. Scores and weights are float32.

        Raises:
            ValueError: a field is out of range.
        """
        return cls(
            top_k=top_k,
            score="softmax",
            n_group=n_group,
            topk_group=n_group if topk_group is None else topk_group,
            group_fill=group_fill,
            norm=norm_topk_prob,
            eps=1e-20 if n_group > 1 else 0.0,
            scale=routed_scaling_factor,
        )

    @classmethod
    def sigmoid(
        cls,
        top_k: int,
        *,
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int | None = None,
        routed_scaling_factor: float = 1.0,
        group_fill: float = -math.inf,
    ) -> RouteSpec:
        """sigmoid(z), top-k of s + bias in the best groups, renormalised with eps 1e-20, scaled.

        The rule of DeepSeek-V3, GLM-4.5, dots1 and MiniMax-M2 (`transformers.models.deepseek_v3`).
        The keywords have the names that blocks carry themselves. A missing `topk_group` means all
        groups. The correction bias is a tensor, so it is given to `route` as `bias_E`; a missing
        bias is zero. Scores and weights are float32.

        Raises:
            ValueError: a field is out of range.
        """
        return cls(
            top_k=top_k,
            score="sigmoid",
            n_group=n_group,
            topk_group=n_group if topk_group is None else topk_group,
            group_fill=group_fill,
            norm=norm_topk_prob,
            eps=1e-20,
            scale=routed_scaling_factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """What happens between an expert's two GEMMs: z (S, G) to h (S, F).

    Gated, with z = [g, u] (`interleaved`: g in the even columns, u in the odd ones):

        h = min(a(min(g, limit)), limit if limit_after) * (clip(u, -limit, limit) + up_offset)

    where the inner minimum is dropped when `limit_after` is set, and all of them when `limit` is
    None. Not gated: h = a(z). `a` is `act`; for silu, a(x) = x * sigmoid(alpha * x).

    Covers silu/gelu GLUs, gpt-oss (alpha 1.702, limit 7, up_offset 1, interleaved), DeepSeek-V4's
    clamped silu, Step-3.7 (limit after the activation) and Nemotron's relu squared.
    """

    act: Act = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        check_choice("Activation.act", self.act, Act)
        for name in ("gated", "interleaved", "limit_after"):
            _check_bool(f"Activation.{name}", getattr(self, name))
        for name in ("alpha", "up_offset"):
            _check_finite(f"Activation.{name}", getattr(self, name))
        if self.limit is not None:
            _check_finite("Activation.limit", self.limit, low=0.0)
        if not self.gated and (self.interleaved or self.limit is not None or self.up_offset):
            raise ValueError(
                "Activation(gated=False) has no up half, so interleaved, limit and up_offset do "
                f"not apply; got {self}"
            )
        if self.alpha != 1.0 and self.act != "silu":
            raise ValueError(f"Activation.alpha is for silu only; got act={self.act!r}")
        if self.limit_after and self.limit is None:
            raise ValueError("Activation.limit_after is set but limit is None; give the limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """How a stack of experts is stored and what one expert computes.

        y = act(x @ gate_up[e]^T + gate_up_bias[e]) @ down[e]^T + down_bias[e]

    Attributes:
        activation: the function between the two GEMMs.
        transposed: False: `gate_up` is (E, G, H) and `down` (E, H, F), used as x @ W^T.
            True: `gate_up` is (E, H, G) and `down` (E, F, H), used as x @ W (gpt-oss).
        weight_on_input: the routing weight multiplies the expert's input instead of its output
            (Llama 4).
    """

    activation: Activation = Activation()
    transposed: bool = False
    weight_on_input: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.activation, Activation):
            raise ValueError(
                f"ExpertSpec.activation is {self.activation!r}; expected a turnout.Activation"
            )
        for name in ("transposed", "weight_on_input"):
            _check_bool(f"ExpertSpec.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmProblem:
    """One grouped GEMM as a back end sees it: the key of its choice and of its configuration.

    Attributes:
        ragged: `m`: rows of one expert times that expert's weight (forward, dX).
            `k`: sum over the rows of one expert of outer products (dW, dA, dB).
        rows: S, experts: E.
        n, k: for `m`: out[S, n] = a[S, k] @ w[e, n, k]^T. For `k`: out[e, n, k] = a[S, n]^T b[S,
            k].
        rank: LoRA tail width, 0 without one.
        dtype: torch dtype name of the activations, and `weight_dtype` of w (or b).
        epilogue: what follows the product, if anything.
        activation: the epilogue's function.
        gathered: the rows of `a` (for ragged `m`) are read through a row map.
        weight_k_major: the contracted dim of w is the contiguous one.
        dropout: the LoRA input is masked.
        narrow: the product is an adapter's intermediate, x A^T or its mirror.
    """

    ragged: Literal["m", "k"]
    rows: int
    experts: int
    n: int
    k: int
    rank: int = 0
    dtype: str
    weight_dtype: str
    epilogue: Literal["activate", "activate_backward"] | None = None
    activation: Activation | None = None
    gathered: bool = False
    weight_k_major: bool = True
    bias: bool = False
    dropout: bool = False
    narrow: bool = False
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        values = [getattr(self, f.name) for f in fields(self) if f.compare]
        object.__setattr__(self, "_hash", hash(tuple(values)))

    def __hash__(self) -> int:
        """Computed once: a problem is looked up at every launch."""
        return self._hash
