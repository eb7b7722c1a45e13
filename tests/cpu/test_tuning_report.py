"""The record of what ran: events, devices, versions, other libraries' autotuners, and its file."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from tuning_cases import (
    GATED,
    GRAM,
    NARROW,
    PLAIN,
    ask,
    entry,
    gpu,
    gram,
    ran,
    rows,
    search_of,
)
from turnout import device
from turnout.tuning import cache, journal, report
from turnout.tuning.cache import SHIPPED, Store

DEFAULT, TUNED = rows(128), rows(256)


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "nothing ships")
    report.forget()
    yield
    report.forget()


def kernels():
    return [line for line in report.record() if line["event"] == "kernel"]


def test_a_problem_that_ran_twice_is_two_events():
    for question in (ask(), ask(replace(PLAIN, rows=120_000)), ask(GATED), ask()):
        ran(question, DEFAULT)
    assert len(report.events()) == 2
    ran(ask(replace(PLAIN, rows=1024)), DEFAULT)
    ran(ask(name="another GPU"), DEFAULT)
    assert len(report.events()) == 4


def test_an_event_lacks_what_one_needs_to_prune_the_space():
    """The seed's record had no timing, no rank, no dtypes, no versions."""
    search = search_of({TUNED: 0.001, DEFAULT: 0.002}, TUNED)
    cache.store().put([entry(ask(GATED), TUNED, search=search)])
    assert ran(ask(GATED), DEFAULT) == TUNED
    (event,) = kernels()
    assert event["kernel"] == "rows"
    assert event["device"] == "sm_90"
    assert event["config"] == TUNED.to_dict() | {"num_ctas": 1}
    assert event["source"] == "tuned"
    assert event["top_k"] == 8
    expected = {"rows": 131072, "n": 1536, "k": 2048, "experts": 128, "rank": 16}
    expected |= {"dtype": "bfloat16", "weight_dtype": "bfloat16", "epilogue": "activate"}
    assert expected.items() <= event["key"].items()
    assert event["key"]["layout"] == ["activation_gated", "gathered", "k_major"]
    facts = {"winner_s": 0.001, "runner_up_s": 0.002, "tried": 2, "pruned": 0, "failed": []}
    assert facts.items() <= event["search"].items()
    assert event["search"]["seconds"] == 1.0
    json.dumps(event, allow_nan=False)


def test_where_a_config_came_from_is_not_told(tmp_path, monkeypatch):
    Store(tmp_path / "cache", SHIPPED).put([entry(ask(NARROW), rows(16))])
    ran(ask(), DEFAULT)
    ran(ask(NARROW), DEFAULT)
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    from turnout.tuning import table

    table.write(tmp_path / "shipped" / "a.json", table.Table((entry(ask(GRAM), gram(16, 128)),)))
    ran(ask(GRAM), gram(16, 64))
    found = {event["kernel"]: event["source"] for event in kernels()}
    assert [event["source"] for event in kernels()] == ["analytic", "user cache", "shipped"]
    assert found["gram"] == "shipped"
    assert kernels()[0]["search"] is None


def test_the_head_lacks_devices_or_versions():
    ran(ask(), DEFAULT)
    ran(ask(arch=80), DEFAULT)
    head = report.record()[0]
    assert head["event"] == "head"
    assert head["format"] == report.FORMAT
    assert {"turnout", "torch", "triton", "driver", "python"} <= head.keys()
    assert head["turnout"] == report.__version__
    assert head["devices"] == [
        {
            "name": f"sm_{arch}",
            "compute_capability": f"{arch // 10}.{arch % 10}",
            "memory_bytes": 80 * 1024**3,
            "shared_memory_bytes": gpu(arch).shared_memory,
            "num_sms": 132,
        }
        for arch in (90, 80)
    ]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC\n"
            "GCC version:  gcc version 11.4.0",
            "535.129.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
            "570.86.15",
        ),
        ("", None),
    ],
)
def test_the_version_of_the_driver_is_another_number(monkeypatch, text, version):
    device.driver_version.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert device.driver_version() == version
    device.driver_version.cache_clear()


def test_no_driver_is_an_error(monkeypatch):
    def missing(self, **_):
        raise FileNotFoundError(self)

    device.driver_version.cache_clear()
    monkeypatch.setattr(Path, "read_text", missing)
    assert device.driver_version() is None
    device.driver_version.cache_clear()


