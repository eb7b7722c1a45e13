"""The benchmark of the host's cost counts, and knows what is too much."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import host_cost as bench

from turnout.measure import Timing


def row(**values: object) -> bench.Row:
    base = {"shape": "qwen3-30b", "tokens": 4, "mode": "fwd", "launches": 8, "host_us": 149.0}
    base |= values
    beyond = base["host_us"] - 15 * base["launches"]
    return bench.Row("abc", "gpu", "2", "3", **base, beyond_us=beyond)


@pytest.mark.parametrize(("host", "passed"), [(149.0, True), (150.0, True), (150.1, False)])
def test_the_limit_is_another_one(host: float, passed: bool) -> None:
    (must,) = bench.demands([row(host_us=host)])
    assert must.passed == passed
    assert must.limit == 30


def test_plain_pytorch_is_judged_by_launches() -> None:
    assert bench.demands([row(launches=0)]) == []


def test_the_command_measures_and_appends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "host.csv"
    words = ["--shapes", "tiny", "--rounds", "2", "--repeats", "3", "--device", "cpu"]
    words += ["--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--commit", "abc"])
    for times in (1, 2):
        assert bench.main() == 0
        assert len(bench.TABLE.read(out)) == 2 * times
    found = bench.TABLE.read(out)
    assert [(r.shape, r.mode, r.launches) for r in found[:2]] == [
        ("tiny", "fwd", 0),
        ("tiny", "lora16", 0),
    ]
    assert all(r.host_us > 0 and r.beyond_us == r.host_us for r in found)
    assert "2 rows in" in capsys.readouterr().out


def test_a_slow_moment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least median of the rounds is the host's; the others are its neighbours'."""
    seen = iter([5e-6, 9e-6, 4e-6, 2e-6, 7e-6, 3e-6])  # fwd and lora16, in turn
    timed = lambda run, **_: Timing(median=next(seen), low=0.0, high=1.0, repeats=1)  # noqa: E731
    monkeypatch.setattr(bench, "host_seconds", timed)
    out = tmp_path / "host.csv"
    words = ["--shapes", "tiny", "--rounds", "3", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--commit", "abc"])
    assert bench.main() == 0
    assert [r.host_us for r in bench.TABLE.read(out)] == [4.0, 2.0]


def test_a_forward_for_training_keeps_nothing() -> None:
    out = bench.forward("tiny", 4, "lora16", torch.device("cpu"))()
    assert isinstance(out, torch.Tensor)
    assert out.requires_grad
    assert not bench.forward("tiny", 4, "fwd", torch.device("cpu"))().requires_grad
