"""`turnout adapter`: old adapters keep their deltas, and what can not be told is refused.

The golden adapters were written by five versions of PEFT, each with the logits it computed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turnout.integrations.adapter_layout import layout_of, split_key, swap_factors
from turnout.integrations.adapters import (
    AdapterReport,
    check_adapter,
    convert_adapter,
    print_report,
)

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_golden import model_input, run  # noqa: E402
from tiny_model import HF_SIZES, TinyMoe, hf_model, tiny  # noqa: E402

OLD = ("0.18.0", "0.18.1", "0.19.0")
TODAY = ("0.19.1", "0.21.2")
CASES = (
    "out_in-narrow",
    "out_in-square",
    "out_in-patterns",
    "in_out_declared-narrow",
    "in_out_declared-square",
    "in_out_declared-down",
    "in_out-narrow",
    "qwen3_moe",
    "gpt_oss",
)
UNTOLD = ("0.19.0", "in_out_declared-down")  # one square weight, flag read the wrong way round
CONVERTED = [(v, c) for v in OLD for c in CASES if (v, c) != UNTOLD]
TODAYS = [(v, c) for v in TODAY for c in CASES]
INNER = "base_model.model.mlp.experts.base_layer.lora_{}.weight"
OUTER = "base_model.model.mlp.experts.lora_{}.weight"


def golden(version: str, case: str) -> Path:
    return GOLDEN / version / case


def expected(version: str, case: str, what: str) -> Tensor:
    return load_file(GOLDEN / version / "expected.safetensors")[f"{case}/{what}"]


def make_model(case: str) -> nn.Module:
    return hf_model(case) if case in HF_SIZES else tiny(case)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def assert_same_adapter(one: Path, two: Path) -> None:
    """The same config, tensors and metadata; safetensors writes metadata in no fixed order."""
    assert digest(one)["adapter_config.json"] == digest(two)["adapter_config.json"]
    name = "adapter_model.safetensors"
    left, right = load_file(one / name), load_file(two / name)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    with safe_open(one / name, "pt") as a, safe_open(two / name, "pt") as b:
        assert a.metadata() == b.metadata()


def codes(report: AdapterReport) -> set[str]:
    return {finding.code for finding in report.findings}


def exact_delta(a: Tensor, b: Tensor, experts: int, *, over_dim1: bool) -> Tensor:
    """dW (E, dim1, dim2) of unscaled factors, each entry summed over R in order, in fp64."""
    a_eri = a.double().reshape(experts, -1, a.shape[1])
    b_ore = b.double().reshape(b.shape[0], -1, experts)
    out = torch.zeros(experts, a.shape[1], b.shape[0], dtype=torch.float64)
    for r in range(a_eri.shape[1]):
        out += a_eri[:, r, :, None] * b_ore[:, r].T[:, None, :]
    return out if over_dim1 else out.transpose(1, 2)


@pytest.fixture
def editable(tmp_path: Path):
    """A function that copies a golden adapter and changes its config and tensors."""

    def edit(version: str, case: str, config: dict | None = None, tensors=None) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(golden(version, case), folder)
        if config is not None:
            path = folder / "adapter_config.json"
            merged = json.loads(path.read_text()) | config
            path.write_text(json.dumps({k: v for k, v in merged.items() if v != "DELETE"}))
        if tensors is not None:
            state = load_file(folder / "adapter_model.safetensors")
            tensors(state)
            save_file(state, folder / "adapter_model.safetensors")
        return folder

    return edit


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


# --- without a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize("case", ["out_in-narrow", "out_in-square", "out_in-patterns", "qwen3_moe"])
def test_gated_experts_need_no_model(version, case, tmp_path):
    """Widths 2F and F leave one reading; the files are those of the conversion with a model."""
    convert_adapter(golden(version, case), tmp_path / "without")
    convert_adapter(golden(version, case), tmp_path / "with", make_model(case))
    assert_same_adapter(tmp_path / "without", tmp_path / "with")


@pytest.mark.parametrize(
    ("version", "case"),
    [
        ("0.18.1", "gpt_oss"),
        ("0.18.1", "in_out_declared-narrow"),
        ("0.18.1", "in_out-narrow"),
        ("0.19.0", "in_out-narrow"),
        ("0.18.1", "in_out_declared-down"),
        ("0.19.0", "in_out_declared-down"),
    ],
)
def test_ambiguous_without_a_model_is_refused(version, case, tmp_path):
    """(E, in, out) is swapped by today's PEFT or not, depending on a flag only the model has."""
    assert "cannot_tell" in codes(check_adapter(golden(version, case)))
    with pytest.raises(ValueError, match="pass the base model"):
        convert_adapter(golden(version, case), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_0190_needs_no_model_where_a_runs_over_outputs(tmp_path):
    """Declared or not: PEFT 0.19.0 with A over outputs is today's layout of neither."""
    convert_adapter(golden("0.19.0", "gpt_oss"), tmp_path / "new")
    model = hf_model("gpt_oss")
    x = model_input(model)
    wrapped = PeftModel.from_pretrained(model, tmp_path / "new")
    torch.testing.assert_close(run(wrapped, x), expected("0.19.0", "gpt_oss", "logits"))


def test_square_weight_of_0190_is_refused_even_with_the_model(tmp_path):
    """transformers before 5.0 did not declare is_transposed, so both readings were written."""
    with pytest.raises(ValueError, match="weights are square"):
        convert_adapter(golden(*UNTOLD), tmp_path / "new", tiny(UNTOLD[1]))


def test_0190_of_a_module_that_did_not_declare_yet_is_told_by_its_shapes(tmp_path):
    """Trained as `in_out`, loaded where the module declares is_transposed: nothing to swap."""
    report = check_adapter(golden("0.19.0", "in_out-narrow"), tiny("in_out_declared-narrow"))
    assert {(row.a_axis, row.swap) for row in report.parameters} == {("dim1", False)}


def test_one_parameter_alone_is_refused_without_a_model(editable, tmp_path):
    def drop(state):
        for side in "AB":
            del state[INNER.format(side)]

    folder = editable(
        "0.18.1", "out_in-narrow", {"target_parameters": ["mlp.experts.down_proj"]}, drop
    )
    with pytest.raises(ValueError, match="pass the base model"):
        convert_adapter(folder, tmp_path / "new")
    convert_adapter(folder, tmp_path / "new", tiny("out_in-narrow"))


def test_wrappers_in_name_order_are_recognised_by_shape(editable):
    """4-bit experts carry a parametrization, and PEFT then wraps by sorted full names."""

    def exchange(state):
        for side in "AB":
            one, two = INNER.format(side), OUTER.format(side)
            state[one], state[two] = state[two], state[one]

    folder = editable("0.21.2", "out_in-narrow", tensors=exchange)
    report = check_adapter(folder, tiny("out_in-narrow"))
    assert [row.parameter for row in report.parameters] == ["down_proj", "gate_up_proj"]
    assert not report.errors


# --- damaged and odd adapters --------------------------------------------------------------------


def test_untrained_adapter_is_said(editable):
    folder = editable("0.21.2", "out_in-narrow", tensors=lambda s: s[OUTER.format("B")].zero_())
    report = check_adapter(folder)
    assert [(f.code, f.where) for f in report.findings] == [("all_zero", OUTER.format("B"))]


@pytest.mark.parametrize("side", ["A", "B"])
def test_lost_rows_are_said(editable, side):
    folder = editable(
        "0.21.2", "out_in-narrow", tensors=lambda s: s[OUTER.format(side)][-1:].zero_()
    )
    assert codes(check_adapter(folder)) == {"zero_rows"}


def test_expert_without_tokens_is_said_before_and_after_the_conversion(editable, tmp_path):
    def zero(state):
        state[OUTER.format("B")].reshape(-1, 2, 3)[:, :, 1] = 0

    folder = editable("0.18.1", "out_in-narrow", tensors=zero)
    assert codes(check_adapter(folder)) == {"zero_experts"}
    report = convert_adapter(folder, tmp_path / "new")
    assert codes(report) == {"zero_experts"}
    assert "1 of 3 experts" in report.findings[0].message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_errors_and_not_converted(editable, tmp_path, value):
    def poison(state):
        state[INNER.format("A")][0, 0] = value

    folder = editable("0.18.1", "out_in-narrow", tensors=poison)
    assert codes(check_adapter(folder)) == {"non_finite"}
    with pytest.raises(ValueError, match="NaN or infinite"):
        convert_adapter(folder, tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"edited"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: s.pop(OUTER.format("B")), "missing_partner"),
        (lambda s: [s.pop(OUTER.format(x)) for x in "AB"], "missing_wrapper"),
        (lambda s: s.update({OUTER.format("A"): torch.zeros(0)}), "bad_shape"),
        (lambda s: s.update({OUTER.format("A"): s[OUTER.format("A")].int()}), "bad_dtype"),
        (lambda s: s.update({OUTER.format("A"): s[OUTER.format("A")][:-1].clone()}), "misfit"),
        (
            lambda s: s.update({OUTER.format("A.default"): s.pop(OUTER.format("A"))}),
            "adapter_name_in_key",
        ),
        (lambda s: s.clear(), "no_tensors"),
    ],
)
def test_broken_adapters_are_errors_and_not_converted(editable, tmp_path, change, code):
    folder = editable("0.18.1", "out_in-narrow", tensors=change)
    assert code in {finding.code for finding in check_adapter(folder).errors}
    with pytest.raises(ValueError, match="is broken"):
        convert_adapter(folder, tmp_path / "new")


