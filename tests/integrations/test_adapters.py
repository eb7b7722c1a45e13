"""`turnout adapter`: what check says, and that conversion keeps the deltas."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapter_cases import (
    CASES,
    CONVERTED,
    OLD,
    TODAY,
    TODAYS,
    UNTOLD,
    assert_same_adapter,
    codes,
    digest,
    exact_delta,
    expected,
    golden,
    make_model,
)
from hypothesis import given
from hypothesis import strategies as st
from make_golden import model_input, run
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_model import hf_model, tiny

from turnout.integrations.adapter_layout import layout_of, split_key, swap_factors
from turnout.integrations.adapters import (
    check_adapter,
    convert_adapter,
    print_report,
)

# --- converted adapters compute what the old PEFT computed ---------------------------------------


@pytest.mark.parametrize(("version", "case"), CONVERTED)
def test_converted_adapter_gives_the_old_logits_in_todays_peft(version, case, tmp_path):
    source, before = golden(version, case), digest(golden(version, case))
    convert_adapter(source, tmp_path / "new", make_model(case))
    model = make_model(case)
    x = model_input(model)
    wrapped = PeftModel.from_pretrained(model, tmp_path / "new").eval()
    torch.testing.assert_close(run(wrapped, x), expected(version, case, "logits"))
    assert digest(source) == before
    deltas = {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{m.parameter_name}": m
        for name, m in wrapped.named_modules()
        if type(m).__name__ == "ParamWrapper"
    }
    assert deltas
    for name, module in deltas.items():
        got = module.get_delta_weight("default").detach()
        torch.testing.assert_close(got, expected(version, case, f"delta/{name}"))


@pytest.mark.parametrize(("version", "case"), TODAYS)
def test_todays_goldens_load_as_they_are(version, case):
    model = make_model(case)
    x = model_input(model)
    wrapped = PeftModel.from_pretrained(model, golden(version, case)).eval()
    torch.testing.assert_close(run(wrapped, x), expected(version, case, "logits"))


@pytest.mark.parametrize("version", OLD)
def test_unconverted_square_adapter_is_silently_wrong_in_todays_peft(version, tmp_path):
    """Why this command exists: gate_up is square here, so nothing would complain about it."""
    folder = tmp_path / "up"
    shutil.copytree(golden(version, "out_in-square"), folder)
    state = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k.replace(".base_layer", ""): v for k, v in state.items() if ".base_layer" in k},
        folder / "adapter_model.safetensors",
    )
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_parameters": ["mlp.experts.gate_up_proj"]}))
    wrapped = PeftModel.from_pretrained(tiny("out_in-square"), folder)
    wrapper = next(m for m in wrapped.modules() if type(m).__name__ == "ParamWrapper")
    want = expected(version, "out_in-square", "delta/mlp.experts.gate_up_proj")
    assert not torch.allclose(wrapper.get_delta_weight("default"), want, rtol=0.1)


@pytest.mark.parametrize(("version", "case"), CONVERTED)
def test_delta_is_the_same_bit_for_bit(version, case, tmp_path):
    report = check_adapter(golden(version, case), make_model(case))
    convert_adapter(golden(version, case), tmp_path / "new", make_model(case))
    old = load_file(golden(version, case) / "adapter_model.safetensors")
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    stacks = [row for row in report.parameters if row.num_experts != 1]
    assert stacks
    for row in stacks:
        was = row.a_axis == "dim1"
        one = exact_delta(old[row.a_key], old[row.b_key], row.num_experts, over_dim1=was)
        two = exact_delta(new[row.a_key], new[row.b_key], row.num_experts, over_dim1=was ^ row.swap)
        assert torch.equal(one, two)
        shape = dict(make_model(case).named_parameters())[f"{row.module}.{row.parameter}"].shape
        assert one.shape == shape
    moved = {key for row in stacks if row.swap for key in (row.a_key, row.b_key)}
    assert all(torch.equal(old[key], new[key]) for key in old.keys() - moved)


@given(
    experts=st.integers(1, 5),
    rank=st.integers(1, 4),
    a=st.integers(1, 6),
    b=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_swap_is_its_own_inverse_and_keeps_the_delta(experts, rank, a, b, dtype):
    generator = torch.Generator().manual_seed(experts * 1000 + rank * 100 + a * 10 + b)
    one = torch.randn(experts * rank, a, generator=generator).to(dtype)
    two = torch.randn(b, rank * experts, generator=generator).to(dtype)
    new_one, new_two = swap_factors(one, two, experts)
    assert (new_one.shape, new_two.shape) == ((experts * rank, b), (a, rank * experts))
    assert (new_one.dtype, new_two.dtype) == (dtype, dtype)
    old = exact_delta(one, two, experts, over_dim1=True)
    assert torch.equal(old, exact_delta(new_one, new_two, experts, over_dim1=False))
    back = swap_factors(new_one, new_two, experts)
    assert torch.equal(back[0], one)
    assert torch.equal(back[1], two)


# --- what check says -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [*OLD, *TODAY])
@pytest.mark.parametrize("case", CASES)
def test_check_finds_nothing_wrong_with_what_peft_wrote(version, case):
    report = check_adapter(golden(version, case), make_model(case))
    assert codes(report) == ({"cannot_tell"} if (version, case) == UNTOLD else set())
    assert report.peft_version == version
    assert {row.module for row in report.linear_modules if row.swap} == set()
    names = [row.parameter for row in report.parameters if row.num_experts != 1]
    down_only = case == "in_out_declared-down"
    assert names == ["down_proj"] if down_only else names == ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("version", "case", "axis", "swap"),
    [
        ("0.18.0", "out_in-narrow", "dim1", True),
        ("0.18.1", "out_in-square", "dim1", True),
        ("0.18.1", "in_out_declared-narrow", "dim1", False),
        ("0.18.1", "in_out-narrow", "dim1", True),
        ("0.18.1", "gpt_oss", "dim1", False),
        ("0.19.0", "out_in-narrow", "dim1", True),
        ("0.19.0", "in_out_declared-square", "dim2", True),
        ("0.19.0", "in_out-narrow", "dim1", True),
        ("0.19.0", "gpt_oss", "dim2", True),
        ("0.19.1", "out_in-narrow", "dim2", False),
        ("0.21.2", "gpt_oss", "dim1", False),
        ("0.21.2", "in_out-narrow", "dim2", False),
    ],
)
def test_the_axis_a_runs_over_by_version_and_declaration(version, case, axis, swap):
    rows = check_adapter(golden(version, case), make_model(case)).parameters
    assert {(row.a_axis, row.swap) for row in rows} == {(axis, swap)}


def test_ranks_and_scaling_follow_the_patterns():
    report = check_adapter(golden("0.18.1", "out_in-patterns"), tiny("out_in-patterns"))
    found = {
        f"{row.module}.{row.parameter}": (row.rank, row.alpha, row.num_experts, row.swap)
        for row in (*report.parameters, *report.linear_modules)
    }
    assert found == {
        "mlp.experts.gate_up_proj": (4, 6, 3, True),
        "mlp.experts.down_proj": (2, 5, 3, True),
        "mlp.gate.weight": (2, 6, 1, False),
        "q_proj.None": (3, 6, 1, False),
    }
    scaling = {row.parameter: row.scaling for row in report.parameters}
    assert scaling["gate_up_proj"] == pytest.approx(6 / 4**0.5)
    assert scaling["down_proj"] == pytest.approx(5 / 2**0.5)


def test_rank_pattern_survives_the_conversion(tmp_path):
    source = golden("0.18.1", "out_in-patterns")
    convert_adapter(source, tmp_path / "new", tiny("out_in-patterns"))
    old = json.loads((source / "adapter_config.json").read_text())
    new = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert new == old | {"peft_version": "0.19.1"}


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0"])
def test_config_json_of_the_base_model_is_enough(version, case, tmp_path):
    hf_model(case).config.save_pretrained(tmp_path / "base")
    report = check_adapter(golden(version, case), tmp_path / "base")
    assert report == check_adapter(golden(version, case), str(tmp_path / "base"))
    convert_adapter(golden(version, case), tmp_path / "a", tmp_path / "base")
    convert_adapter(golden(version, case), tmp_path / "b", hf_model(case))
    assert_same_adapter(tmp_path / "a", tmp_path / "b")


def test_parameters_are_named_without_a_model_where_only_one_naming_is_possible():
    report = check_adapter(golden("0.18.1", "out_in-patterns"))
    assert {(r.parameter, r.nesting) for r in report.parameters} == {
        ("gate_up_proj", 0),
        ("down_proj", 1),
        ("weight", 0),
    }


def test_second_check_sees_todays_layout(tmp_path):
    convert_adapter(golden("0.18.1", "out_in-narrow"), tmp_path / "new")
    report = check_adapter(tmp_path / "new", tiny("out_in-narrow"))
    assert report.layout == "peft>=0.19.1"
    assert report.converted_from == "0.18.1"
    assert not report.findings
    with pytest.raises(ValueError, match="today's layout"):
        convert_adapter(tmp_path / "new", tmp_path / "again", tiny("out_in-narrow"))


@pytest.mark.parametrize("case", ["out_in-narrow", "gpt_oss"])
def test_report_is_plain_data_and_prints(case):
    report = check_adapter(golden("0.19.0", case), make_model(case))
    assert json.loads(json.dumps(report.to_dict()))["layout"] == "peft==0.19.0"
    console = Console(record=True, width=200)
    print_report(report, console)
    text = console.export_text()
    assert "mlp.experts.gate_up_proj" in text
    assert "nothing wrong found" in text


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        (None, "unknown"),
        ("0.16.0", "unknown"),
        ("0.17.1", "peft<=0.18.1"),
        ("0.18.1", "peft<=0.18.1"),
        ("0.18.1.dev0@abc", "peft<=0.18.1"),
        ("0.18.2.dev0@abc", "unknown"),
        ("0.19.0", "peft==0.19.0"),
        ("0.19.1.dev0@UNKNOWN", "unknown"),
        ("0.19.1", "peft>=0.19.1"),
        ("0.20.1.dev0", "peft>=0.19.1"),
        ("1.0", "peft>=0.19.1"),
        ("banana", "unknown"),
    ],
)
def test_layout_of_versions(version, layout):
    assert layout_of(version)[0] == layout


def test_key_of_a_module_inside_a_wrapped_one():
    inside = split_key("base_model.model.mlp.experts.base_layer.base_layer.shared.lora_A.weight")
    assert (inside.module, inside.level) == ("mlp.experts.shared", 0)
    nested = split_key("base_model.model.mlp.experts.base_layer.base_layer.lora_B.weight")
    assert (nested.module, nested.level) == ("mlp.experts", 2)
    assert split_key("base_model.model.lm_head.weight") is None


def test_a_version_newer_than_we_know_is_said(editable):
    folder = editable("0.21.2", "out_in-narrow", {"peft_version": "9.1.0"})
    assert codes(check_adapter(folder)) == {"newer_peft"}


@pytest.mark.parametrize("modules", [["q_proj"], "q_.*"])
def test_bare_parameter_names_do_not_claim_ordinary_modules(editable, modules):
    """PEFT accepts `gate_up_proj` alone, which could lie on any module, q_proj included."""
    config = {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "target_modules": modules,
        "r": 5,
        "rank_pattern": {"gate_up_proj": 2, "down_proj": 2, "q_proj": 2},
    }
    report = check_adapter(editable("0.18.1", "out_in-narrow", config))
    assert not report.findings
    assert [row.module for row in report.linear_modules] == ["q_proj"]
    assert [row.parameter for row in report.parameters] == ["gate_up_proj", "down_proj"]
