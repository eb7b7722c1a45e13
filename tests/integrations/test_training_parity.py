"""Training with turnout is the same training: router outputs, losses, gradients, checkpointing and
generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hf_models import (
    FUSED_ARCHS,
    assert_same_step,
    experts_of,
    loss_of,
    pair,
    probe,
    relative,
    step,
    tiny,
    with_lora,
)
from torch import Tensor, nn

import turnout
from turnout.integrations.architectures import class_key, live
from turnout.integrations.routers import is_router
from turnout.verify.tiny import make_inputs, out_tensor

KEY = "qwen3_moe"
AUX_LOSS = (
    "mixtral",
    "minimax",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "qwen4_exp_text",
    "olmoe",
    "flex_olmo",
    "mellum",
    "jamba",
    "ernie4_5_moe",
    "gpt_oss",
    "jetmoe",
    "minimax_m2",
    "minimax_m3_vl_text",
    "laguna",
    "deepseek_v4",
    "phimoe",
)
LOGITS_ONLY = (
    "qwen3_vl_moe_text",
    "qwen3_omni_moe_text",
    "diffusion_gemma_text",
    "zaya",
    "openai_privacy_filter",
    "cohere2_moe",
    "afmoe",
    "hy_v3",
)


@pytest.mark.parametrize("key", FUSED_ARCHS)
def test_full_fine_tuning_gets_other_gradients(key: str) -> None:
    expected = step(tiny(key), key)
    model = tiny(key)
    turnout.patch(model)
    with probe() as ran:
        got = step(model, key)
    assert ran.calls
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and n in expected[1]]
    assert len(stacks) >= 4
    # hyper-connections and linear attention have gradients of rounding size
    assert_same_step(got, expected, 2e-5, floor=1e-3)


@contextmanager
def router_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the routers return during the block, flattened, through forward hooks."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        values = out if isinstance(out, tuple) else (out,)
        seen.extend(value.detach() for value in values if isinstance(value, Tensor))

    handles = [
        module.register_forward_hook(hook)
        for name, module in model.named_modules()
        if is_router(live(module)) and "Moe" not in class_key(type(module)).split(".")[0]
    ]
    yield seen
    for handle in handles:
        handle.remove()


def _train_step(model: Any, key: str) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    inputs = make_inputs(key)
    with router_outputs(model) as seen:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        out = model(
            **inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False
        )
        loss = out.get("loss")
        (loss_of(out_tensor(out)) if loss is None else loss).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, grads, seen


@pytest.mark.parametrize("key", [*AUX_LOSS, *LOGITS_ONLY])
def test_router_logits_or_aux_loss_are_lost(key: str) -> None:
    expected, expected_grads, expected_seen = _train_step(tiny(key), key)
    model = tiny(key)
    turnout.patch(model).require("fused")
    with probe() as ran:
        got, grads, seen = _train_step(model, key)
    assert ran.calls
    assert len(got.router_logits) == len(expected.router_logits) > 0
    for ours, theirs in zip(got.router_logits, expected.router_logits, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) < 1e-5
    if key in AUX_LOSS:
        assert float(expected.aux_loss) > 0
        assert abs(float(got.aux_loss) / float(expected.aux_loss) - 1) < 1e-6
        assert abs(float(got.loss) / float(expected.loss) - 1) < 1e-6
    assert_same_step(
        (out_tensor(got).detach(), grads),
        (out_tensor(expected).detach(), expected_grads),
        2e-5,
        1e-3,
    )
    assert [(t.shape, t.dtype) for t in seen] == [(t.shape, t.dtype) for t in expected_seen]


@pytest.mark.parametrize("key", ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "jetmoe"])
def test_router_hooks_are_not_called(key: str) -> None:
    expected = _hooked(tiny(key), key)
    model = tiny(key)
    turnout.patch(model)
    got = _hooked(model, key)
    assert len(expected) >= 2
    assert [t.shape for t in got] == [t.shape for t in expected]
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(got, expected, strict=True)
    )


def _hooked(model: Any, key: str) -> list[Tensor]:
    with router_outputs(model) as seen, torch.no_grad():
        model(**make_inputs(key), use_cache=False)
    return seen


def test_the_aux_loss_alone_trains_the_router_differently() -> None:
    def grads(model: Any) -> dict[str, Tensor]:
        inputs = make_inputs("mixtral")
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True).aux_loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = grads(tiny("mixtral"))
    model = tiny("mixtral")
    turnout.patch(model)
    got = grads(model)
    assert got.keys() == expected.keys()
    routers = [name for name in expected if name.endswith("gate.weight")]
    assert len(routers) == 2
    assert all(relative(got[name], expected[name]) < 1e-5 for name in routers)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", ["none", "gate_up"])
@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_gradient_checkpointing_changes_gradients(
    key: str, recompute: Any, reentrant: bool
) -> None:
    _, plain = pair(key)
    plain.train()
    expected = step(plain, key)
    model = with_lora(tiny(key))
    turnout.patch(model, recompute=recompute)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with probe() as ran:
        got = step(model, key)
    assert len(ran.calls) == 2 * 2  # forward and recompute of two layers
    assert ran.folds == 0
    assert_same_step(got, expected, 1e-6)


def test_checkpointing_with_dropout_draws_another_mask() -> None:
    def trained(checkpointing: bool) -> Any:
        model = with_lora(tiny(KEY))
        turnout.patch(model, expert_dropout=0.4)
        model.train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return step(model, KEY)

    assert_same_step(trained(True), trained(False), 1e-6)


def _perturbed_step(model: Any, amount: float) -> tuple[int, dict[str, Tensor]]:
    """A checkpointed step whose recompute sees other hidden states; tokens routed otherwise."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = [layer.mlp for layer in model.get_base_model().model.layers]
    chosen: dict[int, list[Tensor]] = {}

    def perturb(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        again = len(chosen.setdefault(id(block), [])) > 0
        chosen[id(block)].append(torch.empty(0))
        if not again:
            return args
        x = args[0].detach()
        if amount == 0:  # one ulp
            change = torch.nextafter(x, torch.full_like(x, 9.0)) - x
        else:
            change = amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        return (args[0] + change, *args[1:])

    def keep(router: nn.Module, args: Any, out: Any) -> None:
        routed.setdefault(id(router), []).append(out[-1].detach().sort(-1).values)

    routed: dict[int, list[Tensor]] = {}
    handles = [block.register_forward_pre_hook(perturb) for block in blocks]
    handles += [block.gate.register_forward_hook(keep) for block in blocks]
    inputs = make_inputs(KEY)
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    moved = 0
    for first, second in routed.values():
        moved += int((first != second).any(-1).sum())
    return moved, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "gate_up"])