def test_half_of_a_module_is_an_error_with_the_model(editable):
    def drop_inner(state):
        for side in "AB":
            del state[INNER.format(side)]

    folder = editable("0.21.2", "out_in-narrow", tensors=drop_inner)
    assert codes(check_adapter(folder, tiny("out_in-narrow"))) == {"misfit"}


def test_version_that_contradicts_the_shapes_is_an_error(editable, tmp_path):
    folder = editable("0.21.2", "out_in-narrow", {"peft_version": "0.18.1"})
    report = check_adapter(folder, tiny("out_in-narrow"))
    assert "A over the other axis" in report.errors[0].message
    with pytest.raises(ValueError, match="is broken"):
        convert_adapter(folder, tmp_path / "new", tiny("out_in-narrow"))


def test_other_model_is_an_error():
    report = check_adapter(golden("0.18.1", "out_in-narrow"), hf_model("qwen3_moe"))
    assert codes(report) == {"unknown_module"}
    report = check_adapter(golden("0.18.1", "out_in-narrow"), TinyMoe(10, 3, "out_in"))
    assert codes(report) == {"misfit"}


def test_missing_version_is_refused(editable, tmp_path):
    folder = editable("0.18.1", "out_in-narrow", {"peft_version": "DELETE"})
    report = check_adapter(folder, tiny("out_in-narrow"))
    assert (report.layout, report.parameters[0].a_axis) == ("unknown", "dim1")
    with pytest.raises(ValueError, match="no peft_version"):
        convert_adapter(folder, tmp_path / "new", tiny("out_in-narrow"))


