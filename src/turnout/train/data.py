"""Text to packed sequences: every document's tokens, then EOS, cut into rows of equal length.

Attention crosses document borders: there is no document mask. The loss counts every token, the
prompts of chats included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset

PACKING = (
    "documents joined by EOS and cut into sequences of equal length; attention crosses document "
    "borders (no document mask); the loss counts every token, prompts included"
)
_JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
_HELD_OUT = 10  # every tenth sequence, at most _MOST_HELD_OUT
_MOST_HELD_OUT = 64


class Packed(Dataset[dict[str, torch.Tensor]]):
    """Rows of `ids` (N, seq_len) int64 as the Trainer wants them; labels are the inputs."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What to train on and what to judge by. `heldout` is None when there is one sequence only."""

    train: Packed
    heldout: Packed | None
    num_documents: int
    source: str

    def fingerprint(self) -> str:
        """The same for the same tokens in the same order: a resumed run must find it again."""
        return hashlib.sha256(self.train.ids.numpy().tobytes()).hexdigest()


def read_documents(path: Path, tokenizer: Any) -> list[str]:
    """The documents of `path`: a whole text file is one; each line of a JSONL file is one.

    JSONL is told by the suffix (.jsonl, .json, .ndjson). All its lines have the same key, `text` or
    `messages`; messages go through the chat template of the tokenizer.

    Raises:
        ValueError: no such file, not UTF-8, no text in it, or a bad line, named by its number.
    """
    text = _read(path)
    if path.suffix.lower() not in _JSONL_SUFFIXES:
        documents = [text]
    else:
        documents = _jsonl_documents(path, text, tokenizer)
    if not any(document.strip() for document in documents):
        raise ValueError(f"{path} is empty; expected text to train on.")
    return documents


def pack(documents: Iterable[str], tokenizer: Any, seq_len: int, source: str) -> Packed:
    """All documents' tokens, each followed by EOS, in rows of `seq_len`; the rest is dropped.

    Raises:
        ValueError: the tokenizer has no EOS token, or there is less than one row of tokens.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no EOS token; expected one to separate documents. Set "
            '"eos_token" in tokenizer_config.json.'
        )
    stream: list[int] = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        stream += ids
        if not ids or ids[-1] != eos:
            stream.append(eos)
    rows = len(stream) // seq_len
    if rows == 0:
        raise ValueError(
            f"{source} has {len(stream)} tokens; expected at least seq_len = {seq_len} to fill one "
            "packed sequence. Give more data or a smaller --seq-len."
        )
    return Packed(torch.tensor(stream[: rows * seq_len]).view(rows, seq_len))


def split(packed: Packed) -> tuple[Packed, Packed | None]:
    """(train, held out): every tenth sequence is held out, one at least and 64 at most.

    A single sequence is trained on and nothing is held out.
    """
    rows = len(packed)
    if rows == 1:
        return packed, None
    step = max(_HELD_OUT, -(-rows // _MOST_HELD_OUT))
    held = torch.zeros(rows, dtype=torch.bool)
    held[min(step, rows) - 1 :: step] = True
    return Packed(packed.ids[~held]), Packed(packed.ids[held])


def load_data(path: Path, tokenizer: Any, seq_len: int) -> Data:
    """`path` read, packed and split.

    Raises:
        ValueError: as `read_documents` and `pack` say.
    """
    documents = read_documents(path, tokenizer)
    train, heldout = split(pack(documents, tokenizer, seq_len, str(path)))
    return Data(train=train, heldout=heldout, num_documents=len(documents), source=str(path))


def _read(path: Path) -> str:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"data is {path}, which is {what}; expected a text or .jsonl file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}); expected a text or .jsonl file in UTF-8."
        ) from None


def _jsonl_documents(path: Path, text: str, tokenizer: Any) -> list[str]:
    documents: list[str] = []
    first: tuple[str, int] | None = None  # the key of the first line, and that line's number
    # Not splitlines(): JSON strings may hold U+2028 and other separators as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _parse(where, line)
        key = _key_of(where, record)
        if first is None:
            first = (key, number)
        if key != first[0]:
            raise ValueError(
                f'{where}: has "{key}" but line {first[1]} has "{first[0]}"; expected the same key '
                "on every line. Split the file in two."
            )
        documents.append(
            _text_of(where, record["text"])
            if key == "text"
            else _chat_of(where, record["messages"], tokenizer)
        )
    return documents


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); expected one object per "
            'line, {"text": ...} or {"messages": [...]}.'
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: is a JSON {type(record).__name__}; expected an object, "
            '{"text": ...} or {"messages": [...]}.'
        )
    return record


def _key_of(where: str, record: dict[str, Any]) -> str:
    keys = [key for key in ("text", "messages") if key in record]
    if len(keys) != 1:
        got = ", ".join(map(repr, record)) or "none"
        raise ValueError(
            f'{where}: has the keys {got}; expected exactly one of "text", "messages".'
        )
    return keys[0]


def _text_of(where: str, text: object) -> str:
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" is {type(text).__name__}; expected a string.')
    return text


def _chat_of(where: str, messages: object, tokenizer: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" is {messages!r}; expected a list of messages.')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where}: message {index} is {message!r}; expected an object with "
                '"role" and "content".'
            )
        # Tool calls may stand in for the content.
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise ValueError(
                f"{where}: message {index} has content {message.get('content')!r}; expected "
                "a string."
            )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where}: has messages, but the tokenizer has no chat template. Use a checkpoint with "
            'one, or write the conversations out as {"text": ...}.'
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise ValueError(
            f"{where}: the chat template of the tokenizer refuses these messages: {error}"
        ) from None
