"""Answers in OpenAI's shapes: chat and text completions, whole and as chunks of a stream.

A voice turns what the engine says into bytes for one client. Choices of one prompt share it, so its tokens count once in `usage`.

Source: OpenAI API reference; `reasoning`, `token_ids`, `prompt_token_ids` and `prompt_logprobs` as vLLM has them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import isnan
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from garage import __version__
from garage.core.types import Completion, TokenLogprob
from garage.engine.request import Delta
from garage.serve.asks import Ask, ChatAsk, TextAsk
from garage.serve.errors import ApiError, Json
from garage.serve.prompts import Prompt
from garage.serve.reading import THOUGHT, Piece, Said, said
from garage.tokens.tokenizer import Tokenizer

LOWEST = -9999.0  # what JSON can hold in place of minus infinity
DONE = b"data: [DONE]\n\n"
_json = TypeAdapter(Any).dump_json  # a few times as quick as the standard library's


@dataclass(frozen=True)
class Head:
    """What all parts of one answer share."""

    number: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, prefix: str, kind: str) -> Json:
        head: Json = {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": f"garage-{__version__}"}


class Voice:
    """What chat and text completions have in common; `prompts` have `asked.candidates` choices each."""

    prefix = whole_kind = chunk_kind = ""

    def __init__(self, head: Head, asked: Ask, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> None:
        self.head, self.asked, self.prompts, self.tokenizer = head, asked, prompts, tokenizer
        self.count = len(prompts) * asked.candidates
        self.ended: dict[int, Completion] = {}
        self._wants_probs = asked.num_logprobs() is not None

    def end(self) -> bytes:
        """What comes after the last token."""
        return (self._event({"choices": [], "usage": self.usage()}) if self.asked.wants_usage else b"") + DONE

    def failed(self, error: ApiError) -> bytes:
        """The end of a stream that cannot go on."""
        return sse(error.body)

    def usage(self) -> Json:
        return usage_of(self.ended, [p.manner.is_open for p in self.prompts], self.tokenizer)

    def _chunk(self, place: int, body: Json, logprobs: Json | None = None, reason: str | None = None,
               extras: Json | None = None) -> bytes:  # fmt: skip
        choice = {"index": place, **body, "logprobs": logprobs, "finish_reason": reason, **(extras or {})}
        return self._event({"choices": [choice]})

    def _event(self, more: Json) -> bytes:
        return sse({**self.head.fields(self.prefix, self.chunk_kind), **more})

    def _ids(self, done: Completion) -> Json:
        return {"token_ids": list(done.token_ids)} if self.asked.return_token_ids else {}

    def _prompt_ids(self, place: int) -> Json:
        return {"prompt_token_ids": list(self._prompt_of(place).ids)} if self.asked.return_token_ids else {}

    def _prompt_of(self, place: int) -> Prompt:
        return self.prompts[place // self.asked.candidates]

    def _prompt_probs(self, done: Completion) -> Json:
        if self.asked.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": [p and prompt_logprob(p, self.asked.prompt_logprobs, self.tokenizer) for p in done.prompt_logprobs]}


class ChatVoice(Voice):
    """Chat completions: reasoning, text and calls of each choice, told apart by its reader."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, head: Head, asked: ChatAsk, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> None:
        super().__init__(head, asked, prompts, tokenizer)
        self._readers = [prompts[0].manner.reader() for _ in range(self.count)]
        self._num_calls = [0] * self.count

    def begin(self) -> bytes:
        chunks = [self._chunk(place, {"delta": {"role": "assistant", "content": ""}}) for place in range(self.count)]
        ids = self._prompt_ids(0)
        return b"".join([self._event({"choices": [], **ids}) if ids else b"", *chunks])

    def heard(self, place: int, delta: Delta) -> bytes:
        reader, done = self._readers[place], delta.completion
        pieces = reader.push(delta.text) + (reader.end() if done else [])
        probs = self._probs(delta.logprobs) if self._wants_probs and delta.logprobs else None
        bodies = [body for piece in pieces for body in self._deltas(place, piece)] or ([{"content": ""}] if probs else [])
        out = [self._chunk(place, {"delta": body}, None if n else probs) for n, body in enumerate(bodies)]
        if done is not None:
            self.ended[place] = done
            out.append(self._chunk(place, {"delta": {}}, None, self._reason(done, self._num_calls[place]), self._ids(done)))
        return b"".join(out)

    def whole(self, completions: Sequence[Completion]) -> Json:
        """The answer that is not streamed."""
        self.ended = dict(enumerate(completions))
        choices = [self._choice(place, done) for place, done in self.ended.items()]
        head = {**self.head.fields(self.prefix, self.whole_kind), "choices": choices, "usage": self.usage()}
        return {**head, **self._prompt_ids(0), **self._prompt_probs(completions[0])}

    def _choice(self, place: int, done: Completion) -> Json:
        reader = self.prompts[0].manner.reader()
        seen = said([*reader.push(done.text), *reader.end()])
        probs = self._probs(done.logprobs) if self._wants_probs else None
        reason = self._reason(done, len(seen.calls))
        return {"index": place, "message": message_of(seen), "logprobs": probs, "finish_reason": reason, **self._ids(done)}

    def _deltas(self, place: int, piece: Piece) -> list[Json]:
        if piece.call is None:
            return [{piece.kind: piece.text}]
        index, call = self._num_calls[place], piece.call
        self._num_calls[place] += 1
        first = {"index": index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        return [{"tool_calls": [first]}, {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]}]

    def _reason(self, done: Completion, num_calls: int) -> str:
        return "tool_calls" if num_calls and done.finish_reason == "stop" else done.finish_reason

    def _probs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        as_ids = self.asked.return_tokens_as_token_ids
        named = [(t, [_named(i, p, self.tokenizer, as_ids) for i, p in t.top[: self.asked.num_logprobs()]]) for t in logprobs]
        content = [{**_named(t.token_id, t.logprob, self.tokenizer, as_ids), "top_logprobs": top} for t, top in named]
        return {"content": content, "refusal": None}