# other autotuners: real objects of Triton, their caches filled by hand

triton = pytest.importorskip("triton")
SOURCE = """
import triton
import triton.language as tl

@triton.autotune(configs=CONFIGS, key=KEY)
@triton.jit
def kernel(x_ptr, M, N, K, BLOCK_M: tl.constexpr):
    pass
"""


def autotuner(tmp_path, *, name="lora_ops", key=("M", "N", "K"), count=3):
    """A module with one `@triton.autotune` kernel; Triton reads its source from a file."""
    path = tmp_path / f"{name}.py"
    path.write_text(SOURCE)
    module = types.ModuleType(name)
    configs = [triton.Config({"BLOCK_M": 16 << n}, num_warps=4 + n) for n in range(count)]
    module.__dict__.update(CONFIGS=configs, KEY=list(key), __file__=str(path))
    exec(compile(SOURCE, str(path), "exec"), module.__dict__)
    return module.kernel, configs


def of_module(name="lora_ops"):
    found, single = report.autotuners()
    return [one for one in found if one["module"] == name], single


def test_an_empty_cache_is_a_choice(tmp_path):
    kernel, _ = autotuner(tmp_path)
    assert kernel.cache == {}
    assert of_module()[0] == []


def test_a_choice_of_another_library_is_missed_or_changed(tmp_path):
    kernel, configs = autotuner(tmp_path)
    kernel.cache[4096, 2048, 768, "torch.bfloat16", "torch.float32"] = configs[1]
    (found,) = of_module()[0]
    assert found["kernel"] == "kernel"
    assert found["key"] == {"M": 4096, "N": 2048, "K": 768}
    assert found["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert found["config"] == {"BLOCK_M": 32, "num_warps": 5, "num_stages": 3, "num_ctas": 1}
    assert found["num_configs"] == 3
    assert found["winner_ms"] is None


def test_several_kernels_and_keys_are_one(tmp_path):
    first, configs = autotuner(tmp_path)
    second, others = autotuner(tmp_path, name="ops", key=("M_BUCKET",))
    first.cache[1, 2, 3] = configs[0]
    first.cache[4, 5, 6] = configs[1]
    second.cache[(7,)] = others[2]
    assert [one["key"]["M"] for one in of_module()[0]] == [1, 4]
    assert of_module("ops")[0][0]["key"] == {"M_BUCKET": 7}


def test_an_autotuner_is_looked_for_by_the_name_of_its_module(tmp_path):
    """Libraries load copies of kernels under names with a hash; no module need exist at all."""
    kernel, configs = autotuner(tmp_path, name="kernels_3f2a9c_lora_ops")
    assert "kernels_3f2a9c_lora_ops" not in sys.modules
    kernel.cache[1, 2, 3] = configs[0]
    assert len(of_module("kernels_3f2a9c_lora_ops")[0]) == 1


def test_a_single_config_is_an_autotuner_that_never_ran(tmp_path):
    before = report.autotuners()[1]
    kernel, _ = autotuner(tmp_path, count=1)
    assert of_module() == ([], before + 1)
    assert report.record()[0]["single_config_autotuners"] == before + 1
    del kernel


def test_the_times_of_another_key_are_given(tmp_path):
    kernel, configs = autotuner(tmp_path)
    kernel.cache[1, 2, 3] = configs[0]
    kernel.configs_timings = {configs[0]: [0.25, 0.2, 0.3], configs[1]: [0.5, 0.4, 0.6]}
    kernel.bench_time = 1.5
    (found,) = of_module()[0]
    assert (found["winner_ms"], found["bench_s"]) == (0.25, 1.5)
    kernel.cache[4, 5, 6] = configs[0]  # which of the two the times are of is not known
    assert [one["winner_ms"] for one in of_module()[0]] == [None, None]


def test_a_key_that_is_shorter_than_declared_gets_wrong_names(tmp_path):
    kernel, configs = autotuner(tmp_path)
    kernel.cache[8, 9, "torch.float16"] = configs[0]
    (found,) = of_module()[0]
    assert found["key"] == {"value_0": 8, "value_1": 9}
    assert found["dtypes"] == ["torch.float16"]


def test_a_key_with_a_dtype_loses_it(tmp_path):
    kernel, configs = autotuner(tmp_path, key=("M", "DTYPE"))
    kernel.cache[8, triton.language.bfloat16, "torch.bfloat16"] = configs[0]
    (found,) = of_module()[0]
    assert found["key"] == {"M": 8, "DTYPE": "bf16"}


def test_an_autotuner_that_is_no_good_ends_the_run(tmp_path):
    """One whose making failed, one that keeps something else, one of a module without a name."""
    half = object.__new__(triton.runtime.autotuner.Autotuner)
    odd, configs = autotuner(tmp_path, name="odd_ops")
    odd.cache[1, 2, 3] = "remembered in another way"
    nameless, _ = autotuner(tmp_path, name="nameless_ops")
    nameless.cache[1, 2, 3] = configs[0]
    nameless.base_fn.__module__ = None
    other, _ = autotuner(tmp_path)
    other.cache[1, 2, 3] = configs[0]
    assert of_module("odd_ops")[0] == []
    assert len(of_module("None")[0]) == len(of_module()[0]) == 1
    del half


def test_autotuners_are_asked_for_where_triton_is_not_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton.runtime.autotuner")
    assert report.autotuners() == ([], 0)


# the file


def a_report(path: Path) -> Path:
    ran(ask(), DEFAULT)
    ran(ask(GRAM), gram(16, 128))
    journal.append(path, report.record())
    return path


def test_a_report_changes_on_its_way_to_the_disk(tmp_path):
    path = a_report(tmp_path / "new" / "a.jsonl")
    found = journal.read(path)
    assert [line["event"] for line in found.lines[:3]] == ["head", "kernel", "kernel"]
    assert found.faults == ()
    assert found.of("kernel") == kernels()


def test_a_number_that_is_not_finite_ends_the_run(tmp_path):
    layers = {"l": {"load": [1, 2], "entropy": float("nan"), "dropped": float("inf")}}
    journal.append(tmp_path / "a.jsonl", [*report.record(), {"event": "experts", "layers": layers}])
    (line,) = journal.read(tmp_path / "a.jsonl").of("experts")
    assert line["layers"] == {"l": {"load": [1, 2], "entropy": None, "dropped": None}}


def test_a_second_run_removes_the_first(tmp_path):
    path = a_report(tmp_path / "a.jsonl")
    a_report(path)
    found = journal.read(path)
    assert len(found.of("head")) == 2
    assert len(found.of("kernel")) == 4
    assert len(found.last("kernel")) == 2


def test_a_line_that_is_cut_off_hides_the_others(tmp_path):
    path = a_report(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines)[:-40])
    found = journal.read(path)
    assert len(found.lines) == len(lines) - 1
    (fault,) = found.faults
    assert f"a.jsonl:{len(lines)} is cut off" in fault


