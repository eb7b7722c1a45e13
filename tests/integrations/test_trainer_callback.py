"""`TurnoutCallback`: reported once, to the right places, without the network and without stopping a
training. Kernels need a GPU: here a launch is a question for a config."""

from __future__ import annotations

import ast
import errno
import json
import logging
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import tiny
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import turnout
from tuning_cases import ask, ran, rows
from turnout.integrations.expert_load import ExpertLoad
from turnout.integrations.trainer import LAST_STEP, TurnoutCallback
from turnout.integrations.trainer_loggers import TABLE
from turnout.report.command import main as show_report
from turnout.tuning import journal, report
from turnout.verify.tiny import TINY

KEY = "qwen3_moe"
# Their routers have no rule in turnout, or are not reached by a forward of tokens alone.
OWN = ("aria_text", "zaya", "jetmoe", "phimoe", "switch_transformers", "nllb-moe")
SRC = Path(turnout.__file__).parent


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "autotuners", lambda: ([], 0))
    report.forget()
    yield
    report.forget()


class Data(Dataset[dict[str, torch.Tensor]]):
    """Sequences of 16 tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(16) * (index + 1) % 29 + 1
        return {"input_ids": ids, "labels": ids}


class Launches(TrainerCallback):
    """A kernel is launched first in this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            ran(ask(), rows(128))


