"""The nouns every stage shares: messages, dataset rows, requests and completions.

All are frozen values. A stage receives them, returns new ones and never learns which stage made them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True)
class ToolCall:
    """A call the assistant makes; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Row:
    """One canonical dataset row, whatever format it was read from.

    A conversation has `messages`. Plain text (pretraining) has `text` and no messages. A preference row has the chosen answer as
    the last message and the worse one in `rejected`. `source` names the document or file and line it came from.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    rejected: str = ""
    tools: tuple[Mapping[str, object], ...] = ()
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The defaults are greedy and unlimited by filters; `temperature` 0 is greedy whatever else is set."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One thing to generate. `prompt` is a conversation to render, a text to encode, or token ids to use as they are.

    `schema` is the JSON Schema of the answer that is wanted: help for a generator that can hold to one; whoever asks checks the answer.
    """

    id: str
    prompt: tuple[Message, ...] | str | tuple[int, ...]
    sampling: Sampling = Sampling()
    tools: tuple[Mapping[str, object], ...] = ()
    thinking: bool | None = None
    schema: Mapping[str, object] | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the most likely ones at its place, in nats."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came back for the request with the same `id`. A failed request has finish_reason "error" and says why in `error`.

    `output_tokens` counts what was generated, also where `token_ids` cannot be had; 0 = nobody says.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str = ""
    output_tokens: int = 0


@dataclass(frozen=True)
class Score:
    """A judgement of one completion: a number, its parts, and the reason in words. A failed example is a score with its reason."""

    value: float
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