class TextVoice(Voice):
    """Text completions, with their prompt before them when `echo` asks for it."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, head: Head, asked: TextAsk, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> None:
        super().__init__(head, asked, prompts, tokenizer)
        self._echo = asked.echo
        self._offsets = [0] * self.count

    def begin(self) -> bytes:
        if not self._echo:
            return b""
        return b"".join(self._chunk(place, {"text": self._prompt_of(place).text}) for place in range(self.count))

    def heard(self, place: int, delta: Delta) -> bytes:
        out, done = [], delta.completion
        if delta.text or (delta.logprobs and self._wants_probs):
            probs = self._legacy(delta.logprobs, self._offsets[place]) if self._wants_probs else None
            out.append(self._chunk(place, {"text": delta.text}, probs))
            self._offsets[place] += len(delta.text)
        if done is not None:
            self.ended[place] = done
            out.append(self._chunk(place, {"text": ""}, None, done.finish_reason, {**self._ids(done), **self._prompt_ids(place)}))
        return b"".join(out)

    def whole(self, completions: Sequence[Completion]) -> Json:
        """The answer that is not streamed; of `best_of` candidates the `n` likeliest per token."""
        self.ended = dict(enumerate(completions))
        each = self.asked.candidates
        choices: list[Json] = []
        for start in range(0, len(completions), each):
            group = list(completions[start : start + each])
            if each > self.asked.n:
                group.sort(key=lambda c: -fmean([t.logprob for t in c.logprobs] or [0.0]))
            choices += [self._choice(len(choices) + n, start, done) for n, done in enumerate(group[: self.asked.n])]
        return {**self.head.fields(self.prefix, self.whole_kind), "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, place: int, done: Completion) -> Json:
        prompt = self._prompt_of(place)
        text = prompt.text + done.text if self._echo else done.text
        first = TokenLogprob(prompt.ids[0], float("nan"))  # nothing predicts it
        echoed = [first, *(p for p in done.prompt_logprobs if p)] if self._echo else []
        probs = self._legacy([*echoed, *done.logprobs], 0) if self._wants_probs else None
        extras = {**self._ids(done), **self._prompt_ids(place), **self._prompt_probs(done)}
        return {"index": index, "text": text, "logprobs": probs, "finish_reason": done.finish_reason, **extras}

    def _legacy(self, logprobs: Sequence[TokenLogprob], start: int) -> Json:
        """The shape of text completions; what nothing predicts has null."""
        names = [_name(t.token_id, self.tokenizer, self.asked.return_tokens_as_token_ids) for t in logprobs]
        known = [None if isnan(t.logprob) else (t, name) for t, name in zip(logprobs, names, strict=True)]
        return {
            "tokens": names, "text_offset": list(accumulate(map(len, names), initial=start))[:-1],
            "token_logprobs": [pair and max(pair[0].logprob, LOWEST) for pair in known],
            "top_logprobs": [pair and self._top(*pair) for pair in known],
        }  # fmt: skip

    def _top(self, chosen: TokenLogprob, name: str) -> Json:
        """The likeliest tokens by their text, the chosen one among them; where texts agree, the likelier stays."""
        top: Json = {}
        for token_id, logprob in chosen.top[: self.asked.num_logprobs()]:
            top.setdefault(_name(token_id, self.tokenizer, self.asked.return_tokens_as_token_ids), max(logprob, LOWEST))
        top.setdefault(name, max(chosen.logprob, LOWEST))
        return top


def message_of(seen: Said) -> Json:
    """An assistant's message."""
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in seen.calls]
    content = seen.content if seen.content or not calls else None
    more = {"reasoning": seen.reasoning, "tool_calls": calls}
    return {"role": "assistant", "content": content, "refusal": None, **{name: value for name, value in more.items() if value}}


