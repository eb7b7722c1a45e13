"""`TurnoutKernelConfig` and `mapping` with the installed `kernels` package: gpt-oss, no hub.

Skipped, and so not run, where the installed transformers does not accept the installed `kernels`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import (
    assert_fused,
    assert_same_step,
    forward,
    probe,
    relative,
    step,
    tiny,
    with_lora,
)
from packaging.version import Version
from torch import Tensor, nn
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts
from transformers.utils.import_utils import (
    KERNELS_MAX_VERSION,
    KERNELS_MIN_VERSION,
    is_kernels_available,
)

import turnout
from turnout.integrations import kernels as layer
from turnout.integrations.kernels import LAYER, TurnoutKernelConfig, TurnoutMoeMLP, mapping
from turnout.integrations.state import state_of
from turnout.specs import Unsupported

if not is_kernels_available():
    pytest.skip(
        f"no kernels >= {KERNELS_MIN_VERSION}, < {KERNELS_MAX_VERSION}, which this transformers "
        "accepts: the kernel layer was not tested",
        allow_module_level=True,
    )

from kernels import Mode, kernelize, register_kernel_mapping, use_kernel_mapping
from kernels.layer import repos

KEY = "gpt_oss"


def kernelized(model: Any) -> Any:
    """The model, by the path of `use_kernels=True`."""
    model.set_use_kernels(True, kernel_config=TurnoutKernelConfig())
    return model


def blocks(model: nn.Module) -> list[Any]:
    """The MoE blocks."""
    return [module for module in model.modules() if type(module).__name__ == "GptOssMLP"]


def is_ours(block: Any) -> bool:
    """The block's forward is the one of turnout's layer."""
    return getattr(vars(block).get("forward"), "__func__", None) is TurnoutMoeMLP.forward


class OtherMoeMLP(nn.Module):
    """A layer that runs the block without its experts module, as those of the Hub do."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing of the block."""
        return hidden_states, hidden_states


class Other:
    """A repository with `OtherMoeMLP`."""

    def load(self) -> type[nn.Module]:
        """The layer."""
        return OtherMoeMLP


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_use_kernels_runs_the_experts_in_turnout_with_the_stock_values(training: bool) -> None:
    stock, model = tiny(KEY).train(training), kernelized(tiny(KEY).train(training))
    assert model.use_kernels
    with probe() as ran:
        got = step(model, KEY)
    assert len(ran.calls) == len(blocks(model)) == 2
    assert_same_step(got, step(stock, KEY))


def test_from_pretrained_takes_the_config(tmp_path: Path) -> None:
    stock = tiny(KEY)
    stock.save_pretrained(tmp_path)
    config = TurnoutKernelConfig()
    for _ in range(2):  # the same object for two models
        model = GptOssForCausalLM.from_pretrained(tmp_path, kernel_config=config)
        with probe() as ran:
            got = step(model, KEY)
        assert len(ran.calls) == 2
        assert_same_step(got, step(stock, KEY))
    assert config.kernel_mapping == {}


def test_hooks_on_block_router_and_experts_fire() -> None:
    model = kernelized(tiny(KEY))
    seen: list[str] = []
    for name, module in (("block", block := blocks(model)[1]), ("router", block.router)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    block.experts.register_forward_pre_hook(lambda *_: seen.append("experts"))
    forward(model, KEY)
    assert seen == ["router", "experts", "block"]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="routers name no kernel layer"
)
@pytest.mark.parametrize("key", ["qwen3_5_moe_text", "laguna"])
def test_a_router_that_names_a_layer_is_called_fused_or_loses_its_hooks(key: str) -> None:
    """transformers 5.23 has no layer for the name, so `kernels` binds the class's own forward."""
    model = tiny(key)
    routers = [one for one in model.modules() if type(one).__name__.endswith("TopKRouter")]
    assert hasattr(type(routers[0]), "kernel_layer_name")
    expected, seen = forward(model, key), []
    for router in routers:
        router.register_forward_hook(lambda *_: seen.append(1))
    report = turnout.patch(model, router="fused").require("fused")
    model.set_use_kernels(True)
    with pytest.raises(Unsupported, match=r"its own forward was put back, as use_kernels does"):
        report.require("fused")
    assert relative(forward(model, key), expected) < 1e-5
    turnout.patch(model, router="fused").require("fused")
    assert relative(forward(model, key), expected) < 1e-5
    assert len(seen) == 2 * len(routers)


def test_router_logits_and_aux_loss_are_the_models() -> None:
    ids = torch.arange(2, 18)[None]
    outs = [
        model.train()(input_ids=ids, labels=ids, output_router_logits=True)
        for model in (tiny(KEY), kernelized(tiny(KEY)))
    ]
    stock, ours = outs
    assert len(ours.router_logits) == 2
    for got, expected in zip(ours.router_logits, stock.router_logits, strict=True):
        assert relative(got, expected) < 1e-5
    assert float(stock.aux_loss.detach()) > 0
    assert relative(ours.aux_loss, stock.aux_loss) < 1e-5


def test_layer_stays_when_transformers_registers_its_own_mapping_again() -> None:
    """`train` and `eval` do that; the table of transformers has a layer for this block on a CPU."""
    model = kernelized(tiny(KEY).eval())
    for training in (True, False):
        model.train(training)
        assert all(map(is_ours, blocks(model)))


def test_adapters_that_peft_adds_later_are_fused() -> None:
    stock, model = with_lora(tiny(KEY)), with_lora(kernelized(tiny(KEY)))
    assert_fused(model, stock, KEY)
    assert_fused(model.train(), stock.train(), KEY)


