"""Tiny random models of the MoE architectures of transformers, for parity checks on any machine.

Hidden 64, 8 experts, top 2, intermediate 48, two layers, about 0.15 M parameters each. 2F is not H
on purpose: with equal sizes a layout mistake passes unnoticed. Routers, experts, selection biases,
per-expert scales and router biases are random, so that dropping one shows.

`TINY` maps the `model_type` of the config that carries the experts to an `Arch`, for those that the
installed transformers has; the facts are in
`tiny.json`, one line an architecture. doge with `is_moe=True` is left out: it fails in transformers
5.17 itself.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

H, VOCAB, E = 64, 128, 8  # as in tiny.json


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        cls: model class name. config: its config's arguments.
        decorated: the experts class carries transformers' decorator, so implementations switch.
        inputs: `ids`, `embeds` or `encdec`.
    """

    cls: str
    config: dict[str, Any]
    decorated: bool = True
    inputs: str = "ids"


def _load() -> dict[str, Arch]:
    data = json.loads(files("turnout.verify").joinpath("tiny.json").read_text())
    archs = {}
    for key, row in data["archs"].items():
        if key not in CONFIG_MAPPING:  # an older transformers
            continue
        config: dict[str, Any] = {}
        for part in row.pop("parts"):
            config.update(data["parts"][part])
        archs[key] = Arch(**{**row, "config": {**config, **row["config"]}})
    return archs


TINY = _load()


def find_class(name: str) -> type[nn.Module]:
    """A model class of transformers by name, exported or not.

    Raises:
        ValueError: the installed transformers has no such class.
    """
    if hasattr(transformers, name):
        found: type[nn.Module] = getattr(transformers, name)
        return found
    for module in pkgutil.iter_modules(transformers.models.__path__):
        folder = Path(transformers.models.__path__[0]) / module.name
        path = folder / f"modeling_{module.name}.py"
        if path.is_file() and f"class {name}(" in path.read_text():
            full = f"transformers.models.{module.name}.modeling_{module.name}"
            found = getattr(importlib.import_module(full), name)
            return found
    raise ValueError(f"transformers {transformers.__version__} has no class {name}")


def build(
    key: str, impl: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """The tiny model of `TINY[key]` in eval mode, attention eager.

    `impl` is the experts implementation, for architectures that have the choice.
    """
    arch = TINY[key]
    config = CONFIG_MAPPING[key](**arch.config)
    config._attn_implementation = "eager"
    config._experts_implementation = impl or "eager"
    torch.manual_seed(seed)
    cls: Any = find_class(arch.cls)
    model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    _randomise(model, torch.Generator().manual_seed(seed + 1))
    return model.to(dtype).eval()


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            if name.endswith("tid2eid"):  # the hash router's table: valid, distinct experts
                rows = [torch.randperm(E, generator=generator) for _ in range(tensor.shape[0])]
                tensor.copy_(torch.stack(rows)[:, : tensor.shape[1]])
            continue
        if not torch.isfinite(tensor).all() or (tensor.abs() > 1e4).any():
            tensor.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1, 1)
        noise = torch.randn(tensor.shape, generator=generator)
        if "correction_bias" in name or "expert_bias" in name:
            tensor.copy_(noise * 0.05)
        elif name.endswith(("per_expert_scale", "global_scale", "router.scale")):
            tensor.add_(noise * 0.2)
        elif name.endswith(("router.bias", "gate.bias")):
            tensor.copy_(noise * 0.1)
        elif name.endswith("balancing_biases"):
            tensor[:-1].copy_(noise[:-1] * 0.02)
        elif any(s in name for s in ("experts", "gate.weight", "router")) and tensor.dim() >= 2:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


def make_inputs(key: str, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Keyword inputs for one forward of `TINY[key]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if TINY[key].inputs == "encdec":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    if TINY[key].inputs == "embeds":
        return {"inputs_embeds": torch.randn(batch, length, H, generator=generator)}
    return {"input_ids": ids}


def out_tensor(out: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    found: Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
    return found
