"""Worker processes put into Triton's cache what this process then takes from it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import triton
from cases import DTYPES, LORA, MODELS, USUAL
from recording import chip, recording

from problems import random_problem, run
from turnout import compile_ahead
from turnout.compile_worker import DONE, FAILED, Shared, compile_source, in_cache
from turnout.launch import noting


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[Path]:
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield tmp_path


@pytest.fixture(scope="module")
def step() -> Any:
    """The launches of a step on Hopper: as they are noted, and as Triton sees them."""
    sizes, noted = MODELS["qwen3-30b"], []
    tokens = USUAL * sizes["num_experts"] // sizes["top_k"]
    with recording(chip(90)) as seen:
        with pytest.MonkeyPatch.context() as patch:

            def ahead(key: object, device: object, dry: Any) -> None:
                with noting(noted):
                    dry()

            patch.setattr("turnout.experts.ops.compile_ahead", ahead)
            options = LORA | sizes | DTYPES["bf16-fp32-adapters"]
            problem = random_problem(tokens=tokens, **options)
            run(problem, problem.trained_by_lora)
        wanted = list(dict.fromkeys(noted))
        sources = [source for one in wanted if (source := compile_ahead.source_of(*one))]
    return wanted, sources, seen


def test_a_source_says_something_else_than_the_launch(step: Any) -> None:
    _, sources, seen = step
    names = {launch.kernel.__name__ for launch in seen.values()}
    assert len(sources) > 8
    assert {source.name for source in sources} == names
    assert {source.target for source in sources} == {("cuda", 90, 32)}
    assert any("tensordesc" in kind for source in sources for kind in source.signature.values())


def test_what_workers_compile_is_compiled_again(step: Any, own_cache: Path) -> None:
    """By two processes: a kernel in Triton, one in Gluon, and one that does not compile."""
    _, sources, _ = step
    small = next(s for s in sources if s.name == "combine_kernel")
    chosen = [small, next(s for s in sources if "tensordesc" in str(s.signature))]
    wrong = small._replace(constants={})
    assert [in_cache(source) for source in chosen] == [False, False]
    compile_ahead.share([wrong, *chosen, wrong], 2)
    assert [in_cache(source) for source in chosen] == [True, True]
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    for source in chosen:
        compile_source(source)
    assert hits == [True, True]


def test_what_workers_compile_is_lost_once_torch_names_another_assembler(
    step: Any, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Inductor does when it first compiles; Triton has asked the first one's version by then."""
    _, sources, _ = step
    small = next(s for s in sources if s.name == "combine_kernel")
    assert not in_cache(small)
    ptxas = triton.knobs.nvidia.ptxas.path
    other = tmp_path / "ptxas"
    other.write_text(
        f"""#!/bin/sh
        if [ "$1" = --version ]; then echo "release 12.3"; else exec {ptxas} "$@"; fi
        """
    )
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert triton.knobs.nvidia.ptxas.version == "12.3"
    compile_ahead.share([small], 1)
    assert in_cache(small)


def test_a_cache_of_another_triton_stops_the_step(
    step: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no worker is started, as it may be for nothing."""
    _, sources, _ = step
    monkeypatch.delattr("triton.runtime.cache.get_cache_key")
    assert in_cache(sources[0])


def test_a_worker_that_dies_stops_the_step(
    step: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sources, _ = step
    for begin in ("raise SystemExit(1)", "import sys; sys.stdin.buffer.read(10)"):
        monkeypatch.setattr(compile_ahead, "_BEGIN", begin)
        assert compile_ahead.share(sources, 2) == 0
    monkeypatch.setattr(compile_ahead, "_BEGIN", "import time; time.sleep(60)")
    monkeypatch.setattr(compile_ahead, "PATIENCE_S", 0.5)
    start = perf_counter()
    assert compile_ahead.share(sources, 2) == 0
    assert perf_counter() - start < 30


def test_a_worker_waits_for_torch(step: Any, own_cache: Path) -> None:
    """Which takes seconds to import."""
    _, sources, _ = step
    source = next(s for s in sources if "tensordesc" in str(s.signature))
    begin = compile_ahead._BEGIN + "assert 'torch' not in sys.modules"
    worker = [sys.executable, "-c", begin, *sys.path]
    shared = Shared(str(own_cache), "any", None)
    given = pickle.dumps(shared) + pickle.dumps(source)
    answer = subprocess.run(worker, input=given, capture_output=True, check=True).stdout
    assert answer in (DONE, FAILED)  # no launcher without CUDA's library


def test_a_worker_that_can_not_start_leaves_others_behind(
    step: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sources, _ = step
    started: list[subprocess.Popen[bytes]] = []
    start = compile_ahead._start

    def one_only() -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(start())
        return started[0]

    monkeypatch.setattr(compile_ahead, "_start", one_only)
    with pytest.raises(OSError, match="no more processes"):
        compile_ahead.share(sources, 2)
    assert started[0].returncode is not None


def test_every_search_starts_workers_of_its_own(
    step: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of `turnout tune` searches a hundred problems."""
    _, sources, _ = step
    small = next(s for s in sources if s.name == "combine_kernel")
    wrong = small._replace(constants={})
    started: list[subprocess.Popen[bytes]] = []
    start = compile_ahead._start

    def note() -> subprocess.Popen[bytes]:
        started.append(start())
        return started[-1]

    monkeypatch.setattr(compile_ahead, "_start", note)
    with compile_ahead.workers_kept():
        compile_ahead.share([wrong, wrong], 2)
        compile_ahead.share([wrong], 2)
        compile_ahead.share([wrong, small], 2)
        assert in_cache(small)
        assert len(started) == 2
        assert [worker.poll() for worker in started] == [None, None]
        started[0].kill()
        started[0].wait()
        compile_ahead.share([wrong, wrong, wrong], 2)
        assert len(started) == 3, "one that died is not replaced"
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(own_cache / "other")
            compile_ahead.share([small], 1)
            assert in_cache(small), "it went into the cache of another time"
    assert all(worker.poll() is not None for worker in started), "some are left behind"
