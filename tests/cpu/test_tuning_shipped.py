"""The tables that ship: every entry is found by the GPU that it was measured on, and still fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tuning_cases import asked
from turnout.tuning import table
from turnout.tuning.cache import SHIPPED, Store
from turnout.tuning.space import fits

HOPPER = table.read(SHIPPED / "hopper.json")
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")


@pytest.fixture(autouse=True)
def _its_triton(monkeypatch):
    monkeypatch.setattr("turnout.tuning.key.triton_version", lambda: "3.6")


@pytest.fixture(scope="module")
def store():
    return Store(None)


def test_a_table_that_ships_can_not_be_read():
    for path in SHIPPED.glob("*.json"):
        found = table.read(path)
        assert len(found.entries) == len(json.loads(path.read_text())["entries"])
        assert len({entry.place for entry in found.entries}) == len(found.entries)


def test_the_gpu_that_was_measured_runs_with_something_else(store):
    assert {entry.device for entry in HOPPER.entries} == set(GPUS)
    for entry in HOPPER.entries:
        question = asked(entry, entry.device)
        assert question.key == entry.key
        assert fits(question, entry.config) is None
        found = store.find(question)
        assert (found.entry, found.source, found.is_exact) == (entry, "shipped", True)


def test_a_problem_that_one_gpu_was_measured_on_is_missing_for_the_other():
    one, other = (
        {(entry.key, entry.rows) for entry in HOPPER.entries if entry.device == device}
        for device in GPUS
    )
    assert one == other


def test_another_hopper_gpu_runs_with_the_default(store):
    for entry in HOPPER.entries:
        found = store.find(asked(entry, "NVIDIA GH200 480GB"))
        assert found.entry.rows == entry.rows
        assert not found.is_exact


def test_another_chip_or_triton_takes_configs_of_hopper(store, monkeypatch):
    entry = HOPPER.entries[0]
    assert store.find(asked(entry, "A100", arch=80)) is None
    assert store.listed(asked(entry, "A100", arch=80)) is None
    monkeypatch.setattr("turnout.tuning.key.triton_version", lambda: "3.9")
    assert store.find(asked(entry, entry.device)) is None


def test_a_shipped_list_leaves_a_measured_problem_nothing_to_try(store):
    for entry in HOPPER.entries:
        question = asked(entry, entry.device)
        listed = store.listed(question)
        assert len(listed) >= 2
        assert any(fits(question, config) is None for config in listed)


def test_records_of_adapters_decide_what_wide_products_try(store):
    """All records of `gram` are of 16 columns: on Hopper another kernel takes the wider ones."""
    gram = next(entry for entry in HOPPER.entries if entry.key.kernel == "gram")
    question = asked(gram, gram.device)
    for n in (32, 64, 2048):
        assert store.listed(replace(question, problem=replace(question.problem, n=n))) is None
