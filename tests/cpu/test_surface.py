"""The public surface is frozen: names, parameters, defaults. A change here is a change for users.

Annotations are left out: they may become more precise.
"""

import inspect
import pkgutil
import subprocess
import sys

import pytest

import turnout

NAMES = [
    "Activation",
    "ExpertSpec",
    "ExpertWeights",
    "Lora",
    "LoraWeights",
    "RouteSpec",
    "Routing",
    "Unsupported",
    "__version__",
    "block_forward",
    "expert_mlp",
    "lora_targets",
    "patch",
    "record_routing",
    "reference",
    "replay_routing",
    "route",
    "shared_expert_output",
    "spec_of",
    "unpatch",
]

FUNCTIONS = {
    "patch": "(model, *, backend='auto', router='model', recompute='none', expert_dropout=0.0, "
    "routing_cache=False, tune=None, aux_loss='model')",
    "unpatch": "(model)",
    "lora_targets": "(model)",
    "record_routing": "(model)",
    "replay_routing": "(model, record)",
    "route": "(logits_TE, spec, *, bias_E=None, expert_scale_E=None, scale=None, experts_TK=None)",
    "expert_mlp": "(x_TH, experts_TK, weights_TK, weights, spec, *, lora=None, recompute='none', "
    "backend='auto', expert_dropout=0.0)",
    "spec_of": "(block)",
    "shared_expert_output": "(block, x)",
    "block_forward": "(block, x)",
}

BUNDLES = {
    "Routing": "(experts_TK, weights_TK, always_TA=None, logits_TE=None)",
    "ExpertWeights": "(gate_up, down, gate_up_bias=None, down_bias=None)",
    "LoraWeights": "(gate_up=None, down=None)",
    "Lora": "(a_ERI, b_ORE, scaling)",
}

IMPORT_IS_LIGHT = """
import sys
import turnout
import torch
assert turnout.__version__ and turnout.route and turnout.expert_mlp and turnout.ExpertSpec
loaded = {"transformers", "peft", "accelerate", "matplotlib", "typer", "rich"} & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""


def without_annotations(function):
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


def test_names_are_frozen():
    assert sorted(turnout.__all__) == NAMES
    assert set(NAMES) <= set(dir(turnout))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads(name):
    assert getattr(turnout, name) is not None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_frozen(name):
    assert without_annotations(getattr(turnout, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", BUNDLES)
def test_fields_are_frozen(name):
    assert without_annotations(getattr(turnout, name)) == BUNDLES[name]


@pytest.mark.parametrize("name", ["route", "expert_mlp"])
def test_reference_has_the_same_parameters(name):
    op, definition = getattr(turnout, name), getattr(turnout.reference, name)
    assert without_annotations(op) == without_annotations(definition)
    assert op.__module__ != definition.__module__


def test_routing_flat_and_spec_builders_exist():
    assert without_annotations(turnout.Routing.flat) == "(self)"
    for build in (turnout.RouteSpec.softmax, turnout.RouteSpec.sigmoid):
        assert isinstance(build(top_k=2), turnout.RouteSpec)


def test_unsupported_is_a_not_implemented_error():
    assert issubclass(turnout.Unsupported, NotImplementedError)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = turnout.no_such_name


def test_import_loads_no_hugging_face_library_and_no_gpu():
    subprocess.run([sys.executable, "-c", IMPORT_IS_LIGHT], check=True, timeout=120)


def test_no_public_function_is_named_like_a_module():
    modules = {module.name for module in pkgutil.iter_modules(turnout.__path__)}
    functions = {name for name in NAMES if inspect.isroutine(getattr(turnout, name))}
    assert not modules & functions
