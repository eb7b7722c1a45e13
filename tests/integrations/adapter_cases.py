"""The golden adapters: written by five versions of PEFT, each with the logits it computed."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from turnout.integrations.adapters import (
    AdapterReport,
)

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from tiny_model import HF_SIZES, hf_model, tiny  # noqa: E402

OLD = ("0.18.0", "0.18.1", "0.19.0")
TODAY = ("0.19.1", "0.21.2")
CASES = (
    "out_in-narrow",
    "out_in-square",
    "out_in-patterns",
    "in_out_declared-narrow",
    "in_out_declared-square",
    "in_out_declared-down",
    "in_out-narrow",
    "qwen3_moe",
    "gpt_oss",
)
UNTOLD = ("0.19.0", "in_out_declared-down")  # one square weight, flag read the wrong way round
CONVERTED = [(v, c) for v in OLD for c in CASES if (v, c) != UNTOLD]
TODAYS = [(v, c) for v in TODAY for c in CASES]
INNER = "base_model.model.mlp.experts.base_layer.lora_{}.weight"
OUTER = "base_model.model.mlp.experts.lora_{}.weight"


def golden(version: str, case: str) -> Path:
    return GOLDEN / version / case


def expected(version: str, case: str, what: str) -> Tensor:
    return load_file(GOLDEN / version / "expected.safetensors")[f"{case}/{what}"]


def make_model(case: str) -> nn.Module:
    return hf_model(case) if case in HF_SIZES else tiny(case)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def assert_same_adapter(one: Path, two: Path) -> None:
    """The same config, tensors and metadata; safetensors writes metadata in no fixed order."""
    assert digest(one)["adapter_config.json"] == digest(two)["adapter_config.json"]
    name = "adapter_model.safetensors"
    left, right = load_file(one / name), load_file(two / name)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    with safe_open(one / name, "pt") as a, safe_open(two / name, "pt") as b:
        assert a.metadata() == b.metadata()


def codes(report: AdapterReport) -> set[str]:
    return {finding.code for finding in report.findings}


def exact_delta(a: Tensor, b: Tensor, experts: int, *, over_dim1: bool) -> Tensor:
    """dW (E, dim1, dim2) of unscaled factors, each entry summed over R in order, in fp64."""
    a_eri = a.double().reshape(experts, -1, a.shape[1])
    b_ore = b.double().reshape(b.shape[0], -1, experts)
    out = torch.zeros(experts, a.shape[1], b.shape[0], dtype=torch.float64)
    for r in range(a_eri.shape[1]):
        out += a_eri[:, r, :, None] * b_ore[:, r].T[:, None, :]
    return out if over_dim1 else out.transpose(1, 2)
