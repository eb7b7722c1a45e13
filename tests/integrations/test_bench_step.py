"""`turnout bench --step`: whole steps, timed only where they agree with stock's."""

import dataclasses
import json
import math

import pytest
import torch
from step_cases import ALL, CPU, SMALL, judged, narrow, row, setting, turnout
from torch import nn
from triton.errors import TritonError

from turnout.bench import step_fit, step_models, step_sweep
from turnout.bench.step_gate import Gate, Sample
from turnout.bench.step_loss import next_token_loss
from turnout.bench.step_models import NAMES, Identity, attention_of, build, step_model
from turnout.bench.step_plot import plot
from turnout.bench.step_records import COLUMNS, StepRecord, latest, read
from turnout.bench.step_run import Measured, Step, make_ids
from turnout.bench.step_sweep import sweep
from turnout.integrations.architectures import expert_modules
from turnout.shapes import shape_named

GIB = 2**30


def rows_of(**values):
    record = StepRecord(None)
    sweep([step_model("tiny")], setting(**values), record, lambda row: None)
    return record.rows


@pytest.fixture(scope="module")
def rows():
    return rows_of(checkpointing=("off", "on"))


def test_every_provider_has_a_row_in_both_modes(rows):
    assert [(r.checkpointing, r.provider) for r in rows] == [
        (mode, name) for mode in ("off", "on") for name in ALL
    ]
    assert {(r.shape, r.layers, r.tokens, r.sequence, r.note) for r in rows} == {
        ("tiny", 2, 32, 16, "")
    }
    for r in rows:
        assert r.first_s > 0
        assert r.tokens_per_s == pytest.approx(32 / r.step_ms * 1e3)
        assert r.peak_mb is None  # no allocator counts on a CPU


def test_moe_part_is_the_step_without_the_identity_step_of_its_case(rows):
    identity = {r.checkpointing: r.step_ms for r in rows if r.provider == "identity"}
    for r in rows:
        if r.provider == "identity":
            assert (r.moe_ms, r.gate, r.grad_err) == (None, "", None)
        else:
            assert r.moe_ms == pytest.approx(r.step_ms - identity[r.checkpointing])
            assert r.gate == "stock"


def test_everybody_computes_the_same_step_but_the_identity(rows):
    losses = {r.provider: r.loss for r in rows if r.checkpointing == "off"}
    for name in ALL[1:]:
        assert losses[name] == pytest.approx(losses["stock"], rel=1e-3)
    assert abs(losses["identity"] - losses["stock"]) > 5e-3
    assert all(r.grad_err < 0.1 for r in rows if r.provider != "identity")


def test_without_the_identity_there_is_no_moe_part():
    (only,) = rows_of(providers=("turnout",))
    assert only.step_ms > 0
    assert only.moe_ms is None


def test_identity_has_no_experts_and_the_same_weights():
    shape = step_model("tiny")
    identity, stock = (
        build(shape, 2, name, CPU, checkpointing=False) for name in ("identity", "stock")
    )
    assert list(expert_modules(identity.model)) == []
    assert sum(isinstance(m, Identity) for m in identity.model.modules()) == 2
    x = torch.randn(1, 4, 64)
    assert identity.decoder.layers[0].mlp(x) is x
    there = dict(stock.model.named_parameters())
    for name, parameter in identity.model.named_parameters():
        assert torch.equal(parameter, there[name]), name
    assert any("experts" in name for name in stock.adapters)
    assert all(bool(p.any()) for p in stock.adapters.values())  # B is not zero


