"""`turnout train` on small checkpoints: what it writes, resume, options, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from train_cases import config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import turnout
from tuning_cases import ask, ran, rows
from turnout import cli
from turnout.train import TrainConfig, TrainingFailed, builtin, pipeline, proof, run
from turnout.train import progress as progress_module
from turnout.train.checkpoint import add_lora
from turnout.train.data import Packed
from turnout.train.loop import Fit, fit
from turnout.train.watch import Watch
from turnout.tuning import journal, report

KEYS = {
    "steps",
    "loss_start",
    "loss_end",
    "heldout_loss_base",
    "heldout_loss_lora",
    "heldout_loss_stock_peft",
    "tokens_per_second",
    "peak_memory_bytes",
    "device",
    "backend",
    "expert_lora_tensors",
    "expert_lora_tensors_with_gradient",
    "plain_peft_max_abs_diff",
    "merged_max_abs_diff",
}
# What a second run with the same seed may give differently.
MEASURED = {"tokens_per_second", "peak_memory_bytes"}
FILES = {"adapter", "checkpoints", "loss.png", "experts.png", "report.json", "run.json"} | {
    journal.NAME
}
PNG = b"\x89PNG"


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same_numbers(a: dict, b: dict) -> None:
    left, right = ({k: v for k, v in s.items() if k not in MEASURED} for s in (a, b))
    assert left == right


def same_adapters(a: Path, b: Path) -> None:
    left, right = adapter_of(a), adapter_of(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.slow
def test_the_default_run_proves_what_it_says(tmp_path, capsys):
    out = tmp_path / "demo"
    summary = run(TrainConfig(out=out))
    assert summary.keys() >= KEYS
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["heldout_loss_lora"] <= 0.7 * summary["heldout_loss_base"]
    stock = summary["heldout_loss_stock_peft"]
    assert abs(summary["heldout_loss_lora"] - stock) <= 0.05 * stock
    assert summary["loss_end"] < 0.5 * summary["loss_start"]
    assert summary["expert_lora_tensors"] == summary["expert_lora_tensors_with_gradient"] == 8
    assert summary["plain_peft_max_abs_diff"] < 1e-3
    assert summary["merged_max_abs_diff"] < 1e-3
    assert summary["not_proven"] == []
    assert {path.name for path in out.iterdir()} == FILES | {"base", "summary.json"}
    for name in ("loss.png", "experts.png"):
        assert (out / name).read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "What this run proved" in printed
    for sentence in summary["proven"]:
        assert sentence in printed
    # The adapter is plain PEFT: no turnout in its config, and it loads without.
    assert "turnout" not in (out / "adapter" / "adapter_config.json").read_text().replace(
        str(tmp_path), ""
    )
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    model = PeftModel.from_pretrained(base, out / "adapter")
    assert model(torch.ones(1, 4).long()).logits.isfinite().all()


def test_a_users_checkpoint_is_trained_without_comparisons(checkpoint, text, tmp_path):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    summary = run(config(checkpoint, text, tmp_path / "out"))
    for key in ("heldout_loss_stock_peft", "plain_peft_max_abs_diff", "merged_max_abs_diff"):
        assert summary[key] is None
    assert summary["heldout_loss_lora"] < summary["heldout_loss_base"]
    assert summary["steps"] == 6
    assert "no document mask" in summary["packing"]
    assert summary["backend"] == "torch"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"summary.json"}
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def loads(out: Path) -> list[dict]:
    return journal.read(out / journal.NAME).of("experts")


def tokens_by_layer(lines: list[dict]) -> list[list[int]]:
    """Tokens per expert over all lines, in the order of the layers."""
    names = lines[0]["layers"]
    loads = [[line["layers"][name]["load"] for line in lines] for name in names]
    return [torch.tensor(load).sum(0).tolist() for load in loads]


def test_what_ran_is_not_recorded(checkpoint, text, tmp_path, monkeypatch, capsys):
    """Kernels need a GPU: here a launch is a question for a config."""

    def launch(self, args, state, control, **kwargs):
        ran(ask(), rows(128))

    report.forget()
    monkeypatch.setattr(progress_module.Bar, "on_step_begin", launch)
    out = tmp_path / "out"
    run(config(checkpoint, text, out))
    report.forget()
    assert journal.NAME in capsys.readouterr().out
    found = journal.read(out / journal.NAME)
    assert found.faults == ()
    (head,), (kernel,) = found.of("head"), found.of("kernel")
    assert head["turnout"] == turnout.__version__
    assert kernel["config"]["BLOCK_N"] == 128
    assert [line["step"] for line in loads(out)] == [1, 2, 3, 4, 5, 6]
    # The routers chose what the experts were given.
    counted = json.loads((out / "checkpoints/checkpoint-6/expert_tokens.json").read_text())
    assert tokens_by_layer(loads(out)) == [layer["tokens"] for layer in counted.values()]
    result = CliRunner().invoke(cli.app, ["report", str(out)])
    assert result.exit_code == 0
    assert "Load of the experts at step 6" in result.output


def test_the_record_of_a_long_run_grows_with_its_steps(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LOADS", 3)
    out = tmp_path / "out"
    run(config(checkpoint, text, out, steps=7))
    assert [line["step"] for line in loads(out)] == [3, 6, 7]
    counted = json.loads((out / "checkpoints/checkpoint-7/expert_tokens.json").read_text())
    assert tokens_by_layer(loads(out)) == [layer["tokens"] for layer in counted.values()]


def test_a_record_that_can_not_be_written_ends_the_run(
    checkpoint, text, tmp_path, monkeypatch, capsys
):
    def full(path, lines):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "append", full)
    summary = run(config(checkpoint, text, tmp_path / "out"))
    assert summary["steps"] == 6
    assert journal.NAME not in capsys.readouterr().out


def test_a_run_is_one_pass_over_the_data_by_default(checkpoint, text, tmp_path):
    summary = run(config(checkpoint, text, tmp_path / "out", steps=None))
    assert summary["steps"] == -(-summary["train_sequences"] // 4)


class Stop(Exception):
    pass


def interrupted(run_config, monkeypatch, step) -> None:
    """Run until the end of `step`, then stop as an interrupt would."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(progress_module.Bar, "on_step_begin", stop)
        with pytest.raises(Stop):
            run(run_config)


