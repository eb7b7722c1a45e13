"""`patch(aux_loss="fused")`: the models' own numbers, without the models' own function."""

from __future__ import annotations

import copy
import importlib
import inspect
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hf_models import pickled, relative, tiny, with_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import turnout
from turnout import Unsupported
from turnout.integrations.aux_loss import NAME, STATE, _body, aux_forward
from turnout.verify.tiny import TINY, find_class, make_inputs

OWN = {"switch_transformers": "takes router_probs, expert_indices"}
# transformers 5.17 itself records no logits there: the loss is 0, and with labels an error
NOT_RECORDED = ("dbrx", "granitemoe", "granitemoe_swa", "granitemoeshared", "granitemoehybrid")
HAVE = [key for key, arch in TINY.items() if _body(find_class(arch.cls).forward) is not None]
TAKEN = [key for key in HAVE if key not in OWN]
KEY = "qwen3_moe"
# of the call, and of the config
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "labels": (("labels",), {}),
    "labels and padding": (("labels", "mask"), {}),
    "padding": (("mask",), {}),
    "neither": ((), {}),
    "tuple": (("labels", "mask"), {"return_dict": False}),
    "off": (("labels",), {"output_router_logits": False}),
}


def inputs(key: str, *what: str, **options: Any) -> dict[str, Any]:
    made: dict[str, Any] = {**make_inputs(key), "output_router_logits": True, **options}
    if TINY[key].inputs != "encdec":
        made["use_cache"] = False
    if "labels" in what:
        made["labels"] = made["input_ids"].roll(1, 0)
    if "mask" in what:
        mask = torch.ones_like(made["input_ids"])
        mask[0, -4:] = 0
        made["attention_mask"] = mask
        if TINY[key].inputs == "encdec":
            made["decoder_attention_mask"] = mask.flip(0)
    return made


def flat(out: Any) -> dict[str, Tensor]:
    """Every tensor of an output, by its path."""
    found = {}
    pairs = out.items() if hasattr(out, "items") else enumerate(out)
    for name, value in pairs:
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}.{path}": inner for path, inner in flat(value).items()}
    return found