def test_a_drawn_embedding_changes_nothing_else():
    plain = step_model("tiny")
    drawn = dataclasses.replace(plain, embedding=1.0)
    stock, other = (build(s, 2, "stock", CPU, checkpointing=False) for s in (plain, drawn))
    there = dict(stock.model.named_parameters())
    differ = {n for n, p in other.model.named_parameters() if not torch.equal(p, there[n])}
    assert [name.rpartition("model.")[2] for name in differ] == ["embed_tokens.weight"]
    embedding = other.model.get_input_embeddings().weight
    assert embedding.float().std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_real_configuration_does_not_run(name):
    """With its own options (yarn, biases, groups, partial rotary, ...), by every provider."""
    small, real = narrow(name), step_model(name)
    config, published = small.config(small.layers), real.config(small.layers)
    for key in ("rope_parameters", "num_experts_per_tok", "attention_bias", "n_group"):
        assert getattr(config, key, None) == getattr(published, key, None)
    record = StepRecord(None)
    some = setting(layers=small.layers, tokens=16, sequence=8)
    sweep([small], some, record, lambda row: None)
    assert [(r.provider, r.note) for r in record.rows] == [(n, "") for n in ALL]
    built = build(small, small.layers, "stock", CPU, checkpointing=True)
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n in built.adapters}
    assert adapted >= set(real.targets)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-30b", 30.5),
        ("gptoss-20b", 20.9),
        ("glm-4.5-air", 109.0),  # 106.9 with its dense first layer
        ("qwen3.5-35b", 34.7),
        ("deepseek-v3", 704.0),  # 671 with its three dense layers
        ("olmoe", 6.9),
    ],
)
def test_sizes_are_those_of_the_checkpoints(name, billions):
    model = step_model(name)
    counted = step_fit.count(model)
    total = counted.outside + model.layers * counted.weights
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    if name in ("qwen3-30b", "gptoss-20b", "olmoe"):
        shape = shape_named(name)
        assert counted.experts == 3 * shape.experts * shape.hidden * shape.intermediate
        assert counted.top_k == shape.top_k
        of_experts = 16 * shape.experts * (2 * shape.hidden + 3 * shape.intermediate)
        assert of_experts < counted.adapters < 1.1 * of_experts


def test_the_head_of_six_layers_weighs_in_a_step_what_the_whole_models_weighs():
    model = step_model("qwen3-30b")
    assert model.config(48).vocab_size == 151936
    assert model.config(6).vocab_size == 19072  # 18992 is no multiple of 128
    assert dataclasses.replace(model, words=151936).config(6).vocab_size == 151936
    for name in NAMES:
        built = step_models.on_meta(step_model(name), 4)
        words = built.config.vocab_size
        assert built.get_input_embeddings().weight.shape[0] == words
        assert built.get_output_embeddings().weight.shape[0] == words


def test_layers_are_chosen_by_what_a_stock_step_needs():
    model = step_model("qwen3-30b")
    counted = step_fit.count(model)
    weights = 2 * (6 * counted.weights + counted.outside) + 4 * 6 * counted.adapters
    above = {
        mode: (step_fit.needed(counted, 6, 8192, checkpointing=mode) - weights) / GIB
        for mode in (False, True)
    }
    assert 20.2 <= above[False] <= 23  # 20.2 was measured
    assert 4.4 <= above[True] <= 8  # 4.4 was measured
    fit = {
        tokens: step_fit.layers_that_fit(model, tokens, 79 * GIB, checkpointing=False)
        for tokens in (8192, 32768)
    }
    assert 10 <= fit[8192] <= 18
    assert 3 <= fit[32768] < fit[8192]
    for tokens, layers in fit.items():
        room = 79 * GIB * (1 - step_fit.SPARE)
        assert step_fit.needed(counted, layers, tokens, checkpointing=False) <= room
        assert step_fit.needed(counted, layers + 1, tokens, checkpointing=False) > room
    assert step_fit.layers_that_fit(model, 8192, 2000 * GIB, checkpointing=True) == 48
    assert step_fit.layers_that_fit(model, 8192, GIB, checkpointing=True) == 1


def test_linear_attention_in_plain_pytorch_keeps_more_than_its_linear_layers():
    counted = step_fit.count(step_model("qwen3.5-35b"))
    weights = 2 * (4 * counted.weights + counted.outside) + 4 * 4 * counted.adapters
    above = (step_fit.needed(counted, 4, 8192, checkpointing=False) - weights) / GIB
    assert 20.5 <= above <= 24  # 20.5 was measured
    # 15 layers ran out of the memory of an H100
    assert step_fit.needed(counted, 15, 4096, checkpointing=False) > 79 * GIB


