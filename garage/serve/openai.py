"""The OpenAI shapes: what a request may say, and how answers and errors look.

Every field is honoured or refused with a 400 that names it in `param`. Two short lists are the exceptions, and both are public:
`NO_EFFECT` fields are accepted because clients send them, change nothing, and are named in the header `x-garage-no-effect`; a field
in `NEUTRAL` is accepted only with the value that asks for nothing. A JSON null is the same as an absent field.

Defaults of a request: what `generation_config.json` of the model says, as vLLM does; else temperature 1, top_p 1, no top_k and no
min_p. Without max_tokens an answer may fill the context. Every number has bounds, and NaN and infinity are no numbers here.

Source: OpenAI API reference; names of the extra sampling fields from vLLM.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garage.core.seeds import derive
from garage.core.types import Completion, Message, Sampling, TokenLogprob, ToolCall
from garage.engine.defaults import GenerationDefaults
from garage.tokens.tokenizer import Tokenizer

NO_EFFECT = ("store", "service_tier", "prompt_cache_key", "safety_identifier", "verbosity", "user", "metadata")
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "min_tokens": (0,),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,), "include_stop_str_in_output": (False,), "add_generation_prompt": (True,), "echo": (False,),
    "continue_final_message": (False,), "best_of": (1,), "suffix": ("",), "modalities": (["text"],),
}  # fmt: skip

Json = dict[str, object]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=64)]


class ApiError(Exception):
    """An answer that is an error: status, and the four fields of the body."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Shape):
    include_usage: bool = False


class TemplateArguments(_Shape):
    enable_thinking: bool | None = None


class Part(_Shape):
    type: Literal["text"]
    text: str


class Function(_Shape):
    name: str
    arguments: str


class Call(_Shape):
    id: str
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(_Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str = ""
    reasoning: str = ""
    reasoning_content: str = ""
    tool_calls: list[Call] = []
    tool_call_id: str = ""

    def message(self) -> Message:
        """The same turn as the stages know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in self.tool_calls)
        return Message(self.role, text, self.reasoning or self.reasoning_content, calls, self.tool_call_id, self.name)


class Ask(_Shape, ABC):
    """What chat and text completions have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=1 << 24)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 24)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=8)] = []
    stop_token_ids: list[Id] = Field([], max_length=256)
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many alternatives of each token to report; None = no log-probabilities."""


class ChatAsk(Ask):
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 24)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: TemplateArguments = TemplateArguments()

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsk(Ask):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)] | Annotated[list[Id], Field(min_length=1)] | Annotated[
        list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=64)]  # fmt: skip
    max_tokens: int | None = Field(16, ge=1, le=1 << 24)
    logprobs: int | None = Field(None, ge=0, le=20)

    def num_logprobs(self) -> int | None:
        return self.logprobs


Asked = TypeVar("Asked", bound=Ask)


def parse(shape: type[Asked], body: bytes) -> tuple[Asked, list[str]]:
    """The request in a body, and the names of the fields it has that change nothing.

    Raises:
        ApiError: 400; it is not a JSON object, or a field is unknown, of the wrong kind, out of range or not honoured.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON") from error
    if not isinstance(raw, dict):
        raise ApiError(400, "the body is not a JSON object")
    without_effect = [name for name in NO_EFFECT if raw.pop(name, None) is not None]
    for name, neutral in NEUTRAL.items():
        value = raw.pop(name, None)
        if value is not None and value not in neutral:
            raise ApiError(400, f"{name} is not supported here; only {json.dumps(neutral[0])} is accepted", param=name)
    try:
        asked = shape.model_validate(_without_nulls(raw))
    except ValidationError as error:
        raise _in_words(error) from error
    _check_together(asked)
    return asked, without_effect


