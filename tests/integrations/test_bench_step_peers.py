"""`turnout bench --step` beside other libraries' experts, whose kernels are stand-ins here."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from peft.tuners.lora.layer import ParamWrapper
from step_cases import ALL, CPU, SMALL, judged, narrow, row, setting, turnout
from torch import nn

import fake_sonicmoe
from turnout import ExpertSpec, ExpertWeights, Lora, LoraWeights, reference
from turnout.bench import step_peers
from turnout.bench.step_models import build, step_model
from turnout.bench.step_plot import plot
from turnout.bench.step_records import PEERS, StepRecord
from turnout.bench.step_sweep import sweep
from turnout.integrations import sonic
from turnout.integrations.architectures import expert_modules


def rows_of(*names, shape=None):
    record = StepRecord(None)
    small = shape or step_model("tiny")
    some = setting(providers=names, layers=small.layers, tokens=16, sequence=8)
    sweep([small], some, record, lambda row: None)
    return record.rows


def definition(module: Any, x: Any, experts: Any, weights: Any, lora: Any = None) -> Any:
    stacks = ExpertWeights(module.gate_up_proj, module.down_proj)
    return reference.expert_mlp(x, experts, weights, stacks, ExpertSpec(), lora=lora)


class Axolotl:
    """Its experts function and its short way around PEFT's fold, which changes PEFT's class."""

    def __init__(self) -> None:
        self.calls = 0

    def load(self, module: str, ops: str) -> Any:
        assert module.startswith("axolotl.integrations.kernels.libs.scattermoe_lora.")
        return self

    def scattermoe_experts_forward(self, module, x, experts, weights):
        self.calls += 1
        up, down = (module._scattermoe_lora[n] for n in ("gate_up_proj", "down_proj"))
        return definition(module, x, experts, weights, LoraWeights(up, down))

    def patch_paramwrapper_fastpath(self) -> None:
        def forward(wrapper: Any, x: Any, *args: Any) -> Any:
            found = {}
            while hasattr(wrapper, "lora_A"):
                a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
                e = wrapper.num_experts
                a_ERI, b_ORE = a.view(e, -1, a.shape[1]), b.view(b.shape[0], -1, e)
                scaling = wrapper.scaling["default"]
                found[wrapper.parameter_name] = Lora(a_ERI.to(x.dtype), b_ORE.to(x.dtype), scaling)
                wrapper = wrapper.base_layer
            assert wrapper.config._experts_implementation == "scattermoe"
            wrapper._scattermoe_lora = found
            return wrapper(x, *args)

        ParamWrapper.forward = forward


@pytest.fixture
def axolotl(monkeypatch):
    standing_in = Axolotl()
    monkeypatch.setattr(step_peers, "load", standing_in.load)
    return standing_in


@pytest.fixture
def liger(monkeypatch):
    calls = []

    class LigerExperts(nn.Module):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            calls.append(self)
            return definition(self, hidden_states, top_k_index, top_k_weights)

    module = SimpleNamespace(LigerExperts=LigerExperts)
    monkeypatch.setattr(step_peers, "import_module", lambda name: module)
    return calls


def test_axolotl_computes_another_step_or_changes_the_others(axolotl):
    stock = ParamWrapper.forward
    first, peer, ours = rows_of("stock", "axolotl", "turnout")
    assert axolotl.calls == 2 * 4, "two layers in four steps: the first, for memory, two timed"
    assert (peer.note, peer.gate) == ("", "stock")
    assert peer.grad_err < 0.1
    assert peer.step_ms > 0
    assert (first.note, ours.note) == ("", "")
    assert ParamWrapper.forward is stock
    again, _ = rows_of("stock", "turnout")
    assert again.loss == first.loss


def test_liger_computes_another_step(liger):
    _, peer = rows_of("stock", "liger")
    assert (peer.note, peer.gate) == ("", "stock")
    assert peer.grad_err < 0.1
    built = build(step_model("tiny"), 2, "stock", CPU, checkpointing=False)
    assert not any("forward" in vars(module) for _, module, _ in expert_modules(built.model))


def test_liger_gets_experts_that_it_does_not_have(liger):
    peer, ours = rows_of("liger", "turnout", shape=narrow("gptoss-20b"))
    assert peer.note.startswith("does not run: model.layers.0.mlp.experts: Liger's experts are")
    assert not peer.failed
    assert not liger
    assert ours.note == ""
    assert dataclasses.replace(peer, provider="turnout").failed, "ours has to run everything"


@pytest.mark.parametrize("name", ["qwen3-30b", "glm-4.5-air", "deepseek-v3", "olmoe"])
def test_liger_does_not_get_plain_experts(liger, name):
    small = narrow(name)
    build(small, small.layers, "liger", CPU, checkpointing=False)


def test_a_peer_in_merged_weights_does_not_run_where_sonicmoe_is_missing():
    peer, ours = rows_of("turnout-sonic", "turnout")
    assert peer.note.startswith("does not run: ")
    assert "sonicmoe" in peer.note
    assert not peer.failed
    assert ours.step_ms > 0


def test_sonicmoe_computes_another_step(monkeypatch):
    fake_sonicmoe.install(monkeypatch)
    monkeypatch.setattr(sonic, "device_of", lambda device: fake_sonicmoe.H100)
    _, peer = rows_of("stock", "turnout-sonic")
    assert (peer.note, peer.gate) == ("", "stock")
    assert peer.grad_err < 0.1
    assert fake_sonicmoe.Calls.forwards


def test_missing_peers_are_named_and_nothing_else_is_left_out(monkeypatch, capsys, tmp_path):
    reasons = step_peers.missing(ALL + PEERS, CPU)
    assert set(reasons) == set(PEERS)
    path = tmp_path / "a.json"
    flags = ["--step", *SMALL, "--checkpointing", "off", "--json", path]
    assert turnout(monkeypatch, "bench", *flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    facts = json.loads(path.read_text())
    assert {r["provider"] for r in facts["rows"]} == set(ALL)
    assert facts["missing"] == reasons
    for name in PEERS:
        assert f"{name} did not run: {reasons[name].split()[0]}" in out


def test_red_peers_are_counted_as_ours():
    wrong = row(provider="turnout-sonic", note="the loss is 3", step_ms=None)
    assert wrong.failed
    assert judged([wrong])["red gates and failures of ours"].passed


def test_plot_leaves_peers_out(tmp_path):
    plot(tmp_path / "a.png", [row(provider=name) for name in PEERS])
    assert (tmp_path / "a.png").is_file()
