"""`turnout tune` and `turnout report` from outside, where no kernel has to run."""

from __future__ import annotations

import copy
import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tuning_cases import GATED, GRAM, PLAIN, ask, entry, gram, ran, rows, search_of
from turnout import cli
from turnout.report.roofline import plot, point
from turnout.shapes import SHAPES
from turnout.tune.recorded import problems
from turnout.tune.work import layers_named
from turnout.tuning import cache, journal, report, table

DEFAULT, TUNED = rows(128), rows(256)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "nothing ships")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(report, "autotuners", lambda: ([], 0))
    report.forget()
    yield
    report.forget()


def turnout(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["turnout", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def a_run(folder: Path) -> Path:
    """The report of a run with a tuned and an untuned kernel, and the load of two layers."""
    search = search_of({TUNED: 0.001, DEFAULT: 0.002}, TUNED)
    cache.store().put([entry(ask(GATED), TUNED, search=search)])
    ran(ask(GATED), DEFAULT)
    ran(ask(GRAM), gram(16, 128))
    layer = {"load": [6, 0, 2, 4], "tokens": 6, "dropped": 0.0, "entropy": 1.25}
    load = {"event": "experts", "step": 10, "layers": {"model.layers.0.mlp.gate": layer}}
    journal.append(folder / journal.NAME, [*report.record(), load])
    return folder


def test_a_report_is_not_readable(tmp_path, monkeypatch, capsys):
    assert turnout(monkeypatch, "report", a_run(tmp_path)) == 0
    text = capsys.readouterr().out
    for word in (
        "compute capability 9.0", "131072 x 1536 x 2048", "activate", "BN=256", "tuned",
        "analytic", "1.000", "2.000", "step 10", "model.layers.0.mlp.gate", "2.00", "1.250",
    ):  # fmt: skip
        assert word in text, word


def test_the_json_of_a_report_is_not_the_report(tmp_path, monkeypatch, capsys):
    assert turnout(monkeypatch, "report", a_run(tmp_path), "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["source"] for one in found["kernels"]] == ["tuned", "analytic"]
    assert found["experts"][0]["step"] == 10
    assert found["faults"] == []
    assert found["heads"][0]["format"] == report.FORMAT


def test_earlier_runs_are_mixed_with_the_last(tmp_path, monkeypatch, capsys):
    a_run(tmp_path)
    report.forget()
    ran(ask(), DEFAULT)
    journal.append(tmp_path / journal.NAME, report.record())
    assert turnout(monkeypatch, "report", tmp_path, "--json", tmp_path / "out.json") == 0
    assert "last of 2 runs" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["kernels"]) == 1


def test_a_run_without_kernels_is_an_error(tmp_path, monkeypatch, capsys):
    journal.append(tmp_path / "a.jsonl", report.record())
    assert turnout(monkeypatch, "report", tmp_path / "a.jsonl") == 0
    assert "No kernel of turnout ran" in capsys.readouterr().out


def test_a_fault_in_a_report_ends_the_command(tmp_path, monkeypatch, capsys):
    path = a_run(tmp_path) / journal.NAME
    lines = path.read_text().splitlines(keepends=True)
    gone = json.dumps(json.loads(lines[1]) | {"kernel": "scatter2scatter"}) + "\n"
    path.write_text("".join([lines[0], gone, *lines[2:]])[:-20])
    assert turnout(monkeypatch, "report", path, "--plot", tmp_path / "a.png") == 0
    text = capsys.readouterr().out
    assert "is cut off" in text
    assert "does not have: scatter2scatter" in text


ODD = ("x", None, [5], "gone")


@pytest.mark.parametrize(
    ("event", "place"),
    [
        ("head", ["devices"]),
        ("head", ["devices", 0, "memory_bytes"]),
        ("kernel", ["kernel"]),
        ("kernel", ["key"]),
        ("kernel", ["key", "layout"]),
        ("kernel", ["config"]),
        ("kernel", ["problem"]),
        ("kernel", ["problem", "rows"]),
        ("kernel", ["problem", "dtype"]),
        ("kernel", ["problem", "activation"]),
        ("kernel", ["search"]),
        ("kernel", ["search", "winner_s"]),
        ("kernel", ["search", "failed"]),
        ("kernel", ["search", "seconds"]),
        ("autotuner", ["key"]),
        ("autotuner", ["winner_ms"]),
        ("experts", ["layers"]),
        ("experts", ["layers", "model.layers.0.mlp.gate"]),
        ("experts", ["layers", "model.layers.0.mlp.gate", "load"]),
        ("experts", ["layers", "model.layers.0.mlp.gate", "dropped"]),
        ("experts", ["layers", "model.layers.0.mlp.gate", "entropy"]),
        ("roof", ["dense_tflops"]),
    ],
    ids=str,
)
def test_an_event_that_somebody_changed_is_a_traceback(tmp_path, monkeypatch, event, place):
    """It is left out, shown as far as it goes, or named in an error."""
    other = {"kernel": "k", "module": "m", "key": {"M": 1}, "config": {}, "winner_ms": 0.5}
    roof = {"event": "roof", "device": "H100", "dense_tflops": 700.0, "copy_gb_s": 2800.0}
    path = a_run(tmp_path) / journal.NAME
    journal.append(path, [{"event": "autotuner", **other}, roof])
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(n for n, line in enumerate(whole) if line["event"] == event)
    for odd in ODD:
        lines = copy.deepcopy(whole)
        inner = lines[number]
        for name in place[:-1]:
            inner = inner[name]
        if odd == "gone":
            del inner[place[-1]]
        else:
            inner[place[-1]] = odd
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        emit = tmp_path / "table.json"
        assert turnout(monkeypatch, "report", path) == 0
        assert turnout(monkeypatch, "tune", "--from-reports", path, "--emit", emit) in (0, 2)
        problems(journal.read(path), torch.device("cpu"))
        points = (event, place[-1]) in [("roof", "dense_tflops"), ("kernel", "winner_s")]
        if points and odd in (None, "x"):
            plotted = turnout(monkeypatch, "report", path, "--plot", tmp_path / "a.svg")
            assert plotted in (0, 2)


def test_a_file_that_can_not_be_written_is_a_traceback(tmp_path, monkeypatch, capsys):
    """A full disk at the end of the work."""
    path, full = a_run(tmp_path / "run"), tmp_path / "full.json"
    full.symlink_to("/dev/full")
    assert turnout(monkeypatch, "report", path, "--json", full) == 2
    assert "No space left" in capsys.readouterr().err

    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table, "write", no_room)
    assert turnout(monkeypatch, "tune", "--from-reports", path, "--emit", tmp_path / "t.json") == 2
    assert "No space left" in capsys.readouterr().err
    picture = tmp_path / "full.svg"
    picture.symlink_to("/dev/full")
    assert turnout(monkeypatch, "report", path, "--plot", picture) == 2
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "does not exist"),
        (["."], "0 reports"),
        (["old.jsonl"], "expected format 1"),
        (["a.jsonl", "--plot", "x.bmp"], ".png"),
        (["a.jsonl", "--plot", "nowhere/x.png"], "folder that exists"),
        (["empty.jsonl", "--plot", "x.png"], "nothing to draw"),
    ],
)
def test_a_wrong_report_is_a_traceback(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    if arguments[0] != ".":
        (tmp_path / "old.jsonl").write_text('{"event": "head", "format": 0, "turnout": "0.0.1"}\n')
        journal.append(tmp_path / "empty.jsonl", report.record())
        (a_run(tmp_path) / journal.NAME).rename(tmp_path / "a.jsonl")
    assert turnout(monkeypatch, "report", *arguments) == 2
    assert text in capsys.readouterr().err


def test_a_roofline_is_wrong(tmp_path):
    ran(ask(), DEFAULT)
    (event,) = [line for line in report.record() if line["event"] == "kernel"]
    event["search"] = search_of({DEFAULT: 0.002}, DEFAULT).to_dict()
    found = point(event)
    s, n, k, e = 131072, 1536, 2048, 128
    assert found.flop == 2 * s * n * k
    assert found.intensity == found.flop / (2 * (s * k + s * n + e * n * k))
    assert found.tflops == pytest.approx(found.flop / 0.002 / 1e12)
    assert found.label == "rows"


def test_the_rank_or_the_dtype_does_not_count_in_the_roofline():
    def of(problem):
        report.forget()
        ran(ask(problem), DEFAULT if problem.ragged == "m" else gram(16, 128))
        return point(next(line for line in report.record() if line["event"] == "kernel"))

    assert of(replace(GATED, rank=64)).flop > of(GATED).flop
    assert of(GATED).label == "activate"
    assert of(GATED).tflops is None
    wide = replace(PLAIN, dtype="float32", weight_dtype="float32")
    assert of(wide).intensity == of(PLAIN).intensity / 2
    assert of(GRAM).label == "gram"


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_a_picture_is_not_made(tmp_path, monkeypatch, name):
    path = a_run(tmp_path) / journal.NAME
    roof = {"event": "roof", "device": "H100", "dense_tflops": 700.0, "copy_gb_s": 2800.0}
    journal.append(path, [roof])
    assert turnout(monkeypatch, "report", path, "--plot", tmp_path / name) == 0
    assert (tmp_path / name).stat().st_size > 5000


def test_a_picture_without_times_or_roofs_is_an_error(tmp_path):
    ran(ask(), DEFAULT)
    points = [point(line) for line in report.record() if line["event"] == "kernel"]
    plot(tmp_path / "a.png", points, None)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("missing", ["key", "kernel"])
def test_an_event_without_sizes_is_drawn(missing):
    ran(ask(), DEFAULT)
    event = report.record()[1]
    del event[missing]
    with pytest.raises(ValueError, match=missing):
        point(event)


def test_tuning_without_a_gpu_is_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("turnout.tune.command.visible_gpus", lambda: ())
    monkeypatch.setattr("turnout.tune.command.interpreting", lambda: False)
    assert turnout(monkeypatch, "tune", "--shape", "qwen3-30b") == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["here"], "--from-reports"),
        (["--emit", "x.json"], "--from-reports"),
        (["--onto", "x.json"], "--onto without --from-reports"),
        (["--from-reports", "nowhere", "--emit", "x.json"], "does not exist"),
        (["--from-reports", "."], "--emit"),
        (["--from-reports", ".", "--emit", "x.json", "--onto", "y.json"], "--onto is y.json"),
        (["--from-reports", ".", "--emit", "x.json", "--shape", "tiny"], "without a search"),
    ],
)
def test_a_mistake_about_reports_starts_the_search(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert turnout(monkeypatch, "tune", *arguments) == 2
    assert text in capsys.readouterr().err


def test_reports_of_several_folders_are_one_argument(tmp_path, monkeypatch, capsys):
    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two")
    emit = tmp_path / "h100.json"
    assert turnout(monkeypatch, "tune", "--from-reports", one, two, "--emit", emit) == 0
    assert "2 reports" in capsys.readouterr().out
    assert len(json.loads(emit.read_text())["entries"]) == 1


def test_a_shipped_table_is_no_start_on_the_command_line(tmp_path, monkeypatch, capsys):
    """What the first command made is the second one's start, and its target."""
    run, emit, out = a_run(tmp_path / "run"), tmp_path / "h100.json", tmp_path / "out.json"
    assert turnout(monkeypatch, "tune", "--from-reports", run, "--emit", emit) == 0
    before = emit.read_bytes()
    arguments = ("--from-reports", run, "--onto", emit, "--emit", emit, "--json", out)
    assert turnout(monkeypatch, "tune", *arguments) == 0
    assert emit.read_bytes() == before
    assert json.loads(out.read_text())["onto"] == str(emit)
    assert "onto 1 configs" in capsys.readouterr().out


def test_a_named_shape_can_not_be_tuned():
    for shape in SHAPES:
        (plain, *_) = layers_named(shape.name)
        sizes = (plain.tokens, plain.hidden, plain.intermediate, plain.experts, plain.top_k)
        assert sizes == (
            shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k,
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected one of"):
        layers_named("gpt-5")


LIGHT = """
import sys
from turnout import cli
sys.argv = ["turnout", "report", sys.argv[1]]
try:
    cli.main()
except SystemExit as end:
    assert end.code == 0
assert not {"transformers", "peft", "matplotlib", "triton"} & set(sys.modules)
"""


def test_reading_a_report_needs_more_than_the_base(tmp_path):
    a_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
