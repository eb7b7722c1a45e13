"""Tuning end to end in Triton's interpreter, on the CPU: what is tried is right, what is chosen is
used, what was done is not done again. Times mean nothing here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import turnout
from problems import GPT_OSS, check, random_problem, run
from tuning_cases import entry, gram, rows
from turnout import launch
from turnout.bench.providers import PROVIDERS, Options
from turnout.bench.run import measure
from turnout.bench.truth import make_judge
from turnout.bench.work import make_weights, make_work
from turnout.experts import gemm_triton, triton_tuning
from turnout.measure import Timing
from turnout.shapes import Shape
from turnout.tune import command, work
from turnout.tune.command import TuneConfig, main
from turnout.tuning import cache, candidates, first_use, journal, report
from turnout.tuning.first_use import Tuner, start, stop, tuning
from turnout.tuning.key import Config

ROWS = (rows(16, 16, warps=4), rows(16, 32, warps=4, stages=2))
GRAM = (gram(16, 16, 16, warps=4), gram(16, 16, 32, warps=4, first=1))
SMALL = Shape("tiny", 4, 16, 16, 2, 1)
SIZES: dict[str, Any] = {
    "tokens": 4, "top_k": 1, "num_experts": 2, "hidden": 16, "intermediate": 16
}  # fmt: skip
assert triton  # imported: the package then knows that the interpreter is on


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        candidates, "built_in", lambda family, _: ROWS if family.kernel == "rows" else GRAM
    )
    monkeypatch.setattr(work, "shape_named", lambda name: SMALL)
    monkeypatch.setattr(command, "Tuner", partial(Tuner, clock=still))
    _forget()
    yield tmp_path / "cache"
    _forget()


def _forget() -> None:
    gemm_triton._rows_launch.cache_clear()
    gemm_triton._gram_launch.cache_clear()
    report.forget()


def quick(**options: Any) -> Tuner:
    return Tuner(keep_shipped=False, **({"clock": still} | options))


def still(fn: Any, *, device: Any, warmup: int, repeats: int) -> Timing:
    """A clock that runs nothing: the gate has run every config once, and that is slow enough."""
    return Timing(median=1.0, low=1.0, high=1.0, repeats=repeats)


def tuned(problem: Any, **options: Any) -> Tuner:
    with tuning(quick(**options)) as tuner:
        run(problem, backend="triton")
    return tuner


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"activation": GPT_OSS, "transposed": True, "bias": True},
        {"rank_up": 0, "rank_down": 0},
        {"weight_on_input": True},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_a_right_config_is_refused_by_the_gate(case: dict[str, Any]) -> None:
    """Every product of a training step, forward and backward, adapters and weights."""
    tuner = tuned(random_problem(**SIZES, **case))
    assert tuner.broken == []
    assert len(tuner.entries) >= 6
    for one in tuner.entries:
        assert one.search is not None
        assert one.search.failed == ()
        assert one.search.tried >= 2
    assert {one.key.kernel for one in tuner.entries} == {"rows", "gram"}


def test_dropout_is_not_masked_as_in_the_kernel() -> None:
    with tuning(quick()) as tuner:
        run(random_problem(**SIZES), backend="triton", expert_dropout=0.3)
    assert tuner.broken == []
    assert any("dropout" in one.key.layout for one in tuner.entries)
    assert all(one.search is not None and not one.search.failed for one in tuner.entries)


def test_a_wrong_config_passes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one product is off by the width of its noise."""
    build = gemm_triton._build_rows

    def odd(facts: Any, config: Config) -> Any:
        made, num_n = build(facts, config)
        if config != ROWS[1]:
            return made, num_n

        def spoiled(*tensors: Tensor) -> None:
            made(*tensors)
            tensors[2][0, 0] += 0.01

        return spoiled, num_n

    monkeypatch.setattr(gemm_triton, "_build_rows", odd)
    tuner = tuned(random_problem(**SIZES))
    of_rows = [one for one in tuner.entries if one.key.kernel == "rows"]
    for one in of_rows:
        assert one.config != ROWS[1]
        assert one.search is not None
        ((config, reason),) = one.search.failed
        assert config == ROWS[1]
        assert "wrong result" in reason