def test_plain_kernelize_without_patch_fuses_adapters() -> None:
    stock, model = with_lora(tiny(KEY)), with_lora(tiny(KEY))
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        for block in blocks(model):
            kernelize(block, mode=Mode.TRAINING, device="cpu", use_fallback=False)
    assert all(map(is_ours, blocks(model)))
    assert_fused(model, stock, KEY)


@pytest.mark.parametrize("first", ["patch", "kernels"])
def test_options_of_patch_hold_in_both_orders(first: str) -> None:
    model = tiny(KEY)
    if first == "kernels":
        kernelized(model)
    report = turnout.patch(model, recompute="gate_up", router="fused")
    if first == "patch":
        kernelized(model)
    assert all(map(is_ours, blocks(model)))
    report.require("fused")
    assert_same_step(step(model, KEY), step(tiny(KEY), KEY))
    assert {state_of(block.experts).recompute for block in blocks(model)} == {"gate_up"}


def test_block_stays_in_turnout_after_unpatch() -> None:
    """transformers has no way back from use_kernels, and so the mapping still holds."""
    model = kernelized(tiny(KEY))
    turnout.patch(model, recompute="gate_up")
    turnout.unpatch(model)
    with probe() as ran:
        got = step(model, KEY)
    assert len(ran.calls) == 2
    assert {state_of(block.experts).recompute for block in blocks(model)} == {"none"}
    assert_same_step(got, step(tiny(KEY), KEY))


def test_copy_runs_its_own_experts() -> None:
    model = kernelized(tiny(KEY))
    twin = copy.deepcopy(model)
    expected = forward(model, KEY)
    with torch.no_grad():
        for block in blocks(model):
            block.experts.down_proj.zero_()
    assert relative(forward(twin, KEY), expected) == 0
    assert relative(forward(model, KEY), expected) > 1e-3


@pytest.mark.parametrize(
    "mode",
    [
        Mode.TRAINING,
        Mode.INFERENCE,
        Mode.TRAINING | Mode.TORCH_COMPILE,
        Mode.INFERENCE | Mode.TORCH_COMPILE,
    ],
    ids=str,
)
def test_every_mode_has_the_layer(mode: Mode) -> None:
    (block, _) = blocks(tiny(KEY))
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        kernelize(block, mode=mode, device="cpu", use_fallback=False)
    assert is_ours(block)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_layer_replaces_one_of_the_hub_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    """The choice depends on the mapping alone, so it needs no GPU; nothing runs here."""
    monkeypatch.setattr(repos, "_find_capability", lambda: capability)
    (block, _) = blocks(tiny(KEY))
    hub = {LAYER: {"cuda": {Mode.TRAINING: Other(), Mode.INFERENCE: Other()}}}
    with use_kernel_mapping(hub, inherit_mapping=False):
        kernelize(block, mode=Mode.TRAINING, device="cuda", use_fallback=False)
        assert not is_ours(block)
        register_kernel_mapping(mapping())
        kernelize(block, mode=Mode.TRAINING, device="cuda", use_fallback=False)
        assert is_ours(block)


def test_compiled_block_is_one_graph_with_the_stock_values() -> None:
    model, stock = kernelized(tiny(KEY)), tiny(KEY)
    torch.manual_seed(3)
    x = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    torch._dynamo.reset()
    run = torch.compile(blocks(model)[0], backend="aot_eager", fullgraph=True)
    found = []
    for block in (run, blocks(stock)[0]):
        out, weights = block(x)
        (grad,) = torch.autograd.grad(out.square().sum() + weights.square().sum(), x)
        found.append((out, weights, grad))
    for got, expected in zip(*found, strict=True):
        assert relative(got, expected) < 1e-5


def test_compiling_an_unpatched_block_says_what_to_do() -> None:
    (block, _) = blocks(tiny(KEY))
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        kernelize(block, mode=Mode.TRAINING, device="cpu")
    torch._dynamo.reset()
    run = torch.compile(block, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Call turnout\.patch\(model\) before"):
        run(torch.zeros(1, 3, block.router.hidden_dim))


def test_report_says_that_another_layer_took_the_block() -> None:
    model = with_lora(tiny(KEY))
    report = turnout.patch(model)
    report.require("fused")
    with use_kernel_mapping({LAYER: {"cpu": Other()}}, inherit_mapping=False):
        kernelize(blocks(model)[1], mode=Mode.TRAINING, device="cpu", use_fallback=False)
    assert [row.status for row in report.layers] == ["fused", "stock"]
    with pytest.raises(Unsupported, match=r"other_kernel \(use_kernels gave the block OtherMoeMLP"):
        report.require("fused")


def test_mxfp4_experts_are_unsupported_before_anything_runs() -> None:
    model = tiny(KEY)
    block = blocks(model)[1]
    block.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(Unsupported, match="quantised, MXFP4 blocks"):
        kernelized(model)
    assert not model.use_kernels
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        kernelize(block, mode=Mode.INFERENCE, device="cpu")
    with pytest.raises(Unsupported, match="quantised, MXFP4 blocks"):
        block(torch.zeros(1, 3, model.config.hidden_size))


def test_model_without_such_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no block of Qwen3Moe\w+ names the kernel layer"):
        kernelized(tiny("qwen3_moe"))


def test_device_without_the_layer_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "infer_device", lambda model: "xpu")
    with pytest.raises(Unsupported, match="the model is on xpu"):
        kernelized(tiny(KEY))


def test_layer_of_the_block_can_not_be_named_twice() -> None:
    with pytest.raises(ValueError, match=f"kernel_mapping names {LAYER}"):
        TurnoutKernelConfig({LAYER: "org/repo:Layer"})
