"""What a teacher is asked about, and in which order.

Documents take turns, and of each the chunk with most to say comes first: no document stands for the others, no beginning for its document.
A source comes up again, for questions of other types, until it has brought nothing new `DRY_VISITS` times running.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from re import findall

from garage.core.errors import UserError
from garage.core.seeds import derive
from garage.core.types import Row
from garage.data.asking import Form
from garage.data.encode import document_of
from garage.store.corpus import Chunk

WORDS_PER_ITEM, FEWEST_WORDS, DRY_VISITS, KEPT_QUESTIONS = 15, 5, 2, 40
"""Different words of a chunk that make one item, and that make a chunk worth asking about; visits without a row; questions shown again."""


@dataclass(frozen=True)
class Source:
    """What one prompt is about: a chunk of a document, or a row of a dataset."""

    id: str
    document: str
    text: str
    start: int = 0
    headings: tuple[str, ...] = ()
    row: Row | None = None

    @property
    def shown(self) -> str:
        return f"{' > '.join(self.headings)}\n\n{self.text}" if self.headings else self.text

    @property
    def says_enough(self) -> bool:
        return self.row is not None or self.num_words >= FEWEST_WORDS

    @property
    def num_words(self) -> int:
        """Different words of four letters or more."""
        return len(set(findall(r"[^\W\d_]{4,}", self.text.lower())))


@dataclass(frozen=True)
class Job:
    """One visit to a source: how many items to ask for, of which types, and what is asked there already."""

    source: Source
    visit: int
    num_items: int
    types: Sequence[str]
    asked: Sequence[str]


def sources_of(items: Iterable[Chunk | Row]) -> Iterator[Source]:
    """Chunks, and rows that end with an answer, as sources."""
    for item in items:
        if isinstance(item, Chunk):
            yield Source(item.id, item.document, item.text, item.start, item.headings)
        elif len(item.messages) > 1 and item.messages[-1].role == "assistant" and item.messages[-1].content.strip():
            yield Source(item.id, document_of(item), "\n\n".join(f"{m.role}: {m.content}" for m in item.messages), row=item)


def divide(sources: Sequence[Source], share: float, seed: int) -> tuple[list[Source], list[Source]]:
    """Sources to train on and to test on, whole documents each; UserError if there is only one document for both."""
    documents = sorted({source.document for source in sources}, key=lambda document: derive(seed, "test", document))
    held = set(documents[: max(1, round(share * len(documents)))] if share else ())
    if len(held) == len(documents):
        remedy = "give more documents, or leave --test_share out"
        raise UserError("a single document cannot be both trained on and held out", remedy=remedy)
    return [source for source in sources if source.document not in held], [source for source in sources if source.document in held]


class Plan:
    """Which sources are asked next, again and again until each has brought nothing new `DRY_VISITS` times running."""

    def __init__(self, sources: Sequence[Source], form: Form, seed: int) -> None:
        self._form, self._visits, self._dry, self._is_cut = form, Counter[str](), Counter[str](), set[str]()
        by_document, self._asked = defaultdict[str, list[Source]](list), defaultdict[str, list[str]](list)
        for source in sources:
            by_document[source.document].append(source)
        turns = [(turn, derive(seed, "order", document), source) for document, own in by_document.items()
                 for turn, source in enumerate(sorted(own, key=lambda source: (-source.num_words, source.start)))]  # fmt: skip
        self._queue = deque(source for _, _, source in sorted(turns, key=lambda item: item[:2]))

    def take(self, num_items: int, limit: int) -> list[Job]:
        """The next jobs, each of another source: as many as make so many items, `limit` at most."""
        jobs, planned = list[Job](), 0
        while self._queue and planned < num_items and len(jobs) < limit:
            source = self._queue.popleft()
            visit, types = self._visits[source.id], self._form.types
            most = self._form.most if source.row else min(self._form.most, source.num_words // WORDS_PER_ITEM)
            count = max(1, most // (2 if source.id in self._is_cut else 1))
            first = derive(0, source.id) + visit * count
            chosen = [types[(first + i) % len(types)] for i in range(count)] if types else []
            jobs.append(Job(source, visit, count, chosen, self._asked[source.id][-KEPT_QUESTIONS:]))
            planned += count
        return jobs

    def note(self, job: Job, accepted: Sequence[str], *, is_cut: bool) -> None:
        """What a visit brought: the questions accepted, and whether the reply was cut off for its length."""
        name = job.source.id
        self._visits[name] += 1
        self._dry[name] = 0 if accepted else self._dry[name] + 1
        self._asked[name] += accepted
        if is_cut:
            self._is_cut.add(name)
        if self._dry[name] < DRY_VISITS and not (accepted and self._form.most == 1):
            self._queue.append(job.source)
