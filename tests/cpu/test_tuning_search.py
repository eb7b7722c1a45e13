"""The search for a config, with a clock that is told what to say; and tuning at first use."""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tuning_cases import GATED, PLAIN, FakeTrial, ask, clock, entry, ran, rows
from turnout.experts import triton_tuning
from turnout.experts.operands import Activate, Operand
from turnout.experts.triton_tuning import GemmTrial
from turnout.launch import Launch
from turnout.ragged import sort_by_expert
from turnout.specs import Activation, GemmProblem
from turnout.tuning import cache
from turnout.tuning.cache import Store
from turnout.tuning.candidates import candidates
from turnout.tuning.first_use import Tuner, current, start, stop, tuning
from turnout.tuning.search import Effort, IncumbentFails, OutOfTime, search

DEFAULT, FAST, WRONG, SLOW = rows(128), rows(256), rows(64), rows(128, stages=4)
LIST = (FAST, WRONG, SLOW)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "cache"


def found(times, trial=None, *, incumbent=DEFAULT, spread=0.0, listed=LIST, **options):
    trial = trial or FakeTrial()
    return search(
        ask(), incumbent, DEFAULT, trial, Effort(), listed=listed, clock=clock(times, spread),
        **options,
    )  # fmt: skip


def test_a_slower_config_wins():
    result = found({DEFAULT: 0.5, FAST: 0.4, SLOW: 0.6, WRONG: 0.7})
    assert result.config == FAST
    assert result.search.winner_s == 0.4
    assert result.search.runner_up_s == result.search.incumbent_s == 0.5
    assert result.search.tried == 4
    assert dict(result.search.times)[SLOW] == 0.6
    assert (result.key, result.rows, result.device) == (ask().key, 131072, "sm_90")


