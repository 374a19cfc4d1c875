"""Documents to chunks that fit a token budget and know where they came from.

Text is first parted at its headings; inside a part a chunk takes as much as fits the budget and ends at the best boundary found in its
second half: an empty line, else the end of a line, of a sentence, of a word, else anywhere. Nothing is trimmed or normalised: a chunk is
`text[start:end]`, the next one starts where it ends (or `overlap` tokens before), so chunks without their overlaps are the document.

Limits: headings are markdown `#` lines; budgets are counted by the caller's tokenizer, a chunk alone, without its neighbours.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from garage.core.errors import UserError
from garage.store.corpus import Chunk, Document

_LINE = re.compile(r"^(?P<fence>```|~~~)|^(?P<marks>#{1,6})[ \t]+(?P<title>\S.*)$", re.MULTILINE)
_BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n[ \t]*\n+", r"\n", r"[.!?][\"')\]]*\s+", r"\s+"))
_WORD = re.compile(r"\s\S")


@dataclass(frozen=True)
class Budget:
    """Largest chunk and overlap between neighbours, in tokens as `count` counts them."""

    count: Callable[[str], int]
    limit: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.limit:
            raise UserError(f"chunks of {self.limit} tokens cannot overlap by {self.overlap}", remedy="make overlap_tokens smaller")


@dataclass
class _Pace:
    """Characters a token, as the text before showed: a first guess near the truth saves counting twice."""

    characters: float = 4.0


class _Section(NamedTuple):
    start: int
    end: int
    headings: tuple[str, ...]


def chunks_of(document: Document, text: str, budget: Budget, *, has_headings: bool = True, pages: Sequence[int] = ()) -> Iterator[Chunk]:
    """The chunks of one document, in order; `pages` are the offsets at which its pages start.

    A chunk's id is made of the document's and its place, so that the same document cut the same way has the same chunks.
    """
    pace = _Pace()
    for section in _sections(text) if has_headings else [_Section(0, len(text), ())]:
        for start, end, tokens in _cuts(text, section, budget, pace):
            page = bisect_right(pages, start) if pages else None
            yield Chunk(f"{document.id}-{start}", document.id, text[start:end], start, end, tokens, section.headings, page)


def _sections(text: str) -> Iterator[_Section]:
    """Parts under one path of headings; a heading with nothing below it joins the next part."""
    path: list[tuple[int, str]] = []
    start, body, fenced = 0, 0, False
    for line in _LINE.finditer(text):
        if line["fence"] or fenced:
            fenced ^= bool(line["fence"])
            continue
        if text[body : line.start()].strip():
            yield _Section(start, line.start(), tuple(title for _, title in path))
            start = line.start()
        depth = len(line["marks"])
        path = [*(above for above in path if above[0] < depth), (depth, line["title"].rstrip("# \t") or line["title"])]
        body = line.end()
    if start < len(text):
        yield _Section(start, len(text), tuple(title for _, title in path))


def _cuts(text: str, section: _Section, budget: Budget, pace: _Pace) -> Iterator[tuple[int, int, int]]:
    """Start, end and tokens of each chunk of a section."""
    start = done = section.start
    while done < section.end:
        end, tokens = _guessed(text, start, done, section.end, budget=budget, pace=pace)
        if end <= done:
            end = _fitting(text, start, section.end, budget, pace)
            if end <= done:
                start, end = done, _fitting(text, done, section.end, budget, pace)
            if end < section.end:
                end = _boundary(text, max(done, (start + end) // 2), end)
            tokens = budget.count(text[start:end])
        yield start, end, tokens
        done = end
        start = _overlapping(text, start, end, budget) if budget.overlap and end < section.end else end


def _guessed(text: str, start: int, done: int, stop: int, *, budget: Budget, pace: _Pace) -> tuple[int, int]:
    """An end at a boundary and the tokens up to it, counted once, if the pace so far gives one that fits and is not short; else `done`."""
    reach = min(start + int(0.97 * pace.characters * budget.limit), stop)
    if reach <= done:
        return done, 0
    end = reach if reach == stop else _boundary(text, max(done, (start + reach) // 2), reach)
    tokens = budget.count(text[start:end])
    pace.characters = (end - start) / max(1, tokens)
    is_short = reach < stop and (reach - start) / pace.characters < 0.9 * budget.limit
    return (done, 0) if tokens > budget.limit or is_short else (end, tokens)


def _fitting(text: str, start: int, stop: int, budget: Budget, pace: _Pace) -> int:
    """An end, at least one character on, up to which the text from `start` fits the budget, within 6 % of the greatest or of the budget."""
    low, high = 1, stop - start
    guess = max(1, min(int(0.97 * pace.characters * budget.limit), high))
    while high > low + low // 16:
        count = budget.count(text[start : start + guess])
        pace.characters = guess / max(1, count)
        low, high = (guess, high) if count <= budget.limit else (low, guess - 1)
        if 0.94 * budget.limit < count <= budget.limit:
            break
        aimed = int(0.97 * guess * budget.limit / max(1, count))  # the rule of three; by halves where that leads out
        guess = aimed if low < aimed <= high else (low + high + 1) // 2 if high < stop - start else min(high, 2 * low)
    return start + low


def _longest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """A length up to `high` that fits, within 3 % of the greatest, by bisection; `low` is taken to fit."""
    if fits(high):
        return high
    while high - low > 1 + low // 32:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _boundary(text: str, low: int, high: int) -> int:
    """The last end of the best kind of boundary in (low, high]; `high` if there is none."""
    for boundary in _BOUNDARIES:
        if ends := [found.end() for found in boundary.finditer(text, low, high)]:
            return ends[-1]
    return high


def _overlapping(text: str, start: int, end: int, budget: Budget) -> int:
    """Where the next chunk starts: at a word, with at most `overlap` tokens before `end`."""
    shared = _longest(lambda length: budget.count(text[end - length : end]) <= budget.overlap, 0, end - start - 1)
    word = _WORD.search(text, end - shared - 1, end)
    return word.start() + 1 if shared and word else end - shared
