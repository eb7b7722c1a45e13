"""What the kernels must reach, computed from the rows of a run.

    speed   lora16: ours against the fastest peer; fwd and full: ours against scattermoe
    saved   lora16: x + z + xa;  with recompute=gate_up: x + routing + xa
    peak    ours below every peer's, at every shape and mode
    skew    lora16 of qwen3-30b with uneven routing, and at a T that no tile divides
    decode  fwd of a few tokens: not slower than batched_mm and grouped_mm
    tokens  at every T, ours not slower than the portable back end and grouped_mm (median of runs)
    wrapped turnout-sonic at most 2 % over sonicmoe called directly, where both were timed
    error   no red gate of ours
    first   no first step of ours above 15 s

Byte counts per T*H and S = T*K rows: x is T*H*2, z is S*2F*2, the two intermediates of the adapters
xa are S*R*2 each, the routing is 12 per row (an expert, a weight and a place, four bytes each).
"Saved" is counted with the output alive and x already there, so the output, of x's size, stands in
for x.

A required peer that did not run counts with what it reached before, `RECORDED`: its fraction of the
dense rate, or its milliseconds where the launches count (small-t).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

from turnout.bench.records import Row, latest
from turnout.bench.run import GRAPH, MIB
from turnout.bench.work import RANK, Mode, flops
from turnout.shapes import SHAPES, Shape, shape_named

OURS = "turnout"
WRAPPED, BARE, WRAPPING = "turnout-sonic", "sonicmoe", 1.02  # at most, of the bare peer's time
LORA_SPEED = {
    "qwen3-30b": 1.4,
    "sonic-readme": 1.4,
    "small-t": 1.4,
    "gptoss-20b": 1.2,
    "olmoe": 1.2,
    "mixtral": 1.0,
}
SCATTER_SPEED = 1.2
SAVED = 1.1
SAVED_RECOMPUTED = 1.3
SKEW = 1.15
ODD_TOKENS = 12000
ODD = 1.05
DECODE_SHAPES = ("qwen3-30b", "olmoe", "gptoss-20b", "mixtral", "sonic-readme")
DECODE_TOKENS = (1, 2, 4, 8, 16, 32)
PORTABLE = "turnout-portable"
EVERY_T_SHAPE = "qwen3-30b"
EVERY_T = tuple(2**power for power in range(9, 17))
EVERY_T_RUNS = 5
SLOWER = 1.03
FIRST_S = 15.0
PEAK = 1 - 1e-6  # of the lowest peer's: below it

# (shape, mode): fractions of the dense rate on an H100 80GB, torch 2.11, Triton 3.6
RECORDED: dict[tuple[str, Mode], dict[str, float]] = {
    ("qwen3-30b", "fwd"): {"grouped_mm": 0.22, "scattermoe": 0.35, "sonicmoe": 0.67},
    ("qwen3-30b", "full"): {"grouped_mm": 0.25, "scattermoe": 0.35, "sonicmoe": 0.63},
    ("qwen3-30b", "lora16"): {"grouped_mm": 0.15, "split-lora": 0.20, "sonicmoe": 0.33},
    ("olmoe", "fwd"): {"grouped_mm": 0.26, "scattermoe": 0.38},
    ("olmoe", "full"): {"grouped_mm": 0.30, "scattermoe": 0.40},
    ("olmoe", "lora16"): {"grouped_mm": 0.18, "split-lora": 0.23},
    ("gptoss-20b", "fwd"): {"sonicmoe": 0.75},
    ("gptoss-20b", "full"): {"grouped_mm": 0.49, "scattermoe": 0.42, "sonicmoe": 0.73},
    ("gptoss-20b", "lora16"): {"grouped_mm": 0.27, "split-lora": 0.37, "sonicmoe": 0.40},
    ("mixtral", "fwd"): {"sonicmoe": 0.79},
    ("mixtral", "full"): {"grouped_mm": 0.67, "scattermoe": 0.44, "sonicmoe": 0.80},
    ("mixtral", "lora16"): {"grouped_mm": 0.35, "split-lora": 0.54, "sonicmoe": 0.43},
    ("sonic-readme", "full"): {"grouped_mm": 0.36, "scattermoe": 0.47},
    ("sonic-readme", "lora16"): {"grouped_mm": 0.20, "split-lora": 0.27},
}
RECORDED_MS: dict[tuple[str, Mode], dict[str, float]] = {
    ("small-t", "fwd"): {"grouped_mm": 0.72, "scattermoe": 1.43, "sonicmoe": 1.05},
    ("small-t", "full"): {"grouped_mm": 2.14, "scattermoe": 4.18, "sonicmoe": 2.98},
    ("small-t", "lora16"): {"grouped_mm": 5.24, "split-lora": 2.29},
}


@dataclass(frozen=True, slots=True)
class Must:
    """One demand: what was reached, and what is asked for.

    `got` is None where a row is missing; `note` says against whom, or what is missing.
    """

    name: str
    got: float | None
    limit: float
    at_least: bool
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.got is None:
            return False
        return self.got >= self.limit if self.at_least else self.got <= self.limit


def musts(rows: Iterable[Row], sections: Iterable[str]) -> list[Must]:
    """The demands of the named sections: `main`, `recompute`, `skew`, `decode`, `tokens`."""
    table = _Table(rows)
    builders = {
        "main": _main,
        "recompute": _recompute,
        "skew": _skew,
        "decode": _decode,
        "tokens": _tokens,
    }
    found = [must for section in sections for must in builders[section](table)]
    return [*found, table.errors(), *table.first_steps()]


def show(found: Iterable[Must]) -> str:
    """The demands as lines of text."""
    lines = []
    for must in found:
        sign = ">=" if must.at_least else "<="
        got = "-" if must.got is None else f"{must.got:.3f}"
        status = "pass" if must.passed else "MISS"
        lines.append(f"{status}  {must.name:44s} {got:>8s} {sign} {must.limit:<6g} {must.note}")
    return "\n".join(lines)


class _Table:
    """The latest row of everything, without those of CUDA graphs."""

    def __init__(self, rows: Iterable[Row]) -> None:
        found = [row for row in rows if not row.provider.endswith(GRAPH)]
        self.rows = latest(found)
        self._by_key = {row.key: row for row in self.rows}
        self._times: dict[tuple[str, int, str, str, str, str], list[float]] = {}
        self._first = [
            (row.first_s, f"{row.shape} {row.tokens} {row.mode}")
            for row in found
            if row.provider == OURS and row.first_s is not None
        ]
        for row in found:
            if row.ms is not None:
                self._times.setdefault(row.key, []).append(row.ms)

    def get(
        self,
        shape: Shape,
        mode: Mode,
        provider: str = OURS,
        routing: str = "uniform",
        recompute: str = "none",
    ) -> Row | None:
        key = (shape.name, shape.tokens, mode, routing, recompute, provider)
        return self._by_key.get(key)

    def ms(self, *args: Shape | Mode | str) -> float | None:
        row = self.get(*args)  # type: ignore[arg-type]  # the same arguments
        return None if row is None else row.ms

    def median_ms(self, shape: Shape, mode: Mode, provider: str) -> float | None:
        """Of all runs."""
        key = (shape.name, shape.tokens, mode, "uniform", "none", provider)
        return median(self._times[key]) if key in self._times else None

    def peers(self, shape: Shape, mode: Mode) -> list[Row]:
        """Everyone else's rows on the standard batch that have a time."""
        return [
            row
            for row in self.rows
            if row.key[:5] == (shape.name, shape.tokens, mode, "uniform", "none")
            and row.provider not in (OURS, WRAPPED, PORTABLE)
            and row.ms is not None
        ]

    def peer_times(self, shape: Shape, mode: Mode) -> dict[str, float]:
        """Milliseconds by peer; a required one that did not run as `name (recorded)`."""
        times = {row.provider: row.ms for row in self.peers(shape, mode) if row.ms is not None}
        dense = max((row.dense_tflops for row in self.rows), default=0.0)
        recorded = dict(RECORDED_MS.get((shape.name, mode), {}))
        if dense:
            fractions = RECORDED.get((shape.name, mode), {})
            work = flops(shape, mode) / 1e9
            recorded |= {name: work / (part * dense) for name, part in fractions.items()}
        for name, ms in recorded.items():
            if name not in times:
                times[f"{name} (recorded)"] = ms
        return times

    def errors(self) -> Must:
        red = [row for row in self.rows if row.provider == OURS and row.ms is None]
        names = ", ".join(f"{row.shape} {row.tokens} {row.mode}" for row in red)
        return Must("red gates of ours (law 2)", float(len(red)), 0.0, False, names)

    def first_steps(self) -> list[Must]:
        """The longest of all runs, where they were recorded."""
        if not self._first:
            return []
        longest, where = max(self._first)
        return [Must("longest first step of ours", longest, FIRST_S, False, f"s, {where}")]


