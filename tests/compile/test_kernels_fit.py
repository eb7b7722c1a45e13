"""Every kernel compiled for every chip, without a GPU, against that chip's shared memory.

The launches are recorded from the host code (`recording.py`) for the calls in `cases.py`. Not with
TRITON_INTERPRET: the interpreter compiles nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
from cases import (
    CALLS,
    DTYPES,
    HOPPER_ODD,
    MODELS,
    USUAL,
    hopper,
    hot,
    hungriest,
    launches,
    record,
)
from recording import SHARED_MEMORY, Launch, chip, compiled, rejects, resources

import turnout

CHIPS = sorted(SHARED_MEMORY)
SHOWN = 10
SPILLED = 64  # bytes of local memory per thread


@pytest.fixture(autouse=True)
def _no_interpreter() -> None:
    if triton.knobs.runtime.interpret:
        pytest.fail("TRITON_INTERPRET is set, so nothing can be compiled; run without it")


def assert_all_run(found: list[Launch], arch: int) -> None:
    reasons = [reason for one in found if (reason := rejects(one, chip(arch))) is not None]
    shown = "\n".join(reasons[:SHOWN])
    assert not reasons, f"{len(reasons)} of {len(found)} launches, the first of them:\n{shown}"


@pytest.mark.parametrize("arch", CHIPS, ids="sm_{}".format)
def test_the_largest_tiles_do_not_fit_the_chip(arch: int) -> None:
    assert_all_run(hungriest(arch), arch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", CHIPS, ids="sm_{}".format)
def test_a_launch_does_not_fit_the_chip(arch: int, dtype: str) -> None:
    assert_all_run(launches(arch, dtype), arch)


@pytest.mark.slow
def test_a_hot_kernel_spills() -> None:
    """On Hopper, at the models' shapes."""
    found = hot(90)
    assert {one.by_name["EPILOGUE"] for one in found} == {"none", "activate", "activate_backward"}
    for one in found:
        spilled = resources(compiled(one))["STACK"]
        assert spilled <= SPILLED, f"{one} keeps {spilled} bytes in local memory"


@pytest.mark.parametrize("model", ["qwen3-30b", "gptoss-20b"])
def test_a_hopper_kernel_does_not_fit_or_spills(model: str) -> None:
    found = hopper("bf16", MODELS[model], "everything trains")
    assert len(found) == 6, "four products, and two gradients of weights"
    assert_all_run(found, 90)
    for one in found:
        spilled = resources(compiled(one))["STACK"]
        assert spilled <= SPILLED, f"{one} keeps {spilled} bytes in local memory"


def test_a_hopper_launch_of_sizes_that_16_does_not_divide_does_not_compile() -> None:
    """Sharding makes such sizes: 2880 / 8 = 360. What cp.async can not copy runs elsewhere."""
    for sizes in ({"hidden": 520, "intermediate": 192}, {"hidden": 320, "intermediate": 200}):
        found = hopper("bf16", HOPPER_ODD | sizes, "everything trains")
        assert found
        assert_all_run(found, 90)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_hopper_launch_does_not_fit_the_chip(dtype: str) -> None:
    found: dict[str, Launch] = {}
    for model in (MODELS["qwen3-30b"], MODELS["gptoss-20b"], HOPPER_ODD):
        for call in CALLS:
            found |= {one.key: one for one in hopper(dtype, model, call)}
    assert_all_run(list(found.values()), 90)


def test_a_kernel_is_not_among_the_recorded() -> None:
    source = Path(turnout.__file__).parent
    jitted = re.compile(r"^@(?:triton|gluon)\.jit[^\n]*\ndef (\w+_kernel)\(", re.MULTILINE)
    kernels = {
        (path.stem, name)
        for path in source.rglob("*.py")
        for name in jitted.findall(path.read_text())
    }
    assert ("triton_kernels", "rows_kernel") in kernels
    recorded = [*hungriest(90), *hopper("bf16", MODELS["qwen3-30b"], "everything trains")]
    names = {(one.kernel.__module__.split(".")[-1], one.kernel.__name__) for one in recorded}
    assert kernels == names


def planted(arch: int, **changes: int) -> Launch:
    found = record(arch, "bf16", MODELS["qwen3-30b"], USUAL, "everything trains").values()
    rows = next(one for one in found if one.by_name.get("EPILOGUE") == "activate")
    return rows.changed(**changes)


@pytest.mark.parametrize("arch", [86, 90], ids="sm_{}".format)
def test_too_many_stages_go_unnoticed(arch: int) -> None:
    large = planted(arch, num_stages=8, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64)
    reason = rejects(large, chip(arch))
    assert reason is not None
    assert "bytes of shared memory" in reason


def test_code_that_does_not_compile_goes_unnoticed() -> None:
    reason = rejects(planted(90, num_stages=2, BLOCK_K=3), chip(90))
    assert reason is not None
    assert "does not compile" in reason
