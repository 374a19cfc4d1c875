"""Tokens guessed ahead, so that one step of the model checks several (Leviathan et al., arXiv 2211.17192).

A guess is kept while it is the token that the sampler draws at its place anyway: the draw depends on the request's seed and the place alone
(`engine.sampler`), so the text with speculation is the text without it, token for token, greedy or not, whatever is guessed. A draft model
draws with the same numbers, so the two agree often at any temperature.

    `Ngram`      what followed the last words where they stood before (prompt lookup; Saxena 2023): free, good where answers repeat
    `Draft`      a smaller model with the same tokenizer, on pages of its own

Off when it loses: `Pace` measures seconds a token with and without, by the number of requests, and takes the better one, asking the other
again now and then.
"""

import time
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

from garage.core.errors import UserError
from garage.engine.pages import PagePool
from garage.engine.request import Sequence
from garage.engine.runner import Runner
from garage.engine.scheduler import Limits, Scheduler, Slice
from garage.models.layers import Model
from garage.specs.serve import DraftSpec, EngineSpec, GuessSpec, NgramSpec

ENDLESS = 1 << 60
AGAIN, MEMORY = 16, 0.2  # steps until the slower way is tried again; weight of the newest measurement


class Proposer(Protocol):
    """Guesses what follows."""

    def propose(self, sequences: Seq[Sequence], most: int) -> list[list[int]]:
        """Up to `most` tokens for each sequence; an empty list where there is no guess."""


class Ngram:
    """The longest end of the text, of `prompt_lookup_min` to `prompt_lookup_max` tokens, that stood before, and what followed it last."""

    def __init__(self, spec: NgramSpec) -> None:
        self._lengths = range(spec.prompt_lookup_max, spec.prompt_lookup_min - 1, -1)

    def propose(self, sequences: Seq[Sequence], most: int) -> list[list[int]]:
        return [self._after(sequence.tokens, most) for sequence in sequences]

    def _after(self, tokens: list[int], most: int) -> list[int]:
        data = array("i", tokens)
        text, size = data.tobytes(), data.itemsize
        for length in self._lengths:
            end = text[-length * size :]
            at = text.rfind(end, 0, len(text) - size) if length < len(tokens) else -1
            while at % size and at > 0:  # between two tokens
                at = text.rfind(end, 0, at + len(end) - 1)
            if at >= 0 and at % size == 0:
                start = at // size + length
                return tokens[start : start + most]
        return []


class Draft:
    """A smaller model that follows the sequences it is asked about; others' pages are given back."""

    def __init__(self, model: Model, settings: EngineSpec, spec: DraftSpec, vocab_size: int) -> None:
        own = settings.model_copy(update={"kv_cache_bytes": spec.kv_cache_bytes, "num_pages": None, "max_model_len": None})
        self._runner, self._chunk = Runner(model, own, vocab_size), own.max_num_batched_tokens
        names = ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "max_waiting_tokens")
        limits = Limits(max_model_len=self._runner.max_model_len, **{name: getattr(own, name) for name in names})
        pool = PagePool(self._runner.num_pages, own.page_size, keep=False)
        self._books = Scheduler(pool, limits, self._runner.layout.groups)
        self._shadows: dict[str, Sequence] = {}

    def propose(self, sequences: Seq[Sequence], most: int) -> list[list[int]]:
        for name in self._shadows.keys() - {s.id for s in sequences}:
            self._books.finish(self._shadows.pop(name))
        followed = [self._follow(sequence, most) for sequence in sequences]
        live = [shadow for shadow in followed if shadow is not None]
        for _ in range(most if live else 0):
            self._extend(live)
        return [[] if shadow is None else shadow.tokens[len(s.tokens) :] for s, shadow in zip(sequences, followed, strict=True)]

    def _follow(self, sequence: Sequence, most: int) -> Sequence | None:
        """The shadow of a sequence, brought to the same tokens; None without room for it."""
        shadow = self._shadows.get(sequence.id)
        if shadow is None:
            plain = replace(sequence.sampling, logprobs=None, prompt_logprobs=None)
            shadow = Sequence(sequence.id, [], sequence.num_prompt, ENDLESS, plain, sequence.seed)
            if not self._books.host(shadow, len(sequence.tokens) + most):
                return None
            self._shadows[sequence.id] = shadow
        same = shadow.num_computed
        while same and shadow.tokens[:same] != sequence.tokens[:same]:
            same -= 1  # guesses that were wrong, at most `most` of them
        shadow.tokens, shadow.num_computed = list(sequence.tokens), min(same, len(sequence.tokens) - 1)
        if not self._books.make_room(shadow, len(shadow.tokens) + most):
            self._books.finish(self._shadows.pop(sequence.id))
            return None
        return shadow

    def _extend(self, shadows: list[Sequence]) -> None:
        """One more token for each, after what they have not read yet."""
        ready: list[Slice] = []
        for shadow in shadows:
            while len(shadow.tokens) - shadow.num_computed > self._chunk // len(shadows) + 1:
                piece = [Slice(shadow, shadow.num_computed, min(len(shadow.tokens) - 1, shadow.num_computed + self._chunk))]
                self._runner.run(piece)
                self._books.computed(piece)
            ready.append(Slice(shadow, shadow.num_computed, len(shadow.tokens)))
        sampled = self._runner.step(ready, [(shadow, len(shadow.tokens)) for shadow in shadows])
        self._books.computed(ready)
        for shadow, token in zip(shadows, sampled.read().ids if sampled else (), strict=True):
            shadow.tokens.append(token)


