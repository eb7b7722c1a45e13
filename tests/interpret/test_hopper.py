"""The Hopper kernels in the emulator, the rest of the step in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import gluon_emulator
import pytest
import torch
from gluon_emulator import emulate

import turnout
from problems import (
    GPT_OSS,
    Problem,
    assert_same,
    check,
    random_problem,
    run,
    spaced,
    undefined_where,
)
from turnout import Activation
from turnout.device import device_of
from turnout.experts import gemm, gemm_hopper, hopper_config
from turnout.ragged import rows as ragged_rows
from turnout.report.roofline import point
from turnout.testing import poison_empty
from turnout.tuning import report

BASE: dict[str, Any] = {
    "tokens": 150,
    "num_experts": 3,
    "hidden": 128,
    "intermediate": 64,
    "rank_up": 16,
    "rank_down": 16,
    "dtype": torch.float16,
    "lora_dtype": torch.float32,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several column tiles": {"hidden": 320, "intermediate": 192, "tokens": 80},
    "no adapters": {"rank_up": 0, "rank_down": 0},
    "ranks of several steps": {"rank_up": 128, "rank_down": 33},
    "gpt-oss": {"activation": GPT_OSS, "transposed": True, "bias": True, "intermediate": 192},
    "not gated": {"activation": Activation(act="relu2", gated=False), "bias": True},
    "clamped after": {"activation": Activation(limit=0.5, limit_after=True)},
    "gelu": {"activation": Activation(act="gelu")},
    "weight on the input": {"weight_on_input": True},
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Hopper's host code on the CPU: its launches are emulated, and named here."""
    names: list[str] = []
    device = replace(device_of(torch.device("cpu")), arch=90, num_sms=2, shared_memory=232_448)
    rows, gram = gemm_hopper._rows_launch, gemm_hopper._gram_launch

    def emulated(launch: Any, *tensors: Any) -> None:
        names.append(launch.kernel.__name__)
        launch.chosen.note()  # as a launch that runs does
        emulate(launch, *tensors)

    def rows_launch(*args: Any) -> tuple[Any, int, bool]:
        launch, *more = rows(*args)
        return partial(emulated, launch), *more

    monkeypatch.setattr(gemm_hopper, "rejects", lambda problem, device: None)
    monkeypatch.setattr(gemm_hopper, "device_of", lambda where: device)
    monkeypatch.setattr(gemm_hopper, "_rows_launch", rows_launch)
    monkeypatch.setattr(gemm_hopper, "_gram_launch", lambda *args: partial(emulated, gram(*args)))
    # few rows take Hopper's tiles
    monkeypatch.setattr(gemm_hopper, "GATHERED", 0)
    monkeypatch.setattr(ragged_rows, "tile_rows_of", lambda rows, experts: 128)
    monkeypatch.setattr("turnout.experts.ops.tile_rows_of", lambda rows, experts: 128)
    for cached in (gemm._select, gemm._rows_choice, gemm._gram_choice, gemm._narrow_backend):
        cached.cache_clear()
    rows.cache_clear()
    gram.cache_clear()
    yield names
    for cached in (gemm._select, gemm._rows_choice, gemm._gram_choice, gemm._narrow_backend):
        cached.cache_clear()


def make(seed: int = 0, **changes: Any) -> Problem:
    return random_problem(seed=seed, **(BASE | changes))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_more_than_twice_as_wrong_as_eager(case: str, launches: list[str]) -> None:
    check(partial(make, **CASES[case]), backend="hopper")
    assert launches.count("rows_kernel") >= 3, launches


