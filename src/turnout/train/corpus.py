"""The built-in corpus: two small text tasks over the same words, generated and never downloaded.

    sums        forty-two plus seven is forty-nine.
    backwards   forty-two backwards is owt-ytrof.

The tiny base learns `sums`; LoRA then learns `backwards`, whose answers have the same letters in an
order that the base has never seen. Held-out documents are about numbers, or pairs of numbers, that
no training document is about.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_HELD_OUT = 10  # every tenth document


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents to train on and documents to judge by; no document is in both."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


def spell(number: int) -> str:
    """0 <= number < 1000 in English words, as in `three hundred forty-two`."""
    if not 0 <= number < 1000:
        raise ValueError(f"number is {number}; expected 0 <= number < 1000.")
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        return f"{_ONES[hundreds]} hundred" + (f" {spell(rest)}" if rest else "")
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def sums(seed: int) -> Corpus:
    """Every a + b with 0 <= a, b < 100, shuffled."""
    documents = [
        f"{spell(a)} plus {spell(b)} is {spell(a + b)}." for a in range(100) for b in range(100)
    ]
    return _split(documents, seed)


def backwards(seed: int) -> Corpus:
    """Every number below 1000 spelled backwards, shuffled."""
    documents = []
    for number in range(1000):
        words = spell(number)
        documents.append(f"{words} backwards is {words[::-1]}.")
    return _split(documents, seed)


def _split(documents: list[str], seed: int) -> Corpus:
    random.Random(seed).shuffle(documents)
    heldout = documents[::_HELD_OUT]
    train = [document for index, document in enumerate(documents) if index % _HELD_OUT]
    return Corpus(train=tuple(train), heldout=tuple(heldout))
