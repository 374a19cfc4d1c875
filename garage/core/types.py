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
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Structure:
    """A form the answer is held to token by token: a JSON Schema, a regular expression, a JSON list of choices, a Lark grammar."""

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str


@dataclass(frozen=True)
class Request:
    """One thing to generate. `prompt` is a conversation to render, a text to encode, or token ids to use as they are.

    `structure` is the form the answer must have: an engine holds to it, an endpoint may not, so whoever asks checks the answer.
    `adapter` names one that is loaded over the base. Prompts share cached work only within one `cache_salt`. Lower `priority` runs first.
    `wants_embedding` asks for the mean of the last hidden states of the prompt, of length one, in place of an answer.
    """

    id: str
    prompt: tuple[Message, ...] | str | tuple[int, ...]
    sampling: Sampling = Sampling()
    tools: tuple[Mapping[str, object], ...] = ()
    thinking: bool | None = None
    structure: Structure | None = None
    adapter: str = ""
    cache_salt: str = ""
    priority: int = 0
    wants_embedding: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a chosen token and of the most likely ones at its place, in nats."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came back for the request with the same `id`. A failed request has finish_reason "error" and says why in `error`.

    `output_tokens` counts what was generated, also where `token_ids` cannot be had; 0 = nobody says. `prompt_logprobs` has one entry for
    each prompt token, None for the first, which nothing predicts. `weight_version` counts how often the weights had changed at its start.
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
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    embedding: tuple[float, ...] = ()
    weight_version: int = 0


@dataclass(frozen=True)
class Score:
    """A judgement of one completion: a number, its parts, and the reason in words. A failed example is a score with its reason."""

    value: float
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
