"""Seeded random problems for the expert MLP, and one way to run and judge an implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import turnout
from turnout import Activation, ExpertSpec, ExpertWeights, Lora, LoraWeights
from turnout.testing import assert_within, errors

LORA_LEAVES = ("a_up", "b_up", "a_down", "b_down")
LEAVES = ("x", "weights_TK", "gate_up", "down", "gate_up_bias", "down_bias", *LORA_LEAVES)

SILU = Activation()
YARDSTICKS = 8
# (T, H, G, E, R, K) of the kernel tests of axolotl's ScatterMoE-LoRA.
SEED_SIZES = [
    (16, 64, 64, 4, 8, 1),
    (32, 64, 128, 4, 8, 2),
    (16, 128, 128, 8, 32, 2),
    (32, 64, 64, 4, 4, 1),
    (64, 64, 64, 16, 8, 2),
    (17, 96, 80, 6, 16, 2),
    (1, 64, 64, 4, 8, 1),
    (64, 128, 96, 16, 8, 4),
]
MASK_SEED = 17
GPT_OSS = Activation(alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True)


@dataclass(frozen=True)
class Problem:
    """Everything one call needs. `leaves` holds the tensors that can have a gradient."""

    leaves: dict[str, Tensor]
    experts: Tensor
    spec: ExpertSpec
    scaling: dict[str, float]

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    @property
    def num_experts(self) -> int:
        return self["gate_up"].shape[0]

    @property
    def trained_by_lora(self) -> tuple[str, ...]:
        """The gradients of LoRA training: everything but the base weights."""
        return tuple(n for n in self.leaves if n in ("x", "weights_TK", *LORA_LEAVES))

    def changed(self, **leaves: Tensor) -> Problem:
        """The same problem with other tensors; `experts` and `spec` by those names."""
        rest: dict[str, Any] = {n: leaves.pop(n) for n in ("experts", "spec") if n in leaves}
        return replace(self, leaves={**self.leaves, **leaves}, **rest)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(self, leaves={n: change(t) for n, t in self.leaves.items()})

    def double(self) -> Problem:
        return self.mapped(Tensor.double)

    @property
    def weights(self) -> ExpertWeights:
        get = self.leaves.get
        return ExpertWeights(self["gate_up"], self["down"], get("gate_up_bias"), get("down_bias"))

    @property
    def lora(self) -> LoraWeights:
        def one(side: str) -> Lora | None:
            if f"a_{side}" not in self.leaves:
                return None
            return Lora(self[f"a_{side}"], self[f"b_{side}"], self.scaling[side])

        return LoraWeights(one("up"), one("down"))

    def call(self, function: Callable[..., Tensor] = turnout.expert_mlp, **options: Any) -> Tensor:
        return function(
            self["x"],
            self.experts,
            self["weights_TK"],
            self.weights,
            self.spec,
            lora=self.lora,
            **options,
        )


def restricted(problem: Problem, chosen: Tensor) -> Problem:
    """The part that the `chosen` experts (1-D indices) compute; slots of others are dropped.

    Gradients of their weights and adapters are those of the whole problem.
    """
    place = torch.full((problem.num_experts + 1,), len(chosen), device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)

    def part(name: str, leaf: Tensor) -> Tensor:
        if name in ("x", "weights_TK"):
            return leaf
        return leaf[..., chosen] if name in ("b_up", "b_down") else leaf[chosen]

    leaves = {name: part(name, leaf) for name, leaf in problem.leaves.items()}
    return replace(problem, leaves=leaves, experts=place[problem.experts])


def random_experts(
    tokens: int, top_k: int, num_experts: int, seed: int = 0, dtype: torch.dtype = torch.int64
) -> Tensor:
    """(T, K) indices, distinct within a token where K <= E."""
    generator = torch.Generator().manual_seed(seed)
    if top_k <= num_experts:
        order = torch.rand(tokens, num_experts, generator=generator).argsort(1)
        return order[:, :top_k].to(dtype).contiguous()
    return torch.randint(num_experts, (tokens, top_k), generator=generator, dtype=dtype)


def random_problem(
    *,
    tokens: int = 33,
    top_k: int = 2,
    num_experts: int = 5,
    hidden: int = 24,
    intermediate: int = 20,
    rank_up: int = 4,
    rank_down: int = 3,
    activation: Activation = SILU,
    transposed: bool = False,
    weight_on_input: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """Unit-scale inputs, weights scaled by 1/sqrt(inputs); a rank of 0 is no adapter.

    Adapters are stored as PEFT stores them: `a` a view of (E*R, I), `b` of (O, R*E). The numbers
    are drawn on `device`, so they differ between a CPU and a GPU; the routing does not.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)
        return drawn.mul_(scale)

    gate_up = intermediate * (2 if activation.gated else 1)
    sides = {"up": (rank_up, hidden, gate_up), "down": (rank_down, intermediate, hidden)}
    leaves = {
        "x": normal(tokens, hidden).to(dtype),
        "weights_TK": normal(tokens, top_k).softmax(1).to(weights_dtype),
        "gate_up": normal(num_experts, gate_up, hidden, scale=hidden**-0.5).to(dtype),
        "down": normal(num_experts, hidden, intermediate, scale=intermediate**-0.5).to(dtype),
    }
    if transposed:
        leaves["gate_up"] = leaves["gate_up"].transpose(1, 2).contiguous()
        leaves["down"] = leaves["down"].transpose(1, 2).contiguous()
    if bias:
        leaves["gate_up_bias"] = normal(num_experts, gate_up, scale=0.5).to(dtype)
        leaves["down_bias"] = normal(num_experts, hidden, scale=0.5).to(dtype)
    for side, (rank, inputs, outputs) in sides.items():
        if rank:
            a = normal(num_experts * rank, inputs, scale=inputs**-0.5)
            b = normal(outputs, rank * num_experts, scale=rank**-0.5)
            leaves[f"a_{side}"] = a.to(lora_dtype or dtype).view(num_experts, rank, inputs)
            leaves[f"b_{side}"] = b.to(lora_dtype or dtype).view(outputs, rank, num_experts)
    spec = ExpertSpec(activation=activation, transposed=transposed, weight_on_input=weight_on_input)
    experts = random_experts(tokens, top_k, num_experts, seed).to(device)
    return Problem(leaves, experts, spec, {"up": 0.75, "down": 1.25})


