"""The benchmark times only what is right, and its records lose nothing."""

import dataclasses
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_cases import row

import fake_sonicmoe
from turnout import cli, reference
from turnout.bench import command, providers, run
from turnout.bench.plot import plot
from turnout.bench.providers import PROVIDERS, Options, Provider, provider_named
from turnout.bench.records import COLUMNS, Record, latest, read, slug
from turnout.bench.run import measure
from turnout.bench.sweep import Case, Setting, default_providers, sweep
from turnout.bench.truth import bundles, make_judge, sampled
from turnout.bench.work import GRADIENTS, SPEC, flops, make_weights, make_work
from turnout.experts import sonic
from turnout.experts.weights import alternating, halves
from turnout.shapes import TINY, shape_named

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MODES = ("fwd", "full", "lora16")
HERE = ("turnout", "eager", "grouped_mm", "batched_mm", "split-lora")
HEADER = (
    "commit,device,torch,triton,shape,tokens,mode,routing,recompute,router,backend,provider,ms,"
    "tflops,dense_tflops,saved_mb,peak_mb,rel_err,config_source,first_s"
)


@pytest.fixture(scope="module")
def work():
    return make_work(TINY, make_weights(TINY, CPU))


@pytest.fixture(scope="module")
def judges(work):
    full = make_judge(work, lora=False, gradients=True)
    return {"fwd": full, "full": full, "lora16": make_judge(work, lora=True, gradients=True)}


def broken(change):
    """A provider that changes the definition's output."""

    def prepare(work, mode, options):
        right = PROVIDERS["eager"].prepare(work, mode, options)
        return lambda leaves: change(right(leaves), leaves)

    return Provider("broken", MODES, lambda device: None, prepare)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HERE)
def test_provider_agrees_with_the_truth(name, mode, work, judges):
    provider = provider_named(name)
    if mode not in provider.modes:
        assert (name, mode) in {("batched_mm", "full"), ("batched_mm", "lora16")} | {
            ("split-lora", "fwd"),
            ("split-lora", "full"),
        }
        return
    if provider.missing(CPU) is not None:
        assert find_spec("transformers") is None
        return
    options = Options(backend="torch")
    (measured,) = measure(provider, work, mode, judges[mode], options, repeats=1)
    assert measured.reason is None
    assert measured.rel_err < 1e-2
    assert measured.ms > 0
    assert measured.tflops == pytest.approx(flops(TINY, mode) / measured.ms / 1e9)
    assert (measured.saved_mb, measured.peak_mb) == (None, None)
    assert measured.backend == ("torch" if name == "turnout" else "")
    assert measured.config_source == ""  # no kernel with a config ran


def test_recomputation_is_judged_too(work, judges):
    options = Options(backend="torch", recompute="gate_up")
    (measured,) = measure(
        PROVIDERS["turnout"], work, "lora16", judges["lora16"], options, repeats=1
    )
    assert measured.reason is None
    assert measured.ms > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out, leaves: out * 1.1, "RMS error"),
        (lambda out, leaves: out * torch.nan, "RMS error nan"),
        (lambda out, leaves: out[:-1], "expected (64, 64)"),
        (lambda out, leaves: out.index_fill(0, torch.tensor([3]), 0.0), "out: RMS error"),
        # a right output with a wrong gradient
        (lambda out, leaves: out + (leaves.x - leaves.x.detach()), "x: RMS error"),
    ],
)
def test_wrong_provider_gets_no_time(change, words, work, judges, monkeypatch):
    mode = "fwd" if "expected" in words else "full"
    monkeypatch.setattr(run, "_milliseconds", lambda *_: pytest.fail("a red gate was timed"))
    (measured,) = measure(broken(change), work, mode, judges[mode], repeats=1)
    assert words in measured.reason
    assert measured.ms is measured.tflops is measured.saved_mb is measured.peak_mb is None


def test_ours_has_the_sharper_gate(work, judges):
    """A factor of 0.98 passes as a peer's rounding, never as ours."""
    leaves = work.leaves("fwd")
    weights, _ = bundles(leaves)
    out = reference.expert_mlp(leaves.x, work.experts_TK, leaves.weights_TK, weights, SPEC)
    results = {"out": out * 0.98}
    assert judges["fwd"].verdict(results, is_ours=False)[1] is None
    reason = judges["fwd"].verdict(results, is_ours=True)[1]
    assert reason.startswith("out: ")
    assert judges["fwd"].verdict({"out": out}, is_ours=True)[1] is None


