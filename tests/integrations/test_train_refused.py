"""`turnout train` on bad input: an error before any work, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_cases import config

import turnout
from tuning_cases import gpu
from turnout import cli
from turnout.experts import gemm_hopper, gemm_triton
from turnout.train import builtin, prepare, run


def no_config(path):
    (path / "config.json").unlink()


def bad_config(path):
    (path / "config.json").write_text("{")


def no_model_type(path):
    (path / "config.json").write_text("{}")


def no_weights(path):
    (path / "model.safetensors").unlink()


def cut_weights(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def no_tokenizer(path):
    (path / "tokenizer.json").unlink()


def missing_weights(path):
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (path / "config.json").write_text(json.dumps(config))


def adapter_only(path):
    no_config(path)
    (path / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "no config.json"),
        (bad_config, "not JSON"),
        (no_model_type, "model_type"),
        (no_weights, "no weights"),
        (cut_weights, "can not be loaded"),
        (no_tokenizer, "no tokenizer"),
        (missing_weights, "lacks .* weights"),
        (adapter_only, "folder of its base model"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(checkpoint, text, tmp_path, damage, words):
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    damage(model)
    with pytest.raises(ValueError, match=words):
        run(config(model, text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_not_downloaded(text, tmp_path):
    with pytest.raises(ValueError, match="downloads nothing"):
        run(config(Path("Qwen/Qwen3-30B-A3B"), text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_is_refused(checkpoint, text, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 99}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    model = tmp_path / "dense"
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).save_pretrained(model)
    builtin.make_tokenizer().save_pretrained(model)
    with pytest.raises(ValueError, match="no MoE layer"):
        run(config(model, text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_sequences_longer_than_the_model_are_refused(checkpoint, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("x" * 4000)
    with pytest.raises(ValueError, match="seq_len is 2000; expected at most 1024"):
        run(config(checkpoint, data, tmp_path / "out", seq_len=2000))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["sonic", "sonic-merged"])
def test_options_that_turnout_lacks_are_refused_before_work(checkpoint, text, tmp_path, backend):
    with pytest.raises(turnout.Unsupported, match="trains adapters, which SonicMoE has no"):
        run(config(checkpoint, text, tmp_path / "out", backend=backend))
    assert not (tmp_path / "out").exists()


def on_an_h100(monkeypatch):
    monkeypatch.setattr(prepare, "device_of", lambda device: gpu(90, "NVIDIA H100"))
    for module in (gemm_hopper, gemm_triton):
        monkeypatch.setattr(module, "INSTALLED", True)


@pytest.mark.parametrize(
    ("options", "has_gpu", "words"),
    [
        ({"backend": "hopper"}, False, r"this training in float32: needs sm_90 \(cpu\)"),
        ({"backend": "triton"}, False, r"this training in float32: needs an NVIDIA GPU \(cpu\)"),
        (
            {"backend": "hopper", "dtype": "float32"},
            True,
            r"takes float16 and bfloat16, not float32 \(NVIDIA H100\)",
        ),
    ],
)
def test_a_back_end_that_can_not_run_is_refused_after_loading(
    checkpoint, text, tmp_path, monkeypatch, options, has_gpu, words
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if has_gpu:
        on_an_h100(monkeypatch)
    monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(turnout.Unsupported, match=words):
        run(config(checkpoint, text, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_back_end_that_can_run_is_refused(checkpoint, text, tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*_):
        raise Loaded

    on_an_h100(monkeypatch)
    monkeypatch.setattr(prepare, "load_model", load)
    for options in ({"backend": "hopper", "dtype": "bfloat16"}, {"backend": "triton"}):
        with pytest.raises(Loaded):
            run(config(checkpoint, text, tmp_path / "out", **options))


def test_bad_input_leaves_an_earlier_run_alone(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    run(config(checkpoint, text, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    bad = [
        config(checkpoint, text, out),
        config(checkpoint, empty, out, overwrite=True),
        config(tmp_path, text, out, overwrite=True),
        config(checkpoint, text, out, overwrite=True, backend="sonic"),
        config(checkpoint, text, out, overwrite=True, backend="hopper"),
    ]
    for wrong in bad:
        with pytest.raises((ValueError, turnout.Unsupported)):
            run(wrong)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_command_exits_with_2_on_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["turnout", "train", "--rank", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "rank is 0" in capsys.readouterr().err
