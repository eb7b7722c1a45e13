"""Corpus, packing and the output folder of `turnout train`: no model involved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turnout.train import corpus, folder
from turnout.train.builtin import make_tokenizer
from turnout.train.config import TrainConfig
from turnout.train.data import load_data, pack, read_documents, split

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (42, "forty-two"),
        (100, "one hundred"),
        (342, "three hundred forty-two"),
        (910, "nine hundred ten"),
    ],
)
def test_numbers_are_spelled(number, words):
    assert corpus.spell(number) == words


@pytest.mark.parametrize("task", [corpus.sums, corpus.backwards])
def test_heldout_documents_are_not_trained_on(task):
    documents = task(3)
    assert not set(documents.train) & set(documents.heldout)
    assert len(set(documents.train)) == len(documents.train)
    assert len(documents.train) == 9 * len(documents.heldout)
    assert task(3) == documents
    assert task(4) != documents


def test_the_second_task_answers_backwards():
    assert "forty-two backwards is owt-ytrof." in {
        *corpus.backwards(0).train,
        *corpus.backwards(0).heldout,
    }


def test_the_builtin_tokenizer_gives_back_any_ascii_text(tmp_path):
    text = "Ab 9\n\t{x}: ~!"
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER("ü")["input_ids"] == [TOKENIZER.unk_token_id]
    TOKENIZER.save_pretrained(tmp_path)
    assert TOKENIZER.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_documents_are_joined_by_eos_and_the_rest_is_dropped():
    packed = pack(["ab", "cde", "f"], TOKENIZER, 4, "here")
    a, b, c, d, e = TOKENIZER("abcde")["input_ids"]
    assert packed.ids.tolist() == [[a, b, EOS, c], [d, e, EOS, TOKENIZER("f")["input_ids"][0]]]
    row = packed[1]
    assert torch.equal(row["input_ids"], row["labels"])


def test_a_document_that_ends_with_eos_gets_no_second_one():
    assert pack(["ab<eos>", "c"], TOKENIZER, 5, "here").ids[0].tolist().count(EOS) == 2


@pytest.mark.parametrize(("rows", "held"), [(1, 0), (2, 1), (9, 1), (10, 1), (30, 3), (5000, 63)])
def test_some_sequences_are_held_out(rows, held):
    packed = pack(["x" * (4 * rows - 1)], TOKENIZER, 4, "here")
    packed.ids[:, 0] = torch.arange(rows)
    train, heldout = split(packed)
    assert len(train) == rows - held
    if held == 0:
        assert heldout is None
        return
    assert len(heldout) == held
    numbers = torch.cat([train.ids[:, 0], heldout.ids[:, 0]]).tolist()
    assert sorted(numbers) == list(range(rows))


def test_text_is_one_document_and_jsonl_one_per_line(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo\n")
    assert read_documents(text, TOKENIZER) == ["one\n\ntwo\n"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one", "source": 1}\n\n{"text": "two\\u2028more"}\r\n')
    assert read_documents(lines, TOKENIZER) == ["one", "two\u2028more"]


def test_messages_go_through_the_chat_template(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert read_documents(path, chat_tokenizer()) == ["user: hi\nassistant: yo\n"]


GOOD = '{"text": "ok"}'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", f"{GOOD}\n{{oops\n", ["line 2", "not JSON", '{"text": ...}']),
        ("a.jsonl", f"{GOOD}\n\n[1]\n", ["line 3", "list", "object"]),
        ("a.jsonl", '{"prompt": "x"}', ["line 1", "'prompt'", '"text", "messages"']),
        ("a.jsonl", '{"text": "x", "messages": []}', ["line 1", "exactly one"]),
        ("a.jsonl", f'{GOOD}\n{{"text": 3}}', ["line 2", "int", "string"]),
        ("a.jsonl", '{"messages": "x"}', ["line 1", "list of messages"]),
        ("a.jsonl", '{"messages": []}', ["line 1", "list of messages"]),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', ["line 1", "message 0", '"role"']),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', ["line 1", "content None", "string"]),
        (
            "a.jsonl",
            f'{GOOD}\n{{"messages": [{{"role": "user", "content": "x"}}]}}',
            ["line 2", '"messages"', "line 1", '"text"', "same key"],
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "x"}]}',
            ["line 1", "no chat template"],
        ),
        ("a.jsonl", "", ["empty"]),
        ("a.jsonl", '{"text": " "}\n', ["empty"]),
        ("a.txt", " \n ", ["empty"]),
        ("a.txt", "short", ["6 tokens", "seq_len = 64", "--seq-len"]),
    ],
)
def test_bad_data_is_named_by_file_and_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_data(path, TOKENIZER, 64)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_refusing_chat_template_is_named_by_line(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(ValueError, match=r"line 1.*roles must alternate"):
        read_documents(path, tokenizer)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        read_documents(tmp_path / "none.txt", TOKENIZER)
    with pytest.raises(ValueError, match="a folder"):
        read_documents(tmp_path, TOKENIZER)
    binary = tmp_path / "a.txt"
    binary.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_documents(binary, TOKENIZER)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        pack(["abc"], tokenizer, 2, "here")


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"rank": 0},
        {"rank": True},
        {"rank": 1.5},
        {"seq_len": 1},
        {"batch": -1},
        {"save_steps": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"alpha": -1.0},
        {"seed": -1},
        {"expert_dropout": 1.0},
        {"dtype": "float8"},
        {"backend": "fast"},
        {"router": "none"},
        {"recompute": "all"},
    ],
    ids=str,
)
def test_nonsense_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TrainConfig(**options)


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="resume and overwrite"):
        TrainConfig(resume=True, overwrite=True)
    with pytest.raises(ValueError, match="data is not given"):
        TrainConfig(model=Path("somewhere"))


def make_run(out: Path) -> Path:
    folder.start(out, {"steps": 3})
    (out / "adapter").mkdir()
    (out / "summary.json").write_text("{}")
    return out


def test_a_new_run_needs_an_empty_folder(tmp_path):
    folder.check_out(tmp_path, overwrite=False, resume=False)
    folder.check_out(tmp_path / "new", overwrite=False, resume=False)
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        folder.check_out(make_run(tmp_path / "run"), overwrite=False, resume=False)


def test_overwrite_replaces_an_earlier_run_only(tmp_path):
    run = make_run(tmp_path / "run")
    folder.check_out(run, overwrite=True, resume=False)
    folder.start(run, {"steps": 4})
    assert [path.name for path in run.iterdir()] == [folder.MARKER]
    assert folder.read_marker(run)["steps"] == 4


@pytest.mark.parametrize("foreign", ["thesis.tex", "summary.json", "adapter"])
def test_overwrite_never_deletes_a_folder_of_the_user(tmp_path, foreign):
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(ValueError, match="not an earlier run"):
        folder.check_out(tmp_path, overwrite=True, resume=False)
    run = make_run(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        folder.check_out(run, overwrite=True, resume=False)
    assert (run / "notes.txt").exists()


@pytest.mark.parametrize("marker", ["{}", "no json", '{"made_by": "another tool"}'])
def test_a_foreign_marker_is_not_ours(tmp_path, marker):
    (tmp_path / folder.MARKER).write_text(marker)
    with pytest.raises(ValueError, match=r"run\.json"):
        folder.check_out(tmp_path, overwrite=True, resume=False)


def test_out_must_be_a_plain_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(make_run(tmp_path / "run"))
    for out in (file, link):
        with pytest.raises(ValueError, match="plain folder"):
            folder.check_out(out, overwrite=True, resume=False)


def test_a_run_must_not_read_from_the_folder_it_writes(tmp_path):
    with pytest.raises(ValueError, match="lies in the output folder"):
        folder.check_outside(tmp_path, "model", tmp_path / "base")
    folder.check_outside(tmp_path / "a", "model", tmp_path / "base")


def test_resume_needs_a_complete_checkpoint_of_the_same_run(tmp_path):
    with pytest.raises(ValueError, match="no run"):
        folder.check_out(tmp_path, overwrite=False, resume=True)
    run = make_run(tmp_path / "run")
    folder.check_out(run, overwrite=False, resume=True)
    with pytest.raises(ValueError, match="no checkpoint"):
        folder.last_checkpoint(run)
    for step in (9, 10, 11):
        (run / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        if step != 11:
            (run / "checkpoints" / f"checkpoint-{step}" / folder.COUNTS).write_text("{}")
    assert folder.last_checkpoint(run).name == "checkpoint-10"
    folder.check_same_run(run, {"steps": 3})
    with pytest.raises(ValueError, match="steps = 3, not 4"):
        folder.check_same_run(run, {"steps": 4})


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    folder.write_json(path, {"a": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_file(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError):
        folder.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder.write_folder(tmp_path / "a", lambda path: (path / "old").write_text("x"))
    folder.write_folder(tmp_path / "a", lambda path: (path / "new").write_text("x"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
