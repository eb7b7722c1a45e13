"""Models in SonicMoE's row order: nobody outside sees it, and nobody computes on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import (
    assert_same_step,
    changes,
    experts_of,
    forward,
    pickled,
    probe,
    relative,
    snapshot,
    step,
    tiny,
    with_lora,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import fake_sonicmoe
import turnout
from turnout import Unsupported
from turnout.experts import sonic
from turnout.experts.weights import alternating
from turnout.integrations import sonic as glue

KEY = "qwen3_moe"
# plain silu without bias: softmax router, sigmoid router with groups and shared expert, identity
# experts, a gated shared expert, the stacks below the block
KEYS = (KEY, "deepseek_v3", "longcat_flash", "qwen2_moe", "jetmoe")
STACKS = (".experts.gate_up_proj", ".mlp.input_linear.weight")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sonicmoe.install(monkeypatch)
    monkeypatch.setattr(glue, "device_of", lambda device: fake_sonicmoe.H100)


def raw(model: nn.Module) -> list[torch.Tensor]:
    """The gate_up parameters as they lie."""
    return [p for n, p in model.named_parameters() if n.endswith(STACKS)]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def assert_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(got[n], t)] == []


@pytest.mark.parametrize("key", KEYS)
def test_the_model_computes_something_else(key: str) -> None:
    expected = step(tiny(key), key)
    model = tiny(key)
    turnout.patch(model, backend="sonic").require("fused")
    out, grads = step(model, key)
    assert len(fake_sonicmoe.Calls.forwards) == 2
    found = {id(p) for p in raw(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in found:
            expected[1][name] = alternating(expected[1][name], 1)
    assert_same_step((out, grads), expected)


@pytest.mark.parametrize("key", KEYS)
def test_patching_and_unpatching_leaves_something_behind(key: str) -> None:
    model = tiny(key)
    before, values, expected = snapshot(model), bits(model), forward(model, key)
    turnout.patch(model, backend="sonic")
    assert len(raw(model)) == 2
    for parameter, usual in zip(raw(model), raw(tiny(key)), strict=True):
        assert torch.equal(parameter, alternating(usual, 1))
        assert not torch.equal(parameter, usual)
    assert_bits(bits(model), values)
    turnout.patch(model, backend="sonic")
    turnout.patch(model, backend="torch")
    assert relative(forward(model, key), expected) < 1e-5
    turnout.patch(model, backend="sonic")
    forward(model, key)
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []
    assert_bits(bits(model), values)
    assert torch.equal(forward(model, key), expected)


def test_a_gradient_keeps_the_other_order() -> None:
    model, stock = tiny(KEY), tiny(KEY)
    turnout.patch(model, backend="sonic")
    for one in (model, stock):
        forward(one, KEY).square().sum().backward()
    turnout.unpatch(model)
    for (name, got), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        if expected.grad is not None:
            assert relative(got.grad, expected.grad) < 1e-5, name
    assert relative(raw(model)[0].grad, alternating(raw(stock)[0].grad, 1)) > 0.1


@pytest.mark.parametrize("router", ["model", "fused"])
def test_training_goes_another_way(router: Any) -> None:
    """Five AdamW steps, then the weights and the state dict; the optimizer is made in between."""
    model, stock = tiny(KEY), tiny(KEY)
    turnout.patch(model, backend="sonic", router=router)
    for one in (model, stock):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            forward(one, KEY).square().mean().backward()
            optimizer.step()
    expected = stock.state_dict()
    before = tiny(KEY).state_dict()
    for name, tensor in model.state_dict().items():
        assert relative(tensor, expected[name]) < 1e-4, name
        if "experts" in name:
            assert relative(tensor, before[name]) > 1e-3, f"{name} did not train"


def test_the_checkpoint_has_the_other_order(tmp_path: Any) -> None:
    """`save_pretrained` and `from_pretrained` are transformers' own."""
    model = tiny(KEY)
    values, expected = bits(model), forward(model, KEY)
    turnout.patch(model, backend="sonic")
    turnout.unpatch(tiny(KEY))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_bits(bits(again), values)
    assert relative(forward(again, KEY), expected) < 1e-5
    plain = tiny(KEY)
    plain.save_pretrained(tmp_path / "plain")
    theirs, ours = (load_file(p / "model.safetensors") for p in (tmp_path / "plain", tmp_path))
    assert_bits(ours, theirs)


def test_a_loaded_state_keeps_the_file_order() -> None:
    other = tiny(KEY, seed=5)
    expected, values = forward(other, KEY), bits(other)
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    given = {n: t.clone() for n, t in values.items()}
    model.load_state_dict(given)
    assert_bits(given, values)  # the caller's tensors stay
    assert relative(forward(model, KEY), expected) < 1e-5
    assert_bits(bits(model), values)
    turnout.unpatch(model)
    assert torch.equal(forward(model, KEY), expected)


