"""A back end that was named is refused before work, and not where it may still be possible."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tuning_cases import gpu
from turnout import Unsupported
from turnout.bench import command
from turnout.bench.command import BenchConfig
from turnout.experts import early, gemm
from turnout.experts.early import DTYPES, check_possible, dtypes_of, places_of
from turnout.experts.ops import check_backend

CPU, META = torch.device("cpu"), torch.device("meta")
HOPPER, AMPERE = gpu(90), gpu(80)
TURING = replace(AMPERE, name="sm_75", arch=75)


@pytest.fixture
def machine(monkeypatch):
    """A machine with Triton and these GPUs."""

    def with_gpus(*gpus):
        monkeypatch.setattr(early, "visible_gpus", lambda: gpus)
        for module in (gemm.gemm_hopper, gemm.gemm_triton):
            monkeypatch.setattr(module, "INSTALLED", True)
            monkeypatch.setattr(module, "interpreting", lambda: False)

    return with_gpus


def on(device: str, dtype: torch.dtype):
    """What is asked of weights on a GPU that is not there."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(
    ("backend", "gpus", "words"),
    [
        ("hopper", (), r"on this machine: needs sm_90 \(cpu\)\. Use backend='auto'"),
        ("triton", (), r"needs an NVIDIA GPU \(cpu\)"),
        ("hopper", (AMPERE,), r"needs sm_90, this is sm_80 \(sm_80\); needs sm_90 \(cpu\)"),
        ("triton", (TURING,), r"needs sm_80 or newer, this is sm_75"),
    ],
)
def test_a_back_end_that_no_device_here_runs_is_taken(machine, backend, gpus, words):
    machine(*gpus)
    with pytest.raises(Unsupported, match=words):
        check_backend(backend)


@pytest.mark.parametrize(
    ("backend", "gpus"),
    [
        ("hopper", (HOPPER,)),
        ("hopper", (AMPERE, HOPPER)),
        ("triton", (TURING, AMPERE)),
        ("torch", ()),
        ("auto", ()),
    ],
)
def test_a_back_end_that_one_device_here_runs_is_refused(machine, backend, gpus):
    machine(*gpus)
    check_backend(backend)


def test_the_reason_is_another_than_that_of_the_first_step(machine):
    machine()
    problem = early._any_problem(torch.float32)
    with pytest.raises(Unsupported) as late:
        gemm.select(problem, early.device_of(CPU), "hopper")
    reason = str(late.value).rpartition("hopper: ")[2]
    with pytest.raises(Unsupported, match=reason):
        check_backend("hopper")


def test_weights_that_may_move_count_as_they_lie(machine):
    machine(AMPERE, HOPPER)
    for device in (CPU, META):
        assert [place.arch for place in places_of(device)] == [80, 90, None]
        for dtype in DTYPES:
            assert dtypes_of(torch.empty(2, dtype=dtype, device=device)) == DTYPES


def test_weights_on_a_gpu_count_as_if_they_could_move(machine, monkeypatch):
    machine(AMPERE, HOPPER)
    monkeypatch.setattr(early, "device_of", lambda device: (AMPERE, HOPPER)[device.index])
    assert places_of(torch.device("cuda:0")) == (AMPERE,)
    assert places_of(torch.device("cuda:1")) == (HOPPER,)
    with pytest.raises(Unsupported, match=r"these experts: needs sm_90, this is sm_80 \(sm_80\)\."):
        check_possible("hopper", "these experts", places_of(torch.device("cuda:0")))


@pytest.mark.parametrize(
    ("dtype", "runs"), [(torch.bfloat16, True), (torch.float32, True), (torch.float64, False)]
)
def test_autocast_is_forgotten_or_thought_to_change_float64(machine, dtype, runs):
    """Hopper takes float16 and bfloat16: float32 weights run there under autocast."""
    dtypes = dtypes_of(on("cuda:0", dtype))
    assert dtypes[0] == dtype
    if runs:
        check_possible("hopper", "these experts", [HOPPER], dtypes)
    else:
        with pytest.raises(Unsupported, match="takes float16 and bfloat16, not float64"):
            check_possible("hopper", "these experts", [HOPPER], dtypes)


def test_a_benchmark_begins_before_it_is_refused(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("something was measured"))
    path = tmp_path / "rows.csv"
    with pytest.raises(Unsupported, match="backend='hopper' can not run these shapes: needs sm_90"):
        command.main(BenchConfig(backend="hopper", device="cpu", csv=path))
    assert not path.exists()
