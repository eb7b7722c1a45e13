"""`patch(aux_loss="fused")` where TRL has given the model a forward that imports the loss."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
from hf_models import tiny
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral

import turnout
from turnout.integrations.aux_loss import NAME
from turnout.verify.tiny import make_inputs

pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
from trl.trainer.utils import add_fused_lm_head

KEY = "qwen3_moe"


def with_trl() -> Any:
    model = tiny(KEY)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def step(model: Any, *, mask: bool = False) -> dict[str, Tensor]:
    """Losses, log-probabilities and every gradient of TRL's forward."""
    given: dict[str, Any] = make_inputs(KEY)
    if mask:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, -4:] = 0
    labels = given["input_ids"].clone()
    model.zero_grad(set_to_none=True)
    out = model(**given, labels=labels, fused_lm_head=True, output_router_logits=True)
    out.loss.backward()
    found = {"loss": out.loss, "aux": out.aux_loss, "log_probs": out.log_probs}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("mask", [False, True], ids=["all", "padding"])
def test_trls_forward_computes_another_loss_or_transformers(mask: bool) -> None:
    model = with_trl()
    model.config.router_aux_loss_coef = 1.0  # or it is lost in the loss
    expected = step(model, mask=mask)
    turnout.patch(model, aux_loss="fused", router="model").require("fused")
    with mock.patch.object(modeling_mixtral, NAME, side_effect=AssertionError("transformers'")):
        got = step(model, mask=mask)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-4, atol=2e-6, msg=name)
    assert modeling_mixtral.load_balancing_loss_func.__module__ == modeling_mixtral.__name__


def test_unpatch_does_not_put_trls_forward_back() -> None:
    model = with_trl()
    theirs = vars(model)["forward"].__func__
    expected = step(model)
    for _ in range(2):  # again, over ours
        report = turnout.patch(model, aux_loss="fused")
        assert [row.status for row in report.aux_losses] == ["fused"]
    turnout.unpatch(model)
    assert vars(model)["forward"].__func__ is theirs
    assert torch.equal(step(model)["aux"], expected["aux"])


def test_a_forward_that_trl_puts_over_ours_is_called_the_models() -> None:
    """SFTTrainer does so in a model that was patched before."""
    model = tiny(KEY)
    report = turnout.patch(model, aux_loss="fused")
    add_fused_lm_head(model)
    (row,) = report.aux_losses
    assert row.status == "model"
    assert "_fused_forward of" in row.detail
    assert "trl" in row.detail
    (row,) = turnout.patch(model, aux_loss="fused").aux_losses
    assert row.status == "fused"
    step(model)
    turnout.unpatch(model)
    step(model)


def test_calls_that_trl_passes_on_lose_the_loss() -> None:
    """Without fused_lm_head its forward calls the model's own."""
    model = with_trl()
    given = {**make_inputs(KEY), "output_router_logits": True}
    given["labels"] = given["input_ids"]
    expected = model(**given)
    turnout.patch(model, aux_loss="fused")
    got = model(**given)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=0)


def test_a_loss_of_trl_that_gives_something_else_is_replaced() -> None:
    model = with_trl()
    own = modeling_mixtral.load_balancing_loss_func

    def double(
        gate_logits: Any, num_experts: Any = None, top_k: int = 2, attention_mask: Any = None
    ) -> Any:
        return 2 * own(gate_logits, num_experts, top_k, attention_mask)

    with mock.patch.object(modeling_mixtral, NAME, double):
        (row,) = turnout.patch(model, aux_loss="fused").aux_losses
    assert row.status == "model"
    assert f"{NAME} of {modeling_mixtral.__name__} gives another value" in row.detail
    assert isinstance(vars(model)["forward"], MethodType)


def test_a_copy_of_the_model_computes_transformers_loss() -> None:
    model = with_trl()
    turnout.patch(model, aux_loss="fused")
    twin = copy.deepcopy(model)
    with mock.patch.object(modeling_mixtral, NAME, side_effect=AssertionError("transformers'")):
        got, expected = step(twin), step(model)
    assert torch.equal(got["aux"], expected["aux"])