def step(model: Any, given: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | str:
    """The output and every gradient of its loss, or of its aux_loss; or the error, in words."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    try:
        out = model(**given)
    except AttributeError as error:
        return str(error)
    found = flat(out)
    loss = found.get("loss", found.get("aux_loss", found.get("0")))
    assert loss is not None or not isinstance(out, tuple)
    if loss is not None and loss.requires_grad:
        loss.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in found.items()}, grads


def assert_same(got: Any, expected: Any, limit: float = 1e-5) -> None:
    if isinstance(expected, str):
        assert got == expected
        return
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        largest = max((float(t.double().norm()) for t in theirs.values()), default=0.0)
        for name, value in theirs.items():
            assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
            if not value.is_floating_point():
                continue
            error = float((ours[name].double() - value.double()).norm())
            assert error <= limit * max(float(value.double().norm()), 1e-3 * largest), name


def fused(model: Any, **options: Any) -> Any:
    report = turnout.patch(model, aux_loss="fused", **options)
    assert {row.status for row in report.aux_losses} == {"fused"}
    return report


def module_of(key: str) -> Any:
    return importlib.import_module(find_class(TINY[key].cls).__module__)


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model's own code computed the loss")


@pytest.fixture(scope="module", params=TAKEN)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """An architecture, its tiny model with stock losses, and the same with ours."""
    stock, ours = tiny(request.param), tiny(request.param)
    turnout.patch(stock)
    fused(ours)
    return request.param, stock, ours


@pytest.mark.parametrize("case", CASES)
def test_a_loss_or_gradient_is_not_the_models(pair: tuple[str, Any, Any], case: str) -> None:
    key, stock, ours = pair
    given = inputs(key, *CASES[case][0], **CASES[case][1])
    expected = step(stock, given)
    with mock.patch.object(module_of(key), NAME, forbidden):
        got = step(ours, given)
    assert_same(got, expected)
    logits = [] if isinstance(expected, str) else [n for n in expected[0] if "router_logits" in n]
    if case in ("labels", "labels and padding") and key not in NOT_RECORDED:
        assert logits
    if case == "off":
        assert "aux_loss" not in expected[0]


def test_the_switch_of_the_config_is_not_seen(pair: tuple[str, Any, Any]) -> None:
    key, stock, ours = pair
    given = inputs(key, "labels", "mask")
    del given["output_router_logits"]
    found = []
    for model in (stock, ours):
        with mock.patch.object(model.config, "output_router_logits", True):
            found.append(step(model, given))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("first", [True, False], ids=["patch first", "PEFT first"])
@pytest.mark.parametrize("key", [KEY, "gpt_oss", "qwen2_moe"])
def test_adapters_change_the_loss(key: str, first: bool) -> None:
    stock, ours = with_lora(tiny(key)), tiny(key)
    turnout.patch(stock)
    if first:
        report = fused(ours)
        ours = with_lora(ours)
    else:
        ours = with_lora(ours)
        report = fused(ours)
    given = inputs(key, "labels", "mask")
    expected = step(stock, given)
    with mock.patch.object(module_of(key), NAME, forbidden):
        assert_same(step(ours, given), expected)
    report.require("fused")
    assert expected[1]
    assert all("lora_" in name for name in expected[1])


@pytest.mark.parametrize("options", [{}, {"router": "fused", "routing_cache": True}], ids=str)
@pytest.mark.parametrize("key", [KEY, "gpt_oss", "jamba"])
def test_the_recompute_counts_layers_twice(key: str, options: dict[str, Any]) -> None:
    found = []
    for choice in ("model", "fused"):
        model = tiny(key)
        turnout.patch(model, aux_loss=choice, **options)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        found.append(step(model, inputs(key, "labels", "mask")))
    assert_same(found[1], found[0])
    plain = tiny(key)
    assert_same(found[1], step(plain.train(), inputs(key, "labels", "mask")))


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("key", [KEY, "gpt_oss"])
def test_the_host_waits_or_a_one_hot_is_made(key: str) -> None:
    model = tiny(key)
    fused(model)
    given = inputs(key, "labels")
    with (
        mock.patch.object(torch, "bincount", forbidden),
        mock.patch.object(nn.functional, "one_hot", forbidden),
        Operators() as ran,
    ):
        model(**given).loss.backward()
    assert not [name for name in ran.names if "bincount" in name or "one_hot" in name]


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """The `__dict__` of every module, as the objects in it and not their values."""
    return [{k: id(v) for k, v in vars(module).items()} for module in model.modules()]


def test_unpatch_leaves_something_behind() -> None:
    model = tiny(KEY)
    before, keys = attributes(model), list(model.state_dict())
    fused(model)
    assert list(model.state_dict()) == keys
    assert "forward" in vars(model)
    fused(model)
    turnout.unpatch(model)
    assert attributes(model) == before
    assert model.forward.__func__ is type(model).forward
    assert turnout.patch(model).aux_losses[0].detail == "aux_loss='model'"
    assert "forward" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_runs_the_first_model(copied: Any) -> None:
    model = tiny(KEY)
    fused(model)
    twin = copied(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    given = inputs(KEY, "labels")
    stock = tiny(KEY)
    stock.load_state_dict(twin.state_dict())
    turnout.patch(stock)
    expected = step(stock, given)
    with mock.patch.object(module_of(KEY), NAME, forbidden):
        assert_same(step(twin, given), expected)
    turnout.unpatch(twin)
    assert STATE not in vars(twin)
    assert "forward" not in vars(twin)


def test_the_signature_is_lost() -> None:
    """Trainer drops the columns, and `generate` the arguments, that the forward does not name."""
    model = tiny(KEY)
    names = list(inspect.signature(model.forward).parameters)
    fused(model)
    assert list(inspect.signature(model.forward).parameters) == names
    ids = make_inputs(KEY)["input_ids"]
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)


class Seen(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls += 1
        return output


@pytest.mark.parametrize("first", [True, False], ids=["hook first", "patch first"])
def test_a_hook_of_accelerate_is_lost_or_keeps_our_loss(first: bool) -> None:
    model, hook = tiny(KEY), Seen()
    given = inputs(KEY, "labels")
    expected = step(model, given)
    if first:
        add_hook_to_module(model, hook)
    fused(model)
    if not first:
        add_hook_to_module(model, hook)
    report = fused(model)
    with mock.patch.object(module_of(KEY), NAME, forbidden):
        assert_same(step(model, given), expected)
    assert report.aux_losses[0].status == "fused"
    turnout.unpatch(model)
    with mock.patch.object(module_of(KEY), NAME, forbidden), pytest.raises(AssertionError):
        step(model, given)
    assert_same(step(model, given), expected)
    assert hook.calls == 2
    remove_hook_from_module(model)
    assert_same(step(model, given), expected)
    assert not [n for n in ("_old_forward", "_hf_hook", STATE) if n in vars(model)]


def test_mixed_precision_of_accelerate_is_called_another_library() -> None:
    """It wraps the forward; `unwrap_model` gives ours back."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    model = tiny(KEY)
    report = fused(model)
    ours = model.forward
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    with mock.patch.object(module_of(KEY), NAME, forbidden):
        step(model, inputs(KEY, "labels"))
    assert report.aux_losses[0].status == "fused"
    model.forward = ours
    turnout.unpatch(model)
    assert "forward" not in vars(model)


def test_it_no_longer_compiles_in_one_graph() -> None:
    model = tiny(KEY)
    given = inputs(KEY, "labels", "mask")
    compiled = torch.compile(model, backend="aot_eager")
    expected = step(model, given)
    step(compiled, given)  # what was compiled of the same code must not be taken again
    fused(model)
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(module_of(KEY), NAME, forbidden):
        got = step(compiled, given)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert relative(got[0]["loss"], expected[0]["loss"]) < 1e-5
    torch._dynamo.reset()


def test_bf16_losses_have_another_dtype_or_value() -> None:
    found = []
    for choice in ("model", "fused"):
        model = tiny(KEY, dtype=torch.bfloat16)
        turnout.patch(model, aux_loss=choice)
        found.append(step(model, inputs(KEY, "labels", "mask")))
    assert_same(found[1], found[0], limit=2e-2)
    assert relative(found[1][0]["aux_loss"], found[0][0]["aux_loss"]) < 1e-4


MULTIMODAL = [
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen4ExpForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
    "Ernie4_5_VLMoeForConditionalGeneration",
]


@pytest.mark.parametrize("cls", MULTIMODAL)
def test_a_multimodal_model_keeps_its_own_loss(cls: str) -> None:
    found = []
    given = inputs(KEY, "labels", "mask")
    if cls.startswith("Ernie"):
        given["moe_mm_token_type_ids"] = torch.zeros_like(given["input_ids"])
        given["mm_token_type_ids"] = given["moe_mm_token_type_ids"]
    for choice in ("model", "fused"):
        model = multimodal(cls)
        report = turnout.patch(model, aux_loss=choice)
        assert report.aux_losses[0].status == choice
        forbid = forbidden if choice == "fused" else getattr(inspect.getmodule(type(model)), NAME)
        with mock.patch.object(inspect.getmodule(type(model)), NAME, forbid):
            found.append(step(model, given))
    assert "aux_loss" in found[0][0]
    assert_same(found[1], found[0])


def multimodal(name: str) -> Any:
    """A multimodal model with the tiny text model of its architecture and a small tower."""
    cls: Any = find_class(name)
    text = next(
        key
        for key, arch in TINY.items()
        if find_class(arch.cls).__module__ == cls.__module__ and key.endswith("_text")
    )
    config = cls.config_class(
        text_config=dict(TINY[text].config),
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return cls._from_config(config).eval()


def changed(module: Any, how: Any) -> Any:
    own = getattr(module, NAME)

    def function(
        gate_logits: Any, num_experts: Any = None, top_k: Any = 2, attention_mask: Any = None
    ):
        return how(own, gate_logits, num_experts, top_k, attention_mask)

    return mock.patch.object(module, NAME, function)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda own, z, e, k, m: 2 * own(z, e, k, m), "gives another value without a mask"),
        (lambda own, z, e, k, m: own(z, e, k, None), "gives another value with a mask"),
        (
            lambda own, z, e, k, m: own(z, e, k, m).detach() + 0 * z[0].sum() + 0 * z[1].sum(),
            "gives another gradient without a mask",
        ),
        (lambda own, z, e, k, m: own(z, e, k, m).double(), "gives another value"),
        (lambda own, z, e, k, m: own(z, e, k, m)[7], "fails: IndexError"),
        (lambda own, z, e, k, m: 0, "fails: TypeError"),
    ],
    ids=["value", "mask", "gradient", "dtype", "error", "number"],
)
def test_a_function_that_changed_is_replaced(how: Any, words: str) -> None:
    model = tiny(KEY)
    with changed(module_of(KEY), how):
        report = turnout.patch(model, aux_loss="fused")
    (row,) = report.aux_losses
    assert (row.name, row.model_class, row.status) == ("", "Qwen3MoeForCausalLM", "model")
    assert words in row.detail
    assert "forward" not in vars(model)
    assert "load-balancing loss: model" in str(report)
    with pytest.raises(Unsupported, match="load-balancing loss model"):
        report.require("fused")
    turnout.unpatch(model)
    assert report.aux_losses[0].detail == "turnout.unpatch was called"


