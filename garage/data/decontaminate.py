"""Evaluation questions among training rows, found by hashes of what was asked: a set can be recognised without being held.

Three rules; a number is a figure or an English number word, and numbers in a row are one. Case and punctuation do not count.

    question   the whole question is one of the set's; with fewer than 8 different words besides numbers, the answer is the same as well
    template   so is the question with its numbers masked ("16 eggs" = "nine eggs"), if it has 8 such words
    ngram      13 words of a question, numbers masked, stand together anywhere in the row; they hold 8 such words, and at most 2 questions
               of the set share them: what more share is a form of asking

Answers are not searched for: a fact may be taught in other words than it is tested in. The asset knows the first 1,000 of the 1,319
questions of GSM8K's test split and all 30 of AIME 2024, as 48-bit hashes (written by bench/samples/make_fingerprints.py).

Limits: paraphrases that leave no 13 words together pass. Source of the 13 words: Brown et al. 2020, arXiv 2005.14165, appendix C.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib.resources import files
from itertools import pairwise
from typing import get_args

import numpy as np

from garage.core.types import Message, Row
from garage.specs.curate import RuleName

RULES: tuple[RuleName, ...] = get_args(RuleName)
RUN, DISTINCT, SHARED, BYTES = 13, 8, 3, 6
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")
_NUMBER = re.compile(r"\d.*|(thir|four|fif|six|seven|eigh|nine)teen|(twen|thir|for|fif|six|seven|eigh|nine)ty|zero|one|two|three|four|five|"
                     r"six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|million|billion")  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """An evaluation set as hashes; `about` says what is in it."""

    name: str
    about: str
    rows: int
    question: frozenset[int]
    template: frozenset[int]
    ngram: frozenset[int]


def words(text: str) -> list[str]:
    """Words and numbers without case, punctuation and compatibility forms; each Chinese or Japanese character is one."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def fingerprint(name: str, rows: Iterable[Row], *, about: str = "") -> Fingerprint:
    """The hashes of what the rows of an evaluation set ask (a plain text asks itself)."""
    questions, templates, runs, count = set[int](), set[int](), Counter[int](), 0
    for row in rows:
        count += 1
        for question, answer in _asked(row):
            masked = _masked(question)
            questions |= _key(question, answer)
            templates |= _key(masked)
            runs.update({run for at, run in enumerate(_runs(masked)) if len({*masked[at : at + RUN]} - {"0"}) >= DISTINCT})
    ngrams = frozenset(run for run, shared in runs.items() if shared < SHARED)
    return Fingerprint(name, about, count, frozenset(questions), frozenset(templates), ngrams)


def contamination(row: Row, prints: Sequence[Fingerprint], rules: Sequence[RuleName] = RULES) -> str:
    """Nothing, or the first rule and set that the row falls under: "question in gsm8k-test"."""
    said = (*(message.content for message in row.messages), row.text, row.rejected)
    hashes: dict[RuleName, set[int]] = {
        "question": {key for asked in _asked(row) for key in _key(*asked)},
        "template": {key for question, _ in _asked(row) for key in _key(_masked(question))},
        "ngram": {run for text in said for run in _runs(_masked(words(text)))},
    }
    return next((f"{rule} in {each.name}" for rule in rules for each in prints if not hashes[rule].isdisjoint(getattr(each, rule))), "")


@lru_cache
def built_in() -> tuple[Fingerprint, ...]:
    """The sets that every dataset is compared with."""
    return unpack((files("garage") / "assets" / "fingerprints.bin").read_bytes())


def pack(prints: Sequence[Fingerprint]) -> bytes:
    """Fingerprints as a file."""
    sets = [{"name": p.name, "about": p.about, "rows": p.rows, **{rule: len(getattr(p, rule)) for rule in RULES}} for p in prints]
    head = json.dumps({"form": "48-bit hashes, big-endian, of each set's question, template and ngram; no text", "sets": sets})
    hashes = b"".join(key.to_bytes(BYTES, "big") for p in prints for rule in RULES for key in sorted(getattr(p, rule)))
    return head.encode() + b"\n" + hashes


def unpack(data: bytes) -> tuple[Fingerprint, ...]:
    """The inverse of `pack`."""
    head, _, body = data.partition(b"\n")
    keys = (int.from_bytes(body[at : at + BYTES], "big") for at in range(0, len(body), BYTES))
    return tuple(
        Fingerprint(raw["name"], raw["about"], raw["rows"], *(frozenset(next(keys) for _ in range(raw[rule])) for rule in RULES))
        for raw in json.loads(head)["sets"]
    )


def _asked(row: Row) -> Iterator[tuple[list[str], list[str]]]:
    turns = (*row.messages, Message("user", row.text), Message("assistant", ""))
    return ((words(turn.content), words(reply.content)) for turn, reply in pairwise(turns) if turn.role == "user" and turn.content)


def _masked(found: Sequence[str]) -> list[str]:
    masks = ["0" if _NUMBER.fullmatch(word) else word for word in found]
    return [word for at, word in enumerate(masks) if word != "0" or masks[at - 1 : at] != ["0"]]


def _key(found: Sequence[str], answer: Sequence[str] = ()) -> set[int]:
    """The hash of a question, none if it is too short to tell and has no answer."""
    is_long = len({*found} - {"0"}) >= DISTINCT
    return {_hash(" ".join(found if is_long else [*found, "\x1f", *answer]))} if is_long or answer else set()


def _runs(masked: Sequence[str]) -> list[int]:
    """A hash of each 13 words: the sum of the words' hashes times powers of an odd number, in 64 bits."""
    hashes, powers = np.fromiter(map(_hash, masked), np.uint64), np.cumprod(np.full(RUN, 0x9E3779B97F4A7C15, np.uint64))
    return [int(sum_ >> 16) for sum_ in np.correlate(hashes, powers, "valid").tolist()] if len(hashes) >= RUN else []


@lru_cache(maxsize=1 << 16)
def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=BYTES).digest(), "big")