def test_a_resumed_run_ends_as_an_uninterrupted_one(checkpoint, text, tmp_path, monkeypatch):
    # More steps than one pass has, so that the order of a second pass matters too.
    options = {"steps": 40, "save_steps": 7, "expert_dropout": 0.2}
    whole = run(config(checkpoint, text, tmp_path / "whole", **options))
    first = config(checkpoint, text, tmp_path / "parts", **options)
    interrupted(first, monkeypatch, 30)
    assert not (tmp_path / "parts" / "summary.json").exists()
    parts = run(config(checkpoint, text, tmp_path / "parts", resume=True, **options))
    same_numbers(whole, parts)
    same_adapters(tmp_path / "whole", tmp_path / "parts")
    last = "checkpoints/checkpoint-40/expert_tokens.json"
    assert (tmp_path / "whole" / last).read_text() == (tmp_path / "parts" / last).read_text()
    record = journal.read(tmp_path / "parts" / journal.NAME)
    assert len(record.of("head")) == 2
    # The steps after the last checkpoint ran twice and gave the same.
    steps = {line["step"]: line for line in loads(tmp_path / "whole")}
    assert record.last("experts") == [steps[step] for step in range(29, 41)]
    again = run(config(checkpoint, text, tmp_path / "parts", resume=True, **options))
    same_numbers(whole, again)


def test_a_resumed_builtin_run_keeps_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "BASE_STEPS", 2)
    monkeypatch.setattr(proof, "LEARNED", 10.0)
    options = {"steps": 8, "save_steps": 2, "seq_len": 32, "batch": 4}
    whole = run(TrainConfig(out=tmp_path / "whole", **options))
    interrupted(TrainConfig(out=tmp_path / "parts", **options), monkeypatch, 5)
    base = (tmp_path / "parts" / "base" / "model.safetensors").stat().st_mtime_ns
    parts = run(TrainConfig(out=tmp_path / "parts", resume=True, **options))
    assert (tmp_path / "parts" / "base" / "model.safetensors").stat().st_mtime_ns == base
    same_numbers(whole, parts)


