"""Where configs come from: this user's cache, else what ships with turnout, else nothing.

    <TURNOUT_CACHE_DIR or ~/.cache/turnout>/configs/sm_90-triton-3.6.json
    src/turnout/tuning/configs/*.json

Of the entries with the same key the nearest bucket of rows in log space counts; of equally near
ones that of the same device, then the user's own. A bucket further away than `FAR` octaves says
nothing. An entry that no longer fits is left out with a message.

Nothing here stops a run: a corrupt file is set aside, a folder that can not be written and a full
disk cost one warning, and what was found stays in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout  # torch depends on it

from turnout.tuning import table
from turnout.tuning.candidates import Family
from turnout.tuning.entry import Entry, Source
from turnout.tuning.key import Ask, Config, Key, bucket_of, octaves
from turnout.tuning.space import fits
from turnout.tuning.table import Corrupt, Table

FAR = 3.0  # octaves: a config of 8 times as many rows is no better than the analytic default
LOCK_SECONDS = 20.0
_NO_LOCK = (OSError, Timeout, NotImplementedError)  # the last one: a file system without locks
FILES = "*-triton-*.json"  # what `_file_of` names
SHIPPED = Path(__file__).parent / "configs"
log = logging.getLogger("turnout.tuning")


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store knows for a question; `is_exact` if it is of the same bucket and device."""

    entry: Entry
    source: Source
    is_exact: bool


def cache_folder() -> Path | None:
    """The user's folder, whether it exists or not; None where there is no home."""
    given = os.environ.get("TURNOUT_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    try:
        return Path.home() / ".cache" / "turnout"
    except RuntimeError:
        return None


def store() -> Store:
    """The store of this process and the folder as it is set now."""
    return _store(cache_folder(), SHIPPED)


@lru_cache(maxsize=16)
def _store(folder: Path | None, shipped: Path) -> Store:
    return Store(folder, shipped)


class Store:
    """The tables of one cache folder and of the shipped one, read once, and what was tuned here."""

    def __init__(self, folder: Path | None, shipped: Path = SHIPPED) -> None:
        self.folder = folder
        self._shipped_folder = shipped
        self._users: dict[str, dict[Key, list[Entry]]] = {}
        self._shipped: Table | None = None
        self._shipped_index: dict[Key, list[Entry]] = {}
        self._tuned: dict[Key, list[Entry]] = {}
        self._said: set[str] = set()

    def find(self, ask: Ask, *, shipped: bool = True) -> Stored | None:
        """The stored config for a question: tuned here, in the user's cache, or shipped."""
        key = ask.key
        sources: list[tuple[Source, list[Entry]]] = [
            ("tuned", self._tuned.get(key, [])),
            ("user cache", self._user_entries(key)),
        ]
        if shipped:
            self.shipped()
            sources.append(("shipped", self._shipped_index.get(key, [])))
        known = [(entry, source) for source, entries in sources for entry in entries]
        for entry, source in sorted(known, key=lambda one: _distance(ask, one[0])):
            if octaves(ask.rows, entry.rows) > FAR:
                break
            reason = fits(ask, entry.config)
            if reason is None:
                is_same = entry.rows == bucket_of(ask.rows) and entry.device == ask.device.name
                return Stored(entry, source, is_same)
            self._say(f"the stored config {entry.config} for {key} is left out: {reason}")
        return None

    def put(self, entries: Iterable[Entry]) -> None:
        """Keeps them in this process, and in the user's cache if it can be written."""
        entries = list(entries)
        for entry in entries:
            kept = [e for e in self._tuned.get(entry.key, []) if e.place != entry.place]
            self._tuned[entry.key] = [*kept, entry]
        for name in dict.fromkeys(_file_of(entry.key) for entry in entries):
            self._write(name, [entry for entry in entries if _file_of(entry.key) == name])

    def listed(self, ask: Ask) -> tuple[Config, ...] | None:
        """The shipped list of candidates for this family and architecture, if there is one."""
        return self.shipped().candidates.get((Family.of(ask), ask.device.arch))

    def shipped(self) -> Table:
        """Everything that ships with turnout, as one table."""
        if self._shipped is None:
            found = Table()
            for path in sorted(self._shipped_folder.glob("*.json")):
                try:
                    one = table.read(path)
                except (Corrupt, OSError) as error:
                    self._say(str(error))
                    continue
                found = Table(
                    table.merged(found.entries, one.entries), found.candidates | one.candidates
                )
            self._shipped, self._shipped_index = found, _by_key(found.entries)
        return self._shipped

    def forget_files(self) -> None:
        """Look at the user's files again: another process may have written them."""
        self._users.clear()

    @contextmanager
    def searching(self, ask: Ask, seconds: float) -> Iterator[None]:
        """Held while a config is searched, so that processes that share a folder search once.

        The others wait, at most `seconds`, and then find it in the cache.
        """
        lock = None
        if self.folder is not None:
            name = hashlib.sha256(f"{ask.key} {bucket_of(ask.rows)}".encode()).hexdigest()[:24]
            lock = FileLock(self.folder / "locks" / f"{name}.lock", timeout=seconds)
            try:
                (self.folder / "locks").mkdir(parents=True, exist_ok=True)
                lock.acquire()
                self.forget_files()
            except _NO_LOCK:
                lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _user_entries(self, key: Key) -> list[Entry]:
        name = _file_of(key)
        if name not in self._users:
            self._users[name] = {} if self.folder is None else _by_key(self._read(name).entries)
        return self._users[name].get(key, [])

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "configs" / name

    def _read(self, name: str) -> Table:
        path = self._path(name)
        try:
            return table.read(path)
        except Corrupt as error:
            aside = table.set_aside(path)
            where = f"set aside as {aside.name}" if aside else "ignored"
            self._say(f"{error}. The file is {where}; the run goes on without it")
        except OSError as error:
            self._say(f"{path} can not be read ({error}); the run goes on without it")
        return Table()

    def _write(self, name: str, entries: list[Entry]) -> None:
        if self.folder is None:
            self._say("there is no home folder for a cache; set TURNOUT_CACHE_DIR to keep configs")
            return
        path = self._path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
                before = self._read(name)
                table.write(path, Table(table.merged(before.entries, entries)))
            self._users.pop(name, None)
        except _NO_LOCK as error:
            self._say(
                f"{path} can not be written ({error}); what was tuned is kept for this process "
                "only. Set TURNOUT_CACHE_DIR to a folder with room that can be written"
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _file_of(key: Key) -> str:
    where = "interpreter" if key.arch is None else f"sm_{key.arch}"
    return f"{where}-triton-{key.triton}.json"


def _by_key(entries: Iterable[Entry]) -> dict[Key, list[Entry]]:
    found: dict[Key, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.key, []).append(entry)
    return found


def _distance(ask: Ask, entry: Entry) -> tuple[float, bool]:
    """Octaves between the rows, then whether it is another device; the best is the least."""
    return octaves(ask.rows, entry.rows), entry.device != ask.device.name