def test_truth_by_expert_is_the_definition_at_once(work, judges):
    """Sliced expert by expert it must be what the whole definition gives in float64."""
    leaves = work.leaves("lora16")
    double = {
        field.name: getattr(leaves, field.name).detach().double().requires_grad_()
        for field in dataclasses.fields(leaves)
    }
    leaves = type(leaves)(**double)
    weights, lora = bundles(leaves)
    out = reference.expert_mlp(
        leaves.x, work.experts_TK, leaves.weights_TK, weights, SPEC, lora=lora
    )
    names = GRADIENTS["lora16"]
    wanted = [getattr(leaves, name) for name in names]
    grads = torch.autograd.grad(out, wanted, work.dout_TH.double())
    exact = judges["lora16"].truth
    torch.testing.assert_close(exact["out"], out.detach(), rtol=0, atol=1e-9)
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(exact[name], grad, rtol=1e-9, atol=1e-9)


def test_compared_experts_include_least_and_most_loaded(work, judges):
    load = torch.bincount(work.experts_TK.flatten(), minlength=TINY.experts)
    sample = judges["full"].sample
    assert len(set(sample)) == 4
    loads = [int(load[expert]) for expert in sample]
    assert (min(loads), max(loads)) == (int(load.min()), int(load.max()))


def test_interleaved_gradients_are_put_back():
    rows = torch.arange(12.0).view(1, 12, 1)
    mixed = alternating(rows, 1)
    assert mixed.flatten().tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert torch.equal(halves(mixed, 1), rows)
    found = sampled({"gate_up": mixed, "b_up": mixed[0]}, (0,), interleaved=True)
    assert torch.equal(found["gate_up"], rows)
    assert torch.equal(found["b_up"], rows[0])


@pytest.mark.parametrize("mode", ["fwd", "lora16"])
def test_interleaved_provider_passes_the_gate(mode, work, judges):
    """The layout of SonicMoE, without its kernels."""

    def prepare(work, mode, options):
        inner = PROVIDERS["eager"].prepare(work, mode, options)

        def call(leaves):
            b_up = None if leaves.b_up is None else halves(leaves.b_up, 0)
            gate_up = halves(leaves.gate_up, 1)
            return inner(dataclasses.replace(leaves, gate_up=gate_up, b_up=b_up))

        return call

    mixed = Provider("mixed", MODES, lambda device: None, prepare, interleaved=True)
    (measured,) = measure(mixed, work, mode, judges[mode], repeats=1)
    assert measured.reason is None


def test_routing_is_what_its_name_says():
    shape = dataclasses.replace(TINY, tokens=2000)
    weights = make_weights(shape, CPU)
    loads = {}
    for routing in ("uniform", "zipf1.2", "half-empty"):
        batch = make_work(shape, weights, routing)
        assert all(len(set(row)) == shape.top_k for row in batch.experts_TK.tolist())
        sums = batch.weights_TK.float().sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=2e-2)
        loads[routing] = torch.bincount(batch.experts_TK.flatten(), minlength=shape.experts)
    assert loads["uniform"].min() > 0.8 * loads["uniform"].max()
    assert (loads["half-empty"] == 0).sum() == shape.experts // 2
    skewed = loads["zipf1.2"].sort(descending=True).values
    assert skewed[0] > 4 * skewed[-1] > 0
    assert loads["zipf1.2"].argmax() != 0  # ids are shuffled


def test_half_empty_needs_enough_experts():
    shape = dataclasses.replace(TINY, experts=2, top_k=2)
    with pytest.raises(ValueError, match="half-empty"):
        make_work(shape, make_weights(shape, CPU), "half-empty")


def test_work_repeats_and_adapters_are_in_storage_of_peft(work):
    again = make_work(TINY, make_weights(TINY, CPU))
    assert torch.equal(again.x_TH, work.x_TH)
    assert torch.equal(again.weights.gate_up, work.weights.gate_up)
    leaves = work.leaves("lora16")
    assert leaves.a_up.shape == (TINY.experts, 16, TINY.hidden)
    assert leaves.b_up.shape == (2 * TINY.intermediate, 16, TINY.experts)
    assert leaves.b_down.shape == (TINY.hidden, 16, TINY.experts)
    assert leaves.a_up.dtype == leaves.b_up.dtype == torch.float32
    assert leaves.x.dtype == leaves.gate_up.dtype == leaves.weights_TK.dtype == torch.bfloat16
    for mode in MODES:
        tensors = dataclasses.asdict(work.leaves(mode))
        trained = {name for name, t in tensors.items() if t is not None and t.requires_grad}
        assert trained == set(GRADIENTS[mode])


