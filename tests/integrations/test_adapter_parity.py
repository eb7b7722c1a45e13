"""Fused adapters compute what PEFT's own fold computes, in every architecture, shape and rank."""

from __future__ import annotations

import pytest
from hf_models import LORA_ARCHS, assert_same_step, probe, step, tiny, with_lora

import turnout


@pytest.mark.parametrize("key", LORA_ARCHS)
def test_fused_adapters_differ_from_peft(key: str) -> None:
    expected = step(with_lora(tiny(key)), key)
    model = with_lora(tiny(key))
    turnout.patch(model).require("fused")
    with probe() as ran:
        got = step(model, key)
    assert ran.folds == 0
    assert ran.fused_projections == sum(".lora_A." in name for name in expected[1])
    assert_same_step(got, expected, 1e-5)
