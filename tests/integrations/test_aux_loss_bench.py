"""The benchmark of the load-balancing loss judges what it times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import aux_loss as bench


def test_the_command_measures_judges_and_appends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "aux.csv"
    words = ["--tokens", "32,64", "--layers", "2", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["aux_loss.py", *words, "--commit", "abc", "--out", str(out)])
    bench.main()  # 1 where the CPU was slower by chance
    rows = bench.TABLE.read(out)
    cases = [(tokens, mask) for tokens in (32, 64) for mask in ("no", "yes")]
    assert [(r.tokens, r.mask, r.provider) for r in rows] == [
        (*case, name) for case in cases for name in ("hf", "turnout")
    ]
    assert all(row.ms > 0 and row.host_ms > 0 and 0 < row.error < 1e-5 for row in rows)
    judged = [line for line in capsys.readouterr().out.splitlines() if "error / limit" in line]
    assert len(judged) == 4
    assert all(line.startswith("pass") for line in judged)


def test_another_loss_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    far = bench.spaced(16, 2, torch.device("cpu"))
    truth = bench.truth_of(far, None)
    assert bench.difference(bench.step_of("turnout", far, None)(), truth) < 1e-5
    monkeypatch.setitem(bench.PROVIDERS, "turnout", lambda *args: 1.01 * bench.balancing(*args))
    assert bench.difference(bench.step_of("turnout", far, None)(), truth) > 5e-3


def test_the_truth_is_not_transformers_loss() -> None:
    far = bench.spaced(64, 3, torch.device("cpu"))
    for mask in (None, bench.make_mask(64, 32, torch.device("cpu"))):
        truth, stock = bench.truth_of(far, mask), bench.step_of("hf", far, mask)()
        assert bench.difference(stock, truth) < 1e-5


def test_a_slower_or_a_wrong_one_passes() -> None:
    def row(provider: str, ms: float, error: float) -> bench.Row:
        return bench.Row("a", "g", "2", "5", 48, 128, 8, 8192, "no", provider, ms, ms, None, error)

    stock = row("hf", 4.0, 1e-6)
    judged = [m.passed for m in bench.demands([stock, row("turnout", 3.0, 1e-6)])]
    assert judged == [True, True]
    for bad, expected in (
        (row("turnout", 5.0, 1e-6), [True, False]),
        (row("turnout", 3.0, 1e-3), [False, True]),
    ):
        assert [m.passed for m in bench.demands([stock, bad])] == expected
