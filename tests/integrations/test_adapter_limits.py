"""`turnout adapter`: what can not be told is refused, and damage is said."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_cases import (
    INNER,
    OLD,
    OUTER,
    TODAY,
    UNTOLD,
    assert_same_adapter,
    codes,
    expected,
    golden,
    make_model,
)
from make_golden import model_input, run
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import TinyMoe, hf_model, tiny

from turnout.integrations.adapters import (
    check_adapter,
    convert_adapter,
)

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