def output_gradient(problem: Problem, seed: int = 1) -> Tensor:
    """A fixed random gradient of the output, in x's dtype."""
    x = problem["x"]
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64, device=x.device).to(x)


def undefined_where(dropped: Tensor, problem: Problem) -> tuple[Problem, Problem]:
    """(with NaN, without) in routing weights and whole tokens that are dropped: no expert takes
    these slots, and nobody has to define what stands there (expert parallelism does not)."""
    experts = torch.where(dropped, problem.num_experts, problem.experts)
    x = problem["x"].clone()
    x[dropped.all(1)] = float("nan")
    weights = problem["weights_TK"].masked_fill(dropped, float("nan"))
    clean = problem.changed(experts=experts)
    return clean.changed(x=x, weights_TK=weights), clean


def spaced(x: Tensor) -> Tensor:
    """The same rows with a gap, NaN, behind each."""
    wide = x.new_full((x.shape[0], 2 * x.shape[1]), float("nan"))
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def run(
    problem: Problem,
    needs: Iterable[str] | None = None,
    function: Callable[..., Tensor] = turnout.expert_mlp,
    dout: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor | None]:
    """Output (`out`) and the gradient of every leaf; leaves not in `needs` are frozen."""
    needs = set(problem.leaves if needs is None else needs)
    fresh = problem.mapped(Tensor.detach)
    for name in needs:
        fresh[name].requires_grad_()
    out = fresh.call(function, **options)
    found: dict[str, Tensor | None] = {"out": out.detach()}
    if needs:
        out.backward(output_gradient(problem) if dout is None else dout)
    return found | {name: fresh[name].grad for name in fresh.leaves}


def check(
    make: Callable[[int], Problem],
    needs: Iterable[str] | None = None,
    expert_dropout: float = 0.0,
    **options: Any,
) -> None:
    """The op against the definition: output and gradients, float64 truth, eager yardstick.

    `make` builds the problem from a seed; seed 0 is judged. The maximum error of one small tensor
    is luck, in the op and in the yardstick: the worst yardstick of `YARDSTICKS` problems counts.
    With `expert_dropout` every run draws its mask from the same seed.
    """
    problem = make(0)
    needs = set(problem.leaves if needs is None else needs)
    shared = {"expert_dropout": expert_dropout} if expert_dropout else {}
    torch.manual_seed(MASK_SEED)
    got = run(problem, needs, **shared, **options)
    problems = (make(seed) for seed in range(YARDSTICKS))
    judge(got, ((other, output_gradient(other)) for other in problems), needs, **shared)


def judge(
    got: dict[str, Tensor | None],
    cases: Iterable[tuple[Problem, Tensor]],
    needs: Iterable[str],
    eager: Callable[..., Tensor] = turnout.reference.expert_mlp,
    **options: Any,
) -> None:
    """`got` (output and gradients, as `run` returns them) against the definition.

    Args:
        got: what the op gave; without `out`, the output is not judged.
        cases: problems with their output gradients. The first is the one that `got` solves; the
            worst of the yardsticks of all, in maximum, is what is allowed.
        needs: the gradients asked for; those of other leaves must be None.
        eager: the yardstick.
        options: for the definition.
    """
    needs = tuple(needs)
    names = ("out", *needs) if "out" in got else needs
    truth: dict[str, Tensor] = {}
    allowed: dict[str, tuple[float, float]] = {}
    for problem, dout in cases:
        torch.manual_seed(MASK_SEED)
        exact = run(problem.double(), needs, turnout.reference.expert_mlp, dout.double(), **options)
        torch.manual_seed(MASK_SEED)
        yardsticks = run(problem, needs, eager, dout, **options)
        for name in names:
            true, yardstick = exact[name], yardsticks[name]
            assert true is not None, f"the definition gives {name} no gradient"
            assert yardstick is not None
            worst, rms = errors(yardstick, true)
            if name not in truth:
                truth[name], allowed[name] = true, (worst, rms)
                found = got[name]
                assert found is not None, f"{name} has no gradient"
                assert found.dtype == yardstick.dtype, name
            allowed[name] = (max(worst, allowed[name][0]), allowed[name][1])
    for name, value in got.items():
        if name in truth:
            assert value is not None
            assert_within(name, value, truth[name], allowed[name])
        else:
            assert value is None, f"{name} is frozen and has a gradient"


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Equal bits, and the same gradients missing."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        other = expected[name]
        if value is None or other is None:
            assert value is other, f"{name}: {value} against {other}"
        else:
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), f"{name} differs by {(value - other).abs().max()}"


def assert_near(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], limit: float = 1e-12
) -> None:
    """float64 results that differ by summation order only, and the same gradients missing."""
    assert got.keys() == expected.keys()
    for name, value in got.items():
        other = expected[name]
        if value is None or other is None:
            assert value is other, f"{name}: {value} against {other}"
            continue
        assert value.dtype == other.dtype, name
        worst, _ = errors(value, other.double())
        assert worst <= limit, f"{name} differs by {worst:.1e} of its RMS"
