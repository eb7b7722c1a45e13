"""The benchmark of the analytic defaults judges the last search of every problem, and says when
there is none."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tuning_cases import GRAM, NARROW, PLAIN, ask, gram, rows, search_of
from turnout.tuning import journal, report
from turnout.tuning.report import Event

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import defaults


def searched(problem, default_s, winner_s):
    config = gram(16, 64) if problem is GRAM else rows(128)
    search = replace(search_of({config: winner_s}, config), default_s=default_s)
    return Event(ask=ask(problem), config=config, source="tuned", search=search)


def record(path, *events):
    head = {"event": "head", "format": report.FORMAT}
    journal.append(path, [head, *(event.to_dict() for event in events)])
    return path


@pytest.mark.parametrize(("slowest", "status"), [(1.3, 0), (1.4, 1)])
def test_defaults_that_are_too_slow_pass_or_others_fail(tmp_path, capsys, slowest, status):
    found = record(
        tmp_path / "record.jsonl",
        searched(PLAIN, 1.0, 1.0),
        searched(NARROW, slowest, 1.0),
        searched(GRAM, 2.0, 2.0),
        replace(searched(PLAIN, 9.0, 1.0), search=None),
    )
    assert defaults.main([str(found)]) == status
    mean = math.exp(math.log(slowest) / 3)
    shown = capsys.readouterr().out
    assert f"{mean:.3f} <= 1.1" in shown
    assert "3 problems" in shown
    assert shown.index("131072 x 16 x 2048") < shown.index("131072 x 1536 x 2048")


def test_an_older_search_of_a_problem_counts(tmp_path, capsys):
    path = tmp_path / "record.jsonl"
    record(path, searched(PLAIN, 9.0, 1.0))
    assert defaults.main([str(path)]) == 1
    record(path, searched(PLAIN, 1.05, 1.0))
    assert defaults.main([str(path)]) == 0


def test_a_record_without_searches_passes(tmp_path, capsys):
    path = record(tmp_path / "record.jsonl", replace(searched(PLAIN, 1.0, 1.0), search=None))
    assert defaults.main([str(path)]) == 2
    assert "no searches" in capsys.readouterr().err
    assert defaults.main([str(tmp_path / "nothing")]) == 2
