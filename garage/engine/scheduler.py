"""Continuous batching: which tokens of which sequences are computed in the next step.

Every step the running sequences come first, in the order of their ranks: one token each where the answer is being written, a piece
of the prompt where it is not read yet. What is left of `max_num_batched_tokens` admits waiting sequences in the order of their ranks,
as long as pages for all their tokens are available. When a running sequence needs a page and there is none, the running one of the
last rank gives its pages back and waits again (recompute; Kwon et al., arXiv 2309.06180, section 4.5).

The rank of a sequence is its number of arrival and `HEAD_START` arrivals for each step of priority; it keeps it for life. Nothing
starves: priority lets at most a known number of later arrivals pass, the head of the queue is not passed by smaller requests, the
first of the running ones is never preempted, and a request that could not run alone is refused at once.

Pure Python, no tensors; one step costs a few list operations per sequence.
"""

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from garage.core.errors import UserError
from garage.engine.pages import PagePool, chain
from garage.engine.request import QueueFull, Sequence, State

HEAD_START = 1_000


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens `start` to `stop` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """After this slice the next token can be sampled."""
        return self.stop == len(self.sequence.tokens) < self.sequence.limit

    @property
    def is_end(self) -> bool:
        """This slice ends a sequence that is only read."""
        return self.stop == self.sequence.limit


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds the scheduler keeps; names as in the engine's spec."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    max_waiting_tokens: int
    max_model_len: int


class Scheduler:
    """Owns the waiting and the running sequences and their pages."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: list[Sequence] = []  # both lists by rank
        self.running: list[Sequence] = []
        self.num_waiting_tokens = self._num_arrived = 0  # tokens of prompts
        self._rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0

    def add(self, sequence: Sequence, priority: int = 0) -> None:
        """Queue a sequence.

        Raises:
            UserError: it could not run even alone.
            QueueFull: too many sequences or tokens wait already.
        """
        length, longest = sequence.limit, min(self.limits.max_model_len, self.pool.num_pages * self.pool.page_size + 1)
        if length > longest:
            asked = f"{sequence.num_prompt} prompt tokens and up to {length - sequence.num_prompt} new ones make {length}"
            raise UserError(f"{asked}, but this model is served with at most {longest}", remedy="shorten the prompt or lower max_tokens")
        if len(self.waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already", remedy="send the request again in a moment")
        if self.waiting and self.num_waiting_tokens + sequence.num_prompt > self.limits.max_waiting_tokens:
            raise QueueFull(f"{self.num_waiting_tokens} tokens wait already", remedy="send the request again in a moment")
        sequence.rank = self._num_arrived + HEAD_START * priority
        self._num_arrived += 1
        self._queue(sequence)

    def plan(self) -> list[Slice]:
        """The next step: slices in the order of their rows. Empty only when there is nothing to do.

        The pages of every slice exist when this returns; those it fills are entered in the prefix cache.
        """
        slices: list[Slice] = []
        budget, preemptions = self.limits.max_num_batched_tokens, self.num_preemptions
        while budget and len(slices) < len(self.running):
            sequence = self.running[len(slices)]
            if not self._grow(sequence):
                break
            budget -= self._cut(sequence, budget, slices)
        if self.num_preemptions == preemptions:
            self._admit(slices, budget)
        assert slices or not (self.waiting or self.running), "work is queued but nothing can run"
        return slices

    def computed(self, slices: Seq[Slice]) -> None:
        """The step of `slices` has run: their keys and values are in the pages."""
        for part in slices:
            part.sequence.num_computed = part.stop

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, in whatever state it is, and give its pages back."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            self.num_waiting_tokens -= sequence.num_prompt
        sequence.state = State.FINISHED

    def check_books(self) -> None:
        """Assert that no page is lost and that waiting sequences hold none."""
        assert not [s.id for s in self.waiting if s.pages], "a waiting sequence holds pages"
        assert self.num_waiting_tokens == sum(s.num_prompt for s in self.waiting), "waiting tokens are miscounted"
        rows = sorted([s.row for s in self.running] + self._rows)
        assert rows == list(range(self.limits.max_num_seqs)), f"rows of the block table are lost or shared: {rows}"
        self.pool.check_books(s.pages for s in self.running)

    def _queue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.num_waiting_tokens += sequence.num_prompt
        insort(self.waiting, sequence, key=_rank)

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for all its tokens, preempting the last if need be. False: it was itself the last."""
        while len(sequence.pages) * self.pool.page_size < len(sequence.tokens):
            if self.pool.num_available:
                sequence.pages += self.pool.allocate(1)
                continue
            last = self.running.pop()
            self._give_back(last)
            self._queue(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
        return True

    def _cut(self, sequence: Sequence, budget: int, slices: list[Slice]) -> int:
        start = sequence.num_computed
        stop = min(len(sequence.tokens), start + budget)
        slices.append(Slice(sequence, start, stop))
        full = stop // self.pool.page_size
        if self.pool.keep and full > sequence.num_entered:
            self._extend_keys(sequence, full)
            for place in range(sequence.num_entered, full):
                self.pool.enter(sequence.pages[place], sequence.keys[place])
            sequence.num_entered = full
        return stop - start

    def _admit(self, slices: list[Slice], budget: int) -> None:
        while budget and self.waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if not self._place(sequence):
                return
            del self.waiting[0]
            self.num_waiting_tokens -= sequence.num_prompt
            insort(self.running, sequence, key=_rank)
            sequence.state = State.RUNNING
            budget -= self._cut(sequence, budget, slices)

    def _place(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all its tokens, known prefixes first; False when there are too few.

        The last token is always computed, because its logits are needed. While others run, one page stays in reserve for them.
        """
        size, length = self.pool.page_size, len(sequence.tokens)
        known: list[int] = []
        if self.pool.keep:
            self._extend_keys(sequence, (length - 1) // size)
            reading = sequence.reading
            known = self.pool.find(sequence.keys[: (length - 1 if reading is None or reading.is_done else reading.num_read) // size])
        self.pool.share(known)
        missing = -(-length // size) - len(known)
        if missing + bool(self.running) > self.pool.num_available:
            self.pool.release(known)
            return False
        sequence.pages = known + self.pool.allocate(missing)
        sequence.num_computed = len(known) * size
        sequence.num_entered = len(known)
        sequence.row, sequence.num_tabled = self._rows.pop(), 0
        self._count_hits(sequence)
        return True

    def _count_hits(self, sequence: Sequence) -> None:
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_computed

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        size, keys = self.pool.page_size, sequence.keys
        while len(keys) < count:
            first = len(keys) * size
            keys.append(chain(keys[-1] if keys else sequence.root, sequence.tokens[first : first + size]))

    def _give_back(self, sequence: Sequence) -> None:
        self._rows.append(sequence.row)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_entered = [], 0, 0


def _rank(sequence: Sequence) -> int:
    return sequence.rank
