"""Launches that are noted instead of run, and who may ask for them."""

from __future__ import annotations

import functools
import pickle
import threading
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turnout import compile_ahead as module
from turnout import compile_worker
from turnout.compile_worker import Shared, Source
from turnout.launch import Launch, ValueNeeded, noting
from turnout.ragged import sort_by_expert


class Kernel:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.launched = 0

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> None:
            self.launched += 1

        return run


def launch_of(kernel: Kernel) -> Launch:
    return Launch(kernel, (1, 1, 1), (3,), {"BLOCK": 16}, num_warps=4)


def test_a_noted_launch_runs() -> None:
    kernel = Kernel()
    launch = launch_of(kernel)
    found: list[Any] = []
    with noting(found):
        launch(torch.zeros(4), None, torch.zeros(2, dtype=torch.int32))
    assert found == [(launch, (torch.float32, None, torch.int32))]
    assert kernel.launched == 0
    launch(torch.zeros(4))
    assert kernel.launched == 1, "noting went on"
    assert len(found) == 1


def test_a_launch_that_is_compiled_is_compiled_again() -> None:
    kernel = Kernel()
    launch = launch_of(kernel)
    launch._ready[(-1, torch.float32)] = (None,)
    found: list[Any] = []
    with noting(found):
        launch(torch.zeros(4))
    assert not found
    assert kernel.launched == 0


def test_host_code_reads_values_that_nothing_computed() -> None:
    ragged = sort_by_expert(torch.tensor([[0, 1], [1, 0]]), 2)
    assert ragged.segments() == [(0, 0, 2), (1, 2, 4)]
    with noting([]), pytest.raises(ValueNeeded):
        ragged.segments()