def test_a_config_that_does_not_compile_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    build = gemm_triton._build_gram

    def broken(facts: Any, config: Config) -> Any:
        if config == GRAM[1]:
            raise triton.runtime.errors.OutOfResources(300_000, 200_000, "shared memory")
        return build(facts, config)

    monkeypatch.setattr(gemm_triton, "_build_gram", broken)
    tuner = tuned(random_problem(**SIZES))
    failed = [one.search.failed for one in tuner.entries if one.key.kernel == "gram"]  # type: ignore[union-attr]
    assert failed
    assert all("OutOfResources" in reason for ((_, reason),) in failed)


def constants(problem: Any) -> list[dict[str, Any]]:
    """The constexprs of every launch of the two products in one step."""
    heard: list[Any] = []
    with launch.recording(lambda one, tensors: heard.append(one)):
        out = problem.mapped(Tensor.detach).call(backend="triton")
    assert out.shape == problem["x"].shape
    names = ("rows_kernel", "gram_kernel")
    return [one.constants for one in heard if one.kernel.__name__ in names]


def test_what_was_chosen_is_not_what_runs() -> None:
    problem = random_problem(**SIZES)
    before = constants(problem)
    fastest = rows(16, 32, warps=4, stages=2)
    tuned(problem)  # every config takes the same time: nothing changes
    assert constants(problem) == before
    for event in report.events():
        assert event.source == "tuned"
        if event.ask.kernel == "rows":
            cache.store().put([entry(event.ask, fastest)])
    _forget()
    after = constants(problem)
    assert {c["BLOCK_K"] for c in after} == {32}
    assert {c["BLOCK_N"] for c in after} == {16}


def test_a_tuned_config_computes_something_else() -> None:
    make = partial(random_problem, weights_dtype=torch.float32, **SIZES)
    tuned(make())
    _forget()
    check(lambda seed: make(seed=seed), backend="triton")
    assert {event.source for event in report.events()} == {"tuned"}


def test_a_step_pays_for_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config is asked for when a launch is built: once per problem, never per step."""
    problem = random_problem(**SIZES)
    run(problem, backend="triton")
    assert len(report.events()) >= 8
    assert {event.source for event in report.events()} == {"analytic"}

    def asked(*args: Any) -> Config:
        raise AssertionError("asked again")

    monkeypatch.setattr(gemm_triton, "choose", asked)
    run(problem, backend="triton")


def test_the_source_of_a_config_in_a_benchmark_is_that_of_another_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 is wrong in the interpreter, so the gate is red; what ran is known anyway."""
    bench_work = make_work(SMALL, make_weights(SMALL, torch.device("cpu")))
    judge = make_judge(bench_work, lora=False, gradients=False)
    options = Options(backend="triton")

    def source() -> str:
        (measured,) = measure(PROVIDERS["turnout"], bench_work, "fwd", judge, options, repeats=1)
        return measured.config_source

    assert source() == "analytic"
    report.forget()
    assert source() == "analytic", "launches that were built before are asked as well"
    gemm_triton._rows_launch.cache_clear()
    assert source() == "analytic"
    up, down = report.events()
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(folder / "other"))
    cache.Store(folder / "other", cache.SHIPPED).put([entry(up.ask, up.config)])
    gemm_triton._rows_launch.cache_clear()
    assert source() == "analytic+user cache"
    cache.store().put([entry(down.ask, down.config)])
    gemm_triton._rows_launch.cache_clear()
    assert source() == "tuned+user cache"


def test_no_one_asked_and_something_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr("turnout.tuning.first_use.search", timed)
    run(random_problem(**SIZES), backend="triton")


def test_the_real_clock_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning(Tuner(keep_shipped=False, quick=1, thorough=1)) as tuner, torch.no_grad():
        random_problem(**SIZES, rank_up=0, rank_down=0).call(backend="triton")
    assert len(tuner.entries) == 2
    for one in tuner.entries:
        assert one.search is not None
        assert 0 < one.search.winner_s <= one.search.incumbent_s
        assert one.search.seconds > 0


class Model:
    """Who asks for tuning at first use."""


