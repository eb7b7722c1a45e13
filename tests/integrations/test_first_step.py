"""The benchmark of the first step starts two processes with one cache, and knows what is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import first_step as bench


@pytest.mark.parametrize(
    ("cold", "warm", "timed", "passed"),
    [
        (15.0, 3.0, 0, [True, True, True]),
        (15.1, 3.1, 0, [False, False, True]),
        (1.0, 1.0, 1, [True, True, False]),
    ],
)
def test_the_limit_is_another_one(cold: float, warm: float, timed: int, passed: list[bool]) -> None:
    first, second = {"seconds": cold, "timed": 0}, {"seconds": warm, "timed": timed}
    assert [must.passed for must in bench.demands(first, second)] == passed


def test_both_processes_have_a_cache_of_their_own_or_an_old_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders: list[Path] = []

    def note(device: str, folder: Path) -> dict[str, float]:
        assert not any(folder.iterdir())
        folders.append(folder)
        return {"seconds": 1.0, "timed": 0}

    monkeypatch.setattr(bench, "in_a_process", note)
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu"])
    assert bench.main() == 0
    assert folders[0] == folders[1]
    assert capsys.readouterr().out.count("pass") == 3


def test_a_process_does_not_train(tmp_path: Path) -> None:
    found = bench.in_a_process("cpu", tmp_path)
    assert found["timed"] == 0
    assert 0 < found["seconds"] < 60
