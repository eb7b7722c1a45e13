"""Write golden adapters with one real, old or new, PEFT.

    python make_golden.py OUT_FOLDER

Run it once per PEFT version, in an environment that has that version; the folder of the version is
`OUT_FOLDER/<peft version>`. See README.md beside this file.

Each case becomes a folder with the `adapter_config.json` and the `adapter_model.safetensors` that
PEFT saved. `expected.safetensors` holds, for all cases of the version, the logits PEFT computed
(`<case>/logits`) and the delta of every adapted parameter as its `get_delta_weight` returned it
(`<case>/delta/<parameter>`), in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from tiny_model import TOKENS, TinyMoe, fill_adapter, hf_model, tiny, wave
from torch import Tensor, nn

EXPERT_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora_config(**kwargs: object) -> peft.LoraConfig:
    defaults: dict[str, object] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    return peft.LoraConfig(**(defaults | kwargs))


def tiny_cases() -> dict[str, tuple[nn.Module, peft.LoraConfig]]:
    both = lora_config(target_parameters=EXPERT_TARGETS)
    patterns = lora_config(
        target_parameters=[*EXPERT_TARGETS, "mlp.gate.weight"],
        use_rslora=True,
        rank_pattern={"gate_up_proj": 4, "q_proj": 3},
        alpha_pattern={"down_proj": 5},
    )
    down_only = lora_config(target_parameters=["mlp.experts.down_proj"])
    return {
        "out_in-narrow": (tiny("out_in-narrow"), both),
        "out_in-square": (tiny("out_in-square"), both),
        "out_in-patterns": (tiny("out_in-patterns"), patterns),
        "in_out_declared-narrow": (tiny("in_out_declared-narrow"), both),
        "in_out_declared-square": (tiny("in_out_declared-square"), both),
        "in_out_declared-down": (tiny("in_out_declared-down"), down_only),
        "in_out-narrow": (tiny("in_out-narrow"), both),
    }


def hf_cases() -> dict[str, tuple[nn.Module, peft.LoraConfig]]:
    config = lora_config(target_parameters=EXPERT_TARGETS, target_modules=["q_proj", "v_proj"])
    return {name: (hf_model(name), config) for name in ("qwen3_moe", "gpt_oss")}


def model_input(model: nn.Module) -> Tensor:
    if isinstance(model, TinyMoe):
        return wave("input", (TOKENS, model.q_proj.in_features), scale=1.0)
    return torch.arange(3, 9)[None]


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def deltas(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            delta = module.get_delta_weight("default").detach().clone()
            found[f"delta/{path}.{module.parameter_name}"] = delta
    return found


def write_case(folder: Path, model: nn.Module, config: peft.LoraConfig) -> dict[str, Tensor]:
    x = model_input(model)
    base = run(model, x)
    wrapped = peft.get_peft_model(model, config).eval()
    fill_adapter(wrapped)
    logits = run(wrapped, x)
    assert not torch.allclose(logits, base, rtol=0.01)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return {"logits": logits} | deltas(wrapped)


def main(out: Path) -> None:
    expected = {}
    for name, (model, config) in (tiny_cases() | hf_cases()).items():
        tensors = write_case(out / name, model, config)
        expected.update({f"{name}/{key}": value.contiguous() for key, value in tensors.items()})
    save_file(expected, out / "expected.safetensors")
    print(peft.__version__, "->", out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / peft.__version__)
