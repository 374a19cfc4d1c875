"""Continuous batching: which tokens of which sequences are computed in the next step.

Every step the running sequences come first, in the order of their ranks: one token each where the answer is being written, a piece
of the prompt where it is not read yet. What is left of `max_num_batched_tokens` admits waiting sequences in the order of their ranks,
as long as pages for all their tokens are available. When a running sequence needs a page and there is none, the running one of the
last rank gives its pages back and waits again (recompute; Kwon et al., arXiv 2309.06180, section 4.5).

Each group of layers (`engine.layout`) has its own pages of a sequence. Those of a group with a window are taken as the prompt is
read, and given back when they lie wholly behind the window; a known prefix needs only those that the next token sees.

The rank of a sequence is its number of arrival and `HEAD_START` arrivals for each step of priority; it keeps it for life. Nothing
starves: priority lets at most a known number of later arrivals pass, the head of the queue is not passed by smaller requests, the
first of the running ones is never preempted, and a request that could not run alone is refused at once.

Pure Python, no tensors; one step costs a few list operations per sequence.
"""

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import lcm

from garage.core.errors import UserError
from garage.engine.pages import Group, PagePool, Table, chain, longest
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

    def __init__(self, pool: PagePool, limits: Limits, groups: Seq[Group] = ()) -> None:
        self.pool, self.limits = pool, limits
        self.groups = tuple(groups) or (Group(pool.page_size),)
        self._step = lcm(*(group.span for group in self.groups))  # known prefixes end where a page of every group does
        fits = longest(self.groups, pool.num_pages, limits.max_num_batched_tokens, limits.max_model_len)
        self._longest = min(limits.max_model_len, fits + 1)  # the last token is never computed
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
        length, most = sequence.limit, self._longest
        if length > most:
            asked = f"{sequence.num_prompt} prompt tokens and up to {length - sequence.num_prompt} new ones make {length}"
            raise UserError(f"{asked}, but this model is served with at most {most}", remedy="shorten the prompt or lower max_tokens")
        if len(self.waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already", remedy="send the request again in a moment")
        if self.waiting and self.num_waiting_tokens + sequence.num_prompt > self.limits.max_waiting_tokens:
            raise QueueFull(f"{self.num_waiting_tokens} tokens wait already", remedy="send the request again in a moment")
        sequence.rank = self._num_arrived + HEAD_START * priority
        self._num_arrived += 1
        sequence.tables = tuple(Table() for _ in self.groups)
        self._queue(sequence)

    def plan(self) -> list[Slice]:
        """The next step: slices in the order of their rows. Empty only when there is nothing to do, or nothing until a token is known.

        The pages of every slice exist when this returns; those it fills are entered in the prefix cache.
        """
        slices: list[Slice] = []
        budget, preemptions, place = self.limits.max_num_batched_tokens, self.num_preemptions, 0
        while budget and place < len(self.running):
            sequence, place = self.running[place], place + 1
            if sequence.num_computed == len(sequence.tokens):  # its last token is being sampled
                continue
            stop = min(len(sequence.tokens), sequence.num_computed + budget)
            if stop > sequence.room and not self._grow(sequence, stop):
                break
            budget -= self._cut(sequence, stop, slices)
        if self.num_preemptions == preemptions:
            self._admit(slices, budget)
        assert slices or self.running or not self.waiting, "work is queued but nothing can run"
        return slices

    def computed(self, slices: Seq[Slice]) -> None:
        """The step of `slices` has begun: the next one finds their keys and values in the pages."""
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

    def rekey(self, sequence: Sequence) -> None:
        """The root of a waiting sequence is another one."""
        sequence.tables = tuple(Table() for _ in self.groups)

    def host(self, sequence: Sequence, length: int) -> bool:
        """Let a sequence run that is planned elsewhere; False if there is no line or no pages for `length` tokens of it."""
        if not self._rows or sum(group.most(length, self.limits.max_num_batched_tokens) for group in self.groups) > self.pool.num_available:
            return False
        sequence.tables, sequence.row, sequence.state = tuple(Table() for _ in self.groups), self._rows.pop(), State.RUNNING
        self.running.append(sequence)
        return True

    def make_room(self, sequence: Sequence, stop: int) -> bool:
        """Pages for its tokens up to `stop`, if there are any."""
        self._shed(sequence)
        missing = self._missing(sequence, stop)
        if sum(missing) > self.pool.num_available:
            return False
        self._take(sequence, missing)
        return True

    def check_books(self) -> None:
        """Assert that no page is lost and that waiting sequences hold none."""
        assert not [s.id for s in self.waiting for t in s.tables if t.pages], "a waiting sequence holds pages"
        assert self.num_waiting_tokens == sum(s.num_prompt for s in self.waiting), "waiting tokens are miscounted"
        rows = sorted([s.row for s in self.running] + self._rows)
        assert rows == list(range(self.limits.max_num_seqs)), f"rows of the block table are lost or shared: {rows}"
        for number, group in enumerate(self.groups):
            most = self.limits.max_num_batched_tokens
            held = [(max(len(s.tokens), s.room), len(s.tables[number].held)) for s in self.running]
            assert all(count <= group.most(length, most) for length, count in held), f"pages behind the window are held: {held}"
        self.pool.check_books(table.held for s in self.running for table in s.tables)

    def _queue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.num_waiting_tokens += sequence.num_prompt
        insort(self.waiting, sequence, key=_rank)

    def _grow(self, sequence: Sequence, stop: int) -> bool:
        """Make room for its tokens up to `stop`, preempting the last if need be. False: it was itself the last."""
        self._shed(sequence)
        missing = self._missing(sequence, stop)
        while sum(missing) > self.pool.num_available:
            last = self.running.pop()
            self._give_back(last)
            self._queue(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
        self._take(sequence, missing)
        return True

    def _shed(self, sequence: Sequence) -> None:
        """Give back what no later query can see."""
        for group, table in zip(self.groups, sequence.tables, strict=True):
            first = group.first(sequence.num_computed)
            if first > table.first:
                self.pool.release(table.pages[table.first : first])
                table.first = first

    def _missing(self, sequence: Sequence, stop: int) -> list[int]:
        tables = zip(self.groups, sequence.tables, strict=True)
        return [max(0, -(-stop // group.span) - len(table.pages)) for group, table in tables]

    def _take(self, sequence: Sequence, missing: Seq[int]) -> None:
        for table, count in zip(sequence.tables, missing, strict=True):
            table.pages += self.pool.allocate(count)
        sequence.room = min(len(table.pages) * group.span for group, table in zip(self.groups, sequence.tables, strict=True))

    def _cut(self, sequence: Sequence, stop: int, slices: list[Slice]) -> int:
        start = sequence.num_computed
        slices.append(Slice(sequence, start, stop))
        for group, table in zip(self.groups, sequence.tables, strict=True) if self.pool.keep else ():
            full = min(stop, sequence.num_known) // group.span
            if full > table.num_entered:
                self._extend_keys(sequence, group, table, full)
                for place in range(table.num_entered, full):
                    self.pool.enter(table.pages[place], table.keys[place])
                table.num_entered = full
        return stop - start

    def _admit(self, slices: list[Slice], budget: int) -> None:
        while budget and self.waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if not self._place(sequence, budget):
                return
            del self.waiting[0]
            self.num_waiting_tokens -= sequence.num_prompt
            insort(self.running, sequence, key=_rank)
            sequence.state = State.RUNNING
            budget -= self._cut(sequence, min(len(sequence.tokens), sequence.num_computed + budget), slices)

    def _place(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence pages, known prefixes first; False when there are too few for all its tokens.

        The last token is always computed, because its logits are needed. While others run, one page of each group stays in reserve
        for them. A group with a window gets only the pages of the first piece; there must be enough for the most it can need.
        """
        length, reading = len(sequence.tokens), sequence.reading
        known = self._known(sequence, length - 1 if reading is None or reading.is_done else reading.num_read) if self.pool.keep else 0
        for group, table in zip(self.groups, sequence.tables, strict=True):
            first, last = group.first(known), known // group.span
            shared = self.pool.find(table.keys[first:last])
            self.pool.share(shared)
            table.pages, table.first, table.num_entered = [0] * first + shared, first, last
        held = sum(len(table.held) for table in sequence.tables)
        most = sum(group.most(length, self.limits.max_num_batched_tokens) for group in self.groups)
        reserve = len(self.groups) if self.running else 0
        if most - held + reserve > self.pool.num_available:
            self._empty(sequence)
            return False
        first_piece = min(length, known + budget)
        stops = [length if group.window is None else first_piece for group in self.groups]
        self._take(sequence, [self._missing(sequence, stop)[number] for number, stop in enumerate(stops)])
        sequence.num_computed, sequence.row = known, self._rows.pop()
        self._count_hits(sequence)
        return True

    def _known(self, sequence: Sequence, longest: int) -> int:
        """How many of its first tokens, `longest` at most, have pages wherever the token after them looks."""
        pairs = tuple(zip(self.groups, sequence.tables, strict=True))
        known = longest - longest % self._step
        for group, table in pairs:
            self._extend_keys(sequence, group, table, known // group.span)
            if group.window is None:
                known = min(known, len(self.pool.find(table.keys[: known // group.span])) * group.span)
        known -= known % self._step
        while known:
            gap = max((self._gap(group, table, known) for group, table in pairs if group.window is not None), default=0)
            if not gap:
                break
            known = (gap - 1) // self._step * self._step
        return known

    def _gap(self, group: Group, table: Table, known: int) -> int:
        """Where the last missing page ends among those that the token after the first `known` sees; 0: none is missing."""
        for place in range(known // group.span - 1, group.first(known) - 1, -1):
            if not self.pool.find(table.keys[place : place + 1]):
                return (place + 1) * group.span
        return 0

    def _count_hits(self, sequence: Sequence) -> None:
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_computed

    def _extend_keys(self, sequence: Sequence, group: Group, table: Table, count: int) -> None:
        keys, span = table.keys, group.span
        while len(keys) < count:
            first = len(keys) * span
            origin = keys[-1] if keys else sequence.root + bytes((self.groups.index(group),))
            keys.append(chain(origin, sequence.tokens[first : first + span]))

    def _give_back(self, sequence: Sequence) -> None:
        self._rows.append(sequence.row)
        self._empty(sequence)

    def _empty(self, sequence: Sequence) -> None:
        for table in sequence.tables:
            self.pool.release(table.held)
            table.clear()
        sequence.room = sequence.num_computed = 0


def _rank(sequence: Sequence) -> int:
    return sequence.rank
