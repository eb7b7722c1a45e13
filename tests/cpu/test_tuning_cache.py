"""Stored configs: where they come from, and that no broken file or folder stops a run."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tuning_cases import GATED, PLAIN, ask, entry, rows, search_of
from turnout.tuning import cache, table
from turnout.tuning.cache import Store, cache_folder, store
from turnout.tuning.candidates import Family
from turnout.tuning.entry import Entry
from turnout.tuning.key import triton_version
from turnout.tuning.table import Table

CONFIG, OTHER, THIRD = rows(128), rows(256), rows(64)


def name_of(arch: int = 90) -> str:
    return f"sm_{arch}-triton-{triton_version()}.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    (tmp_path / "shipped").mkdir()
    return tmp_path / "shipped"


def at(count: int, **options):
    return ask(replace(PLAIN, rows=count), **options)


def test_what_was_tuned_is_gone_in_the_next_process(folder, shipped):
    first = Store(folder, shipped)
    first.put([entry(ask(), CONFIG, search=search_of({CONFIG: 0.5}, CONFIG))])
    assert first.find(ask()).source == "tuned"
    found = Store(folder, shipped).find(ask())
    assert (found.entry.config, found.source, found.is_exact) == (CONFIG, "user cache", True)
    assert found.entry.search.winner_s == 0.5


def test_nothing_stored_is_not_nothing_found(folder, shipped):
    assert Store(folder, shipped).find(ask()) is None
    assert not folder.exists()  # and a look leaves no trace


def test_the_shipped_table_wins_over_the_users_own(folder, shipped):
    table.write(shipped / "h100.json", Table((entry(ask(), OTHER),)))
    assert Store(folder, shipped).find(ask()).source == "shipped"
    Store(folder, shipped).put([entry(ask(), CONFIG)])
    found = Store(folder, shipped).find(ask())
    assert (found.entry.config, found.source) == (CONFIG, "user cache")
    assert Store(folder, shipped).find(ask(), shipped=False).source == "user cache"


def test_a_near_bucket_is_not_used(folder, shipped):
    s = Store(folder, shipped)
    s.put([entry(at(1024), CONFIG), entry(at(16384), OTHER)])
    for count, expected in ((1024, CONFIG), (3000, CONFIG), (5000, OTHER), (100_000, OTHER)):
        found = s.find(at(count))
        assert found.entry.config == expected, count
        assert found.is_exact == (count == 1024)


def test_a_bucket_far_away_is_used(folder, shipped):
    s = Store(folder, shipped)
    s.put([entry(at(1024), CONFIG)])
    assert s.find(at(8192)) is not None
    assert s.find(at(8193)) is None


def test_a_far_bucket_of_the_user_hides_a_near_shipped_one(folder, shipped):
    table.write(shipped / "h100.json", Table((entry(at(8192), OTHER),)))
    s = Store(folder, shipped)
    s.put([entry(at(1024), CONFIG)])
    assert s.find(at(8192)).entry.config == OTHER


def test_another_device_of_the_same_chip_is_preferred(folder, shipped):
    both = (entry(ask(name="H200"), OTHER), entry(ask(name="H100"), CONFIG))
    table.write(shipped / "a.json", Table(both))
    s = Store(folder, shipped)
    assert s.find(ask(name="H100")).entry.config == CONFIG
    assert s.find(ask(name="GH200")).is_exact is False


def test_a_config_of_another_kernel_or_triton_or_layout_is_used(folder, shipped):
    s = Store(folder, shipped)
    s.put([entry(ask(), CONFIG), entry(ask(), OTHER, key=replace(ask().key, triton="1.0"))])
    assert s.find(ask(GATED)) is None
    assert s.find(ask()).entry.config == CONFIG


def test_a_config_that_no_longer_fits_is_used(folder, shipped, caplog):
    s = Store(folder, shipped)
    s.put([entry(ask(), rows(256, warps=4)), entry(at(65536), CONFIG)])
    with caplog.at_level(logging.WARNING):
        assert s.find(ask()).entry.config == CONFIG
        s.find(ask())
    assert caplog.text.count("registers") == 1  # once


def test_an_entry_of_a_kernel_that_is_gone_stops_the_others(folder, shipped, caplog):
    good = entry(ask(), CONFIG).to_dict()
    broken = [good | {"kernel": "scatter2scatter"}, good | {"config": {"BLOCK_N": "x"}}, 7]
    path = folder / "configs" / name_of()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 1, "entries": [*broken, good]}))
    with caplog.at_level(logging.WARNING):
        assert Store(folder, shipped).find(ask()).entry.config == CONFIG
    assert "3 entries are left out" in caplog.text
    assert "scatter2scatter" in caplog.text


@pytest.mark.parametrize("content", [b'{"format": 1, "entr', b"", b"[]", b'{"format": 2}', b"\xff"])
def test_a_corrupt_file_stops_the_run_or_is_lost(folder, shipped, caplog, content):
    path = folder / "configs" / name_of()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    s = Store(folder, shipped)
    with caplog.at_level(logging.WARNING):
        assert s.find(ask()) is None
        assert s.find(ask(GATED)) is None
    assert len(caplog.records) == 1
    assert "set aside" in caplog.text
    (aside,) = path.parent.glob("*.corrupt-1")
    assert aside.read_bytes() == content
    s.put([entry(ask(), CONFIG)])
    assert Store(folder, shipped).find(ask()).entry.config == CONFIG


def test_a_corrupt_shipped_file_stops_the_run(folder, shipped, caplog):
    (shipped / "a.json").write_text("{")
    table.write(shipped / "b.json", Table((entry(ask(), CONFIG),)))
    with caplog.at_level(logging.WARNING):
        assert Store(folder, shipped).find(ask()).entry.config == CONFIG
    assert "a.json" in caplog.text


def fails(error: OSError):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=lambda e: errno.errorcode[e.errno],
)
def test_a_full_disk_or_a_read_only_folder_stops_the_run(
    folder, shipped, caplog, monkeypatch, error
):
    s = Store(folder, shipped)
    monkeypatch.setattr(table, "write", fails(error))
    with caplog.at_level(logging.WARNING):
        s.put([entry(ask(), CONFIG)])
        s.put([entry(ask(GATED), OTHER)])
    assert len(caplog.records) == 1
    assert error.strerror in caplog.text
    assert "TURNOUT_CACHE_DIR" in caplog.text
    assert s.find(ask()).entry.config == CONFIG  # for this process
    assert Store(folder, shipped).find(ask()) is None


def test_a_folder_that_can_not_be_made_stops_the_run(tmp_path, shipped, caplog):
    (tmp_path / "file").write_text("")
    s = Store(tmp_path / "file", shipped)
    with caplog.at_level(logging.WARNING):
        assert s.find(ask()) is None
        s.put([entry(ask(), CONFIG)])
        with s.searching(ask(), 1.0):
            pass
    assert s.find(ask()).entry.config == CONFIG


def test_no_home_stops_the_run(shipped, monkeypatch, caplog):
    monkeypatch.delenv("TURNOUT_CACHE_DIR")
    monkeypatch.setattr(Path, "home", fails(RuntimeError("no home")))  # type: ignore[arg-type]
    assert cache_folder() is None
    s = Store(None, shipped)
    with caplog.at_level(logging.WARNING):
        s.put([entry(ask(), CONFIG)])
    assert "TURNOUT_CACHE_DIR" in caplog.text
    assert s.find(ask()).source == "tuned"


def test_half_a_table_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    table.write(path, Table((entry(ask(), CONFIG),)))
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", fails(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        table.write(path, Table((entry(ask(), OTHER),)))
    monkeypatch.undo()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_others_can_not_read_the_table(tmp_path):
    mask = os.umask(0o022)
    try:
        table.write(tmp_path / "a.json", Table())
    finally:
        os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_the_environment_variable_is_read_once_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "a"))
    first = store()
    assert first is store()
    monkeypatch.setenv("TURNOUT_CACHE_DIR", str(tmp_path / "b"))
    assert store().folder == tmp_path / "b"
    monkeypatch.delenv("TURNOUT_CACHE_DIR")
    assert cache_folder() == Path.home() / ".cache" / "turnout"


def _write_some(folder: str, shipped: str, number: int) -> None:
    s = Store(Path(folder), Path(shipped))
    for count in range(5):
        s.put([entry(at(1 << (number * 5 + count)), CONFIG)])


def test_processes_that_write_at_once_lose_entries(folder, shipped):
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_write_some, args=(str(folder), str(shipped), number))
        for number in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = table.read(folder / "configs" / name_of())
    assert {one.rows for one in found.entries} == {1 << n for n in range(15)}


def test_a_lock_of_another_process_is_waited_for_for_ever(folder, shipped, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    s = Store(folder, shipped)
    (folder / "configs").mkdir(parents=True)
    lock = cache.FileLock((folder / "configs" / name_of()).with_suffix(".lock"))
    with lock:
        s.put([entry(ask(), CONFIG)])
    assert s.find(ask()).source == "tuned"
    assert Store(folder, shipped).find(ask()) is None


def test_a_file_system_without_locks_stops_the_run(folder, shipped, monkeypatch, caplog):
    def acquire(self, *args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(cache.FileLock, "acquire", acquire)
    s = Store(folder, shipped)
    with caplog.at_level(logging.WARNING), s.searching(ask(), 1.0):
        s.put([entry(ask(), CONFIG)])
    assert "support flock" in caplog.text
    assert s.find(ask()).source == "tuned"


def test_who_waited_does_not_see_what_was_found(folder, shipped):
    s = Store(folder, shipped)
    assert s.find(ask()) is None
    Store(folder, shipped).put([entry(ask(), CONFIG)])
    with s.searching(ask(), 5.0):
        assert s.find(ask()).source == "user cache"


def test_a_shipped_list_of_candidates_is_not_found(folder, shipped):
    group = (Family.of(ask()), 90)
    table.write(shipped / "a.json", Table((), {group: (CONFIG, THIRD)}))
    s = Store(folder, shipped)
    assert s.listed(ask()) == (CONFIG, THIRD)
    assert s.listed(ask(arch=80)) is None
    assert s.listed(ask(tile_rows=64)) is None


def test_a_broken_list_of_candidates_stops_the_run(folder, shipped, caplog):
    text = {"format": 1, "entries": [], "candidates": [{"kernel": "rows"}]}
    (shipped / "a.json").write_text(json.dumps(text))
    with caplog.at_level(logging.WARNING):
        assert Store(folder, shipped).listed(ask()) is None
    assert "tile_rows is missing" in caplog.text


@pytest.mark.parametrize("found", [None, 5, {"a": 1}, [5], ["kernel"], [None]], ids=str)
def test_something_else_than_lists_of_candidates_stops_the_run(folder, shipped, caplog, found):
    path = folder / "configs" / name_of()
    path.parent.mkdir(parents=True)
    entries = [entry(ask(), CONFIG).to_dict()]
    path.write_text(json.dumps({"format": 1, "entries": entries, "candidates": found}))
    with caplog.at_level(logging.WARNING):
        assert Store(folder, shipped).find(ask()).entry.config == CONFIG
    assert "left out" in caplog.text


@pytest.mark.parametrize(
    "change",
    [{"rows": None}, {"device": 1}, {"search": {"winner_s": -1}}, {"config": {"BLOCK_N": True}}],
    ids=str,
)
def test_a_wrong_entry_is_taken(change):
    values = entry(ask(), CONFIG, search=search_of({CONFIG: 1.0}, CONFIG)).to_dict()
    assert Entry.from_dict(values).config == CONFIG
    with pytest.raises(ValueError):
        Entry.from_dict(values | change)
