"""A teacher model writes rows about chunks of documents, or about rows that exist: planned, asked, checked, until enough are accepted.

`plan` says what is asked next, `asking` in which words, `calls` keeps what was paid for, `replies` decides what of it may stay. Rounds
follow one another until the number is met, every source has brought nothing new, three rounds were barren, or a cap is reached; the
shortfall says which. Replies are used in the order of the plan, so that the order in which they come changes nothing.

Limits: a row is about one chunk; a summary is of a chunk, not of a whole document. Preferences are rated one answer at a time.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from garage.core.errors import UserError
from garage.core.protocols import Generator
from garage.core.seeds import derive
from garage.core.types import Completion, Message, Request, Row, Sampling, Structure
from garage.data.asking import form_of, judge_prompt, rating_of
from garage.data.calls import Calls, request_key
from garage.data.plan import Job, Plan, Source, divide
from garage.data.replies import Item, Rejected, Seen, Turn, final_answer, is_same_answer, read_items, turns_of, word_runs
from garage.specs.data import SynthesizeSpec

JUDGE_TEMPERATURE = 0.1
BARREN_ROUNDS, LOWEST_YIELD, KEPT = 3, 0.2, 4000
"""Rounds without a row before giving up; smallest share of items that is expected to be accepted; characters kept of a rejected reply."""

Tell = Callable[[int, int, str], None]
"""Hears how many rows are accepted, of how many, and the counts in words."""


@dataclass
class Taught:
    """What came of it. `parsed` of `replies` were whole JSON; `skipped` sources say too little to be asked about."""

    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    rejected: list[Row] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    parsed: int = 0
    skipped: int = 0
    missing: int = 0
    shortfall: str = ""
    is_capped: bool = False


@dataclass(frozen=True)
class Models:
    """Who writes and who rates, with the names under which their calls are kept."""

    teacher: Generator
    judge: Generator
    names: tuple[str, str]


def teach(sources: Iterable[Source], models: Models, calls: Calls, spec: SynthesizeSpec, tell: Tell) -> Taught:
    """Rows for training from some documents and for testing from others.

    Raises:
        UserError: nothing can be asked about, or the teacher cannot go on.
    """
    return _Lesson(models, calls, spec, tell).taught(list(sources))


class _Lesson:
    """The state of one synthesis."""

    def __init__(self, models: Models, calls: Calls, spec: SynthesizeSpec, tell: Tell) -> None:
        self._models, self._calls, self._spec, self._tell = models, calls, spec, tell
        self._name = "thoughts" if spec.kind == "reasoning" and spec.data is not None else spec.kind
        self._form, self._seen, self._out = form_of(self._name), Seen(), Taught()
        self._wanted = (rows := spec.rows or 0), round(rows * spec.test_share)
        calls.on_call = self._say

    def taught(self, sources: Sequence[Source]) -> Taught:
        told = [source for source in sources if source.says_enough]
        out = self._out
        out.skipped = len(sources) - len(told)
        if not told:
            raise UserError("nothing here says enough to be asked about", remedy="give a corpus with text, or a dataset with answers")
        for source in told if self._name == "rewrite" else ():
            self._seen.add(_asked_in(source.row.messages if source.row else ()))
        sides = divide(told, self._spec.test_share, self._spec.seed)
        for part, wanted, kept in zip(sides, self._wanted, (out.train, out.test), strict=True):
            self._fill(part, wanted, kept)
        self._calls.require_answers()
        return out

    def _fill(self, sources: Sequence[Source], wanted: int, kept: list[Row]) -> None:
        """Ask about the sources until `kept` has as many rows as wanted, or there is a reason why not."""
        plan, planned, barren, why = Plan(sources, self._form, self._spec.seed), 0, 0, ""
        while len(kept) < wanted and not why:
            share = max(LOWEST_YIELD, len(kept) / planned) if planned else 1.0
            jobs, before = plan.take(ceil((wanted - len(kept)) / share), self._spec.batch), len(kept)
            for job, rows, is_cut in self._preferences(jobs) if self._name == "preference" else self._rows(jobs):
                planned += job.num_items
                plan.note(job, [_asked_in(row.messages) for row in rows if self._keep(row, kept, wanted)], is_cut=is_cut)
            barren = 0 if len(kept) > before else barren + 1
            why = self._why_stop(jobs, barren) if len(kept) < wanted else ""
            self._say()
        if missing := wanted - len(kept):
            self._out.missing += missing
            self._out.shortfall += f"{'; ' * bool(self._out.shortfall)}{len(kept)} rows of {wanted}, because {why}"

    def _why_stop(self, jobs: Sequence[Job], barren: int) -> str:
        if self._calls.over:
            self._out.is_capped = True
            return f"the cap {self._calls.over} is reached"
        if not jobs:
            return "every source was asked until it brought nothing new"
        return f"{barren} rounds of calls running brought no row that could be accepted" if barren == BARREN_ROUNDS else ""

    def _keep(self, row: Row, kept: list[Row], wanted: int) -> bool:
        reason = row.meta.get("rejected", "")
        if not reason and len(kept) >= wanted:
            reason = "more than asked for"
        if not reason and not self._seen.add(_asked_in(row.messages)):
            reason = "asked already"
        if reason:
            self._out.reasons[reason] += 1
            self._out.rejected.append(replace(row, meta={**row.meta, "rejected": reason}))
        else:
            kept.append(row)
        return not reason

    def _say(self) -> None:
        out, calls = self._out, self._calls
        lost = ", ".join(f"{reason} {count}" for reason, count in out.reasons.most_common(4))
        words = f"{calls.num_calls} calls, {calls.tokens_in + calls.tokens_out:,} tokens" + (f"; rejected: {lost}" if lost else "")
        self._tell(len(out.train) + len(out.test), sum(self._wanted), words)

    def _rows(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[Row], bool]]:
        requests = [self._request(job) for job in jobs]
        replies = self._calls.ask(self._models.names[0], self._models.teacher, requests)
        for job, request, reply in zip(jobs, requests, replies, strict=True):
            if reply is not None:
                key = request_key(self._models.names[0], request)
                yield job, list(self._made(job, reply, key)), reply.finish_reason == "length"

    def _made(self, job: Job, reply: Completion, key: str) -> Iterator[Row]:
        """The rows of one reply, those that cannot be kept with their reason."""
        nonce = self._nonce(job.source.text)
        runs = word_runs(" ".join(message.content for message in self._prompt(replace(job, asked=()), nonce, text="")))
        items, is_whole = self._read(reply)
        if not items:
            yield self._refused(job, key, 0, reply.text, "nothing offered" if is_whole else _unreadable(reply))
        for number, item in enumerate(items):
            said = json.dumps(item, ensure_ascii=False)
            try:
                if nonce in said or not runs.isdisjoint(word_runs(said)):
                    raise Rejected("copies the prompt")
                if number >= job.num_items:
                    raise Rejected("more than asked for")
                yield self._row(job, key, item)
            except Rejected as fault:
                yield self._refused(job, key, number, said, str(fault))

    def _read(self, reply: Completion) -> tuple[list[Item], bool]:
        items, is_whole = read_items(reply.text)
        self._out.replies += reply.finish_reason != "error"
        self._out.parsed += is_whole
        return items, is_whole

    def _row(self, job: Job, key: str, item: Item) -> Row:
        source, form = job.source, self._form
        turns = turns_of(item, form.fields, source.text, lead=" ".join(source.headings), has_turns=form.has_turns, is_close=form.is_close)
        messages = tuple(message for turn in turns for message in self._exchange(turn, source))
        if self._name == "thoughts" and source.row is not None:
            messages = (*source.row.messages[:-1], messages[-1])
        meta, spans = self._meta(job, key), [turn.span for turn in turns if turn.span]
        if spans:
            (start, end), base = spans[0], source.start
            meta |= {"start": str(base + start), "end": str(base + end), "support": source.text[start:end]}
        if spans[1:]:
            meta["later_spans"] = json.dumps([[base + start, base + end] for start, end in spans[1:]])
        return Row(f"{source.id}-{derive(0, _asked_in(messages)):016x}", messages, source=source.document, meta=meta)

    def _exchange(self, turn: Turn, source: Source) -> tuple[Message, Message]:
        question, answer = turn.question, turn.answer
        if self._form.questions:
            question = f"{self._form.questions[derive(0, source.id) % len(self._form.questions)]}\n\n{source.text.strip()}"
        if self._name == "thoughts" and source.row is not None:
            original = final_answer(source.row.messages[-1].content)
            if not is_same_answer(final_answer(answer), original):
                raise Rejected("another answer than the original")
            answer = original
        tagged = f"<reasoning>{turn.reasoning}</reasoning><answer>{answer}</answer>" if turn.reasoning else answer
        return Message("user", question), Message("assistant", tagged)

    def _meta(self, job: Job, key: str) -> dict[str, str]:
        place = {"row": job.source.id} if job.source.row else {"chunk": job.source.id}
        return {"document": job.source.document, **place, "kind": self._spec.kind, "teacher": self._spec.teacher, "prompt": key}

    def _refused(self, job: Job, key: str, number: int, said: str, reason: str) -> Row:
        meta = {**self._meta(job, key), "rejected": reason}
        return Row(f"{job.source.id}-{job.visit}-{number}", text=said[:KEPT], source=job.source.document, meta=meta)

    def _request(self, job: Job) -> Request:
        prompt = self._prompt(job, self._nonce(job.source.text), text=job.source.shown)
        return replace(self._asking(f"{job.source.id}/{job.visit}", prompt), structure=Structure("json", json.dumps(self._form.schema)))

    def _asking(self, name: str, prompt: tuple[Message, ...], temperature: float | None = None) -> Request:
        """A request that is the same in every run of the same spec."""
        spec, seed = self._spec, derive(self._spec.seed, "sampling", name) % 2**31
        heat = spec.temperature if temperature is None else temperature
        return Request(name, prompt, Sampling(spec.max_tokens, heat, top_p=spec.top_p, seed=seed))

    def _nonce(self, text: str) -> str:
        """A word that whoever wrote the text could not know, the same in every run."""
        return f"{derive(self._spec.seed, 'nonce', text):016x}"

    def _prompt(self, job: Job, nonce: str, *, text: str) -> tuple[Message, ...]:
        parts = {"task": self._spec.task, "types": "; ".join(job.types), "asked": " | ".join(job.asked)}
        return self._form.prompt(job.num_items, text, nonce, **parts)

    def _preferences(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, list[Row], bool]]:
        """Each question answered `samples` times; the best and the worst answer if the judge sets them far enough apart."""
        (teacher, judge), count = self._models.names, self._spec.samples
        requests = [self._asking(f"{job.source.id}/{job.visit}/{n}", _question(job.source)) for job in jobs for n in range(count)]
        replies = self._calls.ask(teacher, self._models.teacher, requests)
        asked = [(i // count, reply.text.strip()) for i, reply in enumerate(replies) if reply and reply.finish_reason == "stop"]
        asked = [pair for pair in dict.fromkeys(asked) if pair[1]]
        marks = self._calls.ask(judge, self._models.judge, [self._rating(jobs[number].source, answer) for number, answer in asked])
        for number, job in enumerate(jobs):
            own = [(mark, answer) for (owner, answer), mark in zip(asked, marks, strict=True) if owner == number]
            if all(replies[number * count : (number + 1) * count]) and all(mark for mark, _ in own):  # no cap stood in the way
                ratings = [(rating, answer) for mark, answer in own if mark and (rating := rating_of(self._read(mark)[0])) is not None]
                yield job, [self._preference(job, request_key(teacher, requests[number * count]), ratings)], False

    def _rating(self, source: Source, answer: str) -> Request:
        assert source.row is not None
        nonce = self._nonce(f"{source.id} {answer}")
        prompt = judge_prompt(_asked_in(_question(source)), source.row.messages[-1].content, answer, nonce=nonce)
        return self._asking(nonce, prompt, temperature=JUDGE_TEMPERATURE)

    def _preference(self, job: Job, key: str, ratings: Sequence[tuple[float, str]]) -> Row:
        question = _asked_in(_question(job.source))
        if len(ratings) < 2:
            return self._refused(job, key, 0, question, "fewer than two different answers with a rating")
        (best, chosen), (worst, other) = max(ratings, key=lambda pair: pair[0]), min(ratings, key=lambda pair: pair[0])
        if best - worst < self._spec.margin:
            return self._refused(job, key, 0, question, "ratings too close")
        meta = self._meta(job, key) | {"rating": f"{best:g}", "rating_rejected": f"{worst:g}", "judge": self._models.names[1]}
        messages = (*_question(job.source), Message("assistant", chosen))
        return Row(f"{job.source.id}-{derive(0, question):016x}", messages, rejected=other, source=job.source.document, meta=meta)


def _question(source: Source) -> tuple[Message, ...]:
    assert source.row is not None, "preferences are made from rows"
    return source.row.messages[:-1]


def _asked_in(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role == "user")


def _unreadable(reply: Completion) -> str:
    if reply.finish_reason == "error":
        return "call failed"
    if not reply.text.strip():
        return "empty reply"
    return "reply cut off" if reply.finish_reason == "length" else "no JSON in the reply"

