"""`turnout verify` over every architecture, and proof that its checks can turn red."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from turnout.cli import app, main
from turnout.integrations import architectures, router_forward, router_outputs
from turnout.specs import Activation, RouteSpec
from turnout.verify import TINY, Row, routing, support_page, to_dict, verify_types
from turnout.verify.run import _forward
from turnout.verify.tiny import build, make_inputs

REASONS = set(architectures.StockReason.__args__)
MODELS_OWN = {"phimoe", "switch_transformers", "nllb-moe"}


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.model_type: row for row in verify_types(TINY)}


def test_no_architecture_is_red(rows: dict[str, Row]) -> None:
    assert {key: row.reason for key, row in rows.items() if row.status == "fail"} == {}


def test_at_least_58_architectures_are_ok_with_numbers(rows: dict[str, Row]) -> None:
    ok = [row for row in rows.values() if row.status == "ok"]
    assert len(rows) == len(TINY) >= 61  # 63 from transformers 5.17 on
    assert len(ok) >= 58
    for row in ok:
        assert row.forward_err is not None, row
        assert row.grad_err is not None, row
        assert row.bf16_err is not None, row


def test_stock_rows_have_a_reason_of_the_fixed_list(rows: dict[str, Row]) -> None:
    stock = {key: row.reason for key, row in rows.items() if row.status == "stock"}
    assert set(stock.values()) <= REASONS
    assert {"switch_transformers", "nllb-moe"} <= set(stock)


def test_adapters_are_compared_but_for_the_noted_few(rows: dict[str, Row]) -> None:
    without = [row for row in rows.values() if row.status == "ok" and row.lora_err is None]
    assert len(without) <= 6
    assert all(row.note == "PEFT path" for row in without)


def test_every_router_but_the_models_own_is_reproduced(rows: dict[str, Row]) -> None:
    assert {key for key, row in rows.items() if row.routing_err is None} == MODELS_OWN


def test_adapters_in_bfloat16_are_closer_to_float32_than_pefts_fold(rows: dict[str, Row]) -> None:
    pairs = [
        (row.lora_bf16_err, row.lora_bf16_peft_err)
        for row in rows.values()
        if row.lora_bf16_err is not None and row.lora_bf16_peft_err is not None
    ]
    assert len(pairs) >= 50
    closer = sum(ours < peft for ours, peft in pairs)
    assert closer >= 0.9 * len(pairs)


def test_the_json_form_has_the_promised_keys(rows: dict[str, Row]) -> None:
    found = json.loads(json.dumps(to_dict(list(rows.values()))))
    assert {"torch", "transformers", "peft", "turnout"} <= set(found["versions"])
    expected = {"model_type", "router", "experts", "routing_err", "forward_err", "grad_err"}
    expected |= {"lora_err", "status", "reason", "note"}
    assert all(expected <= set(row) for row in found["rows"])


def test_the_support_page_is_the_generated_one(rows: dict[str, Row]) -> None:
    page = Path(__file__).parents[2] / "docs" / "support.md"
    head = "Made with transformers"
    pinned = page.read_text().split(head)[1].split("\n")[0]
    generated = support_page(list(rows.values()))
    if generated.split(head)[1].split("\n")[0] != pinned:
        assert generated.count("| ok |") >= 58  # another transformers release than the page's
    else:
        assert page.read_text() == generated


def drop_bias(spec: RouteSpec, tensors: dict[str, Tensor]) -> tuple[RouteSpec, dict[str, Tensor]]:
    return spec, {name: t for name, t in tensors.items() if name != "bias_E"}


def drop_groups(spec: RouteSpec, tensors: dict[str, Tensor]) -> tuple[RouteSpec, dict[str, Tensor]]:
    return replace(spec, n_group=1, topk_group=1), tensors


def flip_norm(spec: RouteSpec, tensors: dict[str, Tensor]) -> tuple[RouteSpec, dict[str, Tensor]]:
    return replace(spec, norm=not spec.norm), tensors


def drop_scale(spec: RouteSpec, tensors: dict[str, Tensor]) -> tuple[RouteSpec, dict[str, Tensor]]:
    kept = {n: t for n, t in tensors.items() if n not in ("scale", "expert_scale_E")}
    return replace(spec, scale=1.0), kept


MUTATIONS = {"bias": drop_bias, "groups": drop_groups, "norm": flip_norm, "scale": drop_scale}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_rule_with_a_part_dropped_is_red_exactly_where_it_is_used(name: str) -> None:
    mutate = MUTATIONS[name]
    missed, wrong, used = [], [], 0
    for key in TINY:
        if key in MODELS_OWN:
            continue
        model, inputs = build(key), make_inputs(key)
        calls = routing.record(model, lambda m=model, i=inputs: _forward(m, i))
        changed = []

        def probe(
            spec: RouteSpec, tensors: dict[str, Tensor], changed: list[bool] = changed
        ) -> tuple[RouteSpec, dict[str, Tensor]]:
            mutated = mutate(spec, tensors)
            changed.append(mutated[0] != spec or set(mutated[1]) != set(tensors))
            return mutated

        errors = [routing.check(call, probe).value for call in calls]
        red = max(errors) > 1e-4
        used += any(changed)
        if any(changed) and not red:
            missed.append(key)
        if red and not any(changed):
            wrong.append(key)
    assert not missed
    assert not wrong
    assert used >= {"bias": 25, "groups": 15, "norm": 58, "scale": 20}[name]


def test_a_wrong_activation_turns_the_row_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "activation_of", lambda module: Activation(act="gelu"))
    (row,) = verify_types(["qwen3_moe"])
    assert row.status == "fail"
    assert "forward_err" in row.reason


def test_a_red_row_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "activation_of", lambda module: Activation(act="gelu"))
    assert CliRunner().invoke(app, ["verify", "qwen3_moe"]).exit_code == 1


def test_swapped_routers_are_not_what_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", "qwen3_moe", "granitemoe", "--router", "fused"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    decide = router_outputs.decide

    def twice(*args: Any, **kwargs: Any) -> Any:
        found = decide(*args, **kwargs)
        return replace(found, weights_TK=2 * found.weights_TK) if args[2].shape[0] > 4 else found

    monkeypatch.setattr(router_forward, "decide", twice)  # but for the check on four tokens
    (row,) = verify_types(["qwen3_moe"], router="fused")
    assert "forward_err" in row.reason
    assert verify_types(["qwen3_moe"])[0].status == "ok"


def test_routers_that_stay_the_models_own_are_not_named(rows: dict[str, Row]) -> None:
    assert {key for key, row in rows.items() if row.own_router} == {*MODELS_OWN, "jetmoe"}


def test_a_local_checkpoint_is_verified(tmp_path: Path) -> None:
    build("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(
        app, ["verify", "--model", str(tmp_path / "model"), "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "ok"
    assert row["forward_err"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "no config.json"),
        (["bogus"], "unknown architectures"),
        (["--all", "--model", "x"], "--model checks one checkpoint"),
        (["--support", "x.md"], "give it with --all"),
        (["--router", "fast"], "--router is 'fast'; expected one of 'model', 'fused'"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["turnout", "verify", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
