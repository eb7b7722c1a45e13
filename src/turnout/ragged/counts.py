"""Counts that a router's kernel makes beside its choice, so that sorting takes one launch.

A block is a run of tokens that one program of the router counted; row b of the counts says how many
slots of block b went to each expert. They travel on the tensor of experts that was counted
(`attach`), and are believed (`counts_of`) only while that very tensor is unchanged. There are at
most `BLOCKS` of them, whatever T is, because every program that sorts reads them all: as many as
make two programs for each multiprocessor of a large GPU.

Legend: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnout.kernel_facts import power_of_2

BLOCKS = 264
TILE = 128  # tokens that a program of the router works on at a time: one for each thread
SORTED_AT_ONCE = 1024  # slots that take one launch to sort anyway

_NAME = "_turnout_counts"


def buckets(num_experts: int) -> int:
    """Columns of the counts."""
    return max(16, power_of_2(num_experts))


def block_tokens(tokens: int) -> int:
    """Tokens of one block."""
    return TILE * max(1, -(-tokens // (TILE * BLOCKS)))


def shape(tokens: int, num_experts: int) -> tuple[int, int]:
    """Of the counts, which are int32."""
    return -(-tokens // block_tokens(tokens)), buckets(num_experts)


def pays(tokens: int, top_k: int) -> bool:
    """There are enough slots that sorting them without counts takes more than one launch."""
    return tokens * top_k > SORTED_AT_ONCE


def _capturing(t: Tensor) -> bool:
    """A graph is: before each replay others write into its inputs, which nobody counts again."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def attach(experts_TK: Tensor, num_experts: int, counts: Tensor) -> None:
    """Leave the counts on the tensor that was counted."""
    if not experts_TK.is_inference():  # no version to know a change by
        place = experts_TK.data_ptr(), experts_TK._version, _capturing(experts_TK)
        vars(experts_TK)[_NAME] = (num_experts, place, counts)


def counts_of(experts_TK: Tensor, num_experts: int) -> Tensor | None:
    """The counts of this tensor for E experts, or None: not counted, or written to since."""
    if torch.compiler.is_compiling():
        return None
    left = vars(experts_TK).get(_NAME)
    if left is None:
        return None
    counted, place, counts = left
    same = place == (experts_TK.data_ptr(), experts_TK._version, _capturing(experts_TK))
    return counts if same and counted == num_experts and experts_TK.is_contiguous() else None