def _main(table: _Table) -> list[Must]:
    found = []
    for shape in SHAPES:
        ours = table.ms(shape, "lora16")
        times = table.peer_times(shape, "lora16")
        fastest = min(times, key=times.__getitem__, default="")
        ratio = times[fastest] / ours if fastest and ours else None
        name = f"{shape.name} lora16: speed / fastest peer"
        found.append(Must(name, ratio, LORA_SPEED[shape.name], True, fastest))
        for mode in ("fwd", "full"):
            found.append(_scatter(table, shape, mode))
    for shape in SHAPES:
        found.append(_saved(table, shape, "none"))
    found += _wrapping(table)
    for shape in SHAPES:
        found += [_peak(table, shape, mode) for mode in ("fwd", "full", "lora16")]
    return found


def _wrapping(table: _Table) -> list[Must]:
    """SonicMoE as a back end over SonicMoE called directly, where both were timed."""
    modes: tuple[Mode, ...] = ("fwd", "full")
    found = []
    for shape, mode in product(SHAPES, modes):
        ours, bare = (table.ms(shape, mode, name) for name in (WRAPPED, BARE))
        if ours and bare:
            name = f"{shape.name} {mode}: back end sonic / bare"
            found.append(Must(name, ours / bare, WRAPPING, False, BARE))
    return found


