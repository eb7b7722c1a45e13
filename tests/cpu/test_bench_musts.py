"""What the kernels must reach is judged from the rows of a run as the demand says."""

import pytest
from bench_cases import row

from turnout.bench import musts
from turnout.bench.sweep import default_providers
from turnout.bench.work import flops
from turnout.shapes import SHAPES, shape_named


def found(rows, sections=("main",)):
    return {must.name: must for must in musts.musts(rows, sections)}


def test_speed_is_against_the_fastest_peer():
    rows = [row(ms=6.0), row(provider="split-lora", ms=16.0), row(provider="sonicmoe", ms=9.0)]
    must = found(rows)["qwen3-30b lora16: speed / fastest peer"]
    assert (must.got, must.limit, must.note) == (pytest.approx(1.5), 1.4, "sonicmoe")
    assert must.passed
    rows.append(row(provider="liger", ms=8.0))
    must = found(rows)["qwen3-30b lora16: speed / fastest peer"]
    assert (must.got, must.passed, must.note) == (pytest.approx(8 / 6), False, "liger")


def test_required_peer_that_did_not_run_counts_as_recorded():
    must = found([row(ms=6.0, dense_tflops=750.0)])["qwen3-30b lora16: speed / fastest peer"]
    sonic = flops(shape_named("qwen3-30b"), "lora16") / (0.33 * 750) / 1e9
    assert must.note == "sonicmoe (recorded)"
    assert must.got == pytest.approx(sonic / 6.0)
    must = found([row(shape="small-t", tokens=512, mode="full", ms=1.0)])
    assert must["small-t full: speed / scattermoe"].got == pytest.approx(4.18)


def test_graph_rows_and_red_rows_do_not_count():
    rows = [row(provider="turnout+graph", ms=1.0), row(ms=None), row(provider="sonicmoe", ms=9.0)]
    must = found(rows)["qwen3-30b lora16: speed / fastest peer"]
    assert must.got is None
    assert not must.passed
    assert found(rows)["red gates of ours (law 2)"].got == 1.0
    assert not found(rows)["red gates of ours (law 2)"].passed


def test_saved_floor_by_hand():
    """qwen3-30b: x 64 MiB, z 384 MiB, two intermediates of rank 16 4 MiB each, routing 1.5 MiB."""
    shape = shape_named("qwen3-30b")
    assert musts.saved_floor(shape, "none") == (64 + 384 + 8) * 2**20
    assert musts.saved_floor(shape, "gate_up") == (64 + 1.5 + 8) * 2**20
    name = "qwen3-30b lora16: saved / floor"
    assert found([row(saved_mb=500.0)])[name].passed
    assert not found([row(saved_mb=510.0)])[name].passed
    small = found([row(recompute="gate_up", saved_mb=90.0)], ["recompute"])
    assert small["qwen3-30b lora16 recompute=gate_up: saved / floor"].passed


def test_peak_is_against_the_lowest_peer():
    rows = [row(peak_mb=900.0), row(provider="a", peak_mb=1000.0), row(provider="b", peak_mb=800.0)]
    must = found(rows)["qwen3-30b lora16: peak / lowest peer"]
    assert (must.got, must.note, must.passed) == (pytest.approx(1.125), "b", False)


def test_skew_and_odd_tokens():
    rows = [
        row(ms=6.0),
        row(ms=6.6, routing="zipf1.2"),
        row(ms=7.2, routing="half-empty"),
        row(ms=4.5, tokens=12000),
    ]
    judged = found(rows, ["skew"])
    assert judged["qwen3-30b lora16: zipf1.2 / uniform"].passed
    assert not judged["qwen3-30b lora16: half-empty / uniform"].passed
    odd = judged["qwen3-30b lora16: ms/token T=12000 / T=16384"]
    assert odd.got == pytest.approx(4.5 / 12000 / (6.0 / 16384))
    assert odd.passed


def test_decode_is_against_the_better_of_the_stock_ones():
    base = {"mode": "fwd", "tokens": 4}
    rows = [
        row(ms=0.3, **base),
        row(ms=0.5, provider="grouped_mm", **base),
        row(ms=0.25, provider="batched_mm", **base),
    ]
    must = found(rows, ["decode"])["qwen3-30b fwd T=4: time / best stock"]
    assert (must.got, must.note, must.passed) == (pytest.approx(1.2), "batched_mm", False)
    assert len(found(rows, ["decode"])) == 5 * 6 + 1


def test_every_number_of_tokens_is_judged_by_the_median():
    base = {"mode": "full", "tokens": 1024}
    rows = [row(ms=ms, **base) for ms in (1.0, 1.02, 9.0)]
    rows += [row(ms=ms, provider="turnout-portable", **base) for ms in (1.0, 0.1, 1.2)]
    name = "qwen3-30b full T=1024: time / best"
    assert found(rows, ["tokens"])[name].got is None, "grouped_mm is missing"
    rows.append(row(ms=2.0, provider="grouped_mm", **base))
    must = found(rows, ["tokens"])[name]
    assert (must.got, must.note, must.passed) == (pytest.approx(1.02), "turnout-portable", True)
    rows += [row(ms=ms, **base) for ms in (1.1, 1.2)]
    assert not found(rows, ["tokens"])[name].passed
    assert len(found(rows, ["tokens"])) == 8 * 3 + 1


def test_the_portable_back_end_is_no_peer():
    rows = [row(ms=2.0), row(ms=1.0, provider="turnout-portable", peak_mb=1.0)]
    must = found(rows)["qwen3-30b lora16: speed / fastest peer"]
    assert "portable" not in must.note
    assert "turnout-portable" not in default_providers(16384)


def test_a_peak_as_high_as_a_peers_is_enough():
    must = found([row(peak_mb=900.0), row(provider="a", peak_mb=900.0)])
    assert not must["qwen3-30b lora16: peak / lowest peer"].passed


def test_the_longest_first_step_of_ours_is_not_judged():
    rows = [row(first_s=4.0), row(mode="full", first_s=15.5), row(provider="a", first_s=99.0)]
    must = found(rows)["longest first step of ours"]
    assert (must.got, must.passed, must.note) == (15.5, False, "s, qwen3-30b 16384 full")
    assert found([row(first_s=15.0)])["longest first step of ours"].passed
    assert "longest first step of ours" not in found([row()])


def test_demands_print_as_lines():
    text = musts.show(musts.musts([row()], ["main"]))
    assert "MISS" in text
    assert all(shape.name in text for shape in SHAPES)


def test_the_wrapper_is_judged_by_the_bare_peer():
    name = "qwen3-30b full: back end sonic / bare"
    both = {"mode": "full", "recompute": "none"}
    rows = [row(provider="sonicmoe", ms=7.5, **both)]
    assert name not in found(rows)
    must = found([*rows, row(provider="turnout-sonic", ms=7.6, **both)])[name]
    assert must.passed
    assert must.got == pytest.approx(7.6 / 7.5)
    assert not found([*rows, row(provider="turnout-sonic", ms=7.7, **both)])[name].passed
    fast = [row(ms=6.0), row(provider="turnout-sonic", ms=5.0), row(provider="liger", ms=8.0)]
    assert found(fast)["qwen3-30b lora16: speed / fastest peer"].note == "liger"