@dataclass
class Pace:
    """Seconds a token with and without guesses, for each number of requests by its power of two."""

    is_adaptive: bool
    _seconds: dict[tuple[int, bool], float] = field(default_factory=dict)
    _steps: int = 0

    def wants(self, requests: int) -> bool:
        """Whether to guess in this step."""
        with_it, without = (self._seconds.get((requests.bit_length(), way)) for way in (True, False))
        if not self.is_adaptive or with_it is None:
            return True
        self._steps += 1
        return without is not None and (with_it < without) != (self._steps % AGAIN == 0)

    def note(self, requests: int, was_guessed: bool, seconds: float) -> None:
        """A step took so many seconds a token."""
        key = (requests.bit_length(), was_guessed)
        self._seconds[key] = seconds + (1 - MEMORY) * (self._seconds.get(key, seconds) - seconds)


def speculation_of(settings: EngineSpec, draft: Model | None, vocab_size: int) -> "Speculation | None":
    """What the settings ask for."""
    spec = settings.speculation
    if isinstance(spec, NgramSpec):
        return Speculation(Ngram(spec), spec)
    if not isinstance(spec, DraftSpec):
        return None
    if draft is None:
        raise UserError("speculation by a draft model needs the model", remedy="open the engine from directories, or give it one")
    return Speculation(Draft(draft, settings, spec, vocab_size), spec)


class Speculation:
    """Puts guesses behind the tokens of sequences before a step, and takes off the wrong ones after it."""

    def __init__(self, proposer: Proposer, spec: GuessSpec) -> None:
        self._proposer, self._most, self._pace = proposer, spec.num_speculative_tokens, Pace(spec.adaptive)
        self.draft_tokens = self.accepted_tokens = 0
        self._began, self._requests = 0.0, 0

    def guess(self, running: Seq[Sequence], room: int) -> None:
        """Draft for the sequences that write, if that pays; a step has room for `room` rows."""
        writing = [s for s in running if s.num_computed == len(s.tokens) - 1 and (s.reading is None or s.reading.is_done)]
        self._began, self._requests = time.perf_counter(), len(writing) if len(writing) == len(running) else 0
        if not self._requests or room < len(writing) * (self._most + 1) or not self._pace.wants(len(writing)):
            return
        for sequence, drafts in zip(writing, self._proposer.propose(writing, self._most), strict=True):
            drafts = drafts[: max(0, sequence.limit - len(sequence.tokens) - 1)]
            sequence.tokens += drafts
            sequence.num_drafts = len(drafts)

    def settle(self, was_guessed: bool, num_new: int) -> None:
        """The step is over and gave `num_new` tokens."""
        if self._requests and num_new:
            self._pace.note(self._requests, was_guessed, (time.perf_counter() - self._began) / num_new)