def sampling_of(asked: Ask, defaults: GenerationDefaults, room: int, choice: int) -> Sampling:
    """How to sample choice number `choice`; `room` is what the context leaves for the answer."""
    limit = asked.max_tokens
    if isinstance(asked, ChatAsk) and limit is None:
        limit = asked.max_completion_tokens
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    seed = asked.seed if asked.seed is None or choice == 0 else derive(asked.seed, "choice", choice)
    return Sampling(
        max_tokens=limit or max(1, min(room, defaults.max_new_tokens or room)), seed=seed,
        temperature=_first(asked.temperature, defaults.temperature, 1.0), top_k=max(int(_first(asked.top_k, defaults.top_k, 0)), 0),
        top_p=_first(asked.top_p, defaults.top_p, 1.0), min_p=_first(asked.min_p, defaults.min_p, 0.0), stop=stop,
        stop_token_ids=tuple(asked.stop_token_ids), ignore_eos=asked.ignore_eos, logprobs=asked.num_logprobs(),
    )  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer share: its id, its model, when it was made, and whether it is a chat."""

    id: str
    model: str
    is_chat: bool
    created: int

    @classmethod
    def new(cls, number: str, model: str, *, is_chat: bool) -> "Reply":
        return cls(("chatcmpl-" if is_chat else "cmpl-") + number, model, is_chat, int(time.time()))

    def whole(self, choices: list[Json], usage: Json) -> Json:
        """The answer that is not streamed."""
        return {**self._head("chat.completion" if self.is_chat else "text_completion"), "choices": choices, "usage": usage}

    def chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        """One event of a stream."""
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return {**head, "choices": choices, **({"usage": usage} if usage is not None else {})}

    def choice(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        """One whole choice."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def piece(self, index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        """A part of a choice in a stream; `delta` has `content` or nothing."""
        said = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}


def usage_of(completions: Sequence[Completion], num_prompts: int) -> Json:
    """Tokens counted by the engine. Choices of one prompt share it, so it counts once."""
    each = len(completions) // num_prompts
    prompts, cached = (sum(getattr(c, name) for c in completions[::each]) for name in ("prompt_tokens", "cached_tokens"))
    made = sum(len(c.token_ids) for c in completions)
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made, **details}


def logprobs_of(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, *, is_chat: bool) -> Json:
    """Log-probabilities in the shape of chat or text completions."""
    if is_chat:
        return {"content": [_with_top(t, tokenizer) for t in logprobs], "refusal": None}
    texts = [tokenizer.decode([t.token_id], skip_special=False) for t in logprobs]
    tops = [{tokenizer.decode([i], skip_special=False): p for i, p in t.top} for t in logprobs]
    offsets = list(accumulate(map(len, texts), initial=0))[:-1]
    return {"tokens": texts, "token_logprobs": [t.logprob for t in logprobs], "top_logprobs": tops, "text_offset": offsets}


def model_card(name: str, created: int, max_model_len: int) -> Json:
    """One entry of `/v1/models`; the last three fields are vLLM's."""
    card: Json = {"id": name, "object": "model", "created": created, "owned_by": "garage"}
    return {**card, "root": name, "parent": None, "max_model_len": max_model_len}


def _with_top(chosen: TokenLogprob, tokenizer: Tokenizer) -> Json:
    top = [_named(i, p, tokenizer) for i, p in chosen.top]
    return {**_named(chosen.token_id, chosen.logprob, tokenizer), "top_logprobs": top}


def _named(token_id: int, logprob: float, tokenizer: Tokenizer) -> Json:
    text = tokenizer.decode([token_id], skip_special=False)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(tokenizer.token_bytes(token_id))}


def _first(asked: float | None, default: float | None, otherwise: float) -> float:
    return next(value for value in (asked, default, otherwise) if value is not None)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check_together(asked: Ask) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
    if not isinstance(asked, ChatAsk):
        return
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if len({asked.max_tokens, asked.max_completion_tokens} - {None}) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens are both given and differ", param="max_tokens")


def _in_words(error: ValidationError) -> ApiError:
    fault = error.errors(include_input=False, include_url=False)[0]
    place = [str(part) for part in fault["loc"]]
    param = ".".join(place) or None
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {param}, or it is not supported here", param=param)
    return ApiError(400, f"{param}: {fault['msg']}", param=param)
