"""turnout: fast, exact fine-tuning of mixture-of-experts models.

`turnout.patch(model)` is the one line. Everything but the descriptions in `specs.py` is loaded on
first use: torch, and then transformers or PEFT.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turnout._version import __version__
from turnout.specs import Activation, ExpertSpec, RouteSpec, Unsupported

if TYPE_CHECKING:
    from turnout import reference
    from turnout.experts.ops import expert_mlp
    from turnout.experts.weights import ExpertWeights, Lora, LoraWeights
    from turnout.integrations.blocks import block_forward, shared_expert_output
    from turnout.integrations.patching import lora_targets, patch, unpatch
    from turnout.integrations.routers import spec_of
    from turnout.integrations.routing_record import record_routing, replay_routing
    from turnout.routing.ops import Routing, route

_LAZY = {
    "expert_mlp": "turnout.experts.ops",
    "ExpertWeights": "turnout.experts.weights",
    "Lora": "turnout.experts.weights",
    "LoraWeights": "turnout.experts.weights",
    "route": "turnout.routing.ops",
    "Routing": "turnout.routing.ops",
    "patch": "turnout.integrations.patching",
    "unpatch": "turnout.integrations.patching",
    "lora_targets": "turnout.integrations.patching",
    "spec_of": "turnout.integrations.routers",
    "record_routing": "turnout.integrations.routing_record",
    "replay_routing": "turnout.integrations.routing_record",
    "block_forward": "turnout.integrations.blocks",
    "shared_expert_output": "turnout.integrations.blocks",
}

__all__ = [
    "Activation",
    "ExpertSpec",
    "ExpertWeights",
    "Lora",
    "LoraWeights",
    "RouteSpec",
    "Routing",
    "Unsupported",
    "__version__",
    "block_forward",
    "expert_mlp",
    "lora_targets",
    "patch",
    "record_routing",
    "reference",
    "replay_routing",
    "route",
    "shared_expert_output",
    "spec_of",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("turnout.reference")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'turnout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