@pytest.mark.parametrize("key", OWN)
def test_a_function_of_other_arguments_is_replaced(key: str) -> None:
    model = tiny(key)
    (row,) = turnout.patch(model, aux_loss="fused").aux_losses
    assert row.status == "model"
    assert OWN[key] in row.detail


def test_a_model_without_the_loss_is_an_error_or_silent() -> None:
    model = tiny("deepseek_v3")
    report = turnout.patch(model, aux_loss="fused").require("fused")
    (row,) = report.aux_losses
    assert row.status == "none"
    assert row.detail == f"no module of this model calls {NAME}"
    assert report.to_dict()["aux_losses"][0]["status"] == "none"


def test_a_forward_of_another_library_is_called_ours() -> None:
    model = tiny(KEY)
    own = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model)
    model.forward = own
    (row,) = turnout.patch(model, aux_loss="fused").aux_losses
    assert row.status == "model"
    assert "the instance has the forward" in row.detail
    turnout.unpatch(model)
    assert vars(model)["forward"] is own
    del model.forward
    report = fused(model)
    model.forward = own
    assert "the instance has the forward" in report.aux_losses[0].detail
    model.forward = MethodType(type(model).forward, model)
    assert "put back" in report.aux_losses[0].detail
    turnout.unpatch(model)


def test_a_forward_that_the_class_gets_later_is_not_run() -> None:
    model = tiny(KEY)
    report = fused(model)
    own, calls = type(model).forward, []

    def later(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(self, *args, **kwargs)

    with mock.patch.object(type(model), "forward", later):
        step(model, inputs(KEY, "labels"))
        assert calls
    assert vars(model)["forward"].func is aux_forward
    assert report.aux_losses[0].status == "fused"


def test_a_mask_of_four_dimensions_is_taken_for_weights_of_tokens() -> None:
    model = tiny(KEY)
    given = inputs(KEY, "labels")
    batch, sequence = given["input_ids"].shape
    given["attention_mask"] = torch.ones(batch, 1, sequence, sequence, dtype=torch.bool).tril()
    fused(model)
    with pytest.raises(ValueError, match=r"attention_mask is .* expected \(batch, sequence\)"):
        model(**given)


def test_another_word_is_taken() -> None:
    with pytest.raises(ValueError, match=r"aux_loss is 'other'; expected one of 'model', 'fused'"):
        turnout.patch(tiny(KEY), aux_loss="other")