@pytest.mark.parametrize("version", TODAY)
def test_todays_layout_is_refused(version, tmp_path):
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_adapter(golden(version, "out_in-narrow"), tmp_path / "new")


def test_adapter_of_modules_only_is_refused(editable, tmp_path):
    def keep_q(state):
        for key in [k for k in state if "experts" in k]:
            del state[key]

    folder = editable("0.18.1", "out_in-narrow", {"target_parameters": None}, keep_q)
    report = check_adapter(folder)
    assert not report.findings
    assert [row.module for row in report.linear_modules] == ["q_proj"]
    with pytest.raises(ValueError, match="only modules"):
        convert_adapter(folder, tmp_path / "new")


def test_shards_are_read_and_converted_like_one_file(editable, tmp_path):
    folder = editable("0.18.1", "out_in-narrow")
    whole = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    weight_map = {}
    for i, (key, tensor) in enumerate(whole.items()):
        name = f"adapter_model-{i % 2 + 1:05}-of-00002.safetensors"
        weight_map[key] = name
        save_file(
            {k: whole[k] for k, n in weight_map.items() if n == name} | {key: tensor},
            folder / name,
        )
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    convert_adapter(folder, tmp_path / "a")
    convert_adapter(golden("0.18.1", "out_in-narrow"), tmp_path / "b")
    assert_same_adapter(tmp_path / "a", tmp_path / "b")
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        check_adapter(folder)


