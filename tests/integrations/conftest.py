"""Fixtures that several files of this folder use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapter_cases import golden
from safetensors.torch import load_file, save_file

from turnout.train import builtin, corpus


@pytest.fixture
def editable(tmp_path: Path):
    """A function that copies a golden adapter and changes its config and tensors."""

    def edit(version: str, case: str, config: dict | None = None, tensors=None) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(golden(version, case), folder)
        if config is not None:
            path = folder / "adapter_config.json"
            merged = json.loads(path.read_text()) | config
            path.write_text(json.dumps({k: v for k, v in merged.items() if v != "DELETE"}))
        if tensors is not None:
            state = load_file(folder / "adapter_model.safetensors")
            tensors(state)
            save_file(state, folder / "adapter_model.safetensors")
        return folder

    return edit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained built-in model of `turnout train` as a user's checkpoint."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = builtin.make_tokenizer()
    builtin.make_model(tokenizer, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus for it."""
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("\n".join(corpus.backwards(0).train[:60]))
    return path