def train(folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2,
        "logging_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "dataloader_pin_memory": False,
    } | options  # fmt: skip
    trainer = Trainer(
        model=tiny(KEY) if model is None else model,
        args=TrainingArguments(**arguments),
        train_dataset=Data(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def of(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("step", [1, 3, LAST_STEP])
def test_a_run_is_reported_twice_or_not_at_all(tmp_path: Path, step: int) -> None:
    sent: list[list[dict[str, Any]]] = []
    callback = TurnoutCallback(send=sent.append, expert_load=False)
    train(tmp_path, Launches(step), callback, max_steps=LAST_STEP + 2)
    assert callback.has_reported
    (lines,) = sent
    assert [line["event"] for line in lines] == ["head", "kernel"]
    assert list(journal.read(tmp_path / journal.NAME).lines) == lines


def test_nothing_ran_and_it_is_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    record = report.record
    monkeypatch.setattr(report, "record", lambda: asked.append(1) or record())
    sent: list[Any] = []
    callback = TurnoutCallback(send=sent.append, expert_load=False)
    train(tmp_path, Launches(LAST_STEP + 1), callback, max_steps=LAST_STEP + 3)
    assert len(asked) == LAST_STEP
    assert sent == []
    assert not (tmp_path / journal.NAME).exists()


def test_a_report_that_was_made_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    record = report.record
    monkeypatch.setattr(report, "record", lambda: asked.append(1) or record())
    train(tmp_path, Launches(1), TurnoutCallback(expert_load=False), max_steps=6)
    assert len(asked) == 1


def test_the_load_of_the_experts_is_not_that_of_the_routers(tmp_path: Path) -> None:
    model = tiny(KEY)
    top_k, layers = model.config.num_experts_per_tok, model.config.num_hidden_layers
    sent: list[Any] = []
    train(tmp_path, TurnoutCallback(send=sent.append), model=model, max_steps=4)
    loads = [line for lines in sent for line in of(lines, "experts")]
    assert [line["step"] for line in loads] == [2, 4]
    for line in loads:
        assert len(line["layers"]) == layers
        for layer in line["layers"].values():
            assert layer["tokens"] == 2 * 2 * 16  # steps, sequences, tokens
            assert sum(layer["load"]) == layer["tokens"] * top_k
            assert layer["dropped"] == 0.0
            assert layer["entropy"] > 0
    found = show_report(tmp_path)
    assert found["experts"] == loads


def test_tokens_are_lost_where_the_load_is_written_rarely(tmp_path: Path) -> None:
    every, rarely = [], []
    for sent, options in ((every, {}), (rarely, {"load_steps": 4})):
        torch.manual_seed(0)
        callback = TurnoutCallback(False, send=sent.append, **options)
        train(tmp_path, callback, model=tiny(KEY), max_steps=6, logging_steps=1)
    lines = [[line for lines in sent for line in of(lines, "experts")] for sent in (every, rarely)]
    assert [[line["step"] for line in one] for one in lines] == [[1, 2, 3, 4, 5, 6], [4, 6]]
    totals = [
        {name: sum(line["layers"][name]["tokens"] for line in one) for name in one[0]["layers"]}
        for one in lines
    ]
    assert totals[0] == totals[1]
    with pytest.raises(ValueError, match="load_steps is 0; expected an integer of at least 1"):
        TurnoutCallback(load_steps=0)


def test_a_model_that_diverged_ends_the_training(tmp_path: Path) -> None:
    model = tiny(KEY)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    trainer = train(tmp_path, Launches(1), TurnoutCallback(), model=model, max_steps=4)
    assert trainer.state.global_step == 4
    for line in journal.read(tmp_path / journal.NAME).of("experts"):
        assert {layer["entropy"] for layer in line["layers"].values()} == {None}
    show_report(tmp_path)


@pytest.mark.parametrize("key", [k for k in TINY if k not in OWN])
def test_the_router_of_an_architecture_is_not_read(key: str) -> None:
    from hf_models import forward

    model = tiny(key).train()
    load = ExpertLoad(model)
    forward(model, key)
    found = load.take()
    assert found
    for layer in found.values():
        assert sum(layer["load"]) > 0
        assert sum(layer["load"]) % layer["tokens"] == 0
    assert load.take() == {}
    load.detach()
    forward(model, key)
    assert load.take() == {}


def test_evaluation_and_recomputation_are_counted(tmp_path: Path) -> None:
    model = tiny(KEY)
    load = ExpertLoad(model)
    model.eval()
    ids = torch.ones(1, 8, dtype=torch.int64)
    model(input_ids=ids)
    assert load.take() == {}
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {layer["tokens"] for layer in load.take().values()} == {8}
    load.detach()


@pytest.mark.parametrize("key", [KEY, "dbrx"])
def test_padding_is_counted(key: str) -> None:
    """It has no meaning, and all of it goes to the same experts."""
    from turnout.integrations.router_places import places

    model = tiny(key).train()
    top_k = model.config.ffn_config.moe_top_k if key == "dbrx" else model.config.num_experts_per_tok
    ids = torch.arange(24).view(2, 12) % 29 + 1
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    with turnout.record_routing(model) as record:
        load = ExpertLoad(model)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        model(input_ids=ids, attention_mask=mask.flip(0).bool(), use_cache=False)
    kept = mask.flatten().bool(), mask.flip(0).flatten().bool()
    found = load.take()
    assert len(found) == len(list(places(model)))
    for name, layer in found.items():
        chosen = torch.cat([record[f"{name}/{call}"][kept[call]] for call in (0, 1)])
        assert layer["tokens"] == 2 * 19
        expected = chosen.flatten().bincount(minlength=len(layer["load"]))
        assert layer["load"] == expected.tolist()
        assert sum(layer["load"]) == 2 * 19 * top_k
        assert layer["dropped"] == 0.0
    model(input_ids=ids, use_cache=False)
    assert {layer["tokens"] for layer in load.take().values()} == {24}, "of an earlier batch"
    model(input_ids=ids, attention_mask=torch.zeros_like(mask), use_cache=False)
    assert load.take() == {}
    load.detach()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_compiled_model_is_compiled_again_while_its_load_is_counted() -> None:
    model = tiny(KEY).train()
    load = ExpertLoad(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    ids = torch.ones(1, 8, dtype=torch.int64)
    graphs = []
    for _ in range(4):
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert len(set(graphs)) == 1
    assert {layer["tokens"] for layer in load.take().values()} == {4 * 8}
    load.detach()


def test_a_model_without_routers_stops_the_training(tmp_path: Path) -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 32)

        def forward(self, input_ids: Any, labels: Any) -> dict[str, torch.Tensor]:
            logits = self.table(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    train(tmp_path, TurnoutCallback(), model=Dense())
    assert not (tmp_path / journal.NAME).exists()


def test_hooks_stay_on_the_model(tmp_path: Path) -> None:
    model = tiny(KEY)
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    train(tmp_path, TurnoutCallback(), model=model)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert after == count


def test_a_full_disk_or_a_read_only_folder_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, lines: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "append", full)
    sent: list[Any] = []
    with caplog.at_level(logging.WARNING, logger="turnout.trainer"):
        trainer = train(tmp_path, Launches(1), TurnoutCallback(send=sent.append), max_steps=4)
    assert trainer.state.global_step == 4
    assert len([one for lines in sent for one in of(lines, "kernel")]) == 1  # still sent
    assert caplog.text.count("No space left") == 1


def test_a_function_that_fails_ends_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def send(lines: Any) -> None:
        calls.append(lines)
        raise KeyError("no")

    with caplog.at_level(logging.WARNING, logger="turnout.trainer"):
        train(tmp_path, Launches(1), TurnoutCallback(send=send), max_steps=4)
    assert len(calls) == 1
    assert "not called again" in caplog.text
    assert len(journal.read(tmp_path / journal.NAME).of("experts")) == 2


def test_no_file_is_written_where_none_is_wanted(tmp_path: Path) -> None:
    sent: list[Any] = []
    train(tmp_path / "a", Launches(1), TurnoutCallback(False, send=sent.append))
    assert sent
    assert not list(tmp_path.rglob("*.jsonl"))
    report.forget()
    train(tmp_path / "b", Launches(1), TurnoutCallback(tmp_path / "mine.jsonl"))
    assert journal.read(tmp_path / "mine.jsonl").of("kernel")
    with pytest.raises(ValueError, match="path is True"):
        TurnoutCallback(True)


def test_a_second_run_in_the_same_file_has_no_head_of_its_own(tmp_path: Path) -> None:
    """A run that goes on writes the steps since its checkpoint again: the head parts the two."""
    for _ in range(2):  # no kernel runs, so only the load of the experts is written
        train(tmp_path, TurnoutCallback(), max_steps=4)
    lines = journal.read(tmp_path / journal.NAME).lines
    assert [line["event"] for line in lines] == ["head", "experts", "experts"] * 2


def test_every_process_writes(tmp_path: Path) -> None:
    callback = TurnoutCallback()
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=[])
    state = SimpleNamespace(is_world_process_zero=False, global_step=1)
    ran(ask(), rows(128))
    callback.on_train_begin(args, state, None, model=tiny(KEY))
    callback.on_step_end(args, state, None)
    callback.on_log(args, state, None, logs={"loss": 1.0})
    assert callback.has_reported
    assert list(tmp_path.iterdir()) == []


# the Trainer's own loggers


def test_tensorboard_gets_nothing(tmp_path: Path) -> None:
    """For real: into the Trainer's own event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, Launches(1), TurnoutCallback(), report_to=["tensorboard"], max_steps=4)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len({file.parent for file in files}) == 1, "a second run was made"
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert "train/loss" in scalars
    busiest = [name for name in scalars if name.endswith("busiest_over_mean")]
    assert len(busiest) == tiny(KEY).config.num_hidden_layers
    assert [point.step for point in events.Scalars(busiest[0])] == [2, 4]
    assert events.Scalars(busiest[0])[0].value >= 1.0
    (text,) = events.Tensors(f"{TABLE}/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.startswith("| kernel | rows |")
    assert "BN=128 group=4" in shown


class Recorder(ModuleType):
    """A logger's module with its public functions; what they were given is in `calls`."""

    def __init__(self, name: str, **facts: Any) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.__dict__.update(facts)

    def __getattr__(self, function: str) -> Any:
        if function.startswith("__"):
            raise AttributeError(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((function, args, kwargs))
            return SimpleNamespace(args=args, kwargs=kwargs)

        return call


def with_logger(name: str, module: Any, tmp_path: Path, monkeypatch: Any, steps: int = 2) -> None:
    """Two steps by hand: transformers' own callback would need the real library."""
    monkeypatch.setitem(sys.modules, name, module)
    callback = TurnoutCallback()
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=[name])
    model = tiny(KEY).train()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    callback.on_train_begin(args, state, None, model=model)
    ran(ask(), rows(128))
    for step in range(1, steps + 1):
        model(input_ids=torch.ones(1, 8, dtype=torch.int64))
        state.global_step = step
        callback.on_step_end(args, state, None)
        callback.on_log(args, state, None, logs={"loss": 1.0})
    callback.on_train_end(args, state, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_or_trackio_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = Recorder(name, run=object())
    with_logger(name, module, tmp_path, monkeypatch)
    names = [call[0] for call in module.calls]
    assert names == ["Table", "log", "log", "log"]
    table = module.calls[0][2]
    if name == "trackio":  # which ignores `columns`, so a table of lists has no names
        assert table.keys() == {"dataframe"}
        (found,) = table["dataframe"].to_dict(orient="records")
        table = {"columns": list(found), "data": [list(found.values())]}
    assert table["columns"][:2] == ["kernel", "rows"]
    assert table["data"][0][:2] == ["rows", 131072]
    assert table["data"][0][-1] is None, "no time was measured"
    assert set(module.calls[1][1][0]) == {TABLE, "train/global_step"}
    scalars = module.calls[2][1][0]
    assert scalars["train/global_step"] == 1
    assert any(key.endswith("/busiest_over_mean") for key in scalars)


def test_mlflow_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder("mlflow")
    with_logger("mlflow", module, tmp_path, monkeypatch)
    (table,) = [call[2] for call in module.calls if call[0] == "log_table"]
    assert table["artifact_file"] == f"{TABLE}.json"
    assert table["data"]["kernel"] == ["rows"]
    metrics = [call for call in module.calls if call[0] == "log_metrics"]
    assert [call[2] for call in metrics] == [{"step": 1}, {"step": 2}]
    json.dumps(metrics[0][1][0])


def test_a_run_is_started_where_none_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = Recorder("wandb", run=None)
    with caplog.at_level(logging.WARNING, logger="turnout.trainer"):
        with_logger("wandb", module, tmp_path, monkeypatch)
    assert module.calls == []
    assert "no active run" in caplog.text
    assert journal.read(tmp_path / journal.NAME).of("kernel")


def test_a_logger_that_fails_ends_the_training_or_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    class Broken(Recorder):
        def __getattr__(self, function: str) -> Any:
            calls.append(function)
            raise ConnectionError("gone")

    with caplog.at_level(logging.WARNING, logger="turnout.trainer"):
        with_logger("wandb", Broken("wandb", run=object()), tmp_path, monkeypatch, steps=3)
    assert calls == ["Table"]
    assert caplog.text.count("gone") == 1


def test_a_logger_that_is_not_known_ends_the_training(tmp_path: Path) -> None:
    callback = TurnoutCallback()
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=["comet_ml", "none"])
    ran(ask(), rows(128))
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback.on_step_end(args, state, None)
    assert journal.read(tmp_path / journal.NAME).of("kernel")


def test_loggers_are_written_to_although_unwanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, Launches(1), TurnoutCallback(loggers=False), report_to=["tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert not any(name.startswith("experts/") for name in events.Tags()["scalars"])


# no network


def test_a_socket_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked for")

    model = tiny(KEY)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)
    train(tmp_path, Launches(1), TurnoutCallback(), model=model, report_to=["tensorboard"])
    assert journal.read(tmp_path / journal.NAME).of("kernel")


def test_a_module_that_can_reach_the_network_is_imported() -> None:
    network = {
        "socket", "ssl", "urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "ftplib",
        "smtplib", "xmlrpc", "huggingface_hub", "wandb", "trackio", "mlflow",
    }  # fmt: skip
    found = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in network]
    assert found == []
