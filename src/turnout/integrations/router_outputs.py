"""What each router class returns: the order, the dtypes, and where the rule's tensors are.

A router's forward makes logits, routes them, and packs a tuple that its block takes apart. The
first two are `RouteSpec` and `Rule`; this file is the third. Read in transformers 5.16.1, 5.17 and
5.23, and checked again against the live module when it is swapped (`router_swap.agreed_parts`).

Legend: T tokens, K experts per token, E experts, A always-on experts. The parts of a tuple:

    z  logits (T, E)                 w  weights (T, K)      i  experts (T, K)
    p  softmax(z) in float32         d  dense (T, E): the weights at the chosen experts, else 0
    a  weights of always-on experts (T, A)                  s  state for the next layer (zaya)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from turnout.routing import rules
from turnout.routing.ops import refuse_nan, route
from turnout.routing.rules import Routing
from turnout.specs import RouteSpec

Weights = Literal["float32", "logits", "input", "autocast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a router packs what it decided.

    Attributes:
        parts: the letters of the tuple; several where releases of transformers differ.
        weights: dtype of the weights: float32, that of the logits, that of the router's input, or
            `autocast`: that of the logits, float32 where CUDA's autocast widens softmax, sums and
            exp; and not narrower than a scale that is a tensor (Inkling).
        wide_logits: the logits are cast to float32 before they are scored and returned.
        native: scores in the logits' dtype. Without autocast these logits are float32 anyway.
        on_logits: sigmoid scores, chosen by the logits themselves (no bias).
        exact: autocast is off inside the router.
        tensors: keyword of `route` and attribute path on the router.
        extra: what the block passes beside the tokens: a bias, input ids (hash routing), or state.
        method: what is swapped: the router's `forward`, or `route_tokens_to_experts` of the block
            or of its experts, which is then given the router's logits.
        own: why the module keeps its own forward, or an empty string.
        not_replayed: why recorded experts can not be given back, or an empty string.
    """

    parts: tuple[str, ...] = ("zwi",)
    weights: Weights = "logits"
    wide_logits: bool = False
    native: bool = False
    on_logits: bool = False
    exact: bool = False
    tensors: tuple[tuple[str, str], ...] = ()
    extra: Literal["", "bias", "ids", "state"] = ""
    method: Literal["router", "block", "experts"] = "router"
    own: str = ""
    not_replayed: str = ""


BIAS = (("bias_E", "e_score_correction_bias"),)


def exactly(output: Output, x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, for a router that turns it off."""
    if not output.exact:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def prepared(output: Output, spec: RouteSpec) -> RouteSpec:
    """The rule for logits that `decide` has already cast and capped."""
    return replace(
        spec,
        softcap=0.0 if output.wide_logits else spec.softcap,
        score_dtype="logits" if output.native else spec.score_dtype,
        weights_dtype="logits" if output.weights == "logits" else "float32",
    )


def decide(
    output: Output,
    spec: RouteSpec,
    logits_TE: Tensor,
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    *,
    experts_TK: Tensor | None = None,
    kernel: bool = True,
    ready: RouteSpec | None = None,
) -> Routing:
    """`turnout.route`, with logits and weights in the dtypes that the model's own router returns.

    Args:
        output: the router's; spec: the rule as `spec_of` gives it.
        logits_TE: (T, E + A), as the router's linear gives them.
        dtype: of the router's input.
        tensors: `bias_E`, `expert_scale_E`, `scale` of `turnout.route`.
        experts_TK: (T, K) experts chosen elsewhere.
        kernel: False runs the definition even where the kernel could.
        ready: `prepared(output, spec)`, if it was made before.

    Raises:
        ValueError: as `turnout.route`.
    """
    z = logits_TE
    if output.wide_logits:
        z = z.float()
        if spec.softcap > 0:
            z = torch.tanh(z / spec.softcap) * spec.softcap
    if output.on_logits and spec.score == "sigmoid" and experts_TK is None:
        # torch.topk, as the model: its choice among equal logits is then the same
        experts_TK = z.detach().topk(spec.top_k, dim=-1).indices
    run = route if kernel else _definition
    found = run(z, ready or prepared(output, spec), experts_TK=experts_TK, **tensors)
    to = _dtype(output, z, dtype, tensors.get("scale"))
    always = found.always_TA
    return Routing(
        found.experts_TK,
        found.weights_TK if to is None else found.weights_TK.to(to),
        always if always is None or to is None else always.to(to),
        z,
    )


def _definition(logits_TE: Tensor, spec: RouteSpec, **tensors: Any) -> Routing:
    refuse_nan(logits_TE)
    return rules.route(logits_TE, spec, **tensors)


def _dtype(
    output: Output, z: Tensor, dtype: torch.dtype, scale: Tensor | None
) -> torch.dtype | None:
    if output.weights == "float32":
        return torch.float32
    if output.weights == "input":
        return dtype
    if output.weights == "autocast":
        found = torch.float32 if _is_widened(z) else z.dtype
        return found if scale is None else torch.promote_types(found, scale.dtype)
    return None


def _is_widened(z: Tensor) -> bool:
    """Under CUDA's autocast softmax, sums, exp and softplus return float32; not on the CPU."""
    return z.is_cuda and torch.is_autocast_enabled("cuda")


def pack(parts: str, routing: Routing, state: Tensor | None = None) -> tuple[Tensor, ...]:
    """The parts of a router's tuple, in order."""
    return tuple(_part(letter, routing, state) for letter in parts)


def _part(letter: str, routing: Routing, state: Tensor | None) -> Tensor:
    z = routing.logits_TE
    assert z is not None
    if letter == "w":
        return routing.weights_TK.contiguous()
    if letter == "i":
        return routing.experts_TK
    if letter == "z":
        always = routing.always_TA
        return z if always is None else z[..., : z.shape[-1] - always.shape[-1]]
    if letter == "p":
        return z.softmax(-1, dtype=torch.float32)
    if letter == "d":
        return torch.zeros_like(z).scatter(1, routing.experts_TK, routing.weights_TK)
    found = routing.always_TA if letter == "a" else state
    assert found is not None, letter
    return found.contiguous()