def test_attention_of_gpt_oss_needs_sinks():
    oss, qwen = step_model("gptoss-20b"), step_model("qwen3-30b")
    assert attention_of(oss, torch.device("cuda"), "auto") == "flex_attention"
    assert attention_of(oss, CPU, "auto") == "eager"
    assert attention_of(qwen, CPU, "auto") == "sdpa"
    assert attention_of(oss, CPU, "sdpa") == "sdpa"


def test_chunked_loss_is_the_models_own(monkeypatch):
    monkeypatch.setattr("turnout.bench.step_loss.CHUNK", 7)
    model = build(step_model("tiny"), 2, "stock", CPU, checkpointing=False)
    model.model.float()
    ids = make_ids(256, 32, 16, CPU)
    model.model(input_ids=ids, labels=ids).loss.backward()
    own = {n: p.grad.clone() for n, p in model.adapters.items()}
    want = model.model(input_ids=ids, labels=ids).loss
    model.model.zero_grad()
    hidden = model.decoder(input_ids=ids).last_hidden_state
    loss = next_token_loss(hidden, model.head.weight, ids)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    for name, parameter in model.adapters.items():
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-4, atol=1e-8)


def test_a_step_trains_the_adapters_and_nothing_else():
    built = build(step_model("tiny"), 2, "turnout", CPU, checkpointing=True)
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    Step(built, make_ids(256, 32, 16, CPU)).run()
    moved = {n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(built.adapters)


def spoiled(change, wanted=lambda name: "experts" in name and "lora_A" in name):
    """`build` with turnout's gradients changed in the first adapter that `wanted` names."""

    def wrong(shape, layers, provider, device, **options):
        built = build(shape, layers, provider, device, **options)
        if provider == "turnout":
            name = next(name for name in built.adapters if wanted(name))
            built.adapters[name].register_hook(change)
        return built

    return wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda grad: grad / 2, "has 0.50 of it"),  # a forgotten scaling
        (lambda grad: -grad, "has -1.00 of it"),
        (lambda grad: grad * 0, "has 0.00 of it"),
        (lambda grad: grad.flip(0), "gradient differs by RMS 1."),  # another expert's
        (lambda grad: grad * math.nan, "RMS nan"),
    ],
)
def test_wrong_gradients_get_no_time(monkeypatch, change, words):
    monkeypatch.setattr(step_sweep, "build", spoiled(change))
    wrong, right = rows_of(providers=("turnout", "turnout-fused"))
    assert words in wrong.note
    assert wrong.failed
    assert wrong.step_ms is wrong.moe_ms is wrong.tokens_per_s is wrong.peak_mb is None
    assert (right.note, right.failed) == ("", False)
    assert right.step_ms > 0


def test_wrong_loss_gets_no_time(monkeypatch):
    def wrong(shape, layers, provider, device, **options):
        built = build(shape, layers, provider, device, **options)
        if provider == "turnout":
            nn.init.constant_(built.decoder.norm.weight, 2.0)
        return built

    monkeypatch.setattr(step_sweep, "build", wrong)
    (only,) = rows_of(providers=("turnout",))
    assert only.note.startswith("the loss is ")
    assert only.step_ms is None


def test_gate_by_hand():
    want = Sample(10.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 10.0])})
    gate = Gate(want)
    assert gate.judge(want) == (0.0, None)
    near = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.0, 10.0])}
    rms, reason = gate.judge(Sample(10.01, near))
    assert rms == pytest.approx(math.sqrt((0.25 + 1) / 125))
    assert reason is None
    assert "the loss is 10.03000" in gate.judge(Sample(10.03, want.grads))[1]
    assert "the loss is nan" in gate.judge(Sample(math.nan, want.grads))[1]
    assert "who has one: b" in gate.judge(Sample(10.0, {"a": want.grads["a"]}))[1]
    noisy = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0, 10.0])}
    assert "all gradients: RMS" in gate.judge(Sample(10.0, noisy))[1]


