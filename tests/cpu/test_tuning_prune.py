"""From records to fewer candidates: what is kept, what that costs, and what ships."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from tuning_cases import GRAM, PLAIN, ask, entry, gram, rows, search_of
from turnout.tune import from_reports
from turnout.tuning import journal, report, table
from turnout.tuning.cache import Store
from turnout.tuning.candidates import candidates
from turnout.tuning.entry import Entry
from turnout.tuning.prune import Record, loss, prune, records_of, shipped_table
from turnout.tuning.report import Event
from turnout.tuning.table import Table

A, B, C = rows(128), rows(256), rows(64)


def record(times, *, count=131072, n=1536, name="H100", problem=PLAIN, winner=None) -> Record:
    question = ask(replace(problem, rows=count, n=n), name=name)
    winner = winner or min(times, key=times.get)
    return Record(
        key=question.key,
        rows=entry(question, winner).rows,
        device=name,
        winner=winner,
        search=search_of(times, winner),
    )


def many(times, number=12):
    """The same times for problems of many widths, some of them held out."""
    found = [record(times, n=256 * (1 + i)) for i in range(number)]
    assert {one.is_held_out for one in found} == {True, False}
    return found


def test_a_config_that_never_helps_is_kept():
    (one,) = prune(many({A: 1.0, B: 0.5, C: 2.0}))
    assert one.kept == (B,)
    assert one.dropped == (A, C)
    assert one.regret == (0.0, 0.0)
    assert one.seen + one.held_out == 12


def test_a_config_that_some_problem_needs_is_dropped():
    wide = [record({A: 1.0, B: 0.5}, n=256 * i) for i in range(1, 9)]
    narrow = [record({A: 0.5, B: 1.0}, n=256 * i) for i in range(9, 17)]
    (one,) = prune(wide + narrow)
    assert set(one.kept) == {A, B}


def test_a_gain_inside_the_tolerance_keeps_a_config():
    wide = [record({A: 1.0, B: 0.995}, n=256 * i) for i in range(1, 9)]
    narrow = [record({A: 0.995, B: 1.0}, n=256 * i) for i in range(9, 17)]
    (one,) = prune(wide + narrow)
    assert len(one.kept) == 1


def test_the_regret_is_of_what_was_seen():
    """Held-out problems want C, which no other does."""
    found = many({A: 1.0, B: 0.5, C: 2.0})
    odd = [
        record({A: 1.0, B: 0.5, C: 0.25}, n=int(one.key.n)) if one.is_held_out else one
        for one in found
    ]
    (one,) = prune(odd)
    assert one.kept == (B,)
    assert one.regret == (pytest.approx(1.0), pytest.approx(1.0))


def test_more_is_kept_than_asked():
    found = [record({A: 1.0, B: 1.0, C: 1.0} | {c: 0.5}, n=256 * i) for i, c in
             enumerate((A, B, C) * 4, start=1)]  # fmt: skip
    (one,) = prune(found, most=2)
    assert len(one.kept) == 2


def test_kernels_chips_or_row_tiles_share_a_list():
    other = ask(replace(PLAIN, rows=1024), arch=80)
    found = [
        record({A: 1.0}),
        record({gram(16, 128): 1.0}, problem=GRAM, n=16),
        replace(record({B: 1.0}), key=other.key),
        replace(record({C: 1.0}), key=replace(ask().key, tile_rows=64)),
    ]
    assert [one.kept for one in prune(found)] == [(A,), (gram(16, 128),), (B,), (C,)]
    assert len({one.group for one in prune(found)}) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("problem", [GRAM, replace(PLAIN, n=16, narrow=True)], ids=["gram", "rows"])
def test_records_of_adapters_shorten_the_list_of_wide_products(tmp_path, problem, dtype):
    """A product of 16 columns is timed with narrow tiles alone; of wider ones it says nothing."""
    narrow = replace(problem, n=16, dtype=dtype)
    listed = candidates(ask(narrow))[0]
    found = [
        record(dict.fromkeys(listed, 1.0), problem=replace(narrow, k=256 * i), n=16)
        for i in range(1, 9)
    ]
    table.write(tmp_path / "a.json", shipped_table([], prune(found)))
    store = Store(None, tmp_path)
    assert store.listed(ask(narrow)) == listed[:1]
    for n in (64, 128, 2048):
        assert store.listed(ask(replace(problem, n=n, dtype=dtype, narrow=False))) is None


def test_a_problem_without_any_kept_time_loses_nothing():
    assert loss(record({A: 1.0, B: 0.5}), [A]) == 1.0
    assert loss(record({A: 1.0}), [C]) == float("inf")


def test_another_config_ships_than_the_search_chose():
    """Inside the noise the search keeps the incumbent, and so does the table."""
    one = record({A: 1.0, B: 0.99}, winner=A)
    made = shipped_table([one], prune([one]))
    assert made.entries[0].config == A
    assert made.entries[0].search is None
    assert (made.entries[0].rows, made.entries[0].device) == (131072, "H100")


def test_machines_that_differ_are_not_weighed():
    records = [record({A: 1.0, B: 1.1}), record({A: 1.5, B: 1.0}), record({A: 1.2, B: 1.0})]
    assert shipped_table(records, []).entries[0].config == B
    apart = [record({A: 1.0, B: 1.1}), record({A: 1.5, B: 1.0}, name="H200")]
    assert [e.config for e in shipped_table(apart, []).entries] == [A, B]


def event(one: Record) -> dict:
    question = ask(replace(PLAIN, rows=one.rows, n=one.key.n), name=one.device)
    made = Event(ask=question, config=one.winner, source="tuned", search=one.search)
    return made.to_dict()


HEAD = {"event": "head", "format": report.FORMAT, "turnout": "0"}


def written(folder, records, name="a.jsonl"):
    journal.append(folder / name, [HEAD, *map(event, records)])
    return folder


def test_a_record_changes_on_its_way_through_a_report(tmp_path):
    one = record({A: 1.0, B: 0.5})
    written(tmp_path, [one])
    assert records_of(journal.read(tmp_path / "a.jsonl")) == ([one], [])


def test_an_event_that_can_not_be_read_hides_the_others(tmp_path):
    good = event(record({A: 1.0, B: 0.5}))
    odd = [
        good | {"kernel": "scatter2scatter"},
        good | {"key": {}},
        good | {"search": {"winner_s": "x"}},
        good | {"search": good["search"] | {"times": []}},
        good | {"search": None},  # was not searched, which is no fault
    ]
    journal.append(tmp_path / "a.jsonl", [HEAD, *odd, good])
    found, faults = records_of(journal.read(tmp_path / "a.jsonl"))
    assert len(found) == 1
    assert len(faults) == 4


def test_the_command_does_not_close_the_loop(tmp_path, capsys):
    """Reports of two machines in, a table out that the next search and the next run take."""
    one = written(tmp_path / "one", many({A: 1.0, B: 0.5, C: 2.0}))
    two = written(tmp_path / "two", many({A: 1.0, B: 0.6, C: 2.0}))
    (tmp_path / "shipped").mkdir()
    emit = tmp_path / "shipped" / "h100.json"
    result = from_reports.main([one, two], emit)
    assert result["searches"] == 24
    assert result["entries"] == 12
    text = capsys.readouterr().out
    assert "dropped: rows sm_90 tile 128" in text
    assert "regret" in text
    store = Store(None, tmp_path / "shipped")
    question = ask(replace(PLAIN, n=256), name="H100")
    assert store.find(question).entry.config == B
    assert store.listed(question) == (B,)
    assert json.loads(emit.read_text())["format"] == table.FORMAT


def test_a_report_that_is_read_twice_counts_twice(tmp_path):
    folder = written(tmp_path, [record({A: 1.0, B: 0.5})])
    written(tmp_path, [record({A: 1.0, B: 0.5})])  # the next run finds it in the cache
    result = from_reports.main([folder, folder / "a.jsonl"], tmp_path / "out.json")
    assert result["searches"] == 1
    assert len(result["reports"]) == 1


def cached(folder, records):
    """The cache of a machine whose `turnout tune` found them."""
    Store(folder).put(
        Entry(key=r.key, rows=r.rows, device=r.device, config=r.winner, search=r.search)
        for r in records
    )
    return folder


def test_a_search_that_was_killed_before_its_record_is_lost(tmp_path, caplog):
    """What it found is in the cache, with all times: the folder counts, and so does the file."""
    found = many({A: 1.0, B: 0.5})
    cached(tmp_path / "cache", found)
    (tmp_path / "cache" / "config.json").write_text("{}")  # no file of a cache
    (file,) = (tmp_path / "cache" / "configs").glob("*.json")
    emit = tmp_path / "out.json"
    for place in (tmp_path / "cache", file):
        assert from_reports.main([place], emit)["searches"] == len(found)
        made = {entry.place: entry.config for entry in table.read(emit).entries}
        assert made == {(one.key, one.rows, one.device): B for one in found}
    assert not caplog.text


def test_a_report_with_the_name_of_a_table_is_left_out(tmp_path):
    written(tmp_path, [record({A: 1.0, B: 0.5})], name="record.json")
    result = from_reports.main([tmp_path / "record.json"], tmp_path / "out.json")
    assert (result["searches"], result["faults"]) == (1, [])


def test_a_search_in_the_record_and_in_the_cache_counts_twice(tmp_path):
    found = [record({A: 1.0, B: 0.5}), record({A: 1.0, B: 0.5}, n=768)]
    cached(tmp_path, found)
    written(tmp_path, found[:1])
    result = from_reports.main([tmp_path], tmp_path / "out.json")
    assert (result["searches"], len(result["reports"])) == (2, 2)


def test_a_stored_config_without_times_is_a_record(tmp_path, caplog):
    whole, shipped = record({A: 1.0, B: 0.5}), record({A: 1.0}, n=768)
    empty = replace(record({A: 1.0}, n=256), search=replace(whole.search, times=()))
    cached(tmp_path, [whole, empty, replace(shipped, search=None)])
    (tmp_path / "broken-triton-3.6.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        result = from_reports.main([tmp_path], tmp_path / "out.json")
    assert result["searches"] == 1
    assert len(result["faults"]) == 2
    for text in ("is no JSON", "has no times", *result["faults"]):
        assert text in caplog.text


def test_a_report_of_another_version_stops_the_others(tmp_path, caplog):
    written(tmp_path, [record({A: 1.0, B: 0.5})])
    (tmp_path / "b.jsonl").write_text('{"event": "head", "format": 9}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "data"}\n')
    with caplog.at_level(logging.WARNING):
        result = from_reports.main([tmp_path], tmp_path / "out.json")
    assert result["searches"] == 1
    assert len(result["faults"]) == 2
    assert "format 9" in caplog.text


@pytest.mark.parametrize(
    ("places", "emit", "text"),
    [
        (["a"], None, "--emit"),
        (["a"], "nowhere/x.json", "folder that exists"),
        (["nowhere"], "x.json", "does not exist"),
        (["empty"], "x.json", "hold no search"),
    ],
)
def test_a_mistake_is_a_traceback(tmp_path, places, emit, text):
    (tmp_path / "a").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=text):
        from_reports.main([tmp_path / one for one in places], emit and tmp_path / emit)


def test_a_shipped_list_shrinks():
    """Nothing of it is needed here but B, which it does not have; the rest of it stays in front."""
    found = many({A: 1.0, B: 0.5, C: 2.0})
    (one,) = prune(found, base={found[0].group: (C, A)})
    assert (one.base, one.kept, one.dropped) == ((C, A), (C, A, B), ())


def test_a_shipped_list_that_is_good_enough_grows():
    found = many({A: 1.0, B: 0.995})
    (one,) = prune(found, base={found[0].group: (A,)})
    assert (one.kept, one.dropped) == ((A,), (B,))
    assert one.base_regret == (pytest.approx(1 / 0.995 - 1), pytest.approx(1 / 0.995 - 1))
    (new,) = prune(found)
    assert (new.base, new.kept, new.base_regret) == ((), (B,), None)


def test_a_problem_that_the_choice_does_not_see_makes_a_shipped_list_longer():
    """Held-out problems alone lose with A: the list stays, both figures say what it loses."""
    found = [
        record({A: 1.0, B: 0.5 if one.is_held_out else 1.0}, n=one.key.n) for one in many({A: 1.0})
    ]
    (one,) = prune(found, base={found[0].group: (A,)})
    assert one.kept == (A,)
    assert one.regret == (pytest.approx(1.0), pytest.approx(1.0))
    mean = 2 ** (one.held_out / len(found)) - 1
    assert one.base_regret == (pytest.approx(mean), pytest.approx(1.0))


def test_the_loss_of_a_shipped_list_is_that_of_the_longer_one():
    """All problems count, also those that the longer list was chosen by."""
    found = many({A: 1.0, B: 0.5})
    (one,) = prune(found, base={found[0].group: (A,)})
    assert one.regret == (0.0, 0.0)
    assert one.base_regret == (pytest.approx(1.0), pytest.approx(1.0))


def test_a_shipped_list_that_nobody_timed_is_a_traceback():
    found = many({A: 1.0, B: 0.5})
    (one,) = prune(found, base={found[0].group: (C,)})
    assert one.kept == (C, B)
    assert one.base_regret == (float("inf"), float("inf"))


def test_a_shipped_list_grows_beyond_the_most():
    wanted = (A, B, C) * 4
    found = [record({A: 1.0, B: 1.0, C: 1.0} | {c: 0.5}, n=256 * i) for i, c in
             enumerate(wanted, start=1)]  # fmt: skip
    group = found[0].group
    assert [len(one.kept) for one in prune(found, most=2, base={group: (A,)})] == [2]
    assert [one.kept for one in prune(found, most=1, base={group: (C, A)})] == [(C, A)]


def test_a_shipped_list_without_a_record_is_judged():
    found = many({A: 1.0, B: 0.5})
    other = record({gram(16, 128): 1.0}, problem=GRAM, n=16).group
    (one,) = prune(found, base={other: (gram(16, 128),)})
    assert (one.group, one.base, one.base_regret) == (found[0].group, (), None)


def base_table(folder):
    """A table that ships: `record()` on an H100 and on an H200, and lists of two families."""
    on = record({A: 1.0})
    wide, narrow = on.group, record({gram(16, 128): 1.0}, problem=GRAM, n=16).group
    entries = [
        Entry(key=on.key, rows=on.rows, device=device, config=A) for device in ("H100", "H200")
    ]
    path = folder / "shipped" / "hopper.json"
    table.write(path, Table(tuple(entries), {narrow: (gram(16, 128),), wide: (A,)}))
    return path


def test_a_table_that_ships_is_lost_when_its_records_are(tmp_path, capsys):
    """Onto itself: one entry is replaced, one added, the list longer, all else as it was."""
    path = base_table(tmp_path)
    before = table.read(path)
    found = [record({A: 1.0, B: 0.5}), record({A: 1.0, B: 0.5, C: 2.0}, n=768)]
    result = from_reports.main([written(tmp_path / "new", found)], path, path)
    made = table.read(path)
    assert made.entries[0] == replace(before.entries[0], config=B)
    assert made.entries[1] == before.entries[1]
    assert [entry.place for entry in made.entries[2:]] == [(found[1].key, found[1].rows, "H100")]
    wide, narrow = found[0].group, next(iter(before.candidates))
    assert list(made.candidates.items()) == [(narrow, before.candidates[narrow]), (wide, (A, B))]
    assert (result["onto"], result["searches"], result["entries"]) == (str(path), 2, 3)
    (group,) = result["groups"]
    assert group["kernel"] == "rows"
    assert (group["base_regret"], group["worst_base_regret"]) == (pytest.approx(1.0),) * 2
    text = capsys.readouterr().out
    assert "base worst" in text
    assert "100.00 %" in text
    assert f"added: rows sm_90 tile 128: {B}" in text
    assert f"dropped: rows sm_90 tile 128: {C}" in text
    assert "onto 2 configs" in text
    assert "gram" not in text
    assert [file.name for file in path.parent.iterdir()] == ["hopper.json"]


def test_records_alone_are_said_to_have_a_base(tmp_path, capsys):
    result = from_reports.main([written(tmp_path, many({A: 1.0}))], tmp_path / "out.json")
    assert result["onto"] is None
    assert result["groups"][0]["base_regret"] is None
    text = capsys.readouterr().out
    assert not [word for word in ("base", "added", "onto") if word in text]


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.unlink(), "is no file"),
        (lambda path: path.write_text("{"), "is no JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is no text"),
        (lambda path: path.write_text("[]"), "has format None; expected a table of format 1"),
        (lambda path: changed(path, lambda t: t.update(format=9)), "has format 9"),
        (lambda path: changed(path, lambda t: t["entries"][0].pop("n")), "1 of 2 entries"),
        (lambda path: changed(path, lambda t: t["entries"][0].update(new=1)), "would be lost"),
        (lambda path: changed(path, lambda t: t["candidates"].append(3)), "2 lists"),
    ],
)
def test_what_can_not_be_read_of_a_shipped_table_is_lost(tmp_path, damage, text):
    path = base_table(tmp_path)
    damage(path)
    before = path.read_bytes() if path.exists() else None
    new = written(tmp_path / "new", [record({A: 1.0})])
    with pytest.raises(ValueError, match=text) as error:
        from_reports.main([new], path, path)
    assert "--onto" in str(error.value)
    assert "leave --onto out" in str(error.value)
    assert (path.read_bytes() if path.exists() else None) == before
