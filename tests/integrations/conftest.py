"""Fixtures that several files of this folder use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from adapter_cases import golden
from safetensors.torch import load_file, save_file


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
