"""Seconds from the call of the first forward to the end of the first training step, in two
processes that share Triton's cache: the first one compiles, the second one finds all of it.

    PYTHONPATH=src python3 benchmarks/first_step.py

A tiny Qwen3-MoE with LoRA on its experts, bfloat16. Demands: at most 15 s, then 3 s, and nothing is
searched in either. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from turnout.bench.musts import FIRST_S, Must, show
from turnout.measure import seconds

WARM_S = 3.0
TOKENS = 256


def step(device: torch.device) -> dict[str, float]:
    """The first step of this process: its seconds, and how often a config was searched."""
    from peft import LoraConfig, get_peft_model

    import turnout
    from turnout.verify.tiny import build

    model = build("qwen3_moe", dtype=torch.bfloat16).to(device).train()
    turnout.patch(model).require("fused")
    targets = turnout.lora_targets(model)
    lora = LoraConfig(r=8, target_modules=["q_proj"], target_parameters=targets)
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.arange(TOKENS, device=device)[None] % 30

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    with patch("turnout.tuning.first_use.search") as search:
        took = seconds(run, device=device, warmup=0, repeats=1).median
    return {"seconds": took, "timed": search.call_count}


def demands(cold: dict[str, float], warm: dict[str, float]) -> list[Must]:
    """Of both processes."""
    return [
        Must("first step, Triton's cache empty", cold["seconds"], FIRST_S, False, "s"),
        Must("first step of a second process", warm["seconds"], WARM_S, False, "s"),
        Must("searches", cold["timed"] + warm["timed"], 0, False, ""),
    ]


def in_a_process(device: str, folder: Path) -> dict[str, float]:
    """`step` with caches in `folder`."""
    own = [f"{name}_CACHE_DIR={folder / name.lower()}" for name in ("TRITON", "TURNOUT")]
    done = subprocess.run(
        ["env", *own, sys.executable, __file__, "--child", "--device", device],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Two processes in turn; 1 if a demand is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step(torch.device(args.device))))
        return 0
    with TemporaryDirectory() as folder:
        cold, warm = (in_a_process(args.device, Path(folder)) for _ in range(2))
    found = demands(cold, warm)
    print(show(found))
    return 0 if all(must.passed for must in found) else 1


if __name__ == "__main__":
    sys.exit(main())
