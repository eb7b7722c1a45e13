"""What the axolotl tests share: a tiny model with a tokenizer, texts, a config, one real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hf_models import with_lora
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

PLUGIN = "turnout.integrations.axolotl.TurnoutPlugin"
ROOT = Path(__file__).parents[2]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = [f"w{i}" for i in range(92)]
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    # Triton kernels, which a CPU does not run
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
}


def tiny_model() -> Any:
    """Qwen3-MoE with two layers of four experts; the same weights every time."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def write_inputs(folder: Path) -> None:
    """`model`, `adapter` (A and B random), `data.jsonl` and `pairs.jsonl` in `folder`."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder / "model")
    model = tiny_model()
    model.save_pretrained(folder / "model")
    adapted = with_lora(
        model,
        target_modules=LORA["lora_target_modules"],
        target_parameters=LORA["lora_target_parameters"],
        task_type="CAUSAL_LM",
    )
    adapted.save_pretrained(folder / "adapter")
    generator = torch.Generator().manual_seed(0)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(16):
            picks = torch.randint(len(WORDS), (20,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(WORDS[i] for i in picks)}) + "\n")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for i in range(16):
            pair = {"prompt": "w1 w2", "chosen": f"w{i} w4", "rejected": f"w{i + 3} w9"}
            file.write(json.dumps(pair) + "\n")


def config(folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    """An axolotl config on the inputs of `write_inputs`: three steps on the CPU."""
    return {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "output_dir": str(folder / name),
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "experts_implementation": "eager",
        "logging_steps": 1,
        "save_strategy": "no",
        "val_set_size": 0,
        "dataset_num_proc": 1,
        "seed": 1,
        **keys,
    }


# `axolotl train` in the process that counts what ran
_PROBED = """
import sys
from axolotl.cli.train import do_cli
from hf_models import probe
with probe() as ran:
    do_cli(config=sys.argv[1])
print("experts", len(ran.calls), "fused", ran.fused_projections, "folds", ran.folds)
"""


def train(folder: Path, name: str, *, probed: bool = False, **keys: Any) -> tuple[int, str]:
    """`axolotl train` in a process of its own: the exit status and all it printed.

    `probed`: the last line has the calls of turnout's experts, adapters in them, and PEFT's folds.
    """
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(config(folder, name, **keys)), encoding="utf-8")  # JSON is YAML
    environment = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests" / "integrations"))),
    }
    axolotl = ["-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    command = [sys.executable, *(["-c", _PROBED, str(path)] if probed else axolotl)]
    done = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    return done.returncode, done.stdout
