"""`shared_expert_output` and `block_forward` against the blocks of transformers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_blocks import ROUTED, answer, block_of, blocks_of, find_blocks, model_of, tokens
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import turnout
from turnout import Unsupported, block_forward, shared_expert_output
from turnout.integrations.routers import router_logits
from turnout.testing import assert_matches
from turnout.verify.tiny import H

ARIA_HAS_FC = hasattr(block_of("aria_text").experts, "fc1")  # up to transformers 5.17
NO_BLOCK_FORWARD = ("zaya", "gemma4_text", "diffusion_gemma_text", "dbrx")
BLOCKS = tuple(key for key in ROUTED if key not in NO_BLOCK_FORWARD)


def rows(batch: int = 2, length: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return tokens(batch * length, dtype).view(batch, length, H)


def own(block: Any, x: Tensor) -> Tensor:
    """What the block's forward returns first, in x's shape (Llama 4 and ERNIE-VL flatten it)."""
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    return out.view(x.shape)


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    grads = torch.autograd.grad((out * cotangent).sum(), leaves.values(), allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def assert_same_gradients(out: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    ours, theirs = gradients(out, leaves), gradients(expected, leaves)
    assert theirs
    for name, grad in theirs.items():
        mine = ours[name]
        if grad is None or mine is None:  # LongCat's weights of identity experts, unused by both
            assert grad is None or grad.abs().sum() == 0, name
            assert mine is None or mine.abs().sum() == 0, name
            continue
        error = (mine - grad).norm() / grad.norm().clamp_min(1e-6)
        assert error < 2e-5, f"the gradient of {name} is off by {error:.1e}"


def trainable(block: Any, x: Tensor) -> dict[str, Tensor]:
    leaves = {n: p for n, p in block.named_parameters() if p.requires_grad}
    return {"x": x, **leaves}


# --- the shared expert ---------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_each_of_the_three_names_is_found():
    x = torch.randn(5, 4)
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        assert torch.equal(shared_expert_output(SimpleNamespace(**{name: double}), x), 2 * x)


def test_the_first_name_of_the_order_wins_and_none_is_passed_over():
    x = torch.randn(5, 4)
    given = {"shared_expert": double, "shared_experts": torch.neg, "shared_mlp": torch.exp}
    assert torch.equal(shared_expert_output(SimpleNamespace(**given), x), 2 * x)
    given["shared_expert"] = None
    assert torch.equal(shared_expert_output(SimpleNamespace(**given), x), -x)
    given["shared_experts"] = None
    assert torch.equal(shared_expert_output(SimpleNamespace(**given), x), x.exp())


def test_a_block_without_a_shared_expert_gives_none():
    x = torch.randn(5, 4)
    assert shared_expert_output(SimpleNamespace(), x) is None
    assert shared_expert_output(SimpleNamespace(shared_experts=None), x) is None
    gate_only = SimpleNamespace(shared_expert_gate=nn.Linear(4, 1))
    assert shared_expert_output(gate_only, x) is None


def test_the_gate_is_a_sigmoid_per_token():
    x = torch.randn(2, 5, 4)
    gate = nn.Linear(4, 1, bias=False)
    block = SimpleNamespace(shared_expert=double, shared_expert_gate=gate)
    expected = 2 * x * torch.sigmoid(x @ gate.weight.T)
    torch.testing.assert_close(shared_expert_output(block, x), expected)
    block.shared_expert_gate = None
    assert torch.equal(shared_expert_output(block, x), 2 * x)
    block.shared_expert_gate = torch.zeros_like
    assert torch.equal(shared_expert_output(block, x), x)


def test_the_gate_belongs_to_each_of_the_names():
    x = torch.randn(5, 4)
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        block = SimpleNamespace(**{name: double}, shared_expert_gate=torch.zeros_like)
        assert torch.equal(shared_expert_output(block, x), x), name


def test_gradients_reach_the_shared_expert_its_gate_and_x():
    torch.manual_seed(0)
    shared, gate = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
    block = SimpleNamespace(shared_expert=shared, shared_expert_gate=gate)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: shared_expert_output(block, v), (x,))
    shared_expert_output(block, x).square().sum().backward()
    for p in (*shared.parameters(), *gate.parameters()):
        assert p.grad.abs().sum() > 0


def test_hooks_of_the_shared_expert_run():
    seen = []
    shared = nn.Linear(4, 4)
    shared.register_forward_hook(lambda *args: seen.append(len(args[1])))
    shared_expert_output(SimpleNamespace(shared_experts=shared), torch.randn(5, 4))
    assert seen == [1]


@pytest.mark.parametrize("key", ["qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "llama4_text"])
def test_the_shared_expert_of_a_live_block_is_the_part_that_its_experts_do_not_give(key):
    block, x = block_of(key), rows()
    weights, experts = answer(key, block, x.view(-1, H))
    whole, shared = own(block, x), shared_expert_output(block, x)
    assert shared.abs().max() > 1e-3
    if key == "llama4_text":
        scattered = torch.zeros(len(weights), 8).scatter(1, experts, weights)
        fed = (x.view(1, -1, H) * scattered.T[..., None]).reshape(-1, H)
        routed = block.experts(fed).view(8, -1, H).sum(0)
    else:
        routed = block.experts(x.view(-1, H), experts, weights)
    torch.testing.assert_close(routed.view(x.shape) + shared, whole, rtol=1e-5, atol=1e-5)


# --- the whole block -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", BLOCKS)
def test_a_block_computes_its_own_forward_and_gradients_in_float32(key):
    block = block_of(key)
    x = rows().requires_grad_()
    expected, out = own(block, x), block_forward(block, x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, trainable(block, x))
    with torch.no_grad():
        flat = block_forward(block, x.view(-1, H))
    assert flat.shape == (18, H)
    torch.testing.assert_close(flat, expected.view(-1, H), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("key", BLOCKS)
def test_a_bfloat16_block_is_as_good_as_its_own_forward(key):
    """Judged on the tokens where bfloat16, ours and theirs, chose the experts of float64."""
    block, exact = block_of(key, torch.bfloat16), block_of(key, torch.bfloat16).double()
    x = rows(2, 24, torch.bfloat16)
    expected, out = own(block, x), block_forward(block, x)
    assert out.dtype == expected.dtype
    assert out.shape == x.shape
    x_TH = x.view(-1, H)
    spec, tensors = turnout.spec_of(block)
    ours = turnout.route(router_logits(block, x_TH), spec, **tensors).experts_TK
    truth = answer(key, exact, x_TH.double())[1].sort(-1).values
    same = torch.ones(len(x_TH), dtype=torch.bool)
    for chosen in (ours, answer(key, block, x_TH)[1]):
        same &= (chosen.sort(-1).values == truth).all(-1)
    assert same.sum() >= 32
    right = own(exact, x.double()).view(-1, H)[same].double()
    # The privacy filter's eager experts run in float32, so the yardstick is finer than bfloat16.
    factor = 3.0 if key == "openai_privacy_filter" else 2.0
    out, expected = out.view(-1, H)[same], expected.view(-1, H)[same]
    assert_matches(key, out, right, expected, factor=factor)


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "jetmoe"])
def test_no_token_and_one_token(key):
    block = block_of(key)
    assert block_forward(block, torch.zeros(0, H)).shape == (0, H)
    assert block_forward(block, torch.zeros(1, 0, H)).shape == (1, 0, H)
    x = rows(1, 1)
    torch.testing.assert_close(block_forward(block, x), own(block, x), rtol=1e-5, atol=1e-5)


def test_x_is_not_written_to():
    for key in ("qwen2_moe", "llama4_text", "hy_v3", "inkling_text"):
        block, x = block_of(key), rows()
        before = x.clone()
        with torch.no_grad():
            block_forward(block, x)
        assert torch.equal(x, before), key


@pytest.mark.parametrize(("strategy", "divisor"), [("average", 2), ("sum", 1)])
def test_cohere2_combines_as_its_config_says(strategy, divisor):
    block, x = block_of("cohere2_moe"), rows()
    block.shared_expert_combination_strategy = strategy
    expected = own(block, x)
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)
    block.shared_expert_combination_strategy = "sum"
    torch.testing.assert_close(block_forward(block, x) / divisor, expected, rtol=1e-5, atol=1e-5)


def test_cohere2_with_an_unknown_combination_is_refused_as_by_the_model():
    block, x = block_of("cohere2_moe"), rows()
    block.shared_expert_combination_strategy = "concat"
    with pytest.raises(ValueError):
        own(block, x)
    with pytest.raises((ValueError, Unsupported)):
        block_forward(block, x)


@pytest.mark.parametrize("fp32", [True, False])
def test_hy_v3_combines_in_the_dtype_that_its_config_says(fp32):
    block, x = block_of("hy_v3", torch.bfloat16), rows(dtype=torch.bfloat16)
    block.enable_moe_fp32_combine = fp32
    with torch.no_grad():
        out, expected = block_forward(block, x), own(block, x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


@pytest.mark.parametrize("key", ["minimax_m3_vl_text", "step3p5", "laguna"])
def test_a_scale_after_the_experts_is_applied(key):
    block, x = block_of(key), rows()
    block.routed_scaling_factor = 3.5
    expected = own(block, x)
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)
    block.routed_scaling_factor = 1.0
    assert (own(block, x) - expected).abs().max() > 1e-2


# --- patched, and with adapters ------------------------------------------------------------------


ROUTERS = {"gpt_oss": "router.weight", "llama4_text": "router.weight"}
WITH_LORA = (
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "minimax_m2",
    "llama4_text",
    "nemotron_h",
    "longcat_flash",
    "step3p5",
)


def adapted(key: str, *, router: bool = True, **options: Any) -> Any:
    """A PEFT model with random adapters on both projections and (not LongCat) on the router."""
    model = model_of(key)
    targets = turnout.lora_targets(model)
    if router and key != "longcat_flash":
        targets.append(ROUTERS.get(key, "gate.weight"))
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return get_peft_model(
        model, LoraConfig(target_parameters=targets, target_modules=[], **options)
    ).eval()


def block_in(model: Any) -> Any:
    return next(iter(find_blocks(model).values()))


def patch(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the router .* is adapted")
        return turnout.patch(model)


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("key", WITH_LORA)
def test_adapters_on_experts_and_router_are_in_the_block(key, patched):
    model = adapted(key)
    block = block_in(model)
    x = rows().requires_grad_()
    expected = own(block, x)
    base = own(block_of(key), x)
    assert (expected - base).abs().max() > 1e-3, "the adapters changed nothing"
    leaves = {"x": x, **{n: p for n, p in block.named_parameters() if "lora_" in n}}
    assert len(leaves) >= 5
    theirs = gradients(expected, leaves)
    if patched:
        patch(model)
    out = block_forward(block, x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(out, leaves).items():
        error = (grad - theirs[name]).norm() / theirs[name].norm()
        assert error < 2e-5, f"the gradient of {name} is off by {error:.1e}"
    if patched:
        torch.testing.assert_close(own(block, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe", "aria_text"])
def test_a_patched_block_without_adapters_is_the_same(key):
    model = model_of(key)
    block = next(b for b in find_blocks(model).values() if type(b).__name__ != "JetMoeMoA")
    x = rows()
    expected = own(block, x)
    patch(model)
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)
    turnout.unpatch(model)
    assert torch.equal(own(block, x), expected)


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_disabled_and_merged_adapters_are_what_peft_makes_of_them(patched):
    model = adapted("qwen3_moe")
    block, x = block_in(model), rows()
    expected, base = own(block, x), own(block_of("qwen3_moe"), x)
    if patched:
        patch(model)
    with model.disable_adapter():
        torch.testing.assert_close(block_forward(block, x), base, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_one_projection_only_is_applied():
    for name in ("gate_up_proj", "down_proj"):
        torch.manual_seed(1)
        config = LoraConfig(
            r=4,
            init_lora_weights=False,
            target_modules=[],
            target_parameters=[f"mlp.experts.{name}"],
        )
        block, x = block_in(get_peft_model(model_of("qwen3_moe"), config).eval()), rows()
        expected = own(block, x)
        assert (expected - own(block_of("qwen3_moe"), x)).abs().max() > 1e-3
        torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)


def test_adapters_on_the_shared_expert_run_in_the_models_own_module():
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["up_proj", "gate_proj"])
    block, x = block_in(get_peft_model(model_of("deepseek_v3"), config).eval()), rows()
    expected = own(block, x)
    assert (expected - own(block_of("deepseek_v3"), x)).abs().max() > 1e-3
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)


# --- what it can not do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("zaya", "state from layer to layer"),
        ("gemma4_text", "no MoE block"),
        ("diffusion_gemma_text", "no MoE block"),
        ("dbrx", "stay stock"),
        ("phimoe", "keeps the model's own router"),
        ("switch_transformers", "keeps the model's own router"),
        ("nllb-moe", "keeps the model's own router"),
    ],
)
def test_a_block_that_needs_more_than_x_is_unsupported_with_its_reason(key, reason):
    block = next(iter(blocks_of(key).values()))
    with pytest.raises(Unsupported, match=reason) as error:
        block_forward(block, rows())
    assert type(block).__name__ in str(error.value) or "Router" in str(error.value)


def test_the_outer_block_of_ernie_vl_is_unsupported_and_its_inner_one_runs():
    model = model_of("ernie4_5_vl_moe_text")
    outer = next(m for m in model.modules() if type(m).__name__ == "Ernie4_5_VLMoeMoeBlock")
    with pytest.raises(Unsupported, match="text_moe"):
        block_forward(outer, rows())
    x = rows()
    torch.testing.assert_close(block_forward(outer.text_moe, x), own(outer.text_moe, x))


def test_a_hash_router_is_unsupported():
    hashed = next(b for b in blocks_of("deepseek_v4").values() if hasattr(b.gate, "tid2eid"))
    with pytest.raises(Unsupported, match="input ids"):
        block_forward(hashed, rows())


@pytest.mark.parametrize("key", ["mixtral", "minimax", "minimax_m2"])
def test_jitter_in_training_is_unsupported_and_in_eval_ignored(key):
    block, x = block_of(key), rows()
    block.jitter_noise = 0.1
    expected = own(block, x.clone())
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)
    block.train()
    with pytest.raises(Unsupported, match="jitter_noise in training"):
        block_forward(block, x)
    block.jitter_noise = 0.0
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_several_active_expert_adapters_are_unsupported(patched):
    model = adapted("qwen3_moe", router=False)
    second = LoraConfig(
        r=2, target_modules=[], target_parameters=turnout.lora_targets(model_of("qwen3_moe"))
    )
    model.add_adapter("second", second)
    if patched:
        patch(model)
    block, x = block_in(model), rows()
    torch.testing.assert_close(block_forward(block, x), own(block, x), rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(Unsupported, match=r"default.*second"):
        block_forward(block, x)


@pytest.mark.parametrize(
    ("key", "target"),
    [
        *([("aria_text", f"experts.{fc}.weight") for fc in ("fc1", "fc2")] if ARIA_HAS_FC else []),
        ("jetmoe", "mlp.input_linear.weight"),
        ("jetmoe", "mlp.output_linear.weight"),
    ],
)
def test_an_adapter_on_a_stack_in_a_module_of_its_own_is_never_left_out(key, target):
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=[], target_parameters=[target])
    model = get_peft_model(model_of(key), config).eval()
    block = next(b for b in find_blocks(model).values() if type(b).__name__ != "JetMoeMoA")
    x = rows()
    expected = own(block, x)
    assert (expected - own(block_of(key), x)).abs().max() > 1e-3
    try:
        out = block_forward(block, x)
    except Unsupported as refusal:
        out, reason = expected, str(refusal)
        assert "adapter" in reason
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_experts_in_modules_to_save_are_the_saved_copy():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["experts"])
    model = get_peft_model(model_of("qwen3_moe"), config).eval()
    block, x = block_in(model), rows()
    with torch.no_grad():
        for p in block.experts.modules_to_save["default"].parameters():
            p.mul_(1.5)
    expected = own(block, x)
    assert (expected - own(block_of("qwen3_moe"), x)).abs().max() > 1e-3
    torch.testing.assert_close(block_forward(block, x), expected, rtol=1e-5, atol=1e-5)


def test_a_missing_attribute_is_an_error_that_names_it():
    block = block_of("minimax_m2")
    del block.e_score_correction_bias
    with pytest.raises(ValueError, match=r"MiniMaxM2SparseMoeBlock.*e_score_correction_bias"):
        block_forward(block, rows())
    block = block_of("qwen3_moe")
    del block.experts
    with pytest.raises(ValueError, match=r"Qwen3MoeSparseMoeBlock.*experts"):
        block_forward(block, rows())
    with pytest.raises(ValueError, match="neither 'gate' nor 'router'"):
        block_forward(nn.Linear(H, H), rows())


def test_an_input_of_the_wrong_width_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        block_forward(block_of("qwen3_moe"), torch.zeros(2, 3, H + 1))