def test_a_run_after_a_line_that_was_cut_off_is_lost(tmp_path):
    path = a_report(tmp_path / "a.jsonl")
    path.write_text(path.read_text()[:-40])
    a_report(path)
    found = journal.read(path)
    assert len(found.last("kernel")) == 2
    assert len(found.faults) == 1


def test_a_line_that_is_no_event_hides_the_others(tmp_path):
    path = a_report(tmp_path / "a.jsonl")
    path.write_text('{"a": 1}\n[]\n\n' + path.read_text())
    found = journal.read(path)
    assert len(found.of("kernel")) == 2
    assert len(found.faults) == 2


def test_a_report_of_another_version_is_read_as_if_it_were_ours(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"event": "head", "format": 7, "turnout": "9.0"}\n')
    with pytest.raises(ValueError, match=r"format 7, of turnout 9\.0; expected format 1"):
        journal.read(path)


@pytest.mark.parametrize("text", ["", "hello\n", '{"event": "kernel"}\n'])
def test_any_file_is_a_report(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="no head"):
        journal.read(path)


def test_the_report_of_a_run_is_not_found(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        journal.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 reports"):
        journal.find(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    odd = a_report(tmp_path / "deep" / "odd.jsonl")
    assert journal.find(tmp_path) == odd
    a_report(tmp_path / "deep" / "two.jsonl")
    with pytest.raises(ValueError, match="2 reports: deep/odd"):
        journal.find(tmp_path)
    usual = a_report(tmp_path / journal.NAME)
    assert journal.find(tmp_path) == journal.find(usual) == usual
