"""`Remote`: any OpenAI-compatible endpoint as a `Generator`, for teachers, judges and models served elsewhere.

Conversations go to chat completions, texts and token ids to completions. Only what differs from a plain request is sent, so that plain
requests work everywhere; fields beyond OpenAI's own have vLLM's names. Log-probabilities need an endpoint that gives token ids back, as
ours and vLLM do. Calls of tools come back in the text, as Qwen 3 writes them. Embeddings are refused.

Asked again with exponential back-off and jitter: 408, 409, 429, 5xx, timeouts, cut connections, and answers that are no completion; what
`Retry-After` says is waited for, up to two minutes. A request that still fails is a completion with finish_reason "error". The whole batch
ends when the endpoint refuses the key or the model, or was never reached. One `Remote` may be asked from several threads.
"""

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from garage.core.errors import UserError, needs_extra
from garage.core.types import Completion, FinishReason, Message, Request, Sampling, Structure, TokenLogprob

ENDS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}
OWN = ("top_p", "presence_penalty", "frequency_penalty", "seed", "stop")
EXTRA = {name: name for name in ("top_k", "min_p", "typical_p", "repetition_penalty", "bad_words", "allowed_token_ids", "stop_token_ids",
         "ignore_eos", "min_tokens", "prompt_logprobs")}
EXTRA |= {"include_stop": "include_stop_str_in_output", "skip_special": "skip_special_tokens"}
"""Fields of `Sampling` that are OpenAI's, and what endpoints call the others."""
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
        if request.wants_embedding:
            return _failed(request, "embeddings cannot be had from a remote model; use the engine")
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
        more: dict[str, Any] = {"tools": [*request.tools]} if request.tools else {}
        if request.structure and request.structure.kind == "json" and self._knows_schemas:
            schema = {"name": "reply", "schema": json.loads(request.structure.text), "strict": True}
            more["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.structure and self._knows_schemas:
            extra |= _form(request.structure)
        if request.sampling.logprobs is not None:
            more |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
        reply = self._client.chat.completions.create(messages=messages, **more, **self._settings(request, extra))
        choice = _choice(reply, "message")
        calls = [f'{{"name": {json.dumps(c.function.name)}, "arguments": {c.function.arguments}}}' for c in choice.message.tool_calls or ()]
        text = "\n".join([choice.message.content or "", *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])
        content = getattr(choice.logprobs, "content", None) or ()
        return _completed(request, text if choice.message.content else text.lstrip("\n"), reply, choice, content)

    def _text(self, request: Request) -> Completion:
        prompt = request.prompt if isinstance(request.prompt, str) else [i for i in request.prompt if isinstance(i, int)]
        extra = _form(request.structure) if request.structure and self._knows_schemas else {}
        more: dict[str, Any] = {} if request.sampling.logprobs is None else {"logprobs": request.sampling.logprobs}
        reply = self._client.completions.create(prompt=prompt, **more, **self._settings(request, extra))
        choice = _choice(reply, "text")
        return _completed(request, choice.text, reply, choice, _legacy(choice.logprobs))

    def _settings(self, request: Request, extra: dict[str, Any]) -> dict[str, Any]:
        sampling, plain = request.sampling, Sampling()
        settings: dict[str, Any] = {"model": request.adapter or self._model, "max_tokens": sampling.max_tokens}
        settings["temperature"] = sampling.temperature
        asked = {name: getattr(sampling, name) for name in (*OWN, *EXTRA) if getattr(sampling, name) != getattr(plain, name)}
        asked = {name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()}
        settings |= {name: asked[name] for name in OWN if name in asked}
        settings |= {"logit_bias": {str(i): bias for i, bias in sampling.logit_bias}} if sampling.logit_bias else {}
        extra |= {told: asked[name] for name, told in EXTRA.items() if name in asked}
        extra |= {name: value for name in ("cache_salt", "priority") if (value := getattr(request, name))}
        if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
            extra |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
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


def _completed(request: Request, text: str, reply: Any, choice: Any, tokens: Any) -> Completion:
    if choice.finish_reason not in ENDS:
        return _failed(request, f"the endpoint ended the answer with {choice.finish_reason!r}")
    usage, ids = reply.usage, tuple(getattr(choice, "token_ids", None) or ())
    cached = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None) or 0
    counts = [getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]
    told = getattr(choice, "prompt_logprobs", None) or getattr(reply, "prompt_logprobs", None) or ()
    if (request.sampling.logprobs is not None and not ids and counts[1]) or (request.sampling.prompt_logprobs is not None and not told):
        return _failed(request, "the endpoint gives no token ids back, so log-probabilities cannot be had from it")
    logprobs = tuple(TokenLogprob(_id(t.token), t.logprob, tuple((_id(o.token), o.logprob) for o in t.top_logprobs)) for t in tokens)
    return Completion(
        request.id, text, ids, ENDS[choice.finish_reason], counts[0], cached, logprobs, output_tokens=counts[1],
        prompt_logprobs=tuple(_prompt_logprob(entry) for entry in told),
    )  # fmt: skip


def _form(structure: Structure) -> dict[str, Any]:
    value = json.loads(structure.text) if structure.kind in ("json", "choice") else structure.text
    return {"structured_outputs": {structure.kind: value}}


def _legacy(logprobs: Any) -> list[Any]:
    """Log-probabilities of a text completion in the shape of a chat's."""
    if logprobs is None:
        return []
    tops = [[SimpleNamespace(token=token, logprob=p) for token, p in top.items()] for top in logprobs.top_logprobs]
    rows = zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=True)
    return [SimpleNamespace(token=token, logprob=p, top_logprobs=top) for token, p, top in rows]


def _prompt_logprob(entry: Any) -> TokenLogprob | None:
    """The first is the token itself; those with a rank, in its order, are the likeliest."""
    if entry is None:
        return None
    named = {int(token_id): facts for token_id, facts in entry.items()}
    top = sorted((facts["rank"], token_id, facts["logprob"]) for token_id, facts in named.items() if facts["rank"] is not None)
    first = next(iter(named))
    return TokenLogprob(first, named[first]["logprob"], tuple((token_id, p) for _, token_id, p in top))


def _id(name: str) -> int:
    """The id in the name that endpoints give tokens when asked for ids."""
    return int(name.removeprefix("token_id:"))


def _failed(request: Request, why: str) -> Completion:
    return Completion(request.id, "", (), "error", 0, error=why)
