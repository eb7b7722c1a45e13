"""The kernels of a step are compiled before the first of them runs, by several processes.

Triton compiles a kernel at its first launch, and then, with the machine's C compiler, the function
that starts it; the first step of a layer does both some twenty times. But the host code of a pass
reads no value of a tensor: it can run once with its launches noted instead of started. So all that
a step needs is known at once, and what is not in Triton's cache is put there by worker processes
(`compile_worker.py`). Processes, not threads: with Triton's `AsyncCompileMode` and many threads, a
run of the GPU tests ended in an illegal memory access, and the same run without it did not.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from turnout.compile_worker import DONE, Shared, Source, in_cache
from turnout.launch import Launch, ValueNeeded, noting

MOST_WORKERS = 8
WORKERS_PAY = 3  # kernels; starting a worker takes as long as compiling one
PATIENCE_S = 120.0  # for all of them
log = logging.getLogger("turnout.compile")

Wanted = tuple[Launch, tuple[torch.dtype | None, ...]]

_BEGIN = """
import sys
sys.path[:] = sys.argv[1:]
from turnout.compile_worker import main
main()
"""

_met: set[Hashable] = set()
_one_asks = threading.Lock()  # Triton's hooks are the process's: who puts them back has to be alone


def compile_ahead(key: Hashable, device: torch.device, dry: Callable[[], object]) -> None:
    """Compile all that `dry` would launch on a GPU and is not compiled, once per key.

    Args:
        key: what decides the kernels.
        device: the GPU.
        dry: the host code; nothing that it makes may be used.
    """
    if key in _met or torch.cuda.is_current_stream_capturing():
        return
    _met.add(key)
    wanted: list[Wanted] = []
    try:
        # who follows operators (a recording, selective checkpointing) would take these for the step
        with noting(wanted), _disable_current_modes():
            dry()
    except (ValueNeeded, torch.OutOfMemoryError) as error:
        log.debug("nothing is compiled ahead: %r", error)
        return  # then each is compiled when it is launched
    if len(wanted) > 1:
        with torch.cuda.device(device):
            _compile(list(dict.fromkeys(wanted)))


def _num_workers() -> int:
    """As if there were a process for every GPU here, each with its share of half of the cores.

    None where Python runs inside another program, which would be started instead of Python.
    """
    if not Path(sys.executable or "").name.startswith("python"):
        return 0
    share = _cores() // 2 // max(1, torch.cuda.device_count())
    return min(MOST_WORKERS, share) if share > 1 else 0


def _cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def fill_cache(wanted: Sequence[Wanted]) -> None:
    """Have workers compile for the current GPU what Triton's cache lacks, where that pays.

    Raises:
        OSError: no process can be started.
    """
    num_workers = _num_workers()
    if not num_workers:
        log.debug("no workers compile: %d cores, %s", _cores(), sys.executable)
        return
    found = [source_of(*one) for one in wanted]
    missing = [source for source in found if source and not in_cache(source)]
    log.debug("%d of %d kernels are not in Triton's cache", len(missing), len(found))
    if len(missing) >= WORKERS_PAY:
        began = perf_counter()
        done = share(missing, num_workers)
        took = perf_counter() - began
        log.debug("%d workers compiled %d of them in %.1f s", num_workers, done, took)
        if log.isEnabledFor(logging.DEBUG):
            lost = sum(not in_cache(source) for source in missing)
            log.debug("%d of them are still not in Triton's cache", lost)


def _compile(wanted: Sequence[Wanted]) -> None:
    """An error is left for the launch that meets it again, if the step gets there."""
    from triton.runtime.errors import TritonError

    try:
        fill_cache(wanted)
        for launch, dtypes in wanted:
            launch.compile(dtypes)
    except (TritonError, RuntimeError, OSError) as error:
        log.debug("compiling ahead ended: %r", error)


def share(sources: Sequence[Source], num_workers: int) -> int:
    """Have kernels, at least one, compiled by workers.

    Returns:
        How many they put into Triton's cache, with their launchers.
    """
    shared = _shared(sources[0].target)
    # taken from the end: those with TMA take longest
    left = sorted(sources, key=lambda source: "tensordesc" in str(source.signature))

    idle: list[subprocess.Popen[bytes]] = []

    def feed(worker: subprocess.Popen[bytes], is_new: bool) -> int:
        assert worker.stdin is not None
        assert worker.stdout is not None
        done = 0
        try:
            if is_new:
                worker.stdin.write(pickle.dumps(shared))
            while True:
                worker.stdin.write(pickle.dumps(left.pop()))
                worker.stdin.flush()
                answer = worker.stdout.read(1)
                if not answer:
                    return done
                done += answer == DONE
        except IndexError:  # all are taken
            idle.append(worker)
        except OSError:  # the worker is gone
            pass
        return done

    num_workers = min(num_workers, len(left))
    workers, gone = _take_kept(shared, num_workers), []
    num_kept = len(workers)
    try:
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            try:
                workers += (_start() for _ in range(num_workers - num_kept))
                feeding = [pool.submit(feed, w, n >= num_kept) for n, w in enumerate(workers)]
                wait(feeding, timeout=PATIENCE_S)
            finally:
                gone = [w for w in workers if w not in idle or _kept is None]
                for worker in gone:
                    worker.kill()  # whoever waits for its answer reads its end
    finally:
        for worker in gone:
            worker.communicate()
    if _kept is not None:
        _kept.extend((shared, worker) for worker in workers if worker not in gone)
    return sum(one.result() for one in feeding)


def _shared(target: tuple[str, int, int]) -> Shared:
    from triton import knobs
    from triton.backends.nvidia import compiler
    from triton.runtime import cache

    key = cache.triton_key() if hasattr(cache, "triton_key") else None
    version = None
    if hasattr(compiler, "get_ptxas_version"):
        ask = compiler.get_ptxas_version
        # Triton 3.5 has one assembler for all chips
        version = ask(target[1]) if signature(ask).parameters else ask()
    return Shared(knobs.cache.dir, key, version)


_kept: list[tuple[Shared, subprocess.Popen[bytes]]] | None = None


@contextmanager
def workers_kept() -> Iterator[None]:
    """Within it, workers wait for the next kernels instead of ending: starting one takes as long
    as compiling a few."""
    global _kept
    before, _kept = _kept, []
    try:
        yield
    finally:
        kept, _kept = _kept, before
        for _, worker in kept:
            worker.kill()
            worker.communicate()


def _take_kept(shared: Shared, most: int) -> list[subprocess.Popen[bytes]]:
    """Those that wait and know the same cache."""
    found: list[subprocess.Popen[bytes]] = []
    for one in list(_kept or ()):
        if len(found) < most and one[0] == shared and one[1].poll() is None:
            assert _kept is not None
            _kept.remove(one)
            found.append(one[1])
    return found


def _start() -> subprocess.Popen[bytes]:
    """A worker that finds the packages where this process does."""
    return subprocess.Popen(
        [sys.executable, "-c", _BEGIN, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def source_of(launch: Launch, dtypes: tuple[torch.dtype | None, ...]) -> Source | None:
    """What Triton would compile for a launch; None if this process has compiled it."""
    from triton import knobs
    from triton.runtime import driver

    found: list[Source] = []
    target, thread = driver.active.get_current_target(), threading.get_ident()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if threading.get_ident() != thread:
            return False  # a launch of somebody else, which has to be compiled
        options = json.loads(compile["specialization_data"])["options"]
        found.append(
            Source(
                fn.module,
                fn.name,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()},
                (target.backend, target.arch, target.warp_size),
            )
        )
        return True  # do not compile

    with _one_asks, knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        launch.compile(dtypes)
    return found[0] if found else None