def short_of_memory(*failing):
    """`build` that has no memory for some (provider, checkpointing, backend)."""

    def failing_build(shape, layers, provider, device, **options):
        for name, checkpointing in failing:
            if name == provider and options["checkpointing"] in checkpointing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB")
        return build(shape, layers, provider, device, **options)

    return failing_build


def test_out_of_memory_is_a_row_and_the_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(step_sweep, "build", short_of_memory(("stock", (False,))))
    record = StepRecord(tmp_path / "a.csv")
    names = ("identity", "stock", "turnout")
    sweep([step_model("tiny")], setting(providers=names), record, lambda row: None)
    identity, stock, ours = read(tmp_path / "a.csv")
    assert (stock.note, stock.step_ms, stock.moe_ms) == ("out of memory", None, None)
    assert stock.out_of_memory
    assert not stock.failed
    assert (ours.gate, ours.note) == ("stock", "")
    assert ours.moe_ms == pytest.approx(ours.step_ms - identity.step_ms, abs=2e-3)


def test_a_slow_round_counts(monkeypatch):
    """Of every provider, the identity too; what failed once has no time."""
    times = {"identity": [5.0, 9.0], "stock": [30.0, 20.0], "turnout": [8.0, None]}
    rounds = [(number, times[name][number]) for number in range(2) for name in times]
    measured = iter(
        Measured(step_ms=ms, first_s=number, note="" if ms else "red") for number, ms in rounds
    )
    monkeypatch.setattr(step_sweep, "measure", lambda *args, **options: next(measured))
    identity, stock, ours = rows_of(providers=tuple(times), rounds=2, checkpointing=("off",))
    assert (identity.step_ms, stock.step_ms, stock.moe_ms) == (5.0, 20.0, 15.0)
    assert stock.first_s == 0
    assert stock.tokens_per_s == pytest.approx(32 / 20e-3)
    assert (ours.step_ms, ours.moe_ms, ours.note) == (None, None, "red")


def test_where_stock_never_fits_the_definition_is_the_reference(monkeypatch):
    monkeypatch.setattr(step_sweep, "build", short_of_memory(("stock", (False, True))))
    stock, ours = rows_of(providers=("stock", "turnout"))
    assert stock.note == "out of memory"
    assert (ours.gate, ours.note) == ("torch", "")
    assert ours.step_ms > 0


def test_where_stock_fails_nobody_is_judged(monkeypatch):
    monkeypatch.setattr(step_sweep, "build", failing(RuntimeError("strides"), "stock"))
    stock, ours = rows_of(providers=("stock", "turnout"))
    assert stock.failed
    assert (ours.gate, ours.note) == ("torch", "")


def test_where_nothing_fits_all_rows_say_so(monkeypatch):
    everybody = [(name, (False, True)) for name in ALL]
    monkeypatch.setattr(step_sweep, "build", short_of_memory(*everybody))
    found = rows_of()
    assert [r.provider for r in found] == list(ALL)
    assert all(r.out_of_memory for r in found)


