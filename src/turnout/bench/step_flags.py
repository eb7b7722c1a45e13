"""Which flags of `turnout bench` belong to whole steps and which to one layer."""

from __future__ import annotations

from typing import Any

ONE_LAYER = ("mode", "routing", "recompute", "backend", "graph")
WHOLE_STEP = (
    "layers",
    "sequence",
    "vocabulary",
    "checkpointing",
    "attention",
    "rounds",
    "plot",
    "judge",
)
_DEFAULTS = {"recompute": "none", "backend": "auto", "graph": False, "rounds": 1, "judge": False}


def chosen(flags: dict[str, Any], *, step: bool) -> dict[str, Any]:
    """The flags of the one benchmark.

    Raises:
        ValueError: a flag of the other one was given.
    """
    others = ONE_LAYER if step else WHOLE_STEP
    given = [name for name in others if flags[name] not in (_DEFAULTS.get(name), [])]
    if given:
        names = ", ".join(f"--{name}" for name in given)
        if step:
            raise ValueError(
                f"got --step with {names}; expected --step without, as whole steps are LoRA steps "
                "of a model that routes by itself. Leave one out"
            )
        raise ValueError(f"got {names} without --step; expected both or neither. Add --step")
    return {name: value for name, value in flags.items() if name not in others}
