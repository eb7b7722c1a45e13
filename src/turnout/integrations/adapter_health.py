"""What the values of a pair of LoRA tensors say: never trained, untouched experts, lost shards.

A fresh adapter has random A and zero B, so an expert that saw no token keeps B[:, :, e] = 0. After
a conversion that swaps the factors the zeros are in A; both are read alike here. A single row or
column that is zero while its neighbours are not has no such cause: a sharded save that lost
a part leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from turnout.integrations.adapter_report import AdaptedParameter, Finding, error, warning


def examine_tensors(row: AdaptedParameter, a: Tensor, b: Tensor) -> Iterator[Finding]:
    """NaN, infinity, and zeros: all of a factor, whole experts, or single rows."""
    if a.dtype != b.dtype:
        yield warning("mixed_dtype", row.module, f"A is {a.dtype}, B is {b.dtype}")
    # Rank components by features, for linear layers, stacks of experts and convolutions alike.
    parts = {row.a_key: a.flatten(1), row.b_key: b.transpose(0, 1).flatten(1)}
    nonzero = {key: part != 0 for key, part in parts.items()}
    live = {key: part.any(1) for key, part in nonzero.items()}
    for key, part in parts.items():
        if not all(edge.isfinite() for edge in part.aminmax()):  # NaN reaches both edges
            bad = part.numel() - int(part.isfinite().sum())
            yield error("non_finite", key, f"{bad} of {part.numel()} values are NaN or infinite")
        if not live[key].any():
            yield warning("all_zero", key, "all values are zero: this pair was never trained")
    if row.num_experts is not None and all(bool(some.any()) for some in live.values()):
        yield from _examine_zeros(row, nonzero, live, row.num_experts)


def _examine_zeros(
    row: AdaptedParameter, nonzero: dict[str, Tensor], live: dict[str, Tensor], experts: int
) -> Iterator[Finding]:
    """Experts that add nothing, then what is zero in the others."""
    a_er = live[row.a_key].view(experts, -1)
    b_er = live[row.b_key].view(-1, experts).T
    live_e = a_er.any(1) & b_er.any(1)
    dead = experts - int(live_e.sum())
    if dead:
        message = "add nothing, A or B is all zero: no token reached them, or a shard was lost"
        yield warning("zero_experts", row.a_key, f"{dead} of {experts} experts {message}")
    ranks = a_er.shape[1]
    rows_of = {row.a_key: live_e.repeat_interleave(ranks), row.b_key: live_e.repeat(ranks)}
    for key, rows in rows_of.items():
        lost = int((rows & ~live[key]).sum())
        seen = nonzero[key] if dead == 0 else nonzero[key][rows]
        unseen = int((~seen.any(0)).sum())
        if dead < experts and (lost or unseen):
            message = (
                f"{lost} rank components and {unseen} features are all zero while others are "
                "not: shards lost by a sharded save look like this"
            )
            yield warning("zero_rows", key, message)