@pytest.mark.parametrize("amount", [0.0, 0.3], ids=["one ulp", "other experts"])
def test_a_recompute_with_other_hidden_states_fails(recompute: Any, amount: float) -> None:
    model = with_lora(tiny(KEY))
    turnout.patch(model, recompute=recompute)
    moved, grads = _perturbed_step(model, amount)
    assert (moved > 0) == (amount > 0)
    assert len(grads) == 8
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    if amount == 0:
        _, plain = pair(KEY)
        plain.train()
        inputs = make_inputs(KEY)
        plain(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        expected = dict(plain.named_parameters())
        assert all(relative(grads[n], expected[n].grad) < 1e-4 for n in grads)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("adapted", [False, True])
def test_generate_writes_other_tokens(key: str, adapted: bool) -> None:
    make = (lambda: with_lora(tiny(key))) if adapted else (lambda: tiny(key))
    ids = make_inputs(key, length=5)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = make().generate(input_ids=ids, **options)
    assert expected.shape == (2, 11)
    model = make()
    turnout.patch(model)
    with probe() as ran:
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert len(ran.calls) == 2 * 6
    assert ran.folds == 0


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "nemotron_h", "gemma4_text"])
def test_an_expert_parallel_sentinel_reaches_an_expert(key: str) -> None:
    model = with_lora(tiny(key))
    turnout.patch(model)
    wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    module = experts_of(model)[0]
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    torch.manual_seed(0)
    x = torch.randn(6, width, requires_grad=True)
    index = torch.randint(0, 8, (6, 2))
    index[0, 1] = index[3, 0] = module.num_experts
    index[5] = module.num_experts
    dropped = index == module.num_experts
    weights = torch.rand(6, 2, requires_grad=True)

    def run(index: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = wrapper(x, index, weights)
        inputs = [x, weights, *(p for p in wrapper.parameters() if p.requires_grad)]
        return out, list(torch.autograd.grad(out.square().sum(), inputs))

    out, grads = run(index, weights)
    kept = weights.detach().masked_fill(dropped, 0).requires_grad_()
    expected, expected_grads = run(index.masked_fill(dropped, 0), kept)
    assert torch.equal(out[5], torch.zeros(width))
    assert relative(out, expected) < 1e-6
    assert torch.equal(grads[0][5], torch.zeros(width))
    assert torch.equal(grads[1][dropped], torch.zeros(4))
    assert torch.allclose(grads[1][~dropped], expected_grads[1][~dropped], rtol=1e-4)
    assert len(grads) == 6
    for ours, theirs in zip(grads[2:], expected_grads[2:], strict=True):
        assert torch.isfinite(ours).all()
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("index", [-1, 9])
def test_an_index_out_of_range_is_computed_with(index: int) -> None:
    model = tiny(KEY)
    turnout.patch(model)
    with pytest.raises(ValueError, match=r"experts_TK holds .*expected 0\.\.7"):
        experts_of(model)[0](torch.randn(1, 64), torch.tensor([[0, index]]), torch.rand(1, 2))


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_training_mode_of_a_short_run_drifts_from_stock_peft(key: str) -> None:
    losses = []
    for model in pair(key):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        inputs, run = make_inputs(key), []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            loss.backward()
            optimizer.step()
            run.append(float(loss))
        losses.append(run)
    stock, ours = losses
    assert stock[-1] < stock[0] - 1e-3
    assert max(abs(a - b) for a, b in zip(ours, stock, strict=True)) < 1e-4
