"""`turnout train` on bad input: an error before any work, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_cases import config

import turnout
from turnout import cli
from turnout.train import builtin, run


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