def test_a_wrong_file_is_reordered() -> None:
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    values = bits(model)
    name = next(n for n in values if n.endswith("gate_up_proj"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**values, name: values[name][:, :-1]})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({n: t for n, t in values.items() if n != name})
    with pytest.raises(Unsupported, match=r"assign=True.*interleaved"):
        model.load_state_dict(values, assign=True)


def test_the_experts_alone_have_another_state() -> None:
    model = tiny(KEY)
    experts = experts_of(model)[0]
    values = bits(experts)
    turnout.patch(model, backend="sonic")
    assert_bits(bits(experts), values)
    experts.load_state_dict({n: t + 1 for n, t in values.items()})
    turnout.unpatch(model)
    assert_bits(bits(experts), {n: t + 1 for n, t in values.items()})


def test_another_class_on_top_loses_the_file_order() -> None:
    """A parametrization gives the experts a subclass of the guarded class, as FSDP2 does."""
    model = tiny(KEY)
    expected, values = forward(model, KEY), bits(model)
    turnout.patch(model, backend="sonic")
    experts = experts_of(model)[0]
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    name = next(n for n in values if n.endswith("gate_up_proj"))
    assert torch.equal(model.state_dict()[name], values[name])
    assert relative(forward(model, KEY), expected) < 1e-5
    model.load_state_dict(model.state_dict())
    with pytest.raises(Unsupported, match=r"gate_up_proj of .*Qwen3MoeExperts has its gate and up"):
        _ = experts.gate_up_proj
    with pytest.raises(Unsupported, match=r"another class since turnout\.patch"):
        turnout.unpatch(model)
    nn.utils.parametrize.remove_parametrizations(experts, "down_proj")
    turnout.unpatch(model)
    assert_bits(bits(model), values)
    assert torch.equal(forward(model, KEY), expected)


