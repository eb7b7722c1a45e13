"""Read the folder of a PEFT LoRA adapter, and what a base model says of the modules it adapts.

The folder holds `adapter_config.json` and `adapter_model.safetensors`, or shards of it with
`adapter_model.safetensors.index.json`. The JSON is read as it is: PEFT's own reader fills a missing
`peft_version` with the version of the reader. Only headers are read until a tensor is asked for.
No network: a base model is an `nn.Module`, or a local folder with `config.json`, built without
weights on the meta device.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from turnout.integrations.adapter_layout import BaseModule

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = WEIGHTS + ".index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that decide what the tensors mean; `raw` has all."""

    raw: dict[str, Any]
    peft_version: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: tuple[str, ...]
    target_modules: tuple[str, ...] | str

    def rank(self, key: str) -> int:
        """R of the module or parameter with the full name `key`, by PEFT's own matching."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key), self.r)

    def alpha(self, key: str) -> float:
        """Alpha of the module or parameter with the full name `key`."""
        return self.alpha_pattern.get(
            get_pattern_key(list(self.alpha_pattern), key), self.lora_alpha
        )

    def scaling(self, key: str) -> float:
        """alpha / R, or alpha / sqrt(R) with rsLoRA."""
        rank = self.rank(key)
        return self.alpha(key) / (math.sqrt(rank) if self.use_rslora else rank)

    def names_on(self, module: str) -> tuple[str, ...]:
        """The last names of the `target_parameters` that can lie on `module`."""
        names = (target.rpartition(".")[2] for target in self.target_parameters)
        return tuple(sorted({name for name in names if self.is_target(f"{module}.{name}")}))

    def is_module_target(self, module: str) -> bool:
        """Whether PEFT would adapt `module` as a module; it never does both to one."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(module == t or module.endswith(f".{t}") for t in self.target_modules)

    def is_target(self, key: str) -> bool:
        """Whether PEFT would adapt the parameter with the full name `key`."""
        return any(key == t or key.endswith(f".{t}") for t in self.target_parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """One adapter on disk: where each tensor lies, its shape, and safetensors' dtype name."""

    path: Path
    config: AdapterConfig
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def tensor(self, key: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


def read_folder(path: Path) -> AdapterFolder:
    """Read config and headers.

    Raises:
        ValueError: not a folder, no adapter in it, not LoRA, or files that can not be read.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing"
        raise ValueError(f"{path} is {got}; expected the folder of a PEFT adapter, with {CONFIG}.")
    config = _read_config(path / CONFIG)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for file in _weight_files(path):
        for key, shape, dtype in _read_header(file, metadata):
            if key in files:
                raise ValueError(f"{key} is in {files[key]} and in {file}; expected it only once.")
            files[key], shapes[key], dtypes[key] = file, shape, dtype
    _check_index(path, files)
    return AdapterFolder(
        path=path, config=config, files=files, shapes=shapes, dtypes=dtypes, metadata=metadata
    )


def load_base_model(model: str | Path | nn.Module, modules: set[str]) -> nn.Module:
    """The base model without weights, of the auto class that has most of `modules`.

    Raises:
        ValueError: no folder with a readable `config.json`, or a model transformers can not build.
    """
    if isinstance(model, nn.Module):
        return model
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; expected the local folder of the base model "
            "(config.json is enough, no weights needed)."
        )
    _read_json(folder / "config.json")
    built = _build_on_meta(folder)
    return max(built, key=lambda each: len(modules & {name for name, _ in each.named_modules()}))


def base_module(model: nn.Module, module: str, config: AdapterConfig) -> BaseModule | None:
    """The targeted parameters of one module, in order; None where the model has no such module."""
    try:
        found = model.get_submodule(module)
    except AttributeError:
        return None
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in found.named_parameters(recurse=False)
        if config.is_target(f"{module}.{name}")
    }
    # As PEFT asks it; transformers declares the flag since 5.0, and only on decorated experts.
    return BaseModule(shapes=shapes, is_transposed=bool(getattr(found, "is_transposed", False)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}. Expected one JSON object.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected one JSON object.")
    return content


def _read_config(path: Path) -> AdapterConfig:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {CONFIG}; expected the folder of a PEFT adapter.")
    raw = _read_json(path)

    def field(name: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = raw.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {name} is {value!r}; expected {expected}.")
        return value

    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type is {raw.get('peft_type')!r}; expected 'LORA'. "
            "Other kinds of adapters have no expert layout to check."
        )
    if "r" not in raw or "lora_alpha" not in raw:
        raise ValueError(
            f"{path} has no 'r' or no 'lora_alpha'; expected both, as PEFT writes them."
        )
    modules = field("target_modules", (list, str), [])
    config = AdapterConfig(
        raw=raw,
        peft_version=field("peft_version", (str,), None),
        r=field("r", (int,), 0),
        lora_alpha=field("lora_alpha", (int, float), 0),
        use_rslora=field("use_rslora", (bool,), False),
        rank_pattern=field("rank_pattern", (dict,), {}),
        alpha_pattern=field("alpha_pattern", (dict,), {}),
        target_parameters=tuple(field("target_parameters", (list,), [])),
        target_modules=modules if isinstance(modules, str) else tuple(modules),
    )
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: AdapterConfig) -> None:
    ranks = {"r": config.r} | {f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{path}: {name} is {rank!r}; expected an integer of at least 1.")
    for key, alpha in config.alpha_pattern.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"{path}: alpha_pattern[{key!r}] is {alpha!r}; expected a number.")
    for target in (*config.target_parameters, *config.target_modules):
        if not isinstance(target, str):
            raise ValueError(f"{path}: a target is {target!r}; expected a string.")
    if isinstance(config.target_modules, str):
        try:
            re.compile(config.target_modules)
        except re.error as error:
            raise ValueError(
                f"{path}: target_modules is {config.target_modules!r}; expected a list or "
                f"a regular expression ({error})."
            ) from error


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return sorted({path / name for name in _weight_map(path).values()})
    if (path / "adapter_model.bin").is_file():
        raise ValueError(
            f"{path} holds adapter_model.bin, which is a pickle; expected {WEIGHTS}. Load it with "
            "the PEFT that wrote it and save it again with save_pretrained."
        )
    raise ValueError(f"{path} has no {WEIGHTS} and no {INDEX}; expected one of them.")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ValueError(f"{path / INDEX} has no weight_map from tensor names to file names.")
    return weight_map


def _check_index(path: Path, files: dict[str, Path]) -> None:
    if (path / WEIGHTS).is_file():
        return
    weight_map = _weight_map(path)
    for key in sorted(weight_map.keys() ^ files.keys()):
        where = "the index but in no shard" if key in weight_map else "a shard but not in the index"
        raise ValueError(f"{path}: {key} is in {where}; expected the same tensors in both.")


def _read_header(file: Path, metadata: dict[str, str]) -> list[tuple[str, tuple[int, ...], str]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; the index names it. Is the download complete?")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata.update(opened.metadata() or {})
            slices = ((key, opened.get_slice(key)) for key in opened.keys())  # noqa: SIM118
            return [(key, tuple(one.get_shape()), one.get_dtype()) for key, one in slices]
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}). Is the download complete?"
        ) from error


def _build_on_meta(folder: Path) -> list[nn.Module]:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    safe = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **safe)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"transformers can not read {folder / 'config.json'}: {error}") from error
    built, reasons = [], []
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        try:
            with torch.device("meta"):
                built.append(auto.from_config(config, **safe))
        except ValueError as error:  # this auto class does not know this kind of config
            reasons.append(str(error))
    if not built:
        raise ValueError(f"transformers can not build the model of {folder}: {reasons[0]}")
    return built
