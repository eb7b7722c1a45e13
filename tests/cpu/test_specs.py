"""Specs: frozen, hashable, without tensors, and a bad value never gets past the constructor."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch

from turnout import Activation, ExpertSpec, RouteSpec, Unsupported
from turnout.specs import GemmProblem, check_choice

NAN, INF = math.nan, math.inf
ROUTE = RouteSpec(top_k=2)
SPECS = [
    ROUTE,
    RouteSpec.softmax(4),
    RouteSpec.sigmoid(4, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    Activation(),
    Activation(alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True),
    Activation(act="relu2", gated=False),
    ExpertSpec(),
    ExpertSpec(activation=Activation(act="gelu"), transposed=True, weight_on_input=True),
    GemmProblem(ragged="m", rows=8, experts=2, n=4, k=4, dtype="float32", weight_dtype="float32"),
]

# Class, field, bad value, and the other fields that make only this one bad.
BAD = [
    *[(RouteSpec, "top_k", v, {}) for v in (0, -1, 2.0, True, "2", None)],
    *[(RouteSpec, "n_group", v, {}) for v in (0, -2, 1.5, True, None)],
    *[(RouteSpec, "topk_group", v, {"n_group": 4}) for v in (0, -1, 5, 2.0, None)],
    (RouteSpec, "topk_group", 2, {}),
    *[(RouteSpec, "score", v, {}) for v in ("tanh", "Softmax", None, ["softmax"])],
    *[(RouteSpec, "score_dtype", v, {}) for v in ("bfloat16", torch.float32, None)],
    *[(RouteSpec, "weights_dtype", v, {}) for v in ("bfloat16", torch.float32, None)],
    *[(RouteSpec, "group_score", v, {}) for v in ("sum", "top1", None)],
    *[(RouteSpec, "group_fill", v, {}) for v in (-1.0, INF, NAN, "0", None)],
    *[(RouteSpec, "eps_mode", v, {}) for v in ("max", None)],
    *[(RouteSpec, "eps", v, {}) for v in (-1e-9, NAN, INF, "1e-20", None, True)],
    *[(RouteSpec, "softcap", v, {}) for v in (-30.0, NAN, INF, "30", None, True)],
    *[(RouteSpec, "scale", v, {}) for v in (NAN, INF, -INF, "2.5", None, True)],
    *[(RouteSpec, "output_scale", v, {}) for v in (NAN, INF, "2.5", None, True)],
    *[(RouteSpec, "n_always", v, {}) for v in (-1, True, 1.5, "1", None)],
    *[(RouteSpec, "norm", v, {}) for v in (None, "no")],
    *[(Activation, "act", v, {}) for v in ("swish", "SiLU", None)],
    *[(Activation, "limit", v, {}) for v in (-7.0, NAN, INF, "7", True)],
    *[(Activation, "limit_after", v, {"limit": 7.0}) for v in ("yes",)],
    *[(Activation, "alpha", v, {}) for v in (NAN, INF, "1.702", None)],
    *[(Activation, "up_offset", v, {}) for v in (NAN, INF, "1", None)],
    *[(Activation, "gated", v, {}) for v in (None, "no")],
    *[(Activation, "interleaved", v, {}) for v in (None, "no")],
    *[(ExpertSpec, "activation", v, {}) for v in ("silu", None)],
    *[(ExpertSpec, "transposed", v, {}) for v in (None, "no")],
    *[(ExpertSpec, "weight_on_input", v, {}) for v in (None, "no")],
]


@pytest.mark.parametrize(
    ("cls", "field", "value", "others"), BAD, ids=[f"{c.__name__}.{f}={v!r}" for c, f, v, _ in BAD]
)
def test_a_bad_value_is_refused_with_its_field_what_came_and_what_was_expected(
    cls, field, value, others
):
    required = {"top_k": 2} if cls is RouteSpec else {}
    with pytest.raises(ValueError) as error:
        cls(**{**required, **others, field: value})
    message = str(error.value)
    assert f"{cls.__name__}.{field}" in message
    assert repr(value) in message
    assert "expected" in message


# What contradicts what, and a word that the message must contain for each side.
CONTRADICTIONS = [
    (lambda: Activation(gated=False, interleaved=True), ("gated=False", "interleaved")),
    (lambda: Activation(gated=False, limit=7.0), ("gated=False", "limit")),
    (lambda: Activation(gated=False, up_offset=1.0), ("gated=False", "up_offset")),
    (lambda: Activation(act="gelu", alpha=1.702), ("alpha", "silu", "'gelu'")),
    (lambda: Activation(limit_after=True), ("limit_after", "limit is None")),
    (lambda: RouteSpec(top_k=2, n_group=2, topk_group=3), ("topk_group is 3", "2")),
    (lambda: RouteSpec.softmax(2, n_group=2, topk_group=3), ("topk_group is 3", "2")),
    (lambda: RouteSpec.sigmoid(2, topk_group=2), ("topk_group is 2", "1")),
]


@pytest.mark.parametrize(("build", "words"), CONTRADICTIONS)
def test_fields_that_contradict_each_other_are_refused_by_name(build, words):
    with pytest.raises(ValueError) as error:
        build()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_no_field_can_be_set_after_the_checks_ran(spec):
    field = dataclasses.fields(spec)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, field, getattr(spec, field))
    with pytest.raises((AttributeError, TypeError)):
        spec.added_later = 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_equal_specs_are_one_key_of_a_cache(spec):
    twin = pickle.loads(pickle.dumps(spec))
    assert twin is not spec
    assert twin == spec
    assert hash(twin) == hash(spec)
    assert {spec: "config"}[twin] == "config"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__)
def test_a_spec_holds_no_tensor_and_no_container(spec):
    plain = (int, float, str, bool, type(None), Activation)
    for field in dataclasses.fields(spec):
        assert isinstance(getattr(spec, field.name), plain), field.name


CHANGED = {
    RouteSpec: {
        "top_k": 3,
        "score": "sigmoid",
        "score_dtype": "logits",
        "softcap": 30.0,
        "n_group": 4,
        "topk_group": None,  # needs n_group too, see below
        "group_score": "max",
        "group_fill": 0.0,
        "norm": False,
        "eps": 1e-20,
        "eps_mode": "clamp",
        "scale": 2.5,
        "n_always": 1,
        "weights_dtype": "logits",
        "output_scale": 2.5,
    },
    Activation: {
        "act": "gelu",
        "gated": False,
        "interleaved": True,
        "limit": 7.0,
        "limit_after": None,
        "alpha": 1.702,
        "up_offset": 1.0,
    },
    ExpertSpec: {
        "activation": Activation(act="gelu"),
        "transposed": True,
        "weight_on_input": True,
    },
}


@pytest.mark.parametrize("cls", CHANGED, ids=lambda c: c.__name__)
def test_every_field_is_part_of_equality(cls):
    base = ROUTE if cls is RouteSpec else cls()
    assert set(CHANGED[cls]) == {f.name for f in dataclasses.fields(cls)}
    for name, value in CHANGED[cls].items():
        if value is None:
            continue
        assert dataclasses.replace(base, **{name: value}) != base, name
    grouped = dataclasses.replace(ROUTE, n_group=4)
    assert dataclasses.replace(grouped, topk_group=2) != grouped
    clamped = Activation(limit=7.0)
    assert dataclasses.replace(clamped, limit_after=True) != clamped


def test_replace_checks_again():
    with pytest.raises(ValueError, match=r"RouteSpec\.top_k"):
        dataclasses.replace(ROUTE, top_k=0)
    with pytest.raises(ValueError, match=r"Activation\.act"):
        dataclasses.replace(Activation(), act="swish")


def test_fields_can_not_be_given_by_position():
    for cls in (RouteSpec, Activation, ExpertSpec):
        with pytest.raises(TypeError):
            cls(2)


def test_softmax_builder_fields_reach_the_rule():
    assert RouteSpec.softmax(8) == RouteSpec(
        top_k=8, score="softmax", norm=True, eps=0.0, group_fill=0.0
    )
    grouped = RouteSpec.softmax(
        4, norm_topk_prob=False, n_group=8, topk_group=3, routed_scaling_factor=16.0
    )
    assert (grouped.n_group, grouped.topk_group, grouped.group_score) == (8, 3, "top2sum")
    assert (grouped.norm, grouped.scale, grouped.eps) == (False, 16.0, 1e-20)
    assert grouped.group_fill == 0.0
    assert RouteSpec.softmax(4, n_group=2, group_fill=-INF).group_fill == -INF


def test_sigmoid_builder_fields_reach_the_rule():
    spec = RouteSpec.sigmoid(
        8, norm_topk_prob=False, n_group=8, topk_group=4, routed_scaling_factor=2.5
    )
    assert spec == RouteSpec(
        top_k=8,
        score="sigmoid",
        n_group=8,
        topk_group=4,
        group_score="top2sum",
        group_fill=-INF,
        norm=False,
        eps=1e-20,
        scale=2.5,
    )
    assert RouteSpec.sigmoid(8).norm is True
    assert RouteSpec.sigmoid(4, n_group=2, group_fill=0.0).group_fill == 0.0


@pytest.mark.parametrize("build", [RouteSpec.softmax, RouteSpec.sigmoid])
def test_a_missing_topk_group_means_all_groups_and_the_docstring_says_so(build):
    assert build(2, n_group=8).topk_group == 8
    assert build(2, n_group=8, topk_group=None).topk_group == 8
    assert "missing `topk_group`" in build.__doc__


def test_the_docstring_says_that_a_missing_bias_is_zero():
    assert "missing\n        bias is zero" in RouteSpec.sigmoid.__doc__


def test_unsupported_is_a_not_implemented_error():
    assert issubclass(Unsupported, NotImplementedError)
    assert not issubclass(Unsupported, ValueError)


def test_check_choice_lists_what_is_allowed():
    from typing import Literal

    with pytest.raises(ValueError, match=r"mode is 'c'; expected one of 'a', 'b'"):
        check_choice("mode", "c", Literal["a", "b"])
    check_choice("mode", "b", Literal["a", "b"])
