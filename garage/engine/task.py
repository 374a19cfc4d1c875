"""A request the engine has accepted: its sequence, its answer, who wants to hear of it, and what is said when it ends."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from garage.core.errors import UserError
from garage.core.types import Completion, FinishReason, Request, TokenLogprob
from garage.engine.reading import Reading
from garage.engine.request import Delta, Sequence, State, Times
from garage.engine.sampler import Chosen, Sampled
from garage.engine.stops import Answer

OnToken = Callable[[Delta], None]
MOST_TOP = 20


@dataclass(slots=True)
class Task:
    """One request."""

    request: Request
    sequence: Sequence
    answer: Answer
    on_token: OnToken | None
    arrived: float
    started: float | None = None
    first_token: float | None = None

    def add(self, rows: range, guesses: Seq[int], chosen: Chosen) -> Delta:
        """Take what was chosen in `rows`, up to the first guess that was wrong."""
        sequence, answer, texts, logprobs = self.sequence, self.answer, list[str](), list[TokenLogprob]()
        for row, guess in zip(rows, [*guesses, None], strict=True):
            if row in chosen.faults:
                break
            token, logprob = chosen.ids[row], chosen.logprobs[row]
            texts.append(answer.add(token, logprob))
            logprobs += [] if logprob is None else [logprob]
            if token != guess or answer.finish_reason is not None:
                break
        if guesses:
            sequence.num_computed = len(sequence.tokens) - 1
        return Delta(sequence.id, "".join(texts), len(texts), tuple(logprobs))

    def end(self, reason: FinishReason, error: str, last: Delta | None) -> Completion:
        """The whole answer; its reader is told."""
        sequence, answer, now = self.sequence, self.answer, time.monotonic()
        delta = last or Delta(sequence.id, answer.rest(), 0)
        logprobs, cached = tuple(answer.logprobs), sequence.num_cached or 0
        ids, num_prompt = answer.token_ids, sequence.num_prompt
        completion = Completion(
            sequence.id, answer.text, ids, reason, num_prompt, cached, logprobs, error, output_tokens=len(ids),
            weight_version=sequence.weight_version,
        )  # fmt: skip
        if sequence.reading is not None and sequence.reading.is_done:
            completion = _with_reading(completion, sequence.reading)
        if self.on_token is not None:
            started = self.started or now
            times = Times(self.arrived, started, self.first_token or now, now)
            self.on_token(replace(delta, completion=completion, times=times))
        return completion


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that has begun. `ready` are the sequences it samples for, `was_read` those of which only the prompt was wanted."""

    ready: Seq[Sequence]
    was_read: Seq[Sequence]
    sampled: Sampled | None
    num_tokens: int

    @property
    def can_be_followed(self) -> bool:
        """Whether the step after it can begin before its tokens are known."""
        return all(s.rules is None and s.constraint is None for s in self.ready)

    def stand_in(self, token: int) -> None:
        """Put `token` in the place of each token that is not known yet and that another one will follow."""
        for sequence in self.ready:
            if sequence.state is State.RUNNING and len(sequence.tokens) + 1 < sequence.limit:
                sequence.tokens.append(token)
                sequence.is_pending = True


def reading_of(request: Request, num_prompt: int) -> Reading | None:
    """What the request wants to know of its prompt; checks that it wants something at all."""
    sampling = request.sampling
    num_top = sampling.prompt_logprobs
    if num_top is not None and not 0 <= num_top <= MOST_TOP:
        raise UserError(f"prompt_logprobs is {num_top}", remedy=f"ask for 0 to {MOST_TOP}")
    if not request.wants_embedding and (sampling.max_tokens < 0 or (sampling.max_tokens == 0 and num_top is None)):
        raise UserError(f"max_tokens is {sampling.max_tokens}", remedy="ask for at least one token, or for prompt_logprobs alone")
    is_read = request.wants_embedding or num_top is not None
    return Reading(num_prompt, num_top, wants_mean=request.wants_embedding) if is_read else None


def _with_reading(completion: Completion, reading: Reading) -> Completion:
    found = replace(completion, prompt_logprobs=tuple(reading.logprobs), embedding=reading.embedding())
    if not reading.is_broken:
        return found
    return replace(completion, finish_reason="error", error="the model's hidden states are not finite")
