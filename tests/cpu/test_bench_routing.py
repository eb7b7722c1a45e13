"""The benchmark of routing times only what is right, judges what was asked, and loses no row."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

CPU = torch.device("cpu")
HEADER = (
    "commit,device,torch,triton,shape,tokens,experts,top_k,rule,mode,provider,ms,graph_ms,"
    "launches,rel_err"
)
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import routing  # noqa: E402
import routing_cases as cases  # noqa: E402

SHAPES = [shape.name for shape in cases.SHAPES]


def row(**values):
    base = {
        "commit": "abc",
        "device": "NVIDIA H100 80GB HBM3",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "shape": "qwen3-30b",
        "tokens": 16384,
        "experts": 128,
        "top_k": 8,
        "rule": "softmax",
        "mode": "fwd",
        "provider": "turnout",
        "ms": 0.05,
        "graph_ms": 0.03,
        "launches": 2,
        "rel_err": 1e-3,
    }
    return routing.Row(**base | values)


def musts(*rows):
    return {must.name: must for must in routing.musts(rows)}


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_stock_path_or_the_definition_is_red(name, mode):
    work = cases.make_work(cases.shape_named(name), 64, CPU)
    for provider in ("hf", "rules"):
        error, reason = cases.verdict(work, cases.Step(work, provider, mode)(), is_ours=False)
        assert reason is None
        assert error < 1e-6
    found = cases.Step(work, "rules", mode)()
    assert cases.verdict(work, found, is_ours=True)[1] is None


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("experts", lambda t: (t + 1) % 128, "tokens go to other experts"),
        ("experts", lambda t: t[:-1], "experts have shape (63, 8)"),
        ("order", lambda t: t.flip(0), "not in the order of a stable sort"),
        ("ends", lambda t: t + 1, "an expert has other rows"),
        ("weights", lambda t: t * 1.01, "weights: max error"),
        ("weights", lambda t: t * torch.nan, "weights: 512 of 512 elements are not finite"),
        ("dlogits", lambda t: t.roll(1, 0), "dlogits: max error"),
    ],
)
def test_a_wrong_result_is_green(name, change, words):
    work = cases.make_work(cases.shape_named("qwen3-30b"), 64, CPU)
    found = cases.Step(work, "rules", "fwd+bwd")()
    found[name] = change(found[name])
    assert words in cases.verdict(work, found, is_ours=True)[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.roll(1), "rows are not sorted by expert"),
        (lambda t: torch.zeros_like(t), "no permutation"),
    ],
)
def test_a_peers_sort_is_not_looked_at(change, words):
    work = cases.make_work(cases.shape_named("gptoss-20b"), 64, CPU)
    found = cases.Step(work, "hf", "fwd")()
    found["order"] = change(found["order"])
    assert words in cases.verdict(work, found, is_ours=False)[1]


def test_an_equal_score_at_the_kth_place_is_an_error():
    """The other of two equal logits is as right; a smaller one is not."""
    work = cases.make_work(cases.shape_named("gptoss-20b"), 64, CPU)
    ordered = work.logits.argsort(1, descending=True)
    work.logits[0, ordered[0, 4]] = work.logits[0, ordered[0, 3]]
    found = cases.Step(work, "hf", "fwd")()
    for expert, strays in ((ordered[0, 3], None), (ordered[0, 4], None), (ordered[0, 9], None)):
        found["experts"][0] = torch.cat([ordered[0, :3], expert[None]])
        assert cases._wrong_choice(work, found["experts"]) == strays
    found["experts"][1, 3] = ordered[1, 9]
    assert cases._wrong_choice(work, found["experts"]) == "1 of 64 tokens go to other experts"


def test_speed_is_against_the_stock_path():
    hf = [row(provider="hf", ms=0.25), row(provider="hf", mode="fwd+bwd", ms=0.29)]
    found = musts(*hf, row(), row(mode="fwd+bwd", ms=0.1, launches=3))
    forward, both = (found[f"qwen3-30b {mode}: speed / hf"] for mode in cases.MODES)
    assert (forward.got, forward.limit, forward.passed) == (pytest.approx(5.0), 5.0, True)
    assert (both.got, both.limit, both.passed) == (pytest.approx(2.9), 3.0, False)
    assert found["qwen3-30b fwd: launches"].passed
    assert found["qwen3-30b fwd+bwd: launches"].passed
    assert found["deepseek-v3 fwd: speed / hf"].got is None
    assert not found["deepseek-v3 fwd: speed / hf"].passed


def test_other_tokens_older_rows_or_graphs_count():
    rows = [row(ms=0.01), row(provider="hf", ms=0.2), row(tokens=4096, ms=0.001), row(ms=0.05)]
    assert musts(*rows)["qwen3-30b fwd: speed / hf"].got == pytest.approx(4.0)


def test_a_red_gate_or_a_third_launch_passes():
    found = musts(row(launches=3), row(mode="fwd+bwd", ms=None, graph_ms=None, launches=None))
    assert not found["qwen3-30b fwd: launches"].passed
    red = found["red gates of ours (law 2)"]
    assert (red.got, red.passed, red.note) == (1.0, False, "qwen3-30b 16384 fwd+bwd")


def test_rows_are_lost_or_changed(tmp_path):
    path = tmp_path / "routing_h100.csv"
    rows = [row(), row(provider="hf", graph_ms=None, launches=None, rule="a, b")]
    for one in rows:
        routing.Record(path).add(one)
    assert path.read_text().splitlines()[0] == HEADER
    assert routing.read(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_text("commit,ms\n")
    with pytest.raises(ValueError, match="Name another file"):
        routing.Record(path)


def test_the_script_does_not_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.csv"
    flags = ["--device", "cpu", "--tokens", "64", "--repeats", "1", "--commit", "x"]
    monkeypatch.setattr(sys, "argv", ["routing.py", *flags, "--out", str(path)])
    assert routing.main() == 1, "nothing was measured at T = 16384"
    shown = capsys.readouterr().out
    assert "turnout does not run: needs an NVIDIA GPU" in shown
    assert "0 failed" in shown
    rows = routing.read(path)
    assert len(rows) == len(SHAPES) * 2 * 2
    assert {(r.provider, r.launches, r.graph_ms) for r in rows} == {
        ("hf", None, None),
        ("rules", None, None),
    }
    monkeypatch.setattr(sys, "argv", ["routing.py", *flags, "--out", str(path), "--judge"])
    rows = [row(commit="x", shape=name, mode=mode) for name, mode in demanded()]
    rows = [replace(one, launches=2 + (one.mode != "fwd")) for one in rows]
    for one in (*rows, *(replace(one, provider="hf", ms=0.5) for one in rows)):
        routing.Record(path).add(one)
    assert routing.main() == 0
    assert "MISS" not in capsys.readouterr().out


def demanded():
    return [(name, mode) for name in routing.DEMANDED for mode in cases.MODES]
