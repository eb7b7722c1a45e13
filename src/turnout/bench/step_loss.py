"""Mean cross-entropy of the next token, with a frozen head, a chunk of tokens at a time.

transformers' own loss keeps the logits of all tokens in float32 more than once: at 8192 tokens and
152k words that is more memory than the layers under test need, and the same for every provider.
Trainers avoid it with fused losses (Liger's, TRL's chunked one). This is that method in plain
PyTorch: the gradient of each chunk is computed beside its loss, so only one chunk of logits lives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK = 1024


class _ChunkedLoss(torch.autograd.Function):
    """`forward(hidden_TH, head_VH, labels_T)` gives the mean loss over the labelled tokens."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor) -> Tensor:
        counted = (labels_T != IGNORED).sum()
        grad_TH = torch.empty_like(hidden_TH)
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden_TH.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            with torch.enable_grad():
                part = hidden_TH[rows].detach().requires_grad_()
                loss = F.cross_entropy(
                    F.linear(part, head_VH).float(),
                    labels_T[rows],
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                # divided before it is rounded to bfloat16, as in a backward pass of the mean
                (grad,) = torch.autograd.grad(loss / counted, part)
            grad_TH[rows] = grad
            total += loss.detach()
        ctx.save_for_backward(grad_TH)
        return total / counted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_TH,) = ctx.saved_tensors
        return grad_TH * grad.to(grad_TH.dtype), None, None


def next_token_loss(hidden: Tensor, head_VH: Tensor, ids: Tensor) -> Tensor:
    """Mean over all tokens but the last of each row.

    Args:
        hidden: (rows, length, H), the decoder's output.
        head_VH: the frozen weight of the head.
        ids: (rows, length), the inputs; the label of a token is the next one.
    """
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    loss: Tensor = _ChunkedLoss.apply(hidden.flatten(0, 1), head_VH, labels.flatten())
    return loss