def failing(error, provider="eager"):
    """`build` that raises it for one provider."""

    def build_or_fail(shape, layers, name, device, **options):
        if name == provider:
            raise error
        return build(shape, layers, name, device, **options)

    return build_or_fail


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel image\nis available"),
        AttributeError("'NoneType' object has no attribute 'shape'"),
        TypeError("forward() takes 2 positional arguments"),
        KeyError("sonicmoe"),
        AssertionError("expected a multiple of 64"),
        TritonError("an fp32 dot"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_one_provider_ends_the_run(monkeypatch, error):
    monkeypatch.setattr(step_sweep, "build", failing(error))
    eager, ours = rows_of(providers=("eager", "turnout"))
    words = " ".join(str(error).split())
    assert eager.note.startswith(f"failed: {type(error).__name__}: {words} (test_bench_step.py:")
    assert eager.failed
    assert ours.step_ms > 0


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",  # torch's own, where a kernel is loaded
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_another_allocator_lacks_is_a_failure(monkeypatch, words):
    monkeypatch.setattr(step_sweep, "build", failing(RuntimeError(words), "stock"))
    (stock,) = rows_of(providers=("stock",))
    assert stock.out_of_memory
    assert not stock.failed


def test_an_interrupted_run_goes_on(monkeypatch):
    monkeypatch.setattr(step_sweep, "build", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        rows_of(providers=("eager", "turnout"))


def test_csv_is_appended_whole(tmp_path):
    path = tmp_path / "step_h100.csv"
    StepRecord(path).add(row())
    before = path.read_text()
    assert before.splitlines()[0] == ",".join(COLUMNS)
    stock = row(provider="stock", step_ms=None, moe_ms=None, note="out of memory, or not")
    StepRecord(path).add(stock)
    assert path.read_text().startswith(before)
    assert read(path) == [row(tokens_per_s=91022.2), stock]
    assert [p.name for p in tmp_path.iterdir()] == ["step_h100.csv"]
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="expected the columns commit,device"):
        StepRecord(path)


def test_columns_are_those_of_the_record():
    asked = "shape,layers,tokens,checkpointing,provider,step_ms,moe_ms,tokens_per_s,peak_mb,first_s"
    versions = "commit,device,torch,triton,transformers,peft,fla"
    assert [c for c in COLUMNS if c in asked.split(",")] == asked.split(",")
    assert list(COLUMNS[:7]) == versions.split(",")


def test_repeated_rows_count_once_and_the_last_one():
    old, new, other = row(step_ms=99.0), row(), row(checkpointing="on")
    assert latest([old, other, new]) == [new, other]


def standard(**ours):
    stock = {"provider": "stock", "step_ms": 170.0, "moe_ms": 96.0, "tokens_per_s": 48000.0}
    return [row(**{"moe_ms": 20.0, **ours}), row(**stock, peak_mb=20600.0)]


def test_demands_pass():
    rows = standard()
    rows += [dataclasses.replace(r, checkpointing="on") for r in rows]
    found = judged(rows)
    where = "qwen3-30b 6 layers 8192"
    assert found[f"{where} off: MoE part, stock / ours"].got == pytest.approx(4.8)
    assert found[f"{where} off: tokens/s / stock"].got == pytest.approx(91022.2 / 48000)
    assert found[f"{where} off: peak / stock"].got == pytest.approx(10000 / 20600)
    assert f"{where} on: peak / stock" not in found
    assert len(found) == 6
    assert all(must.passed for must in found.values())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"moe_ms": 25.0}, "off: MoE part, stock / ours"),
        ({"tokens_per_s": 80000.0}, "off: tokens/s / stock"),
        ({"peak_mb": 10400.0}, "off: peak / stock"),
    ],
)
def test_demands_miss(change, name):
    found = judged(standard(**change))
    must = found[f"qwen3-30b 6 layers 8192 {name}"]
    assert must.got is not None
    assert not must.passed
    missing = found["qwen3-30b 6 layers 8192 on: MoE part, stock / ours"]
    assert (missing.got, missing.passed) == (None, False)  # not measured is not passed


def test_demands_are_made_of_the_shape_and_layers_they_name():
    assert len(judged(standard(layers=12)[:1])) == 1
    assert len(judged([row(shape="olmoe")])) == 1
    oss = [dataclasses.replace(r, shape="gptoss-20b", layers=8) for r in standard(moe_ms=50.0)]
    found = judged(oss)
    must = found["gptoss-20b 8 layers 8192 off: MoE part, stock / ours"]
    assert (must.got, must.limit, must.passed) == (pytest.approx(1.92), 2.0, False)


def test_red_rows_of_ours_are_counted():
    rows = [row(note="a.lora_A: gradient differs", step_ms=None), row(provider="stock", note="x")]
    must = judged(rows)["red gates and failures of ours"]
    assert (must.got, must.passed) == (1.0, False)
    assert judged([row(note="out of memory")])["red gates and failures of ours"].passed