def test_flops_by_hand():
    shape = shape_named("qwen3-30b")
    rows = 16384 * 8
    base = 6 * rows * 2048 * 768
    lora = 2 * rows * 16 * (2048 + 2 * 768 + 768 + 2048)
    assert flops(shape, "fwd") == base
    assert flops(shape, "full") == 3 * base
    assert flops(shape, "lora16") == 2 * base + 3 * lora


def test_missing_peer_gives_its_reason(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    for name in ("scattermoe", "sonicmoe", "axolotl", "liger"):
        assert "is not installed" in PROVIDERS[name].missing(torch.device("cuda"))


def test_peer_that_does_not_import_gives_its_reason(monkeypatch):
    def fail(name):
        raise ImportError("no nvcc")

    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    monkeypatch.setattr(providers, "import_module", fail)
    assert "no nvcc" in PROVIDERS["sonicmoe"].missing(torch.device("cuda"))
    assert PROVIDERS["sonicmoe"].missing(CPU) == "needs a GPU"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["functions", "flat"])
def test_sonicmoe_as_a_back_end_passes_the_gate(mode, form, work, judges, monkeypatch):
    """Beside the bare peer; a stand-in for the package computes."""
    fake_sonicmoe.install(monkeypatch, form)
    (measured,) = measure(PROVIDERS["turnout-sonic"], work, mode, judges[mode], repeats=1)
    assert measured.reason is None
    assert measured.backend == "sonic"
    assert measured.provider == "turnout-sonic"
    assert len(fake_sonicmoe.Calls.forwards) > 1
    monkeypatch.setattr(sonic, "rejects", lambda problem, device: "no such GPU")
    assert PROVIDERS["turnout-sonic"].missing(CPU) == "no such GPU"


def test_sonicmoe_is_no_back_end_of_the_row_turnout(monkeypatch, capsys):
    with pytest.raises(ValueError, match="--provider turnout-sonic,sonicmoe"):
        command.main(command.BenchConfig(backend="sonic", device="cpu"))


def test_batched_mm_is_for_few_tokens():
    assert "batched_mm" in default_providers(32)
    assert "batched_mm" not in default_providers(16384)


def test_columns_are_those_of_the_record():
    assert ",".join(COLUMNS) == HEADER