def test_candidates_wait_for_each_others_compilation(monkeypatch: pytest.MonkeyPatch):
    trial = FakeTrial()
    found({}, trial)
    assert trial.compiled == [DEFAULT, FAST, WRONG, SLOW]
    pytest.importorskip("triton")
    given: list[object] = []
    monkeypatch.setattr(triton_tuning, "fill_cache", given.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    launches = {config: Launch(None, (1, 1, 1), (), config.to_dict(), 4) for config in LIST}

    def prepare(config):
        if config == WRONG:
            raise RuntimeError("does not fit")
        return lambda: launches[config](torch.zeros(4))

    for device in ("cpu", "cuda"):
        real = GemmTrial(torch.device(device), prepare, None, torch.float32)
        real.compile([*LIST, FAST])
    assert given == [[(launches[FAST], (torch.float32,)), (launches[SLOW], (torch.float32,))]]


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_a_truth_takes_four_times_the_memory_of_a_result(dtype, kept):
    """Of mixtral at 65536 tokens the truth alone would take 45 GB in float64."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    ragged = sort_by_expert(torch.arange(12).reshape(12, 1) % 3, 3)
    x, w, out = normal(12, 8), normal(3, 6, 8), normal(3, 6, 8)
    problem = GemmProblem(
        ragged="m", rows=12, experts=3, n=6, k=8, dtype=str(dtype), weight_dtype=str(dtype)
    )
    a, b, epilogue = Operand(x), Operand(normal(12, 6)), Activate(Activation(), keep_z=True)
    nothing = lambda config: lambda: None  # noqa: E731
    trials = [
        triton_tuning.rows_trial(
            problem, a, w, ragged, dtype, None, None, epilogue, 1.0, nothing
        ),
        triton_tuning.gram_trial(
            replace(problem, ragged="k"), b, a, ragged, out, dtype, nothing
        ),
    ]  # fmt: skip
    for trial in trials:
        truth, allowed = trial._judge
        assert {value.dtype for value in truth.values()} == {kept}
        assert all(0 < rms < 0.01 for _, rms in allowed.values())
        right = {name: value.to(dtype) for name, value in truth.items()}
        assert trial.rejects(right) is None
        name = next(iter(right))
        right[name][2] *= 1.05
        assert name in str(trial.rejects(right))


def test_a_wrong_config_wins_because_it_is_fast():
    trial = FakeTrial(wrong={WRONG: "out: max error 3"})
    result = found({DEFAULT: 0.5, WRONG: 0.1, FAST: 0.4}, trial)
    assert result.config == FAST
    assert result.search.failed == ((WRONG, "wrong result: out: max error 3"),)
    assert WRONG not in dict(result.search.times)
    assert trial.ran.count(WRONG) == 1  # to look at, never for a time


def test_a_config_that_does_not_run_ends_the_search():
    trial = FakeTrial(raises={FAST: RuntimeError("out of resource: shared memory\nHint")})
    result = found({DEFAULT: 0.5, SLOW: 0.4}, trial)
    assert result.config == SLOW
    assert result.search.failed == ((FAST, "RuntimeError: out of resource: shared memory"),)
    assert result.search.tried == 3


def test_a_bug_of_ours_is_counted_as_a_config_that_fails():
    trial = FakeTrial(raises={FAST: KeyError("BLOCK_N")})
    with pytest.raises(KeyError):
        found({}, trial)


def test_no_memory_is_counted_against_a_config():
    trial = FakeTrial(raises={FAST: torch.OutOfMemoryError("CUDA out of memory")})
    with pytest.raises(torch.OutOfMemoryError):
        found({}, trial)


def test_noise_changes_the_config():
    times = {DEFAULT: 0.50, FAST: 0.49}
    assert found(times, spread=0.02).config == DEFAULT
    assert found(times, spread=0.002).config == FAST
    assert found(times, spread=0.02).search.winner_s == 0.50


def test_the_shipped_config_does_not_stay_inside_the_noise():
    times = {DEFAULT: 0.6, SLOW: 0.50, FAST: 0.49}
    result = found(times, incumbent=SLOW, spread=0.02)
    assert result.config == SLOW
    assert (result.search.incumbent_s, result.search.default_s) == (0.50, 0.6)


def test_a_default_that_fails_stops_a_search_with_a_shipped_config():
    trial = FakeTrial(wrong={DEFAULT: "wrong"})
    result = found({SLOW: 0.5, FAST: 0.4}, trial, incumbent=SLOW)
    assert result.config == FAST
    assert result.search.default_s is None


def test_an_incumbent_that_fails_is_replaced_in_silence():
    with pytest.raises(IncumbentFails, match="backend='torch'"):
        found({}, FakeTrial(wrong={DEFAULT: "out is not finite"}))


def test_pruned_candidates_are_run_or_not_counted():
    trial = FakeTrial()
    result = found({DEFAULT: 0.5}, trial, listed=(FAST, rows(256, warps=4)))
    assert rows(256, warps=4) not in trial.ran
    assert result.search.pruned == 1


def test_the_built_in_list_is_not_the_default():
    trial = FakeTrial()
    found({}, trial, listed=None)
    assert set(trial.ran) == {DEFAULT, *candidates(ask())[0]}


def test_only_the_best_are_timed_again():
    trial = FakeTrial()
    kept = candidates(ask())[0]
    times = {config: 1 + number for number, config in enumerate(kept)}
    found(times | {DEFAULT: 99.0}, trial, listed=None)
    counts = {config: trial.ran.count(config) for config in kept}
    again = {config for config, count in counts.items() if count == 3}
    assert again == {*kept[:3], DEFAULT}
    assert set(counts.values()) == {2, 3}


def test_the_deadline_is_not_kept():
    with pytest.raises(OutOfTime):
        search(
            ask(), DEFAULT, DEFAULT, FakeTrial(), Effort(deadline=time.monotonic() - 1),
            clock=clock({}),
        )  # fmt: skip


def test_nobody_is_told_what_is_tried():
    told = []
    found({}, on_trial=lambda config, number, count: told.append((config, number, count)))
    assert told == [(c, n, 4) for n, c in enumerate((DEFAULT, *LIST))]


# at first use


def tuner(times=None, **options) -> Tuner:
    return Tuner(clock=clock(times or {FAST: 0.1}), **options)


def test_a_second_look_searches_again(folder):
    one = tuner()
    assert one.wants(ask())
    one.tune(ask(), DEFAULT, FakeTrial())
    assert not one.wants(ask())
    assert not one.wants(ask(replace(PLAIN, rows=120_000)))  # the same bucket
    assert one.wants(ask(GATED))
    assert ran(ask(), DEFAULT) == FAST
    assert [e.config for e in one.entries] == [FAST]
    assert not tuner().wants(ask())  # another one finds it in the cache


def test_a_stored_config_of_another_bucket_is_the_answer():
    cache.store().put([entry(ask(replace(PLAIN, rows=65536)), SLOW)])
    one = tuner()
    assert one.wants(ask())
    one.tune(ask(), DEFAULT, FakeTrial())
    assert one.entries[0].search.incumbent_s == 1.0  # and is what has to be beaten
    assert one.entries[0].search.default_s == 1.0


def test_turnout_tune_takes_a_shipped_config_for_an_answer(tmp_path):
    from turnout.tuning import table

    (tmp_path / "shipped").mkdir()
    table.write(tmp_path / "shipped" / "a.json", table.Table((entry(ask(), SLOW),)))
    assert not tuner().wants(ask())
    assert tuner(keep_shipped=False).wants(ask())


def test_a_shipped_list_is_not_what_is_tried(monkeypatch):
    monkeypatch.setattr(Store, "listed", lambda self, question: (SLOW,))
    trial = FakeTrial()
    tuner().tune(ask(), DEFAULT, trial)
    assert set(trial.ran) == {DEFAULT, SLOW}


@pytest.mark.parametrize(
    ("trial", "text"),
    [
        (FakeTrial(raises={DEFAULT: torch.OutOfMemoryError("no")}), "no memory"),
        (FakeTrial(wrong={DEFAULT: "out is not finite"}), "not finite"),
    ],
    ids=["memory", "gate"],
)
def test_a_search_that_fails_stops_the_training(trial, text, caplog):
    one = tuner()
    with caplog.at_level(logging.WARNING):
        one.tune(ask(), DEFAULT, trial)
    assert text in caplog.text
    assert not one.wants(ask())  # nor is it tried at every step
    assert ran(ask(), DEFAULT) == DEFAULT
    assert len(one.broken) == ("finite" in text)
    assert len(one.no_memory) == ("memory" in text)


def test_a_budget_that_is_spent_goes_on_being_spent(caplog):
    one = tuner(seconds_left=0.0)
    with caplog.at_level(logging.WARNING):
        one.tune(ask(), DEFAULT, FakeTrial())
    assert one.is_out_of_time
    assert "out of time" in caplog.text
    assert not one.wants(ask(GATED))


def test_waiting_for_another_process_is_free_or_without_end(folder, monkeypatch):
    """A budget below zero would be no limit for the lock."""
    waited = []

    @contextmanager
    def searching(self, question, seconds):
        waited.append(seconds)
        time.sleep(0.1)
        yield

    monkeypatch.setattr(Store, "searching", searching)
    one = tuner(seconds_left=0.15)
    for number in range(4):
        one.tune(ask(replace(PLAIN, n=256 * (1 + number))), DEFAULT, FakeTrial())
    assert waited[0] == 0.15
    assert all(0 <= seconds < 0.06 for seconds in waited[1:])
    assert one.is_out_of_time
    two = tuner(until=time.monotonic() - 1)
    two.tune(ask(), DEFAULT, FakeTrial())
    assert (waited[-1], two.is_out_of_time) == (0, True)


def test_no_limit_is_a_limit():
    one = tuner(seconds_left=None)
    one.tune(ask(), DEFAULT, FakeTrial())
    assert one._left == math.inf
    assert one.entries


def test_another_process_has_searched_meanwhile_and_it_is_done_again(folder):
    one, trial = tuner(), FakeTrial()
    assert one.wants(ask())
    Store(folder, cache.SHIPPED).put([entry(ask(), SLOW)])
    one.tune(ask(), DEFAULT, trial)
    assert trial.ran == []
    assert ran(ask(), DEFAULT) == SLOW


def test_a_graph_is_captured_while_something_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuner().wants(ask())


class Model:
    """Anything that a weak reference can point to."""


def test_tuning_goes_on_without_a_model_that_asked_for_it():
    assert current() is None
    one, two = Model(), Model()
    start(one)
    start(two)
    running = current()
    assert running is not None
    assert running.keep_shipped
    stop(one)
    assert current() is running
    del two
    assert current() is None
    start(one)
    assert current() is running  # what it has searched is known
    stop(one)
    assert current() is None
    stop(one)  # twice is nothing


def test_turnout_tune_is_asked_after_a_patched_model():
    one, model = tuner(), Model()
    start(model)
    try:
        with tuning(one) as inside:
            assert current() is inside is one
        assert current() is not one
    finally:
        stop(model)


def test_recorded_passes_go_on_with_their_old_configs(monkeypatch):
    from turnout import replay

    monkeypatch.setitem(replay._programs, "a pass", "an obstacle")
    model = Model()
    start(model)
    stop(model)
    assert "a pass" not in replay._programs


def test_no_tuner_times_something(monkeypatch):
    """Law 9: without being asked for, a config is looked up and nothing is run."""
    monkeypatch.setattr("turnout.measure.seconds", lambda *a, **k: pytest.fail("timed"))
    assert current() is None
    assert ran(ask(), DEFAULT) == DEFAULT
