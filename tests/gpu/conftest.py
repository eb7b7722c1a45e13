"""What uninitialised memory holds in GPU tests, and which tests wait for each other."""

from __future__ import annotations

import fcntl
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # no warning in deterministic mode

import pytest
import torch

from turnout import compile_ahead
from turnout.testing import poison_empty

compile_ahead.MOST_WORKERS = 0  # the tests themselves run in many processes


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that nobody wrote holds NaN."""
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    with poison_empty():
        yield


@pytest.fixture(autouse=True)
def memory_in_turn(request: pytest.FixtureRequest) -> Iterator[None]:
    """One process at a time runs a test of a memory group, and gives back what it held.

    A lock on a file, because xdist's own groups (`--dist loadgroup`) are ignored with pytest 9.2.
    """
    marker = request.node.get_closest_marker("memory")
    if marker is None:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"turnout-tests-{marker.args[0]}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()