def test_the_same_step_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    device, kernel, compiled = torch.device("cuda", 0), Kernel(), []
    launches = [launch_of(kernel), launch_of(kernel)]
    monkeypatch.setattr(module, "_met", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(module, "_compile", lambda wanted: compiled.append(list(wanted)))

    def dry() -> None:
        for launch in (*launches, launches[0]):
            launch(torch.zeros(4))

    for key in ("one", "one", "two"):
        module.compile_ahead(key, device, dry)
    once = [(launch, (torch.float32,)) for launch in launches]
    assert compiled == [once, once]
    assert kernel.launched == 0


def test_a_step_whose_host_code_needs_values_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_met", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ragged = sort_by_expert(torch.tensor([[0]]), 1)
    module.compile_ahead("key", torch.device("cuda", 0), ragged.segments)


def test_a_foreseen_step_is_seen_as_if_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording for replay would see it fill memory, which can not be repeated; selective
    checkpointing would save its tensors, which nothing computed, for the step itself."""
    monkeypatch.setattr(module, "_met", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen: list[str] = []
    foreseen: list[torch.Tensor] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        module.compile_ahead(
            "key", torch.device("cuda", 0), lambda: foreseen.append(torch.zeros(4))
        )
        torch.ones(4)
    assert foreseen
    assert seen == ["aten.ones.default"]


def test_a_step_that_barely_fits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that is foreseen needs memory before it is needed."""
    monkeypatch.setattr(module, "_met", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def dry() -> None:
        raise torch.OutOfMemoryError

    module.compile_ahead("key", torch.device("cuda", 0), dry)


def test_a_kernel_that_does_not_compile_fails_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody who asks for no gradient never launches the backward pass."""
    pytest.importorskip("triton")
    tried: list[str] = []

    class Refused(Kernel):
        def run(self, *args: Any, **options: Any) -> None:
            tried.append("it")
            raise RuntimeError("does not compile")

    monkeypatch.setattr(module, "_num_workers", lambda: 0)
    module._compile([(launch_of(Refused()), (torch.float32,))])
    assert tried


@pytest.mark.parametrize("cached", [3, 4])
def test_workers_start_for_kernels_in_the_cache_or_for_too_few_others(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    given: list[Any] = []
    compiled: list[Any] = []

    class Compiles(Kernel):
        def run(self, *args: Any, **options: Any) -> None:
            compiled.append(self)

    launches = [launch_of(Compiles()) for _ in range(6)]
    monkeypatch.setattr(module, "source_of", lambda launch, dtypes: launch)
    monkeypatch.setattr(module, "in_cache", lambda launch: launch in launches[:cached])
    monkeypatch.setattr(module, "share", lambda sources, workers: given.append(sources))
    monkeypatch.setattr(module, "_num_workers", lambda: 4)
    module._compile([(launch, ()) for launch in launches])
    assert given == ([launches[3:]] if cached == 3 else [])
    assert compiled == [launch.kernel for launch in launches]


def test_a_worker_stops_at_a_launcher_that_can_not_be_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("triton")
    asked: list[Source] = []

    def refuse(source: Source) -> tuple[object, object]:
        asked.append(source)
        if len(asked) == 1:
            raise ImportError("libcuda.so.1: cannot open shared object file")
        return None, None

    monkeypatch.setattr(compile_worker, "compile_source", refuse)
    monkeypatch.setattr(compile_worker, "_build_launcher", lambda made, kernel: None)
    source, answers = Source("m", "k", {}, {}, {}, {}, ("cuda", 90, 32)), BytesIO()
    given = pickle.dumps(Shared("folder", "key", "ptxas 12.8")) + 2 * pickle.dumps(source)
    cache, compiler = triton.runtime.cache, triton.backends.nvidia.compiler
    monkeypatch.setattr(cache, "triton_key", None)  # put back afterwards
    monkeypatch.setattr(compiler, "get_ptxas_version", None)
    with triton.knobs.cache.scope():
        compile_worker.serve(BytesIO(given), answers)
        assert triton.knobs.cache.dir == "folder"
    assert cache.triton_key() == "key"
    assert compiler.get_ptxas_version(90) == "ptxas 12.8"
    assert asked == [source, source]
    assert answers.getvalue() == compile_worker.FAILED + compile_worker.DONE


def test_another_program_is_started_as_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert module._num_workers() == 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert module._num_workers() == module.MOST_WORKERS
    for program in ("/opt/blender/blender", "", None):
        monkeypatch.setattr(module.sys, "executable", program)
        assert module._num_workers() == 0


@pytest.mark.parametrize("takes", ["nothing", "arch"])
def test_an_older_triton_that_asks_its_assembler_without_a_chip_stops_the_step(
    takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.5's function takes no argument; torch 2.9 comes with it."""
    triton = pytest.importorskip("triton")

    @functools.lru_cache
    def of_the_machine() -> str:
        return "nothing"

    @functools.lru_cache
    def of_the_chip(arch: int) -> str:
        assert arch == 90
        return "arch"

    ask = of_the_machine if takes == "nothing" else of_the_chip
    monkeypatch.setattr(triton.backends.nvidia.compiler, "get_ptxas_version", ask)
    assert module._shared(("cuda", 90, 32)).ptxas_version == takes


def test_two_threads_leave_a_hook_that_keeps_kernels_from_being_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replicas of DataParallel meet their first step at the same time. Triton would return None for
    whatever the thread launched later."""
    triton = pytest.importorskip("triton")
    target = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    inside, second_is_inside = threading.Event(), threading.Event()

    class First(Kernel):
        def run(self, *args: Any, **options: Any) -> None:
            inside.set()
            second_is_inside.wait(0.5)

    class Second(Kernel):
        def run(self, *args: Any, **options: Any) -> None:
            second_is_inside.set()
            first.join()

    def ask(kernel: Kernel) -> None:
        assert module.source_of(launch_of(kernel), (torch.float32,)) is None

    first = threading.Thread(target=ask, args=(First(),))
    with triton.knobs.runtime.scope():
        first.start()
        inside.wait()
        ask(Second())
        assert triton.knobs.runtime.jit_cache_hook is None


def test_a_launch_that_never_ran_is_in_the_record() -> None:
    """A backward pass that is foreseen need not come."""
    noted: list[str] = []
    launch = launch_of(Kernel())
    launch.chosen = SimpleNamespace(source="analytic", note=lambda: noted.append("it"))
    with noting([]):
        launch(torch.zeros(4))
    assert not noted
    launch(torch.zeros(4))
    assert noted
