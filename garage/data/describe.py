"""What a dataset is about: its languages, the subjects that recur, and how varied it is, from a random sample of its rows.

Memory is that of the sample, whatever the size of the dataset. Subjects are words of five letters or more, and pairs of words, that stand
in several rows and in no more than 15 % of them: what stands in more is the language of the whole. A word counts once a row. Variety is
the share of different runs of four words among all of them: near 1 every row says something new, near 0 the rows repeat one another.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from garage.core.types import Row
from garage.data.curate import STOP_WORDS, language

SAMPLE, MOST_SUBJECTS, COMMON, LONG = 4000, 20, 0.15, 5
_WORD = re.compile(r"[^\W\d_][\w'-]+")


@dataclass(frozen=True)
class Description:
    """Shares of the sampled rows: by language, by subject, and of different four-word runs."""

    sample: int
    languages: tuple[tuple[str, float], ...]
    subjects: tuple[tuple[str, float], ...]
    variety: float


class Sampled:
    """A reservoir of rows: each row seen so far is in it with the same chance (algorithm R, Vitter 1985)."""

    def __init__(self, size: int = SAMPLE) -> None:
        self._size, self._rng, self._seen, self._rows = size, Random(0), 0, list[Row]()

    def see(self, row: Row) -> None:
        self._seen += 1
        place = self._rng.randrange(self._seen)
        if len(self._rows) < self._size:
            self._rows.append(row)
        elif place < self._size:
            self._rows[place] = row

    def describe(self) -> Description:
        texts = [text_of(row) for row in self._rows]
        count = max(1, len(texts))
        words = [[word.casefold() for word in _WORD.findall(text)] for text in texts]
        runs = [tuple(row[at : at + 4]) for row in words for at in range(len(row) - 3)]
        languages = Counter(map(language, texts)).most_common()
        variety = len(set(runs)) / len(runs) if runs else 1.0
        return Description(len(texts), tuple((name, n / count) for name, n in languages), _subjects(words), variety)


def text_of(row: Row) -> str:
    """All that a row says, roles aside."""
    return "\n".join([*(message.content for message in row.messages), row.text, row.rejected]).strip()


def _subjects(rows: list[list[str]]) -> tuple[tuple[str, float], ...]:
    counts: Counter[str] = Counter()
    for words in rows:
        pairs = (f"{a} {b}" for a, b in pairwise(words) if not {a, b} & STOP_WORDS)
        counts.update({*pairs, *(word for word in words if len(word) >= LONG and word not in STOP_WORDS)})
    shared = [(term, n) for term, n in counts.most_common(MOST_SUBJECTS * 10) if 1 < n <= COMMON * len(rows)]
    phrases = {word for term, n in shared[: MOST_SUBJECTS * 2] if " " in term for word in term.split()}
    kept = [(term, n / len(rows)) for term, n in shared if " " in term or term not in phrases]
    return tuple(kept[:MOST_SUBJECTS])
