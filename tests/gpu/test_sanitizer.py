"""compute-sanitizer's memcheck over every kernel. Deselect with `-m "not sanitizer"`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitizer_case import BALANCES, CASES, ROUTES

import turnout

HERE = Path(__file__).parent
TOOL = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not on PATH or in CUDA's bin"),
    pytest.mark.timeout(600),
]


def memcheck(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The case under memcheck, every tensor in an allocation of its own with space around it."""
    folders = (Path(turnout.__file__).parents[1], HERE.parent, HERE)
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    tool = [str(TOOL), "--tool", "memcheck", "--padding", "4096", "--error-exitcode", "1"]
    command = [*tool, sys.executable, str(HERE / "sanitizer_case.py"), *arguments]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=580, check=False
    )
    assert "Device not supported" not in done.stdout + done.stderr, (
        "compute-sanitizer does not support this machine's GPU: deselect with -m 'not sanitizer'"
    )
    return done


def test_a_kernel_reads_or_writes_out_of_bounds() -> None:
    done = memcheck()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    assert done.stdout.count("done") == len(CASES) + len(ROUTES) + len(BALANCES)


def test_the_sanitizer_misses_a_kernel_that_does() -> None:
    done = memcheck("--broken")
    assert done.returncode != 0
    assert "Invalid __global__ read" in done.stdout + done.stderr, done.stdout + done.stderr
