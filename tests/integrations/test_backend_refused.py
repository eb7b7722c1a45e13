"""`patch(backend=...)` refuses what this machine can not run before anything is changed, and
nothing that may become possible once the model has moved. GPUs are played here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FUSED_ARCHS, changes, snapshot, tiny, with_lora

import turnout
from tuning_cases import gpu
from turnout import Unsupported
from turnout.device import Device
from turnout.experts import early, gemm_hopper, gemm_triton
from turnout.integrations import patching


def has_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Device) -> None:
    monkeypatch.setattr(early, "visible_gpus", lambda: gpus)
    for module in (gemm_hopper, gemm_triton):
        monkeypatch.setattr(module, "INSTALLED", True)


@pytest.mark.parametrize(
    ("backend", "gpus", "words"),
    [
        ("hopper", (), r"can not run on this machine: needs sm_90 \(cpu\)\. Use backend='auto'"),
        ("hopper", (gpu(80),), "needs sm_90, this is sm_80"),
        ("triton", (), "needs an NVIDIA GPU"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_no_device_here_runs_is_patched(
    backend: Any, gpus: tuple[Device, ...], words: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpus(monkeypatch, *gpus)
    model = tiny("qwen3_moe").to(device)
    before = snapshot(model)
    with pytest.raises(Unsupported, match=words):
        turnout.patch(model, backend=backend)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_may_still_move_to_a_gpu_is_refused(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpus(monkeypatch, gpu(80), gpu(90))
    model = tiny("qwen3_moe", dtype).to(device)
    for backend in ("hopper", "triton", "torch"):
        assert turnout.patch(model, backend=backend).counts == {"fused": 2}


def test_a_model_on_a_gpu_that_does_not_fit_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the CPU plays the GPU where the weights lie."""
    has_gpus(monkeypatch, gpu(80), gpu(90))
    monkeypatch.setattr(patching, "places_of", lambda device: (gpu(80),))
    model = with_lora(tiny("qwen3_moe"))
    before = snapshot(model)
    words = (
        r"layers\.0\.mlp\.experts.* \(Qwen3MoeExperts\), float32 on cpu: needs sm_90, this is sm_80"
    )
    with pytest.raises(Unsupported, match=words):
        turnout.patch(model, backend="hopper")
    assert changes(before, snapshot(model)) == []
    turnout.patch(model, backend="triton")


@pytest.mark.parametrize("key", FUSED_ARCHS)
def test_the_weights_of_an_architecture_are_not_found(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpus(monkeypatch, gpu(90))
    model = with_lora(tiny(key))
    assert turnout.patch(model, backend="hopper").counts.keys() == {"fused"}


def test_a_model_of_the_interpreter_is_refused() -> None:
    """Triton's interpreter runs the portable kernels on a CPU."""
    code = (
        "import turnout\n"
        "from hf_models import tiny\n"
        "print(turnout.patch(tiny('qwen3_moe'), backend='triton').counts)"
    )
    paths = [str(Path(turnout.__file__).parents[1]), *sys.path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "{'fused': 2}", done.stderr
