"""The definitions in plain PyTorch, with the signatures of the public functions."""

from turnout.experts.reference import expert_mlp
from turnout.routing.rules import route

__all__ = ["expert_mlp", "route"]
