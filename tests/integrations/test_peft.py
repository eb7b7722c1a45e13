"""Adapters in every state PEFT knows: right numbers on the fused path, or PEFT's own path and said
so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hf_models import (
    assert_fused,
    assert_same_step,
    experts_of,
    forward,
    pair,
    probe,
    relative,
    step,
    tiny,
    with_lora,
)
from peft import LoraConfig
from torch import nn

import turnout

KEY = "qwen3_moe"


def assert_peft_path(model: Any, stock: Any, key: str = KEY) -> None:
    """Outputs and gradients are stock PEFT's, by PEFT's own fold below our GEMMs."""
    expected = step(stock, key)
    with probe() as ran:
        got = step(model, key)
    assert ran.folds
    assert ran.fused_projections == 0
    assert_same_step(got, expected)


def add_adapter(model: Any, name: str = "second", **options: Any) -> None:
    config = model.peft_config["default"]
    options = {"r": 3, "lora_alpha": 5, **options}
    torch.manual_seed(2)
    model.add_adapter(
        name,
        LoraConfig(
            target_modules=[],
            target_parameters=sorted(config.target_parameters),
            init_lora_weights=False,
            **options,
        ),
    )


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_alpha": 0},
        {"lora_alpha": 1, "r": 3},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 7}},
        {"rank_pattern": {r".*\.gate_up_proj": 5}, "alpha_pattern": {r".*\.gate_up_proj": 3}},
        {"rank_pattern": {r"layers\.1\..*": 6}},
        {"r": 1},
        {"r": 80},
    ],
    ids=str,
)
def test_a_rank_or_scaling_is_taken_for_another(key: str, options: dict[str, Any]) -> None:
    stock, model = pair(key, **options)
    assert_fused(model, stock, key)


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ({"mlp.experts.down_proj": 2}, {"4", "2"}),
        ({"down_proj": 2}, {"4", "2"}),
        ({r".*\.gate_up_proj": 5}, {"4", "5"}),
        ({r"layers\.1\..*": 6}, {"4", "6"}),
    ],
)
def test_a_rank_pattern_has_no_effect(pattern: dict[str, int], ranks: set[str]) -> None:
    _, model = pair(rank_pattern=pattern)
    found = {path.rpartition(" ")[2] for path in turnout.patch(model).adapters.values()}
    assert found == ranks


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("qwen3_moe", "mlp.experts.gate_up_proj"),
        ("qwen3_moe", "mlp.experts.down_proj"),
        ("gpt_oss", "mlp.experts.gate_up_proj"),
        ("gpt_oss", "mlp.experts.down_proj"),
        ("nemotron_h", "mixer.experts.up_proj"),
        ("llama4_text", "feed_forward.experts.down_proj"),
        ("longcat_flash", "mlp.experts.gate_up_proj"),
    ],
)
def test_an_adapter_on_one_projection_needs_the_other(key: str, target: str) -> None:
    stock, model = pair(key, target_parameters=[target])
    assert_fused(model, stock, key, projections=2)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_adapter_on_one_layer_needs_the_others(layer: int) -> None:
    stock, model = pair(target_parameters=[f"layers.{layer}.mlp.experts.down_proj"])
    assert_fused(model, stock, projections=1)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_an_adapter_on_the_router_is_dropped(key: str) -> None:
    targets = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if key == "gpt_oss":
        targets[0] = "mlp.router.weight"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the router")
        stock, model = pair(key, target_parameters=targets)
        expected = step(stock, key)
        assert sum("gate.lora" in n or "router.lora" in n for n in expected[1]) == 4
        assert_same_step(step(model, key), expected)


def test_an_expert_of_a_single_expert_model_is_folded_wrongly() -> None:
    config = {"num_experts": 1, "num_experts_per_tok": 1}
    stock, model = with_lora(tiny(KEY, **config)), with_lora(tiny(KEY, **config))
    turnout.patch(model)
    assert_fused(model, stock)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_all_tokens_on_one_expert_differ_from_peft(key: str) -> None:
    stock, model = pair(key)
    stock_step, model_step = [], []
    for one, out in ((stock, stock_step), (model, model_step)):
        with torch.no_grad():
            for name, parameter in [*one.named_parameters(), *one.named_buffers()]:
                if name.endswith(("gate.weight", "router.weight", "classifier.weight")):
                    parameter.zero_()  # equal scores for all: the lowest experts, or the bias, win
                elif name.endswith("correction_bias"):
                    parameter.zero_()[..., :2] = 1.0
        out.append(step(one, key))
    assert_same_step(model_step[0], stock_step[0])
    idle = [g for n, g in model_step[0][1].items() if n.endswith("lora_A.default.weight")]
    assert idle
    for grad in idle:
        experts = grad.view(-1, 4, grad.shape[-1]).flatten(1).norm(dim=1)
        assert int((experts == 0).sum()) >= 6
        assert torch.isfinite(grad).all()


def test_several_active_adapters_run_fused_with_one() -> None:
    stock, model = pair()
    for one in (stock, model):
        add_adapter(one)
        one.base_model.set_adapter(["default", "second"])
    alone = forward(with_lora(tiny(KEY)), KEY)
    assert relative(forward(stock, KEY), alone) > 1e-3
    report = turnout.patch(model)
    assert_peft_path(model, stock)
    assert set(report.adapters.values()) == {"PEFT's own fold: 2 adapters are active"}
    with pytest.raises(turnout.Unsupported, match="2 adapters are active"):
        report.require("fused")


def test_set_adapter_keeps_the_old_one() -> None:
    stock, model = pair()
    report = turnout.patch(model)
    for one in (stock, model):
        add_adapter(one)
    first = forward(stock, KEY)
    for name in ("second", "default"):
        stock.set_adapter(name)
        model.set_adapter(name)
        assert all(path.startswith(f"fused: adapter {name!r}") for path in report.adapters.values())
        assert_fused(model, stock)
        assert (relative(forward(model, KEY), first) > 1e-3) == (name == "second")


def test_an_adapter_added_after_the_first_forward_is_folded() -> None:
    base = tiny(KEY)
    report = turnout.patch(base)
    assert report.adapters == {}
    forward(base, KEY)
    model = with_lora(base)
    assert len(report.adapters) == 4
    assert_fused(model, with_lora(tiny(KEY)))
    for one in (model, stock := with_lora(tiny(KEY))):
        add_adapter(one)
        one.set_adapter("second")
    assert_fused(model, stock)


def test_an_adapter_that_was_deleted_and_added_again_is_folded() -> None:
    base = tiny(KEY)
    turnout.patch(base)
    model = with_lora(base)
    forward(model, KEY)
    base = model.unload()
    assert torch.equal(forward(base, KEY), forward(_patched(), KEY))
    assert_fused(with_lora(base), with_lora(tiny(KEY)))


def _patched() -> Any:
    model = tiny(KEY)
    turnout.patch(model)
    return model


def test_a_call_of_an_inner_model_folds_what_is_reported_as_fused() -> None:
    # TRL and Liger call the decoder without the head, so the root's forward never runs.
    base = tiny(KEY)
    report = turnout.patch(base)
    model = with_lora(base)
    reported = report.adapters
    with probe() as ran:
        base.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    assert all(path.startswith("fused") for path in reported.values()) == (ran.folds == 0)
    assert model.active_adapter == "default"


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_a_disabled_adapter_is_applied(key: str) -> None:
    _, model = pair(key)
    plain = tiny(key)
    turnout.patch(plain)
    report = turnout.patch(model)
    before = forward(model, key)
    with model.disable_adapter():
        assert torch.equal(forward(model, key), forward(plain, key))
        assert set(report.adapters.values()) == {"disabled by PEFT"}
    assert torch.equal(forward(model, key), before)
    assert all(path.startswith("fused") for path in report.adapters.values())


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_a_merged_adapter_is_applied_twice(key: str) -> None:
    _, model = pair(key)
    report = turnout.patch(model)
    before = forward(model, key)
    model.merge_adapter()
    assert set(report.adapters.values()) == {"merged into the weights by PEFT"}
    with probe() as ran:
        assert relative(forward(model, key), before) < 1e-5
    assert ran.folds == 0
    assert ran.fused_projections == 0
    with model.disable_adapter():
        forward(model, key)  # PEFT unmerges here
    model.unmerge_adapter() if any(_merged(model)) else None
    assert relative(forward(model, key), before) < 1e-5
    assert all(path.startswith("fused") for path in report.adapters.values())


def _merged(model: Any) -> list[bool]:
    return [module.merged for module in model.modules() if hasattr(module, "merged_adapters")]


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_merge_and_unload_leaves_turnout_on_the_wrappers(key: str) -> None:
    stock, model = pair(key)
    expected = forward(stock.merge_and_unload(), key)
    report = turnout.patch(model)
    merged = model.merge_and_unload()
    with probe() as ran:
        assert relative(forward(merged, key), expected) < 1e-5
    assert len(ran.calls) == 2
    assert report.adapters == {}
    turnout.unpatch(merged)
    with probe() as ran:
        assert relative(forward(merged, key), expected) < 1e-5
    assert not ran.calls


def test_a_mixed_batch_is_run_with_one_adapter() -> None:
    stock, model = pair()
    for one in (stock, model):
        add_adapter(one)
    names = ["default", "second"]
    with pytest.raises(ValueError, match="mixed") as expected:
        forward(stock, KEY, adapter_names=names)
    with pytest.raises(ValueError, match="mixed") as got:
        forward(model, KEY, adapter_names=names)
    assert str(got.value) == str(expected.value)
    assert all(module._turnout.lora == {} for module in experts_of(model))


def test_an_error_inside_the_experts_leaves_factors_behind() -> None:
    _, model = pair()
    expected = forward(model, KEY)
    module = experts_of(model)[1]
    down = module.down_proj
    module.down_proj = nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(turnout.Unsupported):
        forward(model, KEY)
    module.down_proj = down
    assert all(one._turnout.lora == {} for one in experts_of(model))
    with model.disable_adapter():
        assert relative(forward(model, KEY), expected) > 1e-3
    assert torch.equal(forward(model, KEY), expected)


def test_experts_that_run_without_turnout_drop_the_adapter() -> None:
    _, model = pair()
    module = experts_of(model)[0]
    module.forward = lambda x, index, weights: x
    with pytest.raises(RuntimeError, match=r"ran without turnout.*was not applied"):
        forward(model, KEY)


def test_a_layers_own_implementation_drops_the_adapter() -> None:
    stock, model = pair()
    report = turnout.patch(model)
    for module in experts_of(model):
        module.config._experts_implementation = "eager"
    expected = step(stock, KEY)
    with probe() as ran:
        assert_same_step(step(model, KEY), expected)
    assert ran.folds
    assert set(report.adapters.values()) == {"PEFT's own fold: experts_implementation is 'eager'"}


def test_the_implementation_without_patch_fails_or_is_silent_about_adapters() -> None:
    stock, model = with_lora(tiny(KEY)), with_lora(tiny(KEY))
    model.get_base_model().set_experts_implementation("turnout")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(model, KEY)
        step(model, KEY)
    said = [str(w.message) for w in caught if "turnout.patch(model)" in str(w.message)]
    assert len(said) == 1
    assert_same_step(got, step(stock, KEY))
    assert_peft_path(model, stock)


def test_the_implementation_without_patch_is_silent_after_a_forward_without_adapter() -> None:
    base = tiny(KEY)
    base.set_experts_implementation("turnout")
    forward(base, KEY)
    model = with_lora(base)
    with pytest.warns(UserWarning, match=r"PEFT's own fold.*turnout\.patch\(model\)"):
        forward(model, KEY)
    assert_peft_path(model, with_lora(tiny(KEY)))


def test_patching_after_the_implementation_alone_keeps_peft_folding() -> None:
    base = tiny(KEY)
    base.set_experts_implementation("turnout")
    forward(base, KEY)
    model = with_lora(base)
    turnout.patch(model).require("fused")
    assert_fused(model, with_lora(tiny(KEY)))


@pytest.mark.parametrize("when", ["patch first", "adapters first"])
def test_a_stock_layer_loses_its_adapter(when: str) -> None:
    def base() -> Any:
        model = tiny(KEY)
        for module in experts_of(model):
            module.act_fn = nn.Tanh()
        return model

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    expected = step(with_lora(base(), target_parameters=targets), KEY)
    model = base()
    report = turnout.patch(model) if when == "patch first" else None
    model = with_lora(model, target_parameters=targets)
    report = report or turnout.patch(model)
    assert report.counts == {"stock": 2}
    assert_same_step(step(model, KEY), expected, 1e-12)
    assert len(report.adapters) == 4
    assert not any(path.startswith("fused") for path in report.adapters.values())


def test_one_stock_layer_takes_the_others_with_it() -> None:
    def base() -> Any:
        model = with_lora(tiny(KEY))
        experts_of(model)[0].act_fn = nn.Tanh()
        return model

    expected, model = step(base(), KEY), base()
    report = turnout.patch(model)
    assert report.counts == {"stock": 1, "fused": 1}
    with probe() as ran:
        assert_same_step(step(model, KEY), expected)
    assert ran.fused_projections == 2
    assert len(report.adapters) == 4


def test_dropout_on_experts_runs_in_eval_mode_or_never() -> None:
    _, plain = pair()
    model = with_lora(tiny(KEY))
    turnout.patch(model, expert_dropout=0.5)
    plain_step, eval_step = step(plain, KEY), step(model, KEY)
    assert torch.equal(eval_step[0], plain_step[0])
    model.train()
    plain.train()
    first, again = step(model, KEY), step(model, KEY)
    assert torch.equal(first[0], again[0])  # the mask comes from torch's generator
    assert relative(first[0], step(plain, KEY)[0]) > 1e-4
    torch.manual_seed(99)
    options = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "use_cache": False}
    assert not torch.equal(model(**options).logits, model(**options).logits)
    with model.disable_adapter():
        with_off = forward(model, KEY)
    with plain.disable_adapter():
        assert torch.equal(with_off, forward(plain, KEY))  # only adapters see the mask


def test_dropout_on_experts_changes_the_mean() -> None:
    _, plain = pair()
    model = with_lora(tiny(KEY))
    turnout.patch(model, expert_dropout=0.3)
    module = experts_of(model)[0]
    wrapper = model.get_base_model().model.layers[0].mlp.experts
    torch.manual_seed(3)
    x = torch.randn(4, 64)
    index, weights = torch.randint(0, 8, (4, 2)), torch.rand(4, 2)
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "base_layer.lora_B" in name:  # only the linear half: the mean passes through
                parameter.zero_()
        exact = wrapper(x, index, weights)
        wrapper.train()
        mean = torch.stack([wrapper(x, index, weights) for _ in range(400)]).mean(0)
        wrapper.eval()
        module._turnout.lora.clear()
        base = module(x, index, weights)
    assert relative(mean - base, exact - base) < 0.15
    assert plain is not None


def test_all_experts_trainable_beside_the_adapter_lose_a_gradient() -> None:
    stock, model = pair()
    for one in (stock, model):
        for module in experts_of(one):
            module.requires_grad_(True)
    expected = step(stock, KEY)
    assert sum(name.endswith("down_proj") for name in expected[1]) == 2
    assert_same_step(step(model, KEY), expected)


def test_a_frozen_half_of_an_adapter_gets_a_gradient() -> None:
    stock, model = pair()
    for one in (stock, model):
        for name, parameter in one.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    expected = step(stock, KEY)
    assert expected[1]
    assert not any(".lora_A." in name for name in expected[1])
    assert_same_step(step(model, KEY), expected)


def test_modules_to_save_copies_experts_without_turnout() -> None:
    def base() -> Any:
        return tiny(KEY)

    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    expected = step(with_lora(base(), **options), KEY)
    assert sum("modules_to_save" in name for name in expected[1]) == 4
    model = with_lora(base(), **options)
    report = turnout.patch(model)
    with probe() as ran:
        assert_same_step(step(model, KEY), expected)
    assert len(ran.calls) == 2
    fused = [row for row in report.layers if row.status == "fused"]
    assert len(fused) == 2  # the frozen originals never run
    early = base()
    turnout.patch(early)
    early = with_lora(early, **options)
    with probe() as ran:
        assert_same_step(step(early, KEY), expected)
    assert len(ran.calls) == 2
    turnout.unpatch(early)
    with probe() as ran:
        assert_same_step(step(early, KEY), expected)
    assert not ran.calls


def test_zero_adapters_change_the_base_model() -> None:
    plain = tiny(KEY)
    turnout.patch(plain)
    model = with_lora(tiny(KEY), init_lora_weights=True)
    turnout.patch(model)
    assert relative(forward(model, KEY), forward(plain, KEY)) < 1e-6
    _, grads = step(model, KEY)
    assert all(float(g.abs().sum()) > 0 for n, g in grads.items() if "lora_B" in n)
    assert all(float(g.abs().sum()) == 0 for n, g in grads.items() if "lora_A" in n)


def test_saved_state_holds_turnout() -> None:
    stock, model = pair()
    forward(model, KEY)
    assert model.state_dict().keys() == stock.state_dict().keys()
    plain = _patched()
    assert plain.state_dict().keys() == tiny(KEY).state_dict().keys()


@pytest.mark.parametrize("when", ["patch first", "adapters first"])
def test_an_adapter_of_transformers_own_integration_is_folded(when: str) -> None:
    base = tiny(KEY)
    targets = turnout.lora_targets(base)
    if when == "patch first":
        turnout.patch(base)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_parameters=targets, init_lora_weights=False)
    base.add_adapter(config)
    if when == "adapters first":
        turnout.patch(base).require("fused")
    with probe() as ran:
        got = forward(base, KEY)
    assert ran.folds == 0
    assert ran.fused_projections == 4
    turnout.unpatch(base)
    assert relative(got, forward(base, KEY)) < 1e-5
    assert relative(got, forward(tiny(KEY), KEY)) > 1e-3


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss"])
def test_adapters_kept_in_bfloat16_get_gradients_of_another_dtype(key: str) -> None:
    from peft import get_peft_model

    def adapted() -> Any:
        base = tiny(key, torch.bfloat16)
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_parameters=turnout.lora_targets(base), init_lora_weights=False
        )
        return get_peft_model(base, config, autocast_adapter_dtype=False).eval()

    expected, model = step(adapted(), key), adapted()
    turnout.patch(model)
    got = step(model, key)
    assert {n: g.dtype for n, g in got[1].items()} == {n: g.dtype for n, g in expected[1].items()}
    assert {g.dtype for g in got[1].values()} == {torch.bfloat16}
    assert relative(got[0], expected[0]) < 5e-2


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_no_token_at_all_fails(key: str) -> None:
    _, model = pair(key)
    wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    width = wrapper.get_base_layer().down_proj.shape[2 if key == "gpt_oss" else 1]
    x = torch.randn(0, width, requires_grad=True)
    out = wrapper(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert out.shape == (0, width)
    out.sum().backward()
    grads = [p.grad for p in wrapper.parameters() if p.requires_grad]
    assert len(grads) == 4
    assert all(grad is not None and not grad.any() for grad in grads)


def test_inference_mode_fails() -> None:
    _, model = pair()
    expected = forward(model, KEY)
    with torch.inference_mode():
        assert torch.equal(forward(model, KEY), expected)