def test_compiled_code_computes_in_it_in_silence() -> None:
    model = tiny(KEY)
    expected = forward(model, KEY)
    turnout.patch(model, backend="sonic")
    torch._dynamo.reset()
    whole = torch.compile(experts_of(model)[0], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not run in compiled code"):
        whole(torch.zeros(3, 64), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert relative(forward(torch.compile(model, backend="eager"), KEY), expected) < 1e-5


GUARD = r"gate_up_proj of Qwen3MoeExperts has its gate and up rows interleaved.*unpatch\(model\)"


def test_eager_experts_run_on_reordered_rows() -> None:
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    experts = experts_of(model)[0]
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        experts.config._experts_implementation = implementation
        with pytest.raises(Unsupported, match=GUARD):
            forward(model, KEY)
    experts.config._experts_implementation = "turnout"
    forward(model, KEY)


@pytest.mark.parametrize(
    "touch",
    [
        lambda experts: experts.gate_up_proj,
        lambda experts: setattr(experts, "gate_up_proj", nn.Parameter(torch.zeros(8, 96, 64))),
        lambda experts: experts.get_parameter("gate_up_proj"),
        lambda experts: nn.utils.parametrize.register_parametrization(
            experts, "gate_up_proj", nn.Identity()
        ),
    ],
    ids=["read", "set", "get_parameter", "parametrize"],
)
def test_reordered_rows_are_handed_out(touch: Any) -> None:
    model = tiny(KEY)
    before = snapshot(model)
    turnout.patch(model, backend="sonic")
    with pytest.raises(Unsupported, match=GUARD):
        touch(experts_of(model)[0])
    forward(model, KEY)
    turnout.unpatch(model)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("call", [get_model_state_dict, lambda m: set_model_state_dict(m, bits(m))])
def test_distributed_checkpoints_have_the_other_order(call: Any) -> None:
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    with pytest.raises(Unsupported, match=GUARD):
        call(model)


def test_peft_attaches_to_reordered_rows() -> None:
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    with pytest.raises(Unsupported, match=GUARD):
        with_lora(model)


def test_an_adapter_on_down_alone_is_left_out() -> None:
    """`down` has no guard, as its rows keep their order; the adapter still has no place."""
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    adapted = with_lora(model, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(Unsupported, match="adapter on down_proj of Qwen3MoeExperts has no place"):
        forward(adapted, KEY)


def test_an_adapted_model_is_patched() -> None:
    model = with_lora(tiny(KEY))
    before, values = snapshot(model), bits(model)
    with pytest.raises(Unsupported, match=r"no place in backend='sonic'.*'sonic-merged'"):
        turnout.patch(model, backend="sonic")
    assert changes(before, snapshot(model)) == []
    assert_bits(bits(model), values)


def test_adapters_on_attention_are_refused() -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    expected = step(with_lora(tiny(KEY), **options), KEY)
    base = tiny(KEY)
    turnout.patch(base, backend="sonic")
    assert_same_step(step(with_lora(base, **options), KEY), expected)


@pytest.mark.parametrize("targets", [None, ["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj"]])
def test_merged_adapters_train_another_way(targets: Any) -> None:
    options = {} if targets is None else {"target_parameters": targets}
    expected = step(with_lora(tiny(KEY), **options), KEY)
    model = with_lora(tiny(KEY), **options)
    report = turnout.patch(model, backend="sonic-merged")
    with probe() as ran:
        got = step(model, KEY)
    assert ran.folds == 0
    assert_same_step(got, expected)
    assert_same_step(step(model, KEY), expected)  # the layers' second call
    assert {path.split(":")[0] for path in report.adapters.values()} == {
        "merged in every forward and backward for sonic"
    }
    with pytest.raises(Unsupported, match="merged in every forward"):
        report.require("fused")
    turnout.unpatch(model)
    assert_same_step(step(model, KEY), expected)


def test_the_report_hides_what_merging_costs() -> None:
    """8 experts of (96, 64) in float32: 192 KiB, seven times that a step."""
    model = with_lora(tiny(KEY), target_parameters=["mlp.experts.gate_up_proj"])
    (path,) = set(turnout.patch(model, backend="sonic-merged").adapters.values())
    assert "0.1875 MiB for a merged copy and as much for its gradient" in path
    assert "1.312 MiB of memory traffic a step" in path


@pytest.mark.parametrize("targets", [None, ["mlp.experts.down_proj"]])
def test_peft_merges_into_reordered_rows(targets: Any) -> None:
    options = {} if targets is None else {"target_parameters": targets}
    model = with_lora(tiny(KEY), **options)
    turnout.patch(model, backend="sonic-merged")
    values, expected = bits(model), forward(model, KEY)
    for merge in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        with pytest.raises(Unsupported, match=r"erge of the adapter .*unpatch\(model\)"):
            merge()
    assert_bits(bits(model), values)
    turnout.unpatch(model)
    merged = model.merge_and_unload()
    assert relative(forward(merged, KEY), expected) < 1e-4


@pytest.mark.parametrize("targets", [None, ["mlp.experts.down_proj"]])
def test_two_active_adapters_are_folded_by_peft(targets: Any) -> None:
    options = {} if targets is None else {"target_parameters": targets}
    model = with_lora(tiny(KEY), **options)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    report = turnout.patch(model, backend="sonic-merged")
    assert set(report.adapters.values()) == {"raises: 2 adapters are active"}
    with pytest.raises(Unsupported, match=r"2 adapters are active.*one active adapter.*unpatch"):
        forward(model, KEY)
    model.base_model.set_adapter(["other"])
    forward(model, KEY)


def test_a_disabled_adapter_is_merged() -> None:
    model = with_lora(tiny(KEY))
    expected = forward(tiny(KEY), KEY)
    turnout.patch(model, backend="sonic-merged")
    with model.disable_adapter():
        assert relative(forward(model, KEY), expected) < 1e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_forgets_its_order_or_shares_it(duplicate: Any) -> None:
    model = tiny(KEY)
    expected, values = forward(model, KEY), bits(model)
    turnout.patch(model, backend="sonic")
    twin = duplicate(model)
    assert relative(forward(twin, KEY), expected) < 1e-5
    assert_bits(bits(twin), values)
    with pytest.raises(Unsupported, match=GUARD):
        _ = experts_of(twin)[0].gate_up_proj
    twin.load_state_dict({n: t + 1 for n, t in values.items()})
    turnout.unpatch(twin)
    assert_bits(bits(twin), {n: t + 1 for n, t in values.items()})
    assert [name for name in snapshot(twin) if "turnout" in name] == []
    assert relative(forward(model, KEY), expected) < 1e-5
    assert_bits(bits(model), values)
    turnout.unpatch(model)
    assert torch.equal(forward(model, KEY), expected)


def test_the_report_hides_the_back_end() -> None:
    model = tiny(KEY)
    report = turnout.patch(model, backend="sonic")
    (detail,) = {row.detail for row in report.layers}
    assert detail == "SonicMoE, back end sonic; gate and up rows interleaved in memory"
    assert {row.activation for row in report.layers} == {"silu glu"}
    assert "interleaved in memory" in str(report)
    assert report.to_dict()["backend"] == "sonic"
    turnout.unpatch(model)
    assert {row.status for row in report.layers} == {"unpatched"}


def test_activation_checkpointing_reads_another_order() -> None:
    expected = step(tiny(KEY), KEY)
    model = tiny(KEY)
    turnout.patch(model, backend="sonic")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    out, grads = step(model, KEY)
    assert len(fake_sonicmoe.Calls.forwards) == 4
    expected[1].update(
        {n: alternating(g, 1) for n, g in expected[1].items() if n.endswith("gate_up_proj")}
    )
    assert_same_step((out, grads), expected)


def test_checkpointing_of_merged_adapters_keeps_what_it_rebuilds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = step(with_lora(tiny(KEY)), KEY)
    model = with_lora(tiny(KEY))
    turnout.patch(model, backend="sonic-merged")
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_same_step(step(model, KEY), expected)
    assert len(fake_sonicmoe.Calls.forwards) == 4, "the layers are not recomputed"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("gpt_oss", r"GptOssExperts\): activation: "),
        ("gemma4_text", "activation: .*gelu_tanh"),
        ("nemotron_h", "activation: .*gated=False"),
        ("deepseek_v4", "activation: .*limit"),
        ("step3p5", r"layers\.1.*activation: .*limit_after=True.*every layer or none"),
        ("minimax_m3_vl_text", "activation: "),
        ("llama4_text", "layout: .*weight_on_input"),
        ("aria_text", "layout: .*transposed|is no parameter"),
    ],
)
def test_a_model_it_computes_wrongly_is_patched(key: str, words: str) -> None:
    model = tiny(key)
    before, values = snapshot(model), bits(model)
    with pytest.raises(Unsupported, match=words):
        turnout.patch(model, backend="sonic")
    assert changes(before, snapshot(model)) == []
    assert_bits(bits(model), values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recompute": "gate_up"}, "recompute='gate_up'"),
        ({"expert_dropout": 0.1, "backend": "sonic-merged"}, "expert_dropout"),
    ],
)
def test_an_option_it_does_not_have_is_dropped(options: Any, words: str) -> None:
    model = tiny(KEY)
    before = snapshot(model)
    with pytest.raises(Unsupported, match=words):
        turnout.patch(model, **{"backend": "sonic", **options})
    assert changes(before, snapshot(model)) == []


