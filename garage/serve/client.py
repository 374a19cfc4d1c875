"""`Remote`: any OpenAI-compatible endpoint as a `Generator`, for teachers, judges and models served elsewhere.

Conversations go to chat completions, texts and token ids to completions. Fields beyond OpenAI's own are sent only when they ask for
something, so that plain requests work everywhere. What an answer over HTTP cannot give back (token ids, and therefore log-probabilities
by id, and tool calls) is refused, not lost.

Asked again with exponential back-off and jitter: 408, 409, 429, 5xx, timeouts, cut connections, and answers that are no completion; what
`Retry-After` says is waited for, up to two minutes. A request that still fails is a completion with finish_reason "error". The whole batch
ends when the endpoint refuses the key or the model, or was never reached. One `Remote` may be asked from several threads.
"""

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from garage.core.errors import UserError, needs_extra
from garage.core.types import Completion, FinishReason, Message, Request

ENDS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ORDERED = 0.5, 8.0, 120.0
"""Seconds before asking again: after the first failure, at most by ourselves, at most because the endpoint says so."""


class Remote:
    """The model called `model` at `base_url`; up to `concurrency` requests at once, each asked again up to `retries` times."""

    def __init__(self, base_url: str, model: str, *, api_key: str = "", concurrency: int = 8, timeout: float = 600,
                 retries: int = 4) -> None:  # fmt: skip
        try:
            import openai  # an extra, and slow to import
        except ImportError as error:
            raise needs_extra("openai", "teacher") from error
        self._errors, self._model, self._concurrency, self._retries = openai, model, concurrency, retries
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=timeout, max_retries=0)
        self._was_reached, self._knows_schemas = False, True

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers in the order of the requests.

        Raises:
            UserError: the endpoint refuses the key, does not know the model, or cannot be reached at all.
        """
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(self._answer, requests))

    def _answer(self, request: Request) -> Completion:
        if request.tools or request.sampling.logprobs is not None:
            what = "tools" if request.tools else "logprobs"
            return _failed(request, f"{what} cannot be had from a remote model; use the engine")
        attempt = 0
        while True:
            try:
                done = self._chat(request) if _is_chat(request) else self._text(request)
                self._was_reached = True
                return done
            except (self._errors.AuthenticationError, self._errors.PermissionDeniedError, self._errors.NotFoundError) as error:
                remedy = "check its base URL, the model's name and the API key"
                raise UserError(f"the endpoint refuses requests for {self._model!r}: {error.message:.300}", remedy=remedy) from error
            except (self._errors.APIError, ValueError) as error:
                self._was_reached |= not isinstance(error, self._errors.APIConnectionError)
                pause = self._pause(request, error, attempt)
                if pause is None:
                    return self._given_up(request, error)
            time.sleep(pause)
            attempt += 1

    def _pause(self, request: Request, error: Exception, attempt: int) -> float | None:
        """Seconds to wait before asking again, None if asking again is no use."""
        status = getattr(error, "status_code", 500)
        if request.structure and self._knows_schemas and status in (400, 422):
            self._knows_schemas = False  # the words of the prompt must do
            return 0.0
        if attempt >= self._retries or not (status >= 500 or status in (408, 409, 429)):
            return None
        ordered: str = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        if ordered.isdecimal():
            return float(ordered) if float(ordered) <= LONGEST_ORDERED else None
        return random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt)

    def _given_up(self, request: Request, error: Exception) -> Completion:
        if isinstance(error, self._errors.APITimeoutError):
            return _failed(request, "the endpoint did not answer in time")
        if isinstance(error, self._errors.APIConnectionError):
            if not self._was_reached:
                raise UserError("the endpoint cannot be reached", remedy="check its base URL and that it is running") from error
            return _failed(request, "the connection to the endpoint was cut")
        return _failed(request, f"the endpoint failed: {getattr(error, 'message', error)!s:.300}")

    def _chat(self, request: Request) -> Completion:
        messages: Any = [_turn(message) for message in request.prompt if isinstance(message, Message)]
        extra = {} if request.thinking is None else {"chat_template_kwargs": {"enable_thinking": request.thinking}}
        shape: dict[str, Any] = {}
        if request.structure and request.structure.kind == "json" and self._knows_schemas:
            schema = {"name": "reply", "schema": json.loads(request.structure.text), "strict": True}
            shape = {"response_format": {"type": "json_schema", "json_schema": schema}}
        reply = self._client.chat.completions.create(messages=messages, **shape, **self._settings(request, extra))
        choice = _choice(reply, "message")
        return _completed(request, choice.message.content or "", choice.finish_reason, reply.usage)

    def _text(self, request: Request) -> Completion:
        prompt = request.prompt if isinstance(request.prompt, str) else [i for i in request.prompt if isinstance(i, int)]
        reply = self._client.completions.create(prompt=prompt, **self._settings(request, {}))
        choice = _choice(reply, "text")
        return _completed(request, choice.text, choice.finish_reason, reply.usage)

    def _settings(self, request: Request, extra: dict[str, Any]) -> dict[str, Any]:
        sampling = request.sampling
        settings: dict[str, Any] = {"model": self._model, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        settings |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        settings |= {"seed": sampling.seed} if sampling.seed is not None else {}
        settings |= {"stop": list(sampling.stop)} if sampling.stop else {}
        for name in ("top_k", "min_p", "stop_token_ids", "ignore_eos"):
            if value := getattr(sampling, name):
                extra[name] = list(value) if isinstance(value, tuple) else value
        return settings | ({"extra_body": extra} if extra else {})


def _is_chat(request: Request) -> bool:
    return not isinstance(request.prompt, str) and isinstance(next(iter(request.prompt), None), Message)


def _turn(message: Message) -> dict[str, Any]:
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls]
    optional = {"reasoning": message.reasoning, "tool_calls": calls, "tool_call_id": message.tool_call_id, "name": message.name}
    return {"role": message.role, "content": message.content} | {key: value for key, value in optional.items() if value}


def _choice(reply: Any, part: str) -> Any:
    """The one answer of a reply; the SDK does not check what it is given."""
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], part, None) is None:
        raise ValueError("its answer is no completion")
    return choices[0]


def _completed(request: Request, text: str, reason: str | None, usage: Any) -> Completion:
    if reason not in ENDS:
        return _failed(request, f"the endpoint ended the answer with {reason!r}")
    cached = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None) or 0
    counts = [getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]
    return Completion(request.id, text, (), ENDS[reason], counts[0], cached, output_tokens=counts[1])


def _failed(request: Request, why: str) -> Completion:
    return Completion(request.id, "", (), "error", 0, error=why)
