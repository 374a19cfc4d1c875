"""A request on its way through the engine: what scheduling, batching and sampling must know of it.

A sequence is its tokens (the prompt, then everything sampled) and how many of them have their keys and values in pages. The two
numbers are all the state there is: a running sequence always has at least one token that is not computed yet; when the last one
is, the next token can be sampled. Preemption gives the pages back and sets `num_computed` to 0; the tokens stay, so what was sent
to the client never changes.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from garage.core.errors import UserError
from garage.core.types import Completion, Sampling, TokenLogprob
from garage.engine.adapters import Adapter
from garage.engine.constrain import Constraint
from garage.engine.pages import Table
from garage.engine.reading import Reading

if TYPE_CHECKING:
    from garage.engine.rules import Rules


PENDING = -1  # stands for a token that is being sampled


class State(Enum):
    """Where a sequence is. Waiting ones hold no pages, running ones do, finished ones never come back."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class QueueFull(UserError):
    """Too many requests wait already; the same request may succeed a little later."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and its answer. `limit` is the number of tokens, prompt included, at which it ends."""

    id: str
    tokens: list[int]
    num_prompt: int
    limit: int
    sampling: Sampling
    seed: int
    state: State = State.WAITING
    tables: tuple[Table, ...] = ()  # its pages in every group of layers
    room: int = 0  # tokens that have a page in every group
    num_computed: int = 0
    num_cached: int | None = None  # prompt tokens taken from the prefix cache; known once it first runs
    row: int = 0  # its line in the block table while it runs
    adapter: Adapter | None = None  # which one of those over the base computes it; None is the base alone
    rank: int = 0  # its place in the queue: lower runs first
    reading: Reading | None = None  # what is read off its prompt
    root: bytes = b""  # what its chain of hashes starts from: sequences with different roots never share pages
    weight_version: int = 0  # the weights it began with
    rules: "Rules | None" = None  # what it changes about its logits
    constraint: Constraint | None = None  # the form its answer is held to
    num_drafts: int = 0  # its last tokens that are guesses, within a step only
    is_pending: bool = False  # its last token is not known yet: the step that samples it has begun and its result was not read

    @property
    def num_known(self) -> int:
        """Tokens that will not change."""
        return len(self.tokens) - self.num_drafts - self.is_pending

    def settle(self) -> list[int]:
        """Take off what is not known; returns the guesses."""
        known = self.num_known
        guesses = self.tokens[known : known + self.num_drafts]
        del self.tokens[known:]
        self.num_drafts, self.is_pending = 0, False
        return guesses


Row = tuple[Sequence, int]  # a token to be sampled: it follows `sequence.tokens[:length]`, whatever stands there later


@dataclass(frozen=True, slots=True)
class Times:
    """Moments of one request, in seconds of the monotonic clock."""

    arrived: float
    started: float
    first_token: float
    finished: float


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to an answer. `text` is safe to show; `completion` and `times` come with the last delta."""

    id: str
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None
    times: Times | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """Gauges of this moment and counters since the engine was made."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_pages: int
    num_pages_used: int
    num_pages_cached: int
    prompt_tokens: int
    generation_tokens: int
    num_preemptions: int
    prefix_queries: int
    prefix_hits: int
    draft_tokens: int = 0
    accepted_tokens: int = 0