def usage_of(ended: dict[int, Completion], are_open: Sequence[bool], tokenizer: Tokenizer) -> Json:
    """Tokens of all choices; `are_open`: which prompts begin an answer's reasoning themselves."""
    completions = [ended[place] for place in sorted(ended)]
    each = max(1, len(completions) // len(are_open))
    prompts, cached = (sum(getattr(c, name) for c in completions[::each]) for name in ("prompt_tokens", "cached_tokens"))
    made = sum(len(c.token_ids) for c in completions)
    thought = sum(num_reasoning(c, are_open[place // each], tokenizer) for place, c in enumerate(completions))
    details = {"prompt_tokens_details": {"cached_tokens": cached}, "completion_tokens_details": {"reasoning_tokens": thought}}
    return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made, **details}


def num_reasoning(done: Completion, is_open: bool, tokenizer: Tokenizer) -> int:
    """Tokens up to the end of the reasoning, its tags included; found by halving, so it costs a few decodes."""
    ids = done.token_ids
    if not is_open and not tokenizer.decode(ids[:16], skip_special=False).lstrip().startswith("<think>"):
        return 0
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if THOUGHT in tokenizer.decode(ids[:middle], skip_special=False) else (middle + 1, high)
    return high


def prompt_logprob(token: TokenLogprob, count: int, tokenizer: Tokenizer) -> Json:
    """One prompt token: the chosen id and the likeliest ones, each with its rank where that is known."""
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
    probs = {token.token_id: token.logprob, **dict(token.top[:count])}
    named = {i: {"logprob": max(p, LOWEST), "rank": ranks.get(i)} for i, p in probs.items()}
    return {str(i): {**facts, "decoded_token": _name(i, tokenizer, False)} for i, facts in named.items()}


def sse(payload: Json, event: str = "") -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return b"".join([name.encode(), b"data: ", _json(payload), b"\n\n"])


def _named(token_id: int, logprob: float, tokenizer: Tokenizer, as_id: bool) -> Json:
    name = _name(token_id, tokenizer, as_id)
    return {"token": name, "logprob": max(logprob, LOWEST), "bytes": list(tokenizer.token_bytes(token_id))}


def _name(token_id: int, tokenizer: Tokenizer, as_id: bool) -> str:
    return f"token_id:{token_id}" if as_id else tokenizer.decode([token_id], skip_special=False)