def test_only_harmless_files_travel(editable, tmp_path):
    folder = editable("0.18.1", "out_in-narrow")
    for name in ("README.md", "tokenizer.json", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text("x")
    (folder / "checkpoint-1").mkdir()
    convert_adapter(folder, tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    expected_names = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == expected_names | {"README.md", "tokenizer.json"}


# --- bad input -----------------------------------------------------------------------------------


def test_destination_must_be_new_and_nothing_stays_behind(tmp_path, monkeypatch):
    source = golden("0.18.1", "out_in-narrow")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder that does not exist or is empty"):
        convert_adapter(source, taken)
    with pytest.raises(ValueError, match="expected a folder that does not exist or is empty"):
        convert_adapter(source, taken / "file")
    assert (taken / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert_adapter(source, tmp_path / "empty")
    convert_adapter(source, tmp_path / "deep" / "er")

    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("turnout.integrations.adapters.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_adapter(source, tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "empty", "deep"}


def test_destination_inside_the_source_is_refused(editable):
    folder = editable("0.18.1", "out_in-narrow")
    with pytest.raises(ValueError, match="lies inside"):
        convert_adapter(folder, folder / "new")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is nothing; expected the folder"),
        ({}, "has no adapter_config.json"),
        ({"adapter_config.json": "{"}, "is not JSON"),
        ({"adapter_config.json": "[]"}, "holds a list"),
        ({"adapter_config.json": '{"peft_type": "LOHA"}'}, "expected 'LORA'"),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, "no 'r' or no 'lora_alpha'"),
        (
            {"adapter_config.json": '{"peft_type": "LORA", "r": "8", "lora_alpha": 1}'},
            "r is '8'; expected int",
        ),
        (
            {"adapter_config.json": '{"peft_type": "LORA", "r": 0, "lora_alpha": 1}'},
            "r is 0; expected an integer of at least 1",
        ),
        (
            {
                "adapter_config.json": '{"peft_type": "LORA", "r": 8, "lora_alpha": 1,'
                ' "target_modules": "(" }'
            },
            "expected a list or a regular expression",
        ),
        ({"adapter_config.json": "GOOD"}, "has no adapter_model.safetensors"),
        ({"adapter_config.json": "GOOD", "adapter_model.bin": "x"}, "which is a pickle"),
        (
            {"adapter_config.json": "GOOD", "adapter_model.safetensors": "x"},
            "not a readable safetensors file",
        ),
        (
            {"adapter_config.json": "GOOD", "adapter_model.safetensors.index.json": "{}"},
            "has no weight_map",
        ),
    ],
)
def test_bad_folders_say_what_was_expected(tmp_path, files, message):
    folder = tmp_path / "adapter"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        good = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16}'
        (folder / name).write_text(good if text == "GOOD" else text)
    if files == {}:
        folder.mkdir()
    with pytest.raises(ValueError, match=message):
        check_adapter(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ('{"model_type": "no_such_model"}', "transformers can not read"),
    ],
)
def test_bad_models_say_what_was_expected(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        check_adapter(golden("0.18.1", "out_in-narrow"), tmp_path)
