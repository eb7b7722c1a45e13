"""What the tests of tuning share: questions, configs, a clock and a trial that are told what to
say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from turnout.device import Device
from turnout.measure import Timing
from turnout.specs import Activation, GemmProblem
from turnout.tuning import report
from turnout.tuning.entry import Entry, Search
from turnout.tuning.key import Ask, Config, bucket_of

KIB = 1024
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def gpu(arch: int = 90, name: str = "") -> Device:
    return Device(
        name=name or f"sm_{arch}",
        arch=arch,
        num_sms=132,
        shared_memory=SHARED_MEMORY[arch] * KIB,
        memory_bytes=80 * KIB**3,
        l2_bytes=50 * KIB**2,
    )


PLAIN = GemmProblem(
    ragged="m", rows=131072, experts=128, n=1536, k=2048, dtype="bfloat16", weight_dtype="bfloat16"
)
GATED = replace(PLAIN, epilogue="activate", activation=Activation(), gathered=True, rank=16)
NARROW = replace(PLAIN, n=16, narrow=True, gathered=True)
GRAM = replace(PLAIN, ragged="k", n=16, k=2048, weight_dtype="float32")


def ask(problem: GemmProblem = PLAIN, arch: int = 90, tile_rows: int = 128, name: str = "") -> Ask:
    kernel: Any = "rows" if problem.ragged == "m" else "gram"
    tile = tile_rows if kernel == "rows" else 0
    return Ask(kernel=kernel, problem=problem, device=gpu(arch, name), tile_rows=tile, top_k=8)


def asked(entry: Entry, device: str, arch: int = 90) -> Ask:
    """The question that an entry of a table answers, on that GPU."""
    key, on = entry.key, set(entry.key.layout)
    epilogue = None if key.epilogue == "none" else key.epilogue
    interleaved = "activation_interleaved" in on
    problem = GemmProblem(
        ragged="k" if key.kernel == "gram" else "m",
        rows=entry.rows,
        experts=key.experts,
        n=key.n,
        k=key.k,
        rank=key.rank,
        dtype=key.dtype,
        weight_dtype=key.weight_dtype,
        epilogue=epilogue,
        activation=Activation(interleaved=interleaved) if epilogue else None,
        gathered="gathered" in on,
        weight_k_major="k_major" in on,
        bias="bias" in on,
        dropout="dropout" in on,
        narrow="narrow" in on,
    )
    return Ask(
        kernel=key.kernel, problem=problem, device=gpu(arch, device), tile_rows=key.tile_rows
    )


def rows(n: int, k: int = 64, warps: int = 8, stages: int = 3, group: int = 4) -> Config:
    return Config.of(
        {"BLOCK_N": n, "BLOCK_K": k, "GROUP": group, "num_warps": warps, "num_stages": stages}
    )


def gram(n: int, k: int, m: int = 64, warps: int = 8, stages: int = 3, first: int = 0) -> Config:
    return Config.of(
        {
            "EXPERT_FIRST": first,
            "BLOCK_N": n,
            "BLOCK_K": k,
            "BLOCK_M": m,
            "num_warps": warps,
            "num_stages": stages,
        }
    )


def entry(question: Ask, config: Config, **changes: Any) -> Entry:
    made = Entry(
        key=question.key,
        rows=bucket_of(question.rows),
        device=question.device.name,
        config=config,
    )
    return replace(made, **changes)


def search_of(times: dict[Config, float], winner: Config) -> Search:
    others = [seconds for config, seconds in times.items() if config != winner]
    return Search(
        winner_s=times[winner],
        runner_up_s=min(others, default=None),
        incumbent_s=times[winner],
        default_s=None,
        tried=len(times),
        pruned=0,
        failed=(),
        seconds=1.0,
        times=tuple(times.items()),
    )


class FakeTrial:
    """Runs nothing. `wrong`: config to reason; `raises`: config to exception."""

    def __init__(
        self,
        wrong: dict[Config, str] | None = None,
        raises: dict[Config, Exception] | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        self.failures: tuple[type[Exception], ...] = (RuntimeError,)
        self.wrong, self.raises = wrong or {}, raises or {}
        self.ran: list[Config] = []
        self.compiled: list[Config] = []

    def compile(self, configs: Sequence[Config]) -> None:
        assert not self.ran
        self.compiled += configs

    def prepare(self, config: Config) -> Callable[[], Any]:
        def run() -> Config:
            self.ran.append(config)
            if config in self.raises:
                raise self.raises[config]
            return config

        return run

    def rejects(self, outputs: Any) -> str | None:
        return self.wrong.get(outputs)


def clock(times: dict[Config, float], spread: float = 0.0) -> Callable[..., Timing]:
    """A clock that knows what each config takes; others take 1 s. `spread` is a part of it."""

    def seconds(fn: Callable[[], Any], *, device: Any, warmup: int, repeats: int) -> Timing:
        median = times.get(fn(), 1.0)
        return Timing(
            median=median,
            low=median * (1 - spread),
            high=median * (1 + spread),
            repeats=repeats,
        )

    return seconds


def ran(question: Ask, default: Config) -> Config:
    """What the question's launch runs with; the launch is in the record."""
    event = report.choose(question, default)
    event.note()
    return event.config