def test_32k_must_run_where_stock_has_no_memory():
    ours = row(tokens=32768, layers=9)
    fits = row(tokens=32768, layers=9, provider="stock")
    full = dataclasses.replace(fits, step_ms=None, moe_ms=None, note="out of memory")
    name = "32768 tokens off: runs where stock is out of memory"
    assert judged([ours, full])[name].passed
    assert judged([ours, full])[name].note == "qwen3-30b, 9 layers"
    assert not judged([ours, fits])[name].passed


def test_plot(tmp_path):
    rows = [row(provider=name) for name in ALL[1:]]
    rows += [row(checkpointing="on"), row(checkpointing="on", provider="stock", step_ms=None)]
    plot(tmp_path / "a.png", rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="none of the 1 rows"):
        plot(tmp_path / "b.png", [row(moe_ms=None)])


def test_command_writes_csv_json_and_picture_and_judges_them_again(monkeypatch, capsys, tmp_path):
    csv, report, png = tmp_path / "a.csv", tmp_path / "a.json", tmp_path / "a.png"
    flags = ["--step", *SMALL, "--provider", "identity,stock", "--provider", "turnout"]
    flags += ["--checkpointing", "off", "--csv", csv, "--commit", "abc", "--json", report]
    assert turnout(monkeypatch, "bench", *flags) == 0
    shown = capsys.readouterr()
    assert "red gates and failures of ours" in shown.out
    assert "turnout" in shown.err
    rows = read(csv)
    assert [(r.provider, r.shape, r.commit) for r in rows] == [
        (name, "tiny", "abc") for name in ("identity", "stock", "turnout")
    ]
    facts = json.loads(report.read_text())
    assert [r["provider"] for r in facts["rows"]] == ["identity", "stock", "turnout"]
    assert facts["demands"][-1]["passed"]
    flags = ["--step", "--judge", "--csv", csv, "--commit", "abc", "--plot", png]
    assert turnout(monkeypatch, "bench", *flags) == 0
    assert png.is_file()
    assert read(csv) == rows


def test_red_gate_ends_the_command_with_1(monkeypatch, capsys):
    monkeypatch.setattr(step_sweep, "build", spoiled(lambda grad: grad * 2))
    flags = ["--step", *SMALL, "--provider", "turnout", "--checkpointing", "on"]
    assert turnout(monkeypatch, "bench", *flags) == 1
    assert "no time: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--step", "--shape", "mixtral"], "shape is 'mixtral' with --step; expected one of qwen3"),
        (["--step", "--provider", "sonicmoe"], "provider is 'sonicmoe'"),
        (["--step", "--checkpointing", "both"], "checkpointing is 'both'"),
        (["--step", "--tokens", "100", "--sequence", "64"], "Give --tokens a multiple"),
        (["--step", "--tokens", "0"], "tokens is 0"),
        (["--step", "--repeats", "0"], "repeats is 0"),
        (["--step", "--rounds", "0"], "rounds is 0"),
        (["--rounds", "2"], "got --rounds without --step"),
        (["--step", "--layers", "3"], "layers is 3; expected 1 to 2"),
        (["--step", "--shape", "qwen3-30b"], "Give --layers, at most 48"),
        (["--step", "--mode", "fwd"], "got --step with --mode"),
        (["--step", "--graph"], "got --step with --graph"),
        (["--layers", "6"], "got --layers without --step"),
        (["--judge"], "got --judge without --step"),
        (["--step", "--judge"], "--judge is given and --csv is None"),
        (["--step", "--plot", "nowhere/a.png"], "a folder that exists"),
        (["--step", "--csv", "nowhere/a.csv"], "a folder that exists"),
    ],
)
def test_wrong_flags_are_clear_errors(monkeypatch, capsys, flags, words):
    assert turnout(monkeypatch, "bench", "--device", "cpu", *flags) == 2
    assert words in " ".join(capsys.readouterr().err.split())
