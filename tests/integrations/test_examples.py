"""The scripts in `examples` train: started as a user does, and on a checkpoint with a probe."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hf_models import probe
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# script: the function of examples/tiny.py that makes its model
SCRIPTS = {
    "qwen3_lora": "qwen3_moe",
    "gpt_oss_lora": "gpt_oss",
    "trl_sft": "qwen3_moe",
    "plain_loop": "qwen3_moe",
    "liger_lora": "qwen3_moe",
}
LAYERS, EXPERT_STACKS = 2, 2
TEXTS = 16

cases = pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name == "trl_sft" and find_spec("trl") is None,
                reason="trl is not installed (it needs Python 3.11): its example was not run",
            ),
        )
        for name in SCRIPTS
    ],
)


def assert_trained(out: Path, text: str, steps: int) -> None:
    """A finite loss that fell, a report of fused layers alone, and an adapter with trained B."""
    found = re.search(r"^loss (\S+) to (\S+) in (\d+) steps", text, flags=re.M)
    assert found, text
    first, last, count = float(found[1]), float(found[2]), int(found[3])
    assert math.isfinite(first)
    assert last < first
    assert count == steps
    if "aux loss" in text:
        for value in re.search(r"^aux loss (\S+) to (\S+)$", text, flags=re.M).groups():
            assert 0 < float(value) < math.inf
    assert f"{LAYERS} x" in text
    assert re.search(r"│ fused +│", text), text
    assert f"{LAYERS * EXPERT_STACKS} adapters" in text
    assert "fused: adapter 'default'" in text
    assert "stock" not in text
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    trained = {name: float(t.norm()) for name, t in tensors.items() if "lora_B" in name}
    assert sum("experts" in name for name in trained) == LAYERS * EXPERT_STACKS
    assert all(0 < norm < math.inf for norm in trained.values()), trained


def assert_says_where_liger_is(script: str, text: str) -> None:
    """On a CPU it is left out, and a line says why."""
    assert script != "liger_lora" or re.search(r"^Liger (is left out: |runs )", text, flags=re.M)


def test_every_python_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "tiny"}


@pytest.mark.slow
@cases
def test_example_trains_without_a_hub_and_without_arguments(script: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{script}.py"), "--out", str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert_trained(tmp_path, done.stdout, steps=6)
    assert_says_where_liger_is(script, done.stdout)


@cases
def test_example_trains_a_checkpoint_on_texts_with_every_expert_in_turnout(
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = runpy.run_path(str(EXAMPLES / "tiny.py"))[SCRIPTS[script]]
    for part in make():
        part.save_pretrained(tmp_path / "model")
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(f"{i} and {i} make {2 * i}." for i in range(TEXTS)), encoding="utf-8")
    words = ["--model", tmp_path / "model", "--data", data, "--out", tmp_path]
    words += ["--steps", 3, "--lr", 0.01]
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    monkeypatch.syspath_prepend(EXAMPLES)
    with probe() as ran:
        made = runpy.run_path(str(EXAMPLES / f"{script}.py"))
    # activation checkpointing runs each layer twice
    times = 2 if script == "trl_sft" else 1
    assert len(ran.calls) == LAYERS * 3 * times
    assert ran.fused_projections == EXPERT_STACKS * len(ran.calls)
    assert ran.folds == 0
    text = capsys.readouterr().out
    assert_trained(tmp_path, text, steps=3)
    assert_says_where_liger_is(script, text)
    assert ("aux loss" in text) == (script in ("trl_sft", "plain_loop"))
    if script == "trl_sft":
        assert [row.status for row in made["report"].aux_losses] == ["fused"]
        rows = [len(row["input_ids"]) for row in made["trainer"].train_dataset]
        assert len(rows) < TEXTS / 2, f"{rows}: the texts are not packed"