def test_a_resumed_run_must_have_the_same_options_and_data(checkpoint, text, tmp_path):
    run(config(checkpoint, text, tmp_path / "out"))
    with pytest.raises(ValueError, match="rank = 4, not 2"):
        run(config(checkpoint, text, tmp_path / "out", rank=2, alpha=8.0, resume=True))
    with pytest.raises(ValueError, match=r"alpha = 8\.0, not 3\.0"):
        run(config(checkpoint, text, tmp_path / "out", alpha=3.0, resume=True))
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + text.read_text())
    with pytest.raises(ValueError, match="data = "):
        run(config(checkpoint, other, tmp_path / "out", resume=True))


def test_changed_data_is_noticed_on_resume(checkpoint, text, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text(text.read_text())
    run(config(checkpoint, data, tmp_path / "out"))
    data.write_text(text.read_text()[::-1])
    with pytest.raises(ValueError, match="data_sha256"):
        run(config(checkpoint, data, tmp_path / "out", resume=True))


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(checkpoint, text, tmp_path):
    runs = [
        run(config(checkpoint, text, tmp_path / str(i), seed=seed))
        for i, seed in enumerate((5, 5, 6))
    ]
    same_numbers(runs[0], runs[1])
    same_adapters(tmp_path / "0", tmp_path / "1")
    assert runs[0]["loss_end"] != runs[2]["loss_end"]


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"recompute": "gate_up"}, {"backend": "torch"}],
    ids=str,
)
def test_memory_options_change_no_number(checkpoint, text, tmp_path, options):
    plain = run(config(checkpoint, text, tmp_path / "plain"))
    other = run(config(checkpoint, text, tmp_path / "other", **options))
    for key in ("loss_start", "loss_end", "heldout_loss_lora"):
        assert other[key] == pytest.approx(plain[key], rel=1e-5)
    # The second forward of checkpointing is not counted.
    last = "checkpoints/checkpoint-6/expert_tokens.json"
    assert (tmp_path / "plain" / last).read_text() == (tmp_path / "other" / last).read_text()
    assert tokens_by_layer(loads(tmp_path / "plain")) == tokens_by_layer(loads(tmp_path / "other"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_of_a_users_checkpoint_can_be_checked(checkpoint, text, tmp_path, dtype):
    summary = run(config(checkpoint, text, tmp_path / "out", dtype=dtype, check=True))
    assert 0 <= summary["plain_peft_max_abs_diff"] < 1e-3
    assert 0 <= summary["merged_max_abs_diff"] < 1e-3
    assert summary["not_proven"] == []
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "out").values()} == {torch.float32}


def test_expert_dropout_changes_training(checkpoint, text, tmp_path):
    plain = run(config(checkpoint, text, tmp_path / "plain"))
    dropped = run(config(checkpoint, text, tmp_path / "dropped", expert_dropout=0.5))
    assert dropped["loss_end"] != plain["loss_end"]


def test_chats_are_trained_on(checkpoint, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    )
    chat = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps(chat) + "\n") * 40)
    summary = run(config(model, data, tmp_path / "out", steps=20))
    assert summary["documents"] == 40
    assert summary["loss_end"] < summary["loss_start"]


def test_one_sequence_is_enough_and_nothing_is_held_out(checkpoint, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("x" * 40)
    summary = run(config(checkpoint, data, tmp_path / "out"))
    assert summary["heldout_sequences"] == 0
    assert summary["heldout_loss_base"] is None
    assert summary["heldout_loss_lora"] is None


# How it fails.


def test_a_claim_that_does_not_hold_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builtin, "BASE_STEPS", 2)
    options = {"steps": 2, "lr": 1e-6, "seq_len": 32, "batch": 2, "out": tmp_path / "out"}
    with pytest.raises(TrainingFailed, match="not proven: LoRA taught the model"):
        run(TrainConfig(**options))
    assert "What this run proved" not in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["not_proven"]) == 1
    flags = ["--steps", "2", "--lr", "1e-6", "--seq-len", "32", "--batch", "2"]
    result = CliRunner().invoke(
        cli.app, ["train", "--out", str(tmp_path / "out"), "--overwrite", *flags]
    )
    assert result.exit_code == 1
    assert "not proven" in result.output


