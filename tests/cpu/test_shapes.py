"""The named shapes stay what the results of record were measured on."""

import dataclasses

import pytest

from turnout.shapes import SHAPES, TINY, Shape, shape_named


def test_shapes_are_those_of_the_record():
    sizes = {shape.name: dataclasses.astuple(shape)[1:] for shape in SHAPES}
    assert sizes == {
        "qwen3-30b": (16384, 2048, 768, 128, 8),
        "olmoe": (16384, 2048, 1024, 64, 8),
        "mixtral": (8192, 4096, 14336, 8, 2),
        "gptoss-20b": (16384, 2880, 2880, 32, 4),
        "sonic-readme": (32768, 4096, 1024, 128, 8),
        "small-t": (512, 2048, 768, 128, 8),
    }


@pytest.mark.parametrize("shape", [*SHAPES, TINY], ids=lambda shape: shape.name)
def test_every_shape_is_found_by_name(shape):
    assert shape_named(shape.name) is shape
    assert shape.rows == shape.tokens * shape.top_k


def test_unknown_name_says_what_there_is():
    with pytest.raises(ValueError) as error:
        shape_named("qwen")
    text = str(error.value)
    assert "'qwen'" in text
    assert all(shape.name in text for shape in SHAPES)
    assert "tiny" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "Shape.tokens is 0"),
        ({"experts": -1}, "Shape.experts is -1"),
        ({"hidden": True}, "Shape.hidden is True"),
        ({"top_k": 9}, "Shape.top_k is 9; expected at most 8"),
    ],
)
def test_impossible_sizes_are_clear_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_shape_is_a_key():
    assert {Shape("a", 1, 1, 1, 1, 1): 1}[Shape("a", 1, 1, 1, 1, 1)] == 1
