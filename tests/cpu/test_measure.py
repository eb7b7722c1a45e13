"""The clock counts what it should: the timed calls, not the warm-up, and each call by itself."""

import time

import pytest
import torch

from turnout import measure
from turnout.measure import host_seconds, seconds

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when the test says so: a list whose sum is the time."""
    ticks = [100.0]
    monkeypatch.setattr(measure, "perf_counter", lambda: sum(ticks))
    return ticks


def test_warm_up_is_not_in_the_result(clock):
    durations = iter([50.0, 50.0, 3.0, 1.0, 2.0, 5.0, 4.0])
    timing = seconds(lambda: clock.append(next(durations)), device=CPU, warmup=2, repeats=5)
    assert next(durations, None) is None
    assert timing.repeats == 5
    assert (timing.low, timing.median, timing.high) == pytest.approx((1.8, 3.0, 4.2))


def test_one_slow_call_does_not_move_the_median(clock):
    durations = iter([1.0, 1.0, 1.0, 1.0, 1000.0])
    timing = seconds(lambda: clock.append(next(durations)), device=CPU, warmup=0, repeats=5)
    assert timing.median == timing.low == pytest.approx(1.0)


def test_a_single_repeat_has_quantiles(clock):
    timing = seconds(lambda: clock.append(0.25), device=CPU, warmup=0, repeats=1)
    assert timing.low == timing.median == timing.high == pytest.approx(0.25)


def test_time_between_calls_is_not_counted(clock, monkeypatch):
    """The clock is read right around the call."""
    monkeypatch.setattr(measure, "perf_counter", lambda: (clock.append(0.0), sum(clock))[1])
    calls = []

    def work():
        calls.append(len(clock))
        clock.append(2.0)

    assert seconds(work, device=CPU, warmup=0, repeats=3).median == pytest.approx(2.0)
    # Readings before and after each of three calls, and nothing else.
    assert len(clock) == 1 + 3 * (2 + 1)


def test_a_real_clock_runs_in_seconds():
    timing = seconds(lambda: time.sleep(0.02), device=CPU, warmup=0, repeats=3)
    assert 0.02 <= timing.low <= timing.median <= timing.high < 2.0


def test_an_error_of_the_work_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        seconds(lambda: 1 / 0, device=CPU, warmup=0, repeats=1)


@pytest.mark.parametrize(
    ("warmup", "repeats", "message"),
    [(-1, 1, "warmup is -1"), (0, 0, "repeats is 0"), (0, -3, "repeats is -3")],
)
def test_counts_out_of_range_are_clear_errors(warmup, repeats, message):
    calls = []
    with pytest.raises(ValueError, match=message):
        seconds(lambda: calls.append(1), device=CPU, warmup=warmup, repeats=repeats)
    assert not calls


def test_a_gpu_that_is_not_there_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU"):
        seconds(lambda: None, device=torch.device("cuda"), warmup=0, repeats=1)


def test_the_host_waits_on_the_clock(clock, monkeypatch):
    """The GPU is waited for between calls, after few enough of them."""
    waits = []

    def wait(device):
        waits.append(len(clock))
        clock.append(1000.0)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    gpu = torch.device("cuda")
    timing = host_seconds(lambda: clock.append(2.0), device=gpu, warmup=3, repeats=20)
    assert (timing.low, timing.high, timing.repeats) == (pytest.approx(2.0), pytest.approx(2.0), 20)
    assert len(waits) == 3
    assert len(clock) == 1 + 3 + 20 + 3


def test_counts_of_the_host_clock_are_checked():
    with pytest.raises(ValueError, match="repeats is 0"):
        host_seconds(lambda: None, device=CPU, warmup=0, repeats=0)
