"""Every config of the tables that ship, compiled for the GPU that it was found on.

The launches are those of `turnout.tune.recorded`, recorded from the host code as everywhere here,
so a config that the store does not hand out, or that the host code does not use, is seen as well.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import pytest
import torch
from recording import Launch, chip, compiled, recording, rejects, resources

from tuning_cases import asked
from turnout.tune.recorded import launch
from turnout.tuning import table
from turnout.tuning.cache import SHIPPED
from turnout.tuning.entry import Entry
from turnout.tuning.space import shared_memory

HOPPER = table.read(SHIPPED / "hopper.json").entries
TOP_K = 2
SPILLED = 320  # bytes of local memory per thread, as for every candidate


def kind(entry: Entry) -> Hashable:
    """Equal for entries whose kernels differ in their config alone."""
    key = entry.key
    return key.kernel, key.epilogue, key.layout, key.tile_rows, key.dtype, key.weight_dtype


def launched(entry: Entry) -> Launch:
    """The one product that the entry is for, on the GPU that it names."""
    device = replace(chip(90), name=entry.device)
    with recording(device) as found:
        launch(asked(entry, entry.device).problem, TOP_K, torch.device("cpu"))
    (one,) = (one for one in found.values() if one.kernel.__name__ == f"{entry.key.kernel}_kernel")
    return one


def assert_runs(entry: Entry) -> None:
    one, config = launched(entry), entry.config.to_dict()
    used = one.by_name | one.options
    assert {name: used[name] for name in config} == config, f"{entry.key} runs with another config"
    reason = rejects(one, chip(90))
    assert reason is None, f"{entry.key} on {entry.device}: {reason}"
    spilled = resources(compiled(one))["STACK"]
    assert spilled <= SPILLED, f"{one} keeps {spilled} bytes in local memory"


@pytest.fixture(autouse=True)
def _no_own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path_factory.mktemp("configs")))


def test_a_shipped_config_with_much_shared_memory_does_not_run() -> None:
    """Of each kind the one that takes most."""
    most: dict[Hashable, tuple[int, Entry]] = {}
    for entry in HOPPER:
        needed = shared_memory(asked(entry, entry.device), entry.config)
        if needed > most.get(kind(entry), (0, entry))[0]:
            most[kind(entry)] = needed, entry
    assert len(most) > 10
    for _, entry in most.values():
        assert_runs(entry)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_shipped_config_does_not_run() -> None:
    different = {(kind(entry), entry.config): entry for entry in HOPPER}
    assert len(different) > 60
    for entry in different.values():
        assert_runs(entry)