def test_few_rows_are_gathered_by_the_slower_kernel(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make()
    rows = problem.experts.numel() / problem.num_experts
    for least, kernels in ((rows, 4), (rows + 1, 2)):  # up and the gradient of h gather
        monkeypatch.setattr(gemm_hopper, "GATHERED", least)
        launches.clear()
        run(problem, problem.trained_by_lora, backend="hopper")
        assert launches.count("rows_kernel") == kernels


GPT_OSS_LAYER: dict[str, Any] = {"activation": GPT_OSS, "transposed": True, "bias": True}
# Problems whose last column tiles are narrow, with the columns of these: in the down projection, in
# its gradient of h and in the gradient of x, where that does not run in the portable kernel.
RESTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "64": ({"hidden": 320, "intermediate": 320}, [64, 64, 64]),
    "128": ({"hidden": 384, "intermediate": 384}, [128, 128, 128]),
    "40 of 64, in the hidden": ({"hidden": 296}, [64, 64]),
    "40 of 64, in the intermediate": ({"intermediate": 296}, [128, 64]),
    "104 of 128": ({"intermediate": 360}, [128, 128]),
    "gpt-oss, 64": (GPT_OSS_LAYER | {"hidden": 320, "intermediate": 320}, [64, 64, 64]),
    "gpt-oss, 128": (GPT_OSS_LAYER | {"hidden": 384, "intermediate": 384}, [128, 128, 128]),
    "gpt-oss, 40 of 64": (GPT_OSS_LAYER | {"hidden": 296}, [64, 64]),
    "gpt-oss, 104 of 128": (GPT_OSS_LAYER | {"intermediate": 360}, [128, 128]),
    "not gated": (
        {"activation": Activation(act="relu2", gated=False), "intermediate": 320, "bias": True},
        [128, 64, 128],
    ),
}


