"""`turnout.tuning.space` against the compiler: what it says of shared memory, for every candidate.

The kernels are recorded from the host code with each candidate as the stored config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import MODELS, USUAL, record
from recording import Launch, chip, compiled, rejects, resources

from turnout.experts import gemm_triton
from turnout.tuning.candidates import candidates
from turnout.tuning.key import Ask, Config
from turnout.tuning.report import Event, fixed
from turnout.tuning.space import registers, shared_memory

CHIPS = (80, 90, 120)
# Bytes of local memory per thread. A few cost little, and the search times them: the analytic
# default of gpt-oss' interleaved backward on sm_80 has 264.
SPILLED = 320


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path))


def asked(
    arch: int, dtype: str, model: str, rows: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> dict[Ask, Config]:
    """The questions for a config in one training step, and the analytic answers."""
    found: dict[Ask, Config] = {}

    def note(ask: Ask, default: Config) -> Event:
        found[ask] = default
        return fixed(ask, default)

    with monkeypatch.context() as patched:
        patched.setattr(gemm_triton, "choose", note)
        record(arch, dtype, MODELS[model], rows, call)
    return found


def launches(
    arch: int, dtype: str, model: str, rows: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Ask, Config, Launch]]:
    """Every question with each of its candidates, as the compiler gets it.

    Launches are built in the order of the questions, so the n-th launch of a kernel with a config
    belongs to the n-th question of that kernel in this round.
    """
    questions = list(asked(arch, dtype, model, rows, call, monkeypatch))
    lists = {ask: candidates(ask)[0] for ask in questions}
    rounds = max(map(len, lists.values()))
    for number in range(rounds):
        chosen: list[tuple[Ask, Config]] = []

        def choose(ask: Ask, default: Config, n: int = number, into=chosen) -> Event:  # type: ignore[no-untyped-def]
            config = lists[ask][n] if n < len(lists[ask]) else default
            into.append((ask, config))
            return fixed(ask, config)

        with monkeypatch.context() as patched:
            patched.setattr(gemm_triton, "choose", choose)
            found = record(arch, dtype, MODELS[model], rows, call)
        for ask, config in chosen:
            if config in lists[ask]:
                for one in found.values():
                    if _is(one, ask, config):
                        yield ask, config, one
                        break


def _is(one: Launch, ask: Ask, config: Config) -> bool:
    """The launch has this question's switches and this config's tiles."""
    if one.kernel.__name__ != f"{ask.kernel}_kernel":
        return False
    values, p = one.by_name, ask.problem
    tiles = {n: v for n, v in config.to_dict().items() if n.startswith("BLOCK")}
    same = tiles.items() <= values.items()
    same &= one.options["num_warps"] == config["num_warps"]
    same &= one.options["num_stages"] == config["num_stages"]
    if ask.kernel == "gram":
        return bool(same and (values["GATHER_A"] or values["GATHER_B"]) == p.gathered)
    same &= values["BLOCK_M"] == ask.tile_rows and values["GATHER"] == p.gathered
    same &= values["HAS_TAIL"] == (p.rank > 0)
    return bool(same and values["EPILOGUE"] == (p.epilogue or "none"))


def judged(
    arch: int, dtype: str, model: str, rows: int, call: str, monkeypatch: pytest.MonkeyPatch,
    every: int = 1,
) -> tuple[int, list[str], dict[str, list[float]]]:  # fmt: skip
    """How many were compiled, what was wrong, and the estimate over what the compiler takes."""
    seen: set[str] = set()
    wrong: list[str] = []
    ratios: dict[str, list[float]] = defaultdict(list)
    for number, (ask, config, one) in enumerate(
        launches(arch, dtype, model, rows, call, monkeypatch)
    ):
        if number % every or one.code_and_tiles in seen:
            continue
        seen.add(one.code_and_tiles)
        reason = rejects(one, chip(arch))
        if reason is not None:
            wrong.append(f"{ask.key} {config}: {reason}")
            continue
        kernel = compiled(one)
        needed, estimate = kernel.metadata.shared, shared_memory(ask, config)
        if needed > estimate:
            wrong.append(f"{ask.key} {config} takes {needed} bytes; {estimate} were estimated")
        spilled = resources(kernel)["STACK"]
        if spilled > SPILLED:
            about = registers(ask, config)
            wrong.append(f"{ask.key} {config} spills {spilled} bytes; about {about} registers")
        ratios[ask.kernel].append(estimate / max(1, needed))
    return len(seen), wrong, ratios


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", CHIPS, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("dtype", "model", "rows", "call"),
    [
        ("bf16", "qwen3-30b", USUAL, "everything trains"),
        ("bf16", "qwen3-30b", USUAL, "dropout"),
        ("bf16", "qwen3-30b", 8, "rank 4"),
        ("bf16", "gptoss-20b", USUAL, "rank 4"),
        ("fp32", "qwen3-30b", USUAL, "rank 4"),
        ("fp32-autocast", "qwen3-30b", USUAL, "rank 4"),
    ],
)
def test_a_candidate_does_not_fit_or_the_estimate_is_far_off(
    arch: int, dtype: str, model: str, rows: int, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, wrong, ratios = judged(arch, dtype, model, rows, call, monkeypatch)
    shown = "\n".join(wrong[:8])
    assert not wrong, f"{len(wrong)} of {count}, the first of them:\n{shown}"
    assert count > 20
    for kernel, found in ratios.items():
        typical = sorted(found)[len(found) // 2]
        assert typical < 2.0, f"{kernel}: the estimate is typically {typical:.2f} times too large"


def test_the_estimate_of_the_main_product_is_below_what_the_compiler_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few of the candidates, at every `make test`."""
    place = (90, "bf16", "qwen3-30b", USUAL, "rank 4")
    count, wrong, _ = judged(*place, monkeypatch, every=40)
    assert count > 2
    assert not wrong, wrong
