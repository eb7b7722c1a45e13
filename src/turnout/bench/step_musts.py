"""What a whole training step must reach, computed from the rows of a run.

    moe     stock's MoE part as a multiple of ours, with and without checkpointing
    tokens  our tokens/s as a multiple of stock's, likewise
    peak    our peak above the weights as a fraction of stock's, without checkpointing
    32k     without checkpointing, a case that ours runs and stock has no memory for
    gate    no red gate and no failure of ours

A demand is made where its shape was measured. `turnout` counts, not `turnout-fused`.
"""

from __future__ import annotations

from collections.abc import Iterable

from turnout.bench import step_records
from turnout.bench.musts import Must
from turnout.bench.step_records import StepCase, StepRow, latest

OURS, STOCK = "turnout", "stock"
SHAPE, LAYERS, TOKENS = "qwen3-30b", 6, 8192
MOE, SPEED, PEAK = 4.0, 1.7, 0.5
OTHER_SHAPE, OTHER_MOE = "gptoss-20b", 2.0
LONG = 32768

_Pair = tuple[StepRow | None, StepRow | None]


def musts(rows: Iterable[StepRow]) -> list[Must]:
    """The demands on the shapes that were measured."""
    table = latest(rows)
    found = []
    for case in _cases(table, SHAPE, LAYERS, TOKENS):
        found += _standard(table, case)
    for case in _cases(table, OTHER_SHAPE, None, TOKENS):
        found.append(_moe(_pair(table, case), case, OTHER_MOE))
    if any(row.tokens == LONG and row.checkpointing == "off" for row in table):
        found.append(_long(table))
    red = [row for row in table if row.provider in step_records.OURS and row.failed]
    names = ", ".join(f"{row.provider} {_words(row.case)}" for row in red)
    return [*found, Must("red gates and failures of ours", float(len(red)), 0.0, False, names)]


def _cases(table: list[StepRow], shape: str, layers: int | None, tokens: int) -> list[StepCase]:
    """The measured cases of a shape; for each number of layers and length both modes."""
    found = dict.fromkeys(
        row.case._replace(checkpointing="")
        for row in table
        if row.shape == shape and row.tokens == tokens and layers in (None, row.layers)
    )
    return [case._replace(checkpointing=mode) for case in found for mode in ("off", "on")]


def _pair(table: list[StepRow], case: StepCase) -> _Pair:
    rows = {row.provider: row for row in table if row.case == case}
    return rows.get(OURS), rows.get(STOCK)


def _standard(table: list[StepRow], case: StepCase) -> list[Must]:
    ours, stock = _pair(table, case)
    found = [_moe((ours, stock), case, MOE)]
    speed = None
    if ours and stock and ours.tokens_per_s and stock.tokens_per_s:
        speed = ours.tokens_per_s / stock.tokens_per_s
    found.append(Must(f"{_words(case)}: tokens/s / stock", speed, SPEED, True))
    if case.checkpointing == "off":
        peak = None
        if ours and stock and ours.peak_mb is not None and stock.peak_mb:
            peak = ours.peak_mb / stock.peak_mb
        found.append(Must(f"{_words(case)}: peak / stock", peak, PEAK, False))
    return found


def _moe(pair: _Pair, case: StepCase, limit: float) -> Must:
    ours, stock = pair
    got, note = None, ""
    if ours and stock and ours.moe_ms and stock.moe_ms:
        got = stock.moe_ms / ours.moe_ms
        note = f"{stock.moe_ms:.1f} ms to {ours.moe_ms:.1f}"
    return Must(f"{_words(case)}: MoE part, stock / ours", got, limit, True, note)


def _long(table: list[StepRow]) -> Must:
    """The number of 32k cases that ours runs and stock has no memory for."""
    cases = {row.case for row in table if row.tokens == LONG and row.checkpointing == "off"}
    won = []
    for case in sorted(cases):
        ours, stock = _pair(table, case)
        if ours and ours.step_ms and stock and stock.out_of_memory:
            won.append(f"{case.shape}, {case.layers} layers")
    name = f"{LONG} tokens off: runs where stock is out of memory"
    return Must(name, float(len(won)), 1.0, True, "; ".join(won))


def _words(case: StepCase) -> str:
    return f"{case.shape} {case.layers} layers {case.tokens} {case.checkpointing}"