@pytest.mark.parametrize("case", RESTS)
def test_a_narrow_last_column_tile_gives_other_numbers(
    case: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All leaves train, so h is kept; what no tile writes is NaN."""
    rules: list[hopper_config.RowsRule] = []

    def heard(*args: Any, **kwargs: Any) -> hopper_config.RowsRule:
        rules.append(hopper_config.rows_rule(*args, **kwargs))
        return rules[-1]

    monkeypatch.setattr(gemm_hopper, "rows_rule", heard)
    changes, rests = RESTS[case]
    with poison_empty():
        check(partial(make, tokens=80, **changes), backend="hopper")
    assert [rule.rest for rule in rules if rule.epilogue != "activate"] == rests
    assert all(rule.rest == 0 for rule in rules if rule.epilogue == "activate")


def test_a_last_column_tile_has_another_width() -> None:
    expected = {256: 0, 8: 64, 64: 64, 72: 128, 384: 128, 392: 0, 511: 0, 2880: 64}
    for epilogue in (None, "activate_backward"):
        assert {n: hopper_config.rest_of(n, 256, epilogue) for n in expected} == expected
    assert not any(hopper_config.rest_of(n, 256, "activate") for n in expected)


def test_a_short_ring_gives_other_numbers(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two stages every barrier turns round several times in a tile."""

    def short(*args: Any, **kwargs: Any) -> hopper_config.RowsRule:
        return hopper_config.rows_rule(*args, **kwargs)._replace(stages=2)

    monkeypatch.setattr(gemm_hopper, "rows_rule", short)
    check(partial(make, tokens=300, hidden=320), backend="hopper")
    assert launches


def test_rows_of_other_experts_are_read(launches: list[str]) -> None:
    """One expert is empty and the last rows are dropped; memory that nobody wrote is NaN."""

    def skewed(seed: int) -> Problem:
        problem = make(seed, tokens=170, intermediate=128)
        experts = problem.experts.clone()
        experts[experts == 1] = 2
        experts[::3] = problem.num_experts
        return problem.changed(experts=experts)

    with poison_empty():
        check(skewed, backend="hopper")
    assert launches.count("gram_kernel") == 2, launches


def test_gaps_between_rows_are_read(launches: list[str]) -> None:
    problem = make()
    expected = run(problem, backend="hopper")
    usual = len(launches)
    launches.clear()
    assert_same(run(problem.changed(x=spaced(problem["x"])), backend="hopper"), expected)
    assert len(launches) == usual > 0


def test_what_nobody_defines_of_a_dropped_slot_is_read(launches: list[str]) -> None:
    problem = make()
    dropped = torch.zeros_like(problem.experts, dtype=torch.bool)
    dropped[::3] = True
    dropped[1::5, 0] = True
    garbage, clean = undefined_where(dropped, problem)
    assert_same(run(garbage, backend="hopper"), run(clean, backend="hopper"))
    assert launches


@pytest.mark.parametrize("rank", [16, 48])
def test_a_neighbours_adapter_is_read(rank: int, launches: list[str]) -> None:
    """NaN in the adapter of one expert stays there, where adapters of all lie side by side."""
    problem = make(rank_up=rank, rank_down=rank, transposed=True, activation=GPT_OSS)
    problem["b_up"][..., 1] = math.nan
    problem["a_down"][1] = math.nan
    away = problem.changed(experts=torch.where(problem.experts == 1, 0, problem.experts))
    got = run(away, ("x",), backend="hopper")
    assert all(value.isfinite().all() for value in got.values() if value is not None)
    assert launches


def test_a_stage_that_is_handed_back_too_early_goes_unnoticed(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's own test: products that are waited for one ring later."""
    waits = gluon_emulator._rows["warpgroup_mma_wait"]
    late = partial(_later, waits)
    monkeypatch.setitem(gluon_emulator._rows, "warpgroup_mma_wait", late)
    problem = make(hidden=1024)
    got = run(problem, (), backend="hopper")["out"]
    exact = run(problem.double(), (), turnout.reference.expert_mlp)["out"]
    assert got is not None
    assert exact is not None
    assert not (got.double() - exact).norm() < 0.1 * exact.norm()


def _later(waits: Any, outstanding: int, deps: Any) -> Any:
    return waits(6 if outstanding else 0, deps)


def test_a_box_that_is_filled_again_too_early_goes_unnoticed(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's own test: copies of results that are waited for one box later."""
    usual = gluon_emulator._epilogues["tma"]
    late = SimpleNamespace(**vars(usual))
    late.store_wait = lambda pendings: usual.store_wait(pendings + 1)
    monkeypatch.setitem(gluon_emulator._epilogues, "tma", late)
    problem = make()
    got = run(problem, (), backend="hopper")["out"]
    exact = run(problem.double(), (), turnout.reference.expert_mlp)["out"]
    assert got is not None
    assert exact is not None
    assert not (got.double() - exact).norm() < 0.1 * exact.norm()


def test_a_box_that_no_fence_published_goes_unnoticed(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's own test: TMA reads shared memory behind a fence alone."""
    monkeypatch.setitem(gluon_emulator._epilogues, "fence_async_shared", lambda: None)
    with pytest.raises(AssertionError, match="no fence has published"):
        run(make(), (), backend="hopper")


def test_an_address_out_of_bounds_goes_unnoticed() -> None:
    pointer = gluon_emulator.Pointer(torch.zeros(8))
    with pytest.raises(AssertionError, match="behind the tensor"):
        (pointer + torch.arange(9)).load(None, 0.0)
    with pytest.raises(AssertionError, match="before the tensor"):
        (pointer + torch.arange(-1, 3)).store(1.0, None)
    assert (pointer + torch.arange(9)).load(torch.arange(9) < 8, 0.0).shape == (9,)


@pytest.mark.parametrize("name", ["x", "gate_up", "down"])
def test_an_address_that_tma_refuses_reaches_it(name: str, launches: list[str]) -> None:
    problem = make(hidden=256, intermediate=256)
    run(problem, backend="hopper")
    usual = len(launches)
    launches.clear()
    given = problem[name]
    assert given is not None
    moved = torch.empty(given.numel() + 1, dtype=given.dtype)[1:].view(given.shape).copy_(given)
    assert moved.data_ptr() % 16
    run(problem.changed(**{name: moved}), backend="hopper")
    assert 0 < len(launches) < usual, launches


def test_a_hopper_launch_is_missing_in_the_record(launches: list[str]) -> None:
    report.forget()
    run(make(hidden=256, intermediate=256), backend="hopper")
    ours = [event for event in report.events() if event.ask.kernel.startswith("hopper")]
    epilogues = {event.ask.key.epilogue for event in ours if event.ask.kernel == "hopper_rows"}
    assert epilogues == {"none", "activate", "activate_backward"}
    assert [event.ask.kernel for event in ours].count("hopper_gram") == 2
    assert all(event.source == "fixed" and event.config["num_stages"] == 4 for event in ours)
    assert all(point(event.to_dict()).flop > 0 for event in ours), "report can not draw it"