def test_appending_keeps_old_rows(tmp_path):
    path = tmp_path / "h100.csv"
    first, second = row(), row(provider="scattermoe", backend="", ms=None, tflops=None)
    one = Record(path)
    one.saw_dense(750.0)
    one.add(first)
    before = path.read_text()
    two = Record(path)
    two.saw_dense(700.0)
    two.add(dataclasses.replace(second, dense_tflops=700.0))
    two.saw_dense(760.0)
    assert path.read_text().startswith(before)
    assert before.splitlines()[0] == HEADER
    assert read(path) == [first, dataclasses.replace(second, dense_tflops=760.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["h100.csv"]


def test_largest_dense_rate_counts_for_rows_already_written(tmp_path):
    record = Record(tmp_path / "a.csv")
    record.saw_dense(700.0)
    record.add(row(dense_tflops=700.0))
    record.saw_dense(800.0)
    record.saw_dense(600.0)
    assert [r.dense_tflops for r in read(tmp_path / "a.csv")] == [800.0]
    assert record.rows[0].fraction == pytest.approx(0.5)


def test_file_without_a_last_newline_is_not_glued(tmp_path):
    path = tmp_path / "a.csv"
    Record(path).add(row())
    path.write_text(path.read_text().rstrip("\n"))
    Record(path).add(row(provider="eager"))
    assert [r.provider for r in read(path)] == ["turnout", "eager"]


def test_other_columns_are_a_clear_error(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns commit,device"):
        Record(path)
    with pytest.raises(ValueError, match="a folder that exists"):
        Record(tmp_path / "nowhere" / "a.csv")
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("cpu", "cpu"),
    ],
)
def test_results_are_named_after_the_device(device, name):
    assert slug(device) == name


def test_repeated_rows_count_once_and_the_last_one():
    old, new, other = row(ms=9.0), row(ms=6.0), row(mode="fwd")
    assert latest([old, other, new]) == [new, other]


def test_plot_is_made_of_standard_rows(tmp_path):
    rows = [row(mode=mode, provider=name) for mode in MODES for name in ("turnout", "scattermoe")]
    rows += [row(shape="olmoe"), row(provider="turnout+graph"), row(routing="zipf1.2")]
    plot(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="none of the 1 rows"):
        plot(tmp_path / "b.png", [row(tokens=12000)])


def test_a_failing_provider_does_not_end_the_run(tmp_path, monkeypatch):
    def explode(work, mode, options):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(PROVIDERS, "explodes", Provider("explodes", MODES, lambda d: None, explode))
    failed = []

    def guard(what, piece):
        try:
            piece()
        except RuntimeError as error:
            failed.append((what, str(error)))

    record = Record(tmp_path / "a.csv")
    cases = [Case(shape=TINY, mode="fwd", providers=("explodes", "eager", "scattermoe"))]
    sweep(cases, Setting(device=CPU, commit="x", repeats=1), record, lambda *_: None, guard)
    assert failed == [("tiny fwd explodes", "no kernel image")]
    (only,) = read(tmp_path / "a.csv")
    assert (only.provider, only.device, only.commit) == ("eager", "cpu", "x")
    assert math.isclose(only.dense_tflops, record.dense, rel_tol=1e-3)
    with pytest.raises(RuntimeError, match="no kernel image"):
        sweep(cases, Setting(device=CPU, commit="x", repeats=1), Record(None), lambda *_: None)


def test_recomputation_is_never_written_beside_a_peer():
    rows = []
    case = Case(shape=TINY, mode="lora16", providers=("turnout", "eager"), recompute="gate_up")
    setting = Setting(device=CPU, commit="x", backend="torch", repeats=1)
    sweep([case], setting, Record(None), lambda row, _: rows.append(row))
    assert [(r.provider, r.recompute) for r in rows] == [("turnout", "gate_up"), ("eager", "none")]


def turnout(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["turnout", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_command_writes_csv_and_json(monkeypatch, capsys, tmp_path):
    csv, report = tmp_path / "cpu.csv", tmp_path / "report.json"
    flags = ["--shape", "tiny", "--tokens", 16, "--mode", "fwd,lora16", "--device", "cpu"]
    flags += ["--provider", "turnout,scattermoe", "--provider", "eager", "--repeats", 1]
    flags += ["--graph", "--csv", csv, "--json", report]
    assert turnout(monkeypatch, "bench", *flags) == 0
    shown = capsys.readouterr()
    assert "scattermoe did not run: " in shown.out
    assert "no CUDA graph" in shown.err
    rows = read(csv)
    assert [(r.mode, r.provider) for r in rows] == [
        ("fwd", "turnout"),
        ("fwd", "eager"),
        ("lora16", "turnout"),
        ("lora16", "eager"),
    ]
    assert {(r.device, r.tokens, r.saved_mb) for r in rows} == {("cpu", 16, None)}
    facts = json.loads(report.read_text())
    assert len(facts["rows"]) == 4
    assert facts["rows"][0]["reason"] is None
    assert set(facts["missing"]) == {"scattermoe"}


def test_red_gate_ends_the_command_with_1(monkeypatch, capsys):
    wrong = broken(lambda out, leaves: F.dropout(out))
    monkeypatch.setitem(PROVIDERS, "broken", wrong)
    flags = ["--device", "cpu", "--mode", "fwd", "--provider", "broken"]
    assert turnout(monkeypatch, "bench", *flags) == 1
    assert "no time: out: RMS error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "qwen"], "shape is 'qwen'"),
        (["--mode", "bwd"], "mode is 'bwd'"),
        (["--provider", "vllm"], "provider is 'vllm'"),
        (["--routing", "zipf"], "routing is 'zipf'"),
        (["--recompute", "all"], "recompute is 'all'"),
        (["--backend", "cuda"], "backend is 'cuda'"),
        (["--tokens", "0"], "Shape.tokens is 0"),
        (["--repeats", "0"], "repeats is 0"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--csv", "nowhere/a.csv"], "a folder that exists"),
    ],
)
def test_wrong_flags_are_clear_errors(monkeypatch, capsys, flags, words):
    assert turnout(monkeypatch, "bench", "--device", "cpu", *flags) == 2
    assert words in capsys.readouterr().err


def test_run_of_record_needs_no_typer_and_no_rich(tmp_path):
    """The GPU machine may have neither."""
    script = f"""
import runpy, sys
for name in ("typer", "rich"):
    sys.modules[name] = None
sys.argv = ["compare.py", "--device", "cpu", "--shapes", "tiny", "--modes", "fwd", "--repeats",
    "1", "--commit", "abc", "--out", {str(tmp_path / "a.csv")!r}]
runpy.run_path({str(ROOT / "benchmarks" / "compare.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "qwen3-30b lora16: speed / fastest peer" in done.stdout
    assert "0 failed" in done.stdout
    assert {r.provider for r in read(tmp_path / "a.csv")} >= {"turnout", "eager"}