def test_the_first_use_in_a_run_is_not_tuned_or_every_use_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = random_problem(**SIZES)
    run(problem, backend="triton")  # built before anyone asked
    monkeypatch.setattr(first_use, "Tuner", partial(Tuner, clock=still))
    model = Model()
    start(model)
    try:
        run(problem, backend="triton")
        count = len(report.events())
        assert {event.source for event in report.events()} == {"tuned"}
        monkeypatch.setattr("turnout.tuning.first_use.search", None)
        run(problem, backend="triton")
        assert len(report.events()) == count
    finally:
        stop(model)


# the command


def small(**options: Any) -> TuneConfig:
    return TuneConfig(**({"shape": ["tiny"], "repeats": 1, "rank": [4]} | options))


def test_the_command_tunes_nothing_or_starts_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = main(small())
    assert len(first["problems"]) >= 8
    assert first["reused"] == 0
    assert not first["out_of_time"]
    assert first["default_over_tuned"] >= 1.0 - 1e-9
    text = capsys.readouterr().out
    assert "problems tuned" in text
    assert str(folder) in text
    _forget()
    second = main(small())
    assert second["problems"] == []
    assert second["reused"] == len(first["problems"])
    found = journal.read(folder / "records" / journal.NAME)
    assert len(found.of("head")) == 2
    assert all(line["search"]["times"] for line in found.of("kernel"))


def test_base_weights_that_train_are_not_tuned() -> None:
    found = main(small(mode=["full"]))
    sizes = {(one["kernel"], one["key"]["n"], one["key"]["k"]) for one in found["problems"]}
    assert {("gram", 16, 32), ("gram", 16, 16)} <= sizes


def test_the_models_own_layout_is_not_tuned() -> None:
    layers = work.layers_named("gptoss-20b")
    assert [layer.spec.transposed for layer in layers] == [False, True]
    work.step(layers[1], 4, "lora", 4, torch.float32, torch.device("cpu"))
    layouts = [event.ask.key.layout for event in report.events()]
    assert any("activation_interleaved" in layout and "bias" in layout for layout in layouts)


def test_a_time_limit_is_an_error_or_loses_what_was_done(folder: Path) -> None:
    first = main(small(minutes=1e-4))
    assert first["out_of_time"]
    _forget()
    second = main(small())
    assert second["reused"] == len(first["problems"])
    assert len(second["problems"]) >= 8 - second["reused"]


def test_what_is_not_searched_is_not_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tensors of large layers, and kernels that are compiled, take their time as well."""
    ran: list[int] = []

    def slow(layer: Any, tokens: int, *rest: Any) -> None:
        ran.append(tokens)
        time.sleep(0.2)

    monkeypatch.setattr(command, "step", slow)
    found = main(small(tokens=[1, 2, 3], minutes=0.1 / 60))
    assert ran == [1]
    assert found["out_of_time"]


def test_a_step_without_memory_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    step = work.step

    def large(layer: Any, tokens: int, *rest: Any) -> None:
        if tokens == 65536:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(layer, tokens, *rest)

    monkeypatch.setattr(command, "step", large)
    found = main(small(tokens=[65536, 4]))
    assert found["no_memory"] == ["tiny T=65536 lora4: no memory to run it"]
    assert len(found["problems"]) >= 8
    assert "not tuned: tiny T=65536" in capsys.readouterr().out
    assert journal.read(folder / "records" / journal.NAME).of("kernel")


def test_what_another_back_end_runs_is_searched_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Hopper most products have a kernel of one config: their time is not worth a search."""
    asked: list[str] = []

    def step(*args: Any) -> None:
        asked.append(args[-1])
        found = random_problem(**SIZES)
        run(found, backend="triton")
        (first, *_) = report.events()
        replace(first, source="fixed").note()

    monkeypatch.setattr(command, "step", step)
    found = main(small())
    assert found["fixed"] == 1
    assert "1 problems run in kernels of one config" in capsys.readouterr().out
    main(small(backend="triton"))
    assert asked == ["auto", "triton"]


