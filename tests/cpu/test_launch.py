"""How a compiled kernel is started: which function, with what between the stream and the hooks."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from turnout.launch import _shortened


class CudaLauncher:
    """What Triton 3.6's launcher has; called itself, it would allocate scratch memory."""

    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, scratch: int = 0) -> None:
        self.global_scratch_size = self.profile_scratch_size = scratch

    def launch(self, *args: Any) -> None:
        """The C function."""


def compiled(run: Any) -> Any:
    return SimpleNamespace(run=run, function="function", packed_metadata="metadata")


@pytest.fixture(autouse=True)
def triton_3_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))


def test_the_launchers_python_runs_at_every_launch() -> None:
    run = CudaLauncher()
    # function, cooperative grid, dependent launch, two scratch buffers, metadata
    expected = (run.launch, "function", False, True, None, None, "metadata")
    assert _shortened(compiled(run)) == expected


@pytest.mark.parametrize(
    ("version", "run"),
    [
        pytest.param("3.7.0", CudaLauncher(), id="another version"),
        pytest.param("3.6.0", CudaLauncher(scratch=64), id="scratch memory"),
        pytest.param("3.6.0", SimpleNamespace(), id="another launcher"),
    ],
)
def test_a_function_with_other_arguments_is_called(
    version: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["triton"], "__version__", version)
    assert _shortened(compiled(run)) == (run, "function", "metadata")