def breaking(monkeypatch, damage):
    """Do `damage` to the model right after it was patched."""
    patch = turnout.patch

    def patch_and_break(model, **options):
        report = patch(model, **options)
        wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
        if wrappers:
            damage(model, wrappers)
        return report

    monkeypatch.setattr(pipeline.turnout, "patch", patch_and_break, raising=False)


def freeze(model, wrappers):
    wrappers[0].lora_A["default"].weight.requires_grad_(False)


def detach(model, wrappers):
    wrappers[-1].get_base_layer().register_forward_hook(lambda module, args, out: out.detach())


def lose_one_expert(model, wrappers):
    def without(grad):
        grad = grad.clone()
        grad.view(grad.shape[0], -1, wrappers[0].num_experts)[..., 0] = 0
        return grad

    wrappers[0].lora_B["default"].weight.register_hook(without)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (freeze, r"layers\.0\.mlp\.experts\.\w+\.lora_A: experts 0, 1"),
        (detach, r"layers\.1\.mlp\.experts\.\w+\.lora_[AB]: experts 0, 1"),
        (lose_one_expert, r"layers\.0\.mlp\.experts\.\w+\.lora_B: expert 0 saw"),
    ],
)
def test_an_expert_adapter_without_gradient_stops_the_run(
    checkpoint, text, tmp_path, monkeypatch, damage, words
):
    breaking(monkeypatch, damage)
    with pytest.raises(TrainingFailed, match=words + ".* step 2;"):
        run(config(checkpoint, text, tmp_path / "out", batch=16))
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(checkpoint, text, tmp_path, monkeypatch):
    breaking(
        monkeypatch,
        lambda model, wrappers: torch.nn.init.constant_(
            wrappers[0].lora_A["default"].weight, float("nan")
        ),
    )
    with pytest.raises(TrainingFailed, match="the loss is nan at step 1"):
        run(config(checkpoint, text, tmp_path / "out"))


def bare(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 60, (count, 16), generator=generator)


def test_the_watch_changes_no_number_and_counts_every_token(checkpoint, tmp_path):
    how = Fit(steps=3, batch=4, lr=1e-2, seed=0)
    losses = []
    for watched in (False, True):
        base = AutoModelForCausalLM.from_pretrained(checkpoint)
        model = add_lora(base, rank=2, alpha=4.0, seed=0)
        turnout.patch(model)
        watch = Watch(model, 16)
        if watched:
            with watch.attached():
                result = fit(model, Packed(bare(12)), how, tmp_path, [watch])
        else:
            result = fit(model, Packed(bare(12)), how, tmp_path, [])
        losses.append(result.losses)
    assert losses[0] == losses[1]
    counts = watch.counts()
    assert list(counts) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert {sum(tokens) for tokens in counts.values()} == {12 * 16 * 2}
    assert not any(layer.module._forward_pre_hooks for layer in watch.layers)


def test_an_expert_that_saw_only_last_tokens_is_not_blamed(checkpoint):
    """The last token of a sequence has no label: its expert has no gradient by right."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = add_lora(base, rank=2, alpha=4.0, seed=0)
    turnout.patch(model)
    watch = Watch(model, 4)
    layer = watch.layers[0]
    experts_TK = torch.tensor([[0, 1], [0, 1], [0, 1], [2, 3]] * 2)
    with watch.attached():
        layer.module(torch.randn(8, 64), experts_TK, torch.full((8, 2), 0.5))
    assert layer.step_E.tolist() == [6, 6, 2, 2, 0, 0, 0, 0]
    assert layer.scored_E.tolist() == [6, 6, 0, 0, 0, 0, 0, 0]
