"""What the experts do during training: how many tokens each gets, and whether its adapter learns.

Forward pre-hooks on the experts modules read the expert indices and change nothing.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import TrainerCallback

from turnout.train.config import TrainingFailed
from turnout.train.folder import COUNTS, write_json


@dataclass
class Layer:
    """One experts module and its adapters.

    Attributes:
        name: module name without PEFT's wrappers.
        module: the experts module itself.
        wrappers: PEFT's wrapper per adapted parameter.
        num_experts: E.
        total_E: tokens routed to each expert so far.
        step_E: the same in the current step; set, not added to, so that the second forward of
            activation checkpointing counts once.
        scored_E: of those, tokens that the loss depends on: all but the last of each sequence.
        ran: the module ran in the current step; `has_run`: it ever did.
        with_gradient: adapter tensors that had a gradient when they were looked at.
    """

    name: str
    module: nn.Module
    wrappers: dict[str, Any]
    num_experts: int
    total_E: Tensor
    step_E: Tensor | None = None
    scored_E: Tensor | None = None
    ran: bool = False
    has_run: bool = False
    with_gradient: set[str] = field(default_factory=set)


class Watch(TrainerCallback):
    """Counts tokens per expert and layer, and stops a run whose expert adapters do not learn."""

    def __init__(self, model: nn.Module, seq_len: int, adapter: str = "default") -> None:
        self.seq_len = seq_len
        self.adapter = adapter
        self.layers = _layers(model)
        self.steps = 0  # of this process: a resumed run is checked again

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on all experts modules, removed on the way out."""
        handles = [
            layer.module.register_forward_pre_hook(partial(self._count, layer), with_kwargs=True)
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> None:
        layer.ran = layer.has_run = True
        experts_TK = _expert_indices((*args, *kwargs.values()))
        if experts_TK is None:
            return
        layer.step_E = _bincount(experts_TK, layer.num_experts)
        layer.scored_E = None
        # Every sequence has seq_len tokens: the row gives the position.
        if experts_TK.shape[0] % self.seq_len == 0:
            last = torch.arange(experts_TK.shape[0], device=experts_TK.device) % self.seq_len
            scored = experts_TK[last != self.seq_len - 1]
            layer.scored_E = _bincount(scored, layer.num_experts)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in self.layers:
            layer.step_E = layer.scored_E = None
            layer.ran = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        step = state.global_step + 1
        # At step 1 B is zero, so A has no gradient yet. Later looks catch experts that see their
        # first tokens late; powers of two keep their cost away from long runs.
        if step >= 2 and (self.steps <= 2 or step & (step - 1) == 0 or step == state.max_steps):
            self.check(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in self.layers:
            if layer.step_E is not None:
                layer.total_E = layer.total_E.to(layer.step_E.device) + layer.step_E

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        state_of_layers = {
            layer.name: {
                "tokens": layer.total_E.tolist(),
                "with_gradient": sorted(layer.with_gradient),
                "has_run": layer.has_run,
            }
            for layer in self.layers
        }
        write_json(folder / COUNTS, state_of_layers)

    def check(self, step: int) -> None:
        """Raise `TrainingFailed` if an adapter saw tokens in this step and has no gradient."""
        for layer in self.layers:
            if not layer.ran:
                continue
            for parameter, wrapper in layer.wrappers.items():
                for which, missing in self._without_gradient(layer, wrapper).items():
                    tensor = f"{parameter}.lora_{which}"
                    if missing is not None:
                        raise TrainingFailed(
                            f"{layer.name}.{tensor}: {missing} saw tokens but got no gradient at "
                            f"step {step}; expected one from the second step on. Stopped, because "
                            "this adapter would stay as it is. Look at what freezes or detaches it."
                        )
                    gradient = _weight(wrapper, which, self.adapter).grad
                    if gradient is not None and bool(gradient.any()):
                        layer.with_gradient.add(tensor)

    def _without_gradient(self, layer: Layer, wrapper: Any) -> dict[str, str | None]:
        """For A and B: None, or which experts saw tokens and have no gradient."""
        a, b = _weight(wrapper, "A", self.adapter), _weight(wrapper, "B", self.adapter)
        experts = layer.num_experts
        # PEFT's storage: A has the rows of one expert together, B the experts innermost.
        b_moved_E = b.detach().view(b.shape[0], -1, experts).ne(0).any(dim=1).any(dim=0)
        a_grad_E = _any_E(a.grad, lambda g: g.view(experts, -1).ne(0).any(dim=1), b_moved_E)
        b_grad_E = _any_E(
            b.grad, lambda g: g.view(g.shape[0], -1, experts).ne(0).any(dim=1).any(dim=0), b_moved_E
        )
        if layer.scored_E is None:  # indices unknown: the tensor as a whole
            none_A = None if bool(a_grad_E.any()) else "the layer"
            none_B = None if bool(b_grad_E.any()) else "the layer"
            return {"A": none_A, "B": none_B}
        seen_E = layer.scored_E > 0
        # While B is zero A's gradient is zero by right: an expert that sees its first tokens now.
        return {
            "A": _name(seen_E & b_moved_E & ~a_grad_E),
            "B": _name(seen_E & ~b_grad_E),
        }

    def counts(self) -> dict[str, list[int]]:
        """Tokens per expert by layer, of the layers whose indices are known."""
        tokens = {layer.name: layer.total_E.tolist() for layer in self.layers}
        return {name: counts for name, counts in tokens.items() if any(counts)}

    def restore(self, checkpoint: Path) -> None:
        """Go on from the counts of a checkpoint."""
        stored = json.loads((checkpoint / COUNTS).read_text(encoding="utf-8"))
        for layer in self.layers:
            state = stored[layer.name]
            layer.total_E = torch.tensor(state["tokens"], dtype=torch.int64)
            layer.with_gradient = set(state["with_gradient"])
            layer.has_run = state["has_run"]

    def num_tensors(self) -> tuple[int, int, int]:
        """Adapter tensors on experts: all, those of layers that ran, those seen with a gradient."""
        sizes = [2 * len(layer.wrappers) for layer in self.layers]
        ran = sum(size for size, layer in zip(sizes, self.layers, strict=True) if layer.has_run)
        return sum(sizes), ran, sum(len(layer.with_gradient) for layer in self.layers)


def _layers(model: nn.Module) -> list[Layer]:
    found: dict[int, Layer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        base = module.get_base_layer()
        if id(base) not in found:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            experts = module.num_experts
            total_E = torch.zeros(experts, dtype=torch.int64)
            found[id(base)] = Layer(plain, base, {}, experts, total_E)
        found[id(base)].wrappers[module.parameter_name] = module
    return list(found.values())


def _weight(wrapper: Any, which: str, adapter: str) -> Tensor:
    side = wrapper.lora_A if which == "A" else wrapper.lora_B
    weight: Tensor = side[adapter].weight
    return weight


def _expert_indices(values: tuple[Any, ...]) -> Tensor | None:
    """The (T, K) integer tensor among the arguments of an experts module."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value
    return None


def _bincount(experts: Tensor, num_experts: int) -> Tensor:
    """Like torch.bincount, without waiting for the GPU; indices >= E (no expert) are left out."""
    flat = experts.detach().reshape(-1).long().clamp(max=num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def _any_E(gradient: Tensor | None, reduce: Any, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else reduce(gradient.detach())


def _name(missing_E: Tensor) -> str | None:
    experts = missing_E.nonzero().flatten().tolist()
    if not experts:
        return None
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts[:8]))}"
