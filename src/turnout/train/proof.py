"""What a run proves: the adapter works without turnout, and no claim is made unchecked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

LEARNED = 0.7  # held-out loss after LoRA, at most this part of the base's
LIKE_PEFT = 0.05  # of stock PEFT's held-out loss
SAME_LOGITS = 1e-4  # of the largest logit; float32 rounding through a model is about 1e-6 of it
_SEQUENCES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """Largest differences of logits, and the largest logit, all in float32."""

    plain_peft: float
    merged: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One sentence in plain words with its numbers, and whether it is true."""

    holds: bool
    text: str


def compare_reloaded(
    model: Any, base: Path, adapter: Path, dtype: torch.dtype, ids: Tensor
) -> Reload:
    """Logits of the trained model against two models that never met turnout, all in float32.

    One is the base with the saved adapter loaded by stock PEFT. The other is that adapter merged
    into the weights, saved as a plain checkpoint and loaded by plain transformers.

    Args:
        model: the trained PEFT model, patched.
        base, adapter: folders of the base checkpoint and of the saved adapter.
        dtype: that the base was trained in; float32 computes with its rounded weights.
        ids: (N, seq_len) tokens; the first four rows are used.
    """
    ids = ids[:_SEQUENCES].to(model.device)
    with _in_float32(model) as exact:
        ours = _logits(exact, ids)
    plain = PeftModel.from_pretrained(_load(base, dtype).to(model.device), adapter)
    plain_peft = _max_diff(_logits(plain, ids), ours)
    with TemporaryDirectory() as folder:
        plain.merge_and_unload().save_pretrained(folder)
        del plain
        again = _load(Path(folder), torch.float32).to(model.device)
        merged = _max_diff(_logits(again, ids), ours)
    return Reload(plain_peft=plain_peft, merged=merged, largest=float(ours.abs().max()))


def claims_of(
    *,
    heldout: tuple[float, float] | None,
    stock: float | None,
    tensors: tuple[int, int] | None,
    reload: Reload | None,
    new_task: bool,
) -> list[Claim]:
    """The claims this run makes, true or not; what was not measured is not claimed.

    Args:
        heldout: held-out loss of the base and after LoRA.
        stock: held-out loss of stock PEFT's run.
        tensors: adapter tensors on experts that saw tokens, and those with a gradient.
        new_task: the base is known not to have learned the data.
    """
    claims = []
    if heldout is not None and new_task:
        claims.append(_learned(*heldout))
    if heldout is not None and stock is not None:
        claims.append(_like_peft(heldout[1], stock))
    if tensors is not None:
        ran, trained = tensors
        claims.append(
            Claim(
                holds=ran > 0 and trained == ran,
                text=f"Every expert adapter trains: {trained} of {ran} tensors had a gradient.",
            )
        )
    if reload is not None:
        claims += _reloads(reload)
    return claims


def _learned(base: float, lora: float) -> Claim:
    return Claim(
        holds=lora <= LEARNED * base,
        text=(
            f"LoRA taught the model a new task: held-out loss {base:.3f} before, {lora:.3f} after, "
            f"that is {lora / base:.2f} of it (at most {LEARNED} was asked)."
        ),
    )


def _like_peft(lora: float, stock: float) -> Claim:
    apart = abs(lora - stock) / stock
    return Claim(
        holds=apart <= LIKE_PEFT,
        text=(
            f"turnout trains like stock PEFT: held-out loss {lora:.4f} with turnout, {stock:.4f} "
            f"without, {100 * apart:.2g} % apart (at most {100 * LIKE_PEFT:g} % was asked)."
        ),
    )


def _reloads(reload: Reload) -> list[Claim]:
    limit = SAME_LOGITS * max(1.0, reload.largest)
    asked = f"largest difference of logits {{:.1e}} (at most {limit:.1e} was asked)."
    return [
        Claim(
            holds=reload.plain_peft <= limit,
            text="The saved adapter needs no turnout: loaded by stock PEFT, "
            + asked.format(reload.plain_peft),
        ),
        Claim(
            holds=reload.merged <= limit,
            text="It merges into a plain transformers checkpoint: saved, loaded again, "
            + asked.format(reload.merged),
        ),
    ]


class _in_float32:
    """The model itself if it is float32 already, else a float32 copy, in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> Any:
        self.was_training = self.model.training
        exact = all(p.dtype == torch.float32 for p in self.model.parameters())
        return self.model if exact else copy.deepcopy(self.model).float()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was_training)


def _load(path: Path, dtype: torch.dtype) -> Any:
    """The checkpoint as `dtype` holds it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.float()


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _max_diff(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