def test_real_limits_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fake_sonicmoe.install(monkeypatch, limits=True)
    monkeypatch.setattr(glue, "device_of", lambda device: fake_sonicmoe.H100)
    with pytest.raises(Unsupported, match=r"layers\.0.*dims: H is 64 and F is 48"):
        turnout.patch(tiny(KEY, torch.bfloat16), backend="sonic")
    sizes = {"hidden_size": 512, "moe_intermediate_size": 64}
    with pytest.raises(Unsupported, match="dtype: the stacks are float32"):
        turnout.patch(tiny(KEY, **sizes), backend="sonic")
    model = tiny(KEY, torch.bfloat16, **sizes)
    expected = forward(model, KEY)
    turnout.patch(model, backend="sonic")
    assert relative(forward(model, KEY), expected) < 2e-2


def test_a_cpu_without_gpu_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fake_sonicmoe.install(monkeypatch)
    model = tiny(KEY)
    before = snapshot(model)
    with pytest.raises(Unsupported, match=r"needs an NVIDIA GPU of sm_90 or newer; got cpu"):
        turnout.patch(model, backend="sonic")
    assert changes(before, snapshot(model)) == []


def test_a_shared_stack_is_reordered_twice() -> None:
    model = tiny(KEY)
    first, second = experts_of(model)
    second.gate_up_proj = first.gate_up_proj
    with pytest.raises(Unsupported, match=r"shares its stack with .*layers\.0"):
        turnout.patch(model, backend="sonic")
    assert type(first).__mro__[1] is nn.Module


def test_block_forward_reads_the_other_order() -> None:
    model = tiny("qwen2_moe")
    block = model.get_submodule(next(n for n, m in model.named_modules() if hasattr(m, "experts")))
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    expected = turnout.block_forward(block, x)
    turnout.patch(model, backend="sonic")
    assert relative(turnout.block_forward(block, x), expected) < 1e-5
    assert sonic.NAME == "sonic"


def test_copies_of_modules_to_save_are_forgotten() -> None:
    """Full training of the experts through PEFT: the original and its copy are both reordered."""
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    expected = forward(with_lora(tiny(KEY), **options), KEY)
    model = with_lora(tiny(KEY), **options)
    values = bits(model)
    turnout.patch(model, backend="sonic")
    assert relative(forward(model, KEY), expected) < 1e-5
    assert_bits(bits(model), values)
    turnout.unpatch(model)
    assert_bits(bits(model), values)
