"""Copies and near copies among the rows of a dataset, across its splits: which rows to drop, and what each repeats.

Rows are taken by worth: first the part (test, eval, train), then the best rated (`meta["rating"]`), then the first. A row is dropped if it
repeats one that is kept: every reason names a row that stays, and no training row survives its held-out twin. Near copies: MinHash of
word shingles by rensa; rows that agree in a band are compared, and are near copies if the whole rows agree to `threshold` (estimated
Jaccard) and their answers to half of it, since rows about one long text differ in their answers. System prompts do not count.

Limits: a changed word breaks five shingles of five words, so 0.7 allows about one word in 25. Two questions about one long text with the
same short answer look like copies. Memory: 1.3 KB a row at the peak (one byte a permutation, own bands; rensa's index needs 2.3 KB).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from garage.core.errors import needs_extra
from garage.core.types import Row
from garage.data.decontaminate import words
from garage.data.encode import content_key

PERMUTATIONS, BATCH, SEED, MULTIPLIER = 128, 512, 1, 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class _Marks:
    """Of all rows: ids, their order of worth, keys (of the bands; the last of the exact content), signatures of whole and answer."""

    ids: Sequence[str]
    order: np.ndarray
    keys: np.ndarray
    signs: np.ndarray


def deduplicate(*parts: Iterable[Row], threshold: float = 0.7, shingle: int = 5) -> Iterator[tuple[Row, str]]:
    """Every row, in order, and "" or why it goes: "copy of ID" or "near copy of ID (0.83)".

    Args:
        parts: rows to be iterated twice; those of an earlier part outrank those of a later one (test, eval, train).
    """
    reasons = _decide(_read(parts, num_bands(threshold), shingle), threshold)
    return ((row, reasons.get(place, "")) for place, row in enumerate(chain(*parts)))


def num_bands(threshold: float) -> int:
    """The fewest bands that find a pair at the threshold with a chance of 60 %: 16 of 8 rows at 0.7."""
    return next(bands for bands in (1, 2, 4, 8, 16, 32, 64, 128) if bands == 128 or 1 - (1 - threshold ** (128 // bands)) ** bands >= 0.6)


def _read(parts: Sequence[Iterable[Row]], bands: int, width: int) -> _Marks:
    try:
        from rensa import RMinHash  # an extra
    except ImportError as error:
        raise needs_extra("rensa", "docs") from error
    stream, ids = ((rank, row) for rank, rows in enumerate(parts) for row in rows), list[str]()
    pieces = [(np.empty((0, 2)), np.empty((0, bands + 1), np.uint64), np.empty((0, 2, PERMUTATIONS), np.uint8))]
    mix = np.cumprod(np.full(PERMUTATIONS, MULTIPLIER, np.uint64))
    while batch := list(islice(stream, BATCH)):
        ids += [row.id or row.source for _, row in batch]
        sets = [_shingles(text, width) for _, row in batch for text in _said(row)]
        signs = np.array(RMinHash.digest_matrix_from_token_sets(sets, PERMUTATIONS, SEED).to_rows(), np.uint64).reshape(len(batch), 2, -1)
        mixed = (signs[:, 0] * mix).reshape(len(batch), bands, -1).sum(axis=2) + mix[:bands]
        keys = np.c_[mixed, np.array([content_key(row) for _, row in batch], np.uint64)]
        pieces.append((np.array([(rank, -_rating(row)) for rank, row in batch]), keys, signs.astype(np.uint8)))
    worth, *columns = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return _Marks(ids, np.lexsort((worth[:, 1], worth[:, 0])), *columns)


def _decide(marks: _Marks, threshold: float) -> dict[int, str]:
    """Why each dropped row goes, by place. Only rows that share a key with another are looked at."""
    keys = np.sort(marks.keys, axis=None)
    shared = np.append(keys[1:][keys[1:] == keys[:-1]], np.uint64(2**64 - 1))  # the last so that every key finds a place
    is_shared = shared[np.searchsorted(shared, marks.keys)] == marks.keys
    kept: defaultdict[int, list[int]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for row in marks.order[np.take(is_shared.any(axis=1), marks.order)].tolist():
        buckets = [kept[key] for key in marks.keys[row][is_shared[row]].tolist()]
        others = sorted({other for bucket in buckets for other in bucket})
        equal: np.ndarray = marks.signs[others] == marks.signs[row]
        alike = (equal.mean(axis=2) - 1 / 256) / (1 - 1 / 256)  # the low bytes of different values agree once in 256 times
        score = np.where(alike[:, 1] >= threshold / 2, alike[:, 0], 0)
        if len(others) and score.max() >= threshold:
            best, like = others[int(score.argmax())], score.max()
            is_copy = like == 1 and marks.keys[best, -1] == marks.keys[row, -1]
            reasons[row] = f"copy of {marks.ids[best]}" if is_copy else f"near copy of {marks.ids[best]} ({like:.2f})"
            continue
        for bucket in buckets:
            bucket.append(row)
    return reasons


def _shingles(text: str, width: int) -> list[str]:
    found = words(text) or [text.strip()]
    return [" ".join(found[at : at + width]) for at in range(max(1, len(found) - width + 1))]


def _said(row: Row) -> tuple[str, str]:
    """All that is said but the system prompt, and the answer."""
    turns = [message for message in row.messages if message.role != "system"]
    said = [" ".join([m.reasoning, m.content, *(f"{call.name} {call.arguments}" for call in m.tool_calls)]) for m in turns]
    return "\n".join([*said, row.text, row.rejected]), "\n".join([*said[-1:], row.text, row.rejected])


def _rating(row: Row) -> float:
    try:
        return float(row.meta["rating"])
    except (KeyError, ValueError):
        return -1.0