def _scatter(table: _Table, shape: Shape, mode: Mode) -> Must:
    times = table.peer_times(shape, mode)
    names = [name for name in times if name.startswith("scattermoe")]
    ours = table.ms(shape, mode)
    ratio = times[names[0]] / ours if names and ours else None
    note = names[0] if names else "no scattermoe"
    return Must(f"{shape.name} {mode}: speed / scattermoe", ratio, SCATTER_SPEED, True, note)


def saved_floor(shape: Shape, recompute: str) -> int:
    """Bytes that the arrangement has to keep."""
    x = shape.tokens * shape.hidden * 2
    xa = 2 * shape.rows * RANK * 2
    if recompute == "gate_up":
        return x + shape.rows * 12 + xa
    return x + shape.rows * 2 * shape.intermediate * 2 + xa


def _saved(table: _Table, shape: Shape, recompute: str) -> Must:
    row = table.get(shape, "lora16", OURS, "uniform", recompute)
    floor = saved_floor(shape, recompute) / MIB
    got = None if row is None or row.saved_mb is None else row.saved_mb / floor
    limit = SAVED if recompute == "none" else SAVED_RECOMPUTED
    words = "" if recompute == "none" else f" recompute={recompute}"
    note = f"of {floor:.0f} MiB"
    return Must(f"{shape.name} lora16{words}: saved / floor", got, limit, False, note)


def _peak(table: _Table, shape: Shape, mode: Mode) -> Must:
    row = table.get(shape, mode)
    peaks = {r.provider: r.peak_mb for r in table.peers(shape, mode) if r.peak_mb is not None}
    lowest = min(peaks, key=peaks.__getitem__, default="")
    got = None
    if row is not None and row.peak_mb is not None and lowest:
        got = row.peak_mb / peaks[lowest]
    return Must(f"{shape.name} {mode}: peak / lowest peer", got, PEAK, False, lowest)


def _recompute(table: _Table) -> list[Must]:
    return [_saved(table, shape, "gate_up") for shape in SHAPES]


def _skew(table: _Table) -> list[Must]:
    shape = shape_named("qwen3-30b")
    even = table.ms(shape, "lora16")
    found = []
    for routing in ("zipf1.2", "half-empty"):
        ours = table.ms(shape, "lora16", OURS, routing)
        ratio = ours / even if ours and even else None
        found.append(Must(f"qwen3-30b lora16: {routing} / uniform", ratio, SKEW, False))
    odd = table.ms(replace(shape, tokens=ODD_TOKENS), "lora16")
    per_token = odd / ODD_TOKENS / (even / shape.tokens) if odd and even else None
    name = f"qwen3-30b lora16: ms/token T={ODD_TOKENS} / T={shape.tokens}"
    return [*found, Must(name, per_token, ODD, False)]


def _decode(table: _Table) -> list[Must]:
    found = []
    for name in DECODE_SHAPES:
        for tokens in DECODE_TOKENS:
            shape = replace(shape_named(name), tokens=tokens)
            ours = table.ms(shape, "fwd")
            times = {peer: table.ms(shape, "fwd", peer) for peer in ("batched_mm", "grouped_mm")}
            known = {peer: ms for peer, ms in times.items() if ms is not None}
            best = min(known, key=known.__getitem__, default="")
            got = ours / known[best] if ours and best else None
            found.append(Must(f"{name} fwd T={tokens}: time / best stock", got, 1.0, False, best))
    return found


def _tokens(table: _Table) -> list[Must]:
    modes: tuple[Mode, ...] = ("fwd", "full", "lora16")
    found = []
    for tokens, mode in product(EVERY_T, modes):
        shape = replace(shape_named(EVERY_T_SHAPE), tokens=tokens)
        ours = table.median_ms(shape, mode, OURS)
        times = {name: table.median_ms(shape, mode, name) for name in (PORTABLE, "grouped_mm")}
        known = {name: ms for name, ms in times.items() if ms is not None}
        best = min(known, key=known.__getitem__, default="")
        got = ours / known[best] if ours and len(known) == len(times) else None
        name = f"{shape.name} {mode} T={tokens}: time / best"
        found.append(Must(name, got, SLOWER, False, best))
    return found
