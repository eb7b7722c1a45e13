"""One MoE block through our kernels, the real SonicMoE and the definition, as routed by each rule.

The block is router, experts and shared expert, with the attributes that transformers' blocks have.
Truth is the definition in float64 on the experts that the bf16 router chose; the yardstick is the
definition in bf16. Ours is held to law 2, twice the yardstick. SonicMoE rounds where it likes (z
and the weighted h to bf16): it may be `PEER` times as wrong, far below what a missing row, a
swapped gate and up, or a dropped bias would be.

All cases share E, H, F: each other size costs SonicMoE about half a minute of compilation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import DEVICE
from torch import Tensor, nn

import turnout
from problems import random_problem, run
from turnout import Activation, ExpertSpec, ExpertWeights, RouteSpec, reference
from turnout.device import Device, device_of
from turnout.experts import sonic
from turnout.experts.weights import alternating
from turnout.testing import assert_within, errors

E, H, INNER, TOKENS = 16, 512, 256, 300
SPEC, ALTERNATING = ExpertSpec(), ExpertSpec(activation=Activation(interleaved=True))
PEER = 4.0
SEEDS = 4
LAYER = sonic.Problem(
    spec=ALTERNATING,
    experts=E,
    hidden=H,
    intermediate=INNER,
    dtype="bfloat16",
    compute="bfloat16",
)
NO_GPU = Device(name="cpu", arch=None, num_sms=0, shared_memory=0, memory_bytes=0, l2_bytes=0)
REASON = sonic.rejects(LAYER, device_of(DEVICE) if torch.cuda.is_available() else NO_GPU)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"SonicMoE does not run: {REASON}"),
    # its kernels allocate with torch.empty and read padding that they never use
    pytest.mark.unpoisoned,
]


@dataclass(frozen=True)
class Case:
    """A rule and where its tensors lie. `shared`: none, plain, or gated."""

    spec: RouteSpec
    bias: str = ""
    shared: str = ""


CASES = {
    "softmax": Case(RouteSpec.softmax(4)),
    "softmax-no-renorm": Case(RouteSpec.softmax(4, norm_topk_prob=False)),
    "softmax-groups": Case(RouteSpec.softmax(4, n_group=4, topk_group=2)),
    "softmax-top1": Case(RouteSpec.softmax(1)),
    "sigmoid": Case(RouteSpec.sigmoid(4)),
    "sigmoid-bias-on-gate": Case(RouteSpec.sigmoid(4), bias="gate"),
    "sigmoid-bias-on-block": Case(RouteSpec.sigmoid(4), bias="block"),
    "sigmoid-groups": Case(RouteSpec.sigmoid(4, n_group=4, topk_group=2), bias="gate"),
    "sigmoid-scaled": Case(RouteSpec.sigmoid(4, routed_scaling_factor=2.5), bias="gate"),
    "sigmoid-no-renorm": Case(RouteSpec.sigmoid(4, norm_topk_prob=False), bias="block"),
    "shared": Case(RouteSpec.softmax(4), shared="plain"),
    "shared-gated": Case(RouteSpec.softmax(4), shared="gated"),
    "everything": Case(
        RouteSpec.sigmoid(4, n_group=4, topk_group=2, routed_scaling_factor=2.5),
        bias="gate",
        shared="gated",
    ),
}


class Block(nn.Module):
    """A block of the given case, in float64, with numbers that bf16 has."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__()
        self.case = case
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def parameter(*size: int, scale: float) -> nn.Parameter:
            values = torch.randn(*size, generator=generator, device=DEVICE) * scale
            return nn.Parameter(values.bfloat16().double())

        self.gate = nn.Linear(H, E, bias=False, device="meta")
        self.gate.weight = parameter(E, H, scale=H**-0.5)
        self.gate_up = parameter(E, 2 * INNER, H, scale=H**-0.5)
        self.down = parameter(E, H, INNER, scale=INNER**-0.5)
        if case.bias:
            owner = self.gate if case.bias == "gate" else self
            bias = torch.randn(E, generator=generator, device=DEVICE)
            owner.e_score_correction_bias = nn.Parameter((bias * 0.1).bfloat16().double())
        if case.shared:
            self.shared_expert = nn.Linear(H, H, bias=False, device="meta")
            self.shared_expert.weight = parameter(H, H, scale=H**-0.5)
        if case.shared == "gated":
            self.shared_expert_gate = nn.Linear(H, 1, bias=False, device="meta")
            self.shared_expert_gate.weight = parameter(1, H, scale=H**-0.5)

    @property
    def bias_E(self) -> Tensor | None:
        owner = {"": None, "gate": self.gate, "block": self}[self.case.bias]
        return None if owner is None else owner.e_score_correction_bias.float()

    def forward(self, x: Tensor, how: str, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block's output, and the experts; `how` names who computes them."""
        spec = self.case.spec
        router = turnout.route if how == "ours" else reference.route
        routing = router(self.gate(x), spec, bias_E=self.bias_E, experts_TK=chosen)
        weights = ExpertWeights(self.gate_up, self.down)
        if how == "sonic":
            weights = replace(weights, gate_up=alternating(self.gate_up, 1))
        call: Any = reference.expert_mlp if how in ("exact", "eager") else turnout.expert_mlp
        out = call(
            x,
            routing.experts_TK,
            routing.weights_TK,
            weights,
            ALTERNATING if how == "sonic" else SPEC,
            backend="sonic" if how == "sonic" else "auto",
        )
        shared = turnout.shared_expert_output(self, x)
        return (out if shared is None else out + shared), routing.experts_TK


def results(
    case: Case, how: str, chosen: Tensor | None, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Output and every gradient, and the experts."""
    block = Block(case, seed)
    generator = torch.Generator(DEVICE).manual_seed(seed + 1000)
    x, dout = (
        torch.randn(TOKENS, H, generator=generator, device=DEVICE).bfloat16() for _ in range(2)
    )
    dtype = torch.float64 if how == "exact" else torch.bfloat16
    block, x = block.to(dtype), x.to(dtype).requires_grad_()
    out, experts = block(x, how, chosen)
    out.backward(dout.to(dtype))
    found = {"out": out.detach(), "x": x.grad}
    found |= {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    return found, experts


@pytest.mark.parametrize("name", CASES)
def test_a_block_differs_between_ours_sonicmoe_and_the_definition(name: str) -> None:
    case = CASES[name]
    allowed: dict[str, tuple[float, float]] = {}
    for seed in reversed(range(SEEDS)):  # the maximum of one small tensor is luck; seed 0 is last
        _, chosen = results(case, "eager", None, seed)
        exact, _ = results(case, "exact", chosen, seed)
        eager, _ = results(case, "eager", chosen, seed)
        for key, value in eager.items():
            worst, rms = errors(value, exact[key])
            allowed[key] = max(worst, allowed.get(key, (0.0, 0.0))[0]), rms
    for how, factor in (("ours", 2.0), ("sonic", PEER)):
        got, experts = results(case, how, chosen)
        assert torch.equal(experts.long(), chosen.long())
        assert got.keys() == exact.keys(), how
        for key, value in got.items():
            assert_within(f"{how} {key}", value, exact[key], allowed[key], factor)
    if case.bias:
        assert not any("correction_bias" in key for key in exact), "it decides, and gets nothing"


def problem(**options: Any) -> Any:
    sizes = {"tokens": TOKENS, "top_k": 4, "num_experts": E, "hidden": H, "intermediate": INNER}
    options = {**sizes, "activation": ALTERNATING.activation, "dtype": torch.bfloat16, **options}
    return random_problem(device=DEVICE, **{"rank_up": 0, "rank_down": 0, **options})


def compare(one: Any, needs: Any, backend: Any) -> None:
    exact = run(one.double(), needs, reference.expert_mlp)
    eager = run(one, needs, reference.expert_mlp)
    got = run(one, needs, backend=backend)
    for name, value in got.items():
        if exact[name] is None:
            assert value is None
        else:
            assert_within(name, value, exact[name], errors(eager[name], exact[name]), PEER)


def test_slots_without_an_expert_are_computed() -> None:
    one = problem()
    experts = one.experts.clone()
    experts[::2, 1] = E
    experts[5] = E
    compare(one.changed(experts=experts), one.leaves.keys(), "sonic")


@pytest.mark.parametrize("tokens", [0, 1, 257, 4096])
def test_odd_numbers_of_tokens_are_wrong(tokens: int) -> None:
    one = problem(tokens=tokens)
    compare(one, one.leaves.keys(), "sonic")


def test_all_tokens_on_one_expert_are_wrong() -> None:
    one = problem(top_k=1)
    compare(one.changed(experts=torch.full_like(one.experts, 3)), one.leaves.keys(), "sonic")


def test_inference_differs_from_training() -> None:
    one = problem()
    with torch.no_grad():
        out = one.call(backend="sonic")
    trained = run(one, one.leaves.keys(), backend="sonic")["out"]
    assert_within("out", out, trained.double(), (0.0, 0.0))


def test_merged_adapters_are_wrong() -> None:
    one = problem(rank_up=16, rank_down=16, lora_dtype=torch.float32)
    compare(one, one.trained_by_lora, "sonic-merged")
    compare(one, one.leaves.keys(), "sonic-merged")


def test_a_gradient_of_strides_zero_is_read_in_place() -> None:
    one = problem()
    x = one["x"].clone().requires_grad_()
    one.changed(x=x).call(backend="sonic").sum().backward()
    other = one["x"].clone().requires_grad_()
    out = one.changed(x=other).call(backend="sonic")
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad, other.grad)


def test_a_model_trains_another_way() -> None:
    """Patched, one step, unpatched: the weights' gradients in the usual order."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=H,
        moe_intermediate_size=INNER,
        intermediate_size=64,
        num_experts=E,
        num_experts_per_tok=4,
        num_hidden_layers=1,  # a second router would choose otherwise after other roundings
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(DEVICE, torch.bfloat16)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    ids = torch.randint(3, 128, (2, 64), device=DEVICE)
    found = []
    for backend in (None, "sonic"):
        model.zero_grad(set_to_none=True)  # first: patch reorders gradients that are there
        if backend is not None:
            turnout.patch(model, backend=backend).require("fused")
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        turnout.unpatch(model)
        found.append(
            (out.logits.detach().float(), {n: p.grad for n, p in model.named_parameters()})
        )
    (logits, grads), (got, got_grads) = found
    assert F.cosine_similarity(got.flatten(), logits.flatten(), dim=0) > 0.999
    for name, grad in grads.items():
        near = F.cosine_similarity(got_grads[name].float().flatten(), grad.float().flatten(), dim=0)
        assert near > 0.99, f"{name}: cosine {near:.4f}"
    usual = {n: torch.equal(t, values[n]) for n, t in model.state_dict().items()}
    assert all(usual.values())
