"""What a patched experts module carries: one plain object in its `__dict__`.

It survives deepcopy and pickle with the module, because it holds nothing but values, the module's
original config and, during a forward, the adapter factors that PEFT's wrapper deposits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from turnout.experts.weights import Lora
from turnout.integrations.architectures import Layout
from turnout.integrations.interleave import Interleaved
from turnout.specs import BackendName, Recompute

ATTRIBUTE = "_turnout"


@dataclass
class LayerState:
    """Options of one layer, and what happens to its adapters.

    Attributes:
        layout: where the tensors are.
        backend, recompute, expert_dropout: as given to `patch`.
        patched: False when the layer was reached by `experts_implementation` alone.
        original_config: the config object the module had, for `unpatch`.
        lora: factors by parameter name, present only while a PEFT wrapper's forward runs.
        lora_read: the experts ran since the factors were deposited.
        interleaved: the rows of gate_up are in SonicMoE's order, and `layout` says so.
    """

    layout: Layout
    backend: BackendName = "auto"
    recompute: Recompute = "none"
    expert_dropout: float = 0.0
    patched: bool = False
    original_config: Any = None
    lora: dict[str, Lora] = field(default_factory=dict)
    lora_read: bool = False
    interleaved: Interleaved | None = None


def state_of(module: nn.Module) -> LayerState | None:
    """The state of a patched module, or None."""
    state = vars(module).get(ATTRIBUTE)
    assert state is None or isinstance(state, LayerState)
    return state
