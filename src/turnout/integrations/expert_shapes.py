"""The sizes of a checkpoint's expert layers, read off the model that its config describes.

The model is built on the meta device: nothing but the config is read, and no memory is taken.

Legend: E experts, H hidden, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from turnout.integrations.architectures import Layout, expert_modules, get_path, live, stack_holder
from turnout.integrations.routers import spec_of
from turnout.integrations.versions import check_versions
from turnout.specs import ExpertSpec, Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """The experts of one layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    spec: ExpertSpec
    has_bias: bool


def expert_shapes(folder: Path) -> list[ExpertShape]:
    """The distinct expert layers of a local checkpoint that turnout computes.

    Raises:
        ValueError: no checkpoint there, or a model without such layers.
    """
    check_versions()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--model is {folder}; expected the folder of a Hugging Face checkpoint, with a "
            "config.json"
        )
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: dict[ExpertShape, None] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module, layout in expert_modules(model):
        if isinstance(layout, Layout):
            block = modules[name.rpartition(".")[0]]
            found[_shape(module, layout, _top_k(block, config))] = None
    if not found:
        raise ValueError(
            f"{type(model).__name__} of {folder} has no expert layer that turnout computes; "
            "docs/support.md lists the architectures"
        )
    return list(found)


def _shape(module: Any, layout: Layout, top_k: int) -> ExpertShape:
    holder = stack_holder(module, layout)
    head, _, tail = layout.down.partition(".")
    down = getattr(holder, head)
    down = get_path(live(down), tail) if tail else down
    experts, *sizes = down.shape
    hidden, inner = reversed(sizes) if layout.spec.transposed else sizes
    return ExpertShape(
        hidden=hidden,
        intermediate=inner,
        experts=experts,
        top_k=top_k,
        spec=layout.spec,
        has_bias=layout.gate_up_bias is not None,
    )


def _top_k(block: Any, config: Any) -> int:
    """Of the router's rule; for routers without a rule the config's, which transformers 5 names
    `num_experts_per_tok`."""
    try:
        return spec_of(block)[0].top_k
    except (Unsupported, ValueError):
        text = config.get_text_config()
        top_k = getattr(text, "num_experts_per_tok", None)
        if top_k is None:
            raise
        return int(top_k)
