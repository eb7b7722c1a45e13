"""The benchmark of equal training trains, sees a run that drifts, and an adapter that changed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import equal_training as bench

SIZE = bench.SIZES["tiny"]


def rows_of(**runs: list[float]) -> list[bench.Row]:
    facts = ("abc", "gpu", "2", "3", "5", "0")
    return [
        bench.Row(*facts, name.replace("_", " "), step, loss, 1.0 + 1e-3 * len(name) * step)
        for name, losses in runs.items()
        for step, loss in enumerate(losses)
    ]


def test_band_by_hand() -> None:
    mine, allowed = bench.band([[1.0, 2.0], [1.0, 4.0]], [1.5, 3.0])
    assert (mine, allowed) == (0.5, 1.0)


def test_a_run_that_drifts_is_like_the_others() -> None:
    stock = {"stock_1": [4.0, 3.00], "stock_2": [4.0, 3.02]}
    same, grad_norm = bench.demands(rows_of(**stock, turnout=[4.0, 3.005]))
    assert same.passed
    assert grad_norm.name.startswith("grad_norm")
    drifted, _ = bench.demands(rows_of(**stock, turnout=[4.0, 3.05]))
    assert not drifted.passed
    assert drifted.got == pytest.approx(0.04 / 0.01)


def test_the_rows_of_a_batch_keep_their_order() -> None:
    seen: list[torch.Tensor] = []

    class Model(torch.nn.Linear):
        def forward(self, ids: Any, labels: Any) -> Any:
            seen.append(ids)
            return type("Out", (), {"loss": super().forward(ids.float()).sum()})

    data = [torch.arange(12).view(6, 2) + 100 * step for step in range(2)]
    for order in (0, 1, 2):
        bench.train(Model(2, 1), data, order, 1e-3)
    plain, first, second = seen[:2], seen[2:4], seen[4:]
    assert all(torch.equal(a, b) for a, b in zip(plain, data, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, data, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, batch in zip(first + second, data + data, strict=True):
        assert torch.equal(got.sort(0).values, batch)


def test_stock_runs_are_judged_by_themselves() -> None:
    stock = [[1.0, 1.0], [1.0, 1.2], [1.0, 2.0]]
    # the second: 0.3 from the mean of the others, which are 0.5 from it; the third: 0.9 and 0.1
    assert bench.by_the_others(stock) == pytest.approx((0.3 / 0.5, 0.9 / 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_changed_is_taken_for_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def fresh() -> Any:
        return bench.base_model(SIZE, 100, dtype).float()

    model = bench.adapted(bench.base_model(SIZE, 100, dtype))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = torch.arange(40).view(2, 20)
    ours, same = bench.exchange({bench.OURS: model, "stock": model}, fresh, batch)
    assert ours.got == same.got
    assert same.got is not None
    assert 0 < same.got < 1e-5
    assert same.note == "the same tensors"
    load = bench.PeftModel.from_pretrained

    def without_b(*args: Any) -> Any:
        loaded = load(*args)
        for name, parameter in loaded.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        return loaded

    monkeypatch.setattr(bench.PeftModel, "from_pretrained", without_b)
    (changed,) = bench.exchange({"stock": model}, fresh, batch)
    assert not changed.passed
    assert "lora_B" in changed.note


def test_other_code_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is loaded and not applied."""

    def fresh() -> Any:
        return bench.base_model(SIZE, 100, torch.float32)

    load = bench.PeftModel.from_pretrained

    def unscaled(base: Any, *args: Any) -> Any:
        loaded = load(base, *args)
        if base is patched[-1]:
            for module in loaded.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling = dict.fromkeys(module.scaling, 0.0)
        return loaded

    model = bench.adapted(fresh())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    patched: list[Any] = [None]
    monkeypatch.setattr(bench.turnout, "patch", patched.append)
    monkeypatch.setattr(bench.PeftModel, "from_pretrained", unscaled)
    (changed,) = bench.exchange({"stock": model}, fresh, torch.arange(40).view(2, 20))
    assert not changed.passed
    assert changed.note == "the same tensors"


def test_six_runs_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "training.csv"
    words = ["--size", "tiny", "--steps", "3", "--length", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--out", str(out), "--commit", "abc"])
    bench.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--jobs", "2"])
    bench.main()  # appends
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 3
    assert {row["run"] for row in rows} == {"turnout", *(f"stock {i}" for i in range(1, 6))}
    first = [float(row["loss"]) for row in rows[:18] if row["step"] == "0"]
    assert max(first) - min(first) < 1e-4, "the runs do not begin with the same weights"
    losses = [float(row["loss"]) for row in rows]
    assert losses[:18] == pytest.approx(losses[18:], rel=1e-4), "in other processes"
    text = capsys.readouterr().out
    assert "adapter of turnout in both codes" in text
    assert "grad_norm: ours / largest of 5 stock" in text