def test_a_recorded_run_is_tuned_as_something_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problems of a training run, from its report, on a machine that has none of it."""
    with tuning(quick()):
        run(random_problem(**SIZES), backend="triton", expert_dropout=0.2)
        run(
            random_problem(**SIZES, activation=GPT_OSS, transposed=True, bias=True),
            backend="triton",
        )
    journal.append(tmp_path / "run.jsonl", report.record())
    expected = {event.ask.key for event in report.events()}
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "other"))
    _forget()
    found = main(TuneConfig(recorded=tmp_path / "run.jsonl", repeats=1))
    assert found["broken"] == []
    assert {event.ask.key for event in report.events()} == expected
    assert len(found["problems"]) == len(expected)


def test_a_record_with_a_kernel_that_is_gone_stops_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(random_problem(**SIZES), backend="triton")
    lines = report.record()
    odd = lines[1] | {"kernel": "scatter2scatter"}
    worse = lines[2] | {"problem": {"ragged": "m"}}
    journal.append(tmp_path / "run.jsonl", [lines[0], odd, worse, lines[3]])
    _forget()
    found = main(TuneConfig(recorded=tmp_path / "run.jsonl", repeats=1))
    assert len(found["problems"]) == 1
    assert "scatter2scatter" in caplog.text
    assert "can not be read" in caplog.text


def test_a_record_that_can_not_be_written_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = main(small(record=tmp_path / "file" / "a.jsonl"))
    assert found["record"] is None
    assert "the record is not written" in caplog.text
    assert found["problems"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shape": None}, "nothing to tune"),
        ({"model": Path("x")}, "expected one of"),
        ({"shape": None, "recorded": Path("nowhere")}, "does not exist"),
        ({"repeats": 0}, "--repeats"),
        ({"minutes": 0.0}, "--minutes"),
        ({"tokens": [0]}, "--tokens"),
        ({"mode": ["lora,half"]}, "--mode"),
        ({"dtype": "float8"}, "--dtype"),
        ({"rank": [16, 0]}, "--rank"),
        ({"rank": [-1]}, "--rank"),
        ({"backend": "hopper"}, "--backend"),
        ({"device": "tpu"}, "--device"),
        ({"device": "cuda:99"}, "sees no GPU|index below"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_found_after_the_work(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        main(small(**options))


def test_a_product_that_fails_is_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = lambda self, outputs: "out is not finite"  # noqa: E731
    monkeypatch.setattr(triton_tuning.GemmTrial, "rejects", refuse)
    found = main(small())
    assert found["broken"]
    assert found["problems"] == []


TWO = """
import os, sys
rank = os.environ["RANK"]
os.environ["TURNOUT_CACHE_DIR"] = sys.argv[1] + "/" + rank
from tuning_cases import gram, rows
from turnout.measure import Timing
from turnout.shapes import Shape
from turnout.tune import command, work
from turnout.tune.command import TuneConfig, main
from turnout.tuning import candidates
small = (rows(16, 16, warps=4),), (gram(16, 16, 16, warps=4),)
candidates.built_in = lambda family, _: small[family.kernel == "gram"]
work.shape_named = lambda name: Shape("tiny", 4, 16, 16, 2, 1)
from pathlib import Path
from turnout.cli import _run
out = Path(sys.argv[1], f"out.{rank}")
found = _run(lambda: main(TuneConfig(shape=["tiny"], repeats=1, rank=[4])), str(out))
print("rank", rank, len(found["problems"]), found.get("received"))
"""


def test_two_processes_both_tune_or_one_gets_nothing(tmp_path: Path) -> None:
    """torchrun: rank 0 tunes, rank 1 has the same table in a folder of its own."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    tuned = int(lines[0].split()[2])
    assert lines == [f"rank 0 {tuned} None", f"rank 1 0 {tuned}"]
    assert tuned >= 8
    tables = [next((tmp_path / rank / "configs").glob("*.json")).read_text() for rank in "01"]
    assert tables[0] == tables[1]
    written = [path.name for path in tmp_path.glob("out.*")]
    assert written == ["out.0"], "the file of --json is that of who came last"


def test_the_reference_is_what_runs() -> None:
    """The tests above would pass if nothing went through the kernels."""
    assert turnout.expert_mlp is not turnout.reference.expert_mlp
    run(random_problem(**SIZES), backend="triton")
    assert {event.ask.kernel for event in report.events()} == {"rows", "gram"}


def test_an_untuned_problem_keeps_a_process_waiting(folder: Path) -> None:
    """Two searches of one problem at once: the second one finds what the first one found."""
    problem = random_problem(**SIZES)
    tuned(problem)
    _forget()
    cache.store().forget_files()
    again = tuned(problem)
    assert again.entries == []
    assert again.reused
