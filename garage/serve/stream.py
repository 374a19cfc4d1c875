"""From the engine's deltas to an answer: whole, or as server-sent events.

A stream is: the role, the pieces of text, a last piece with the finish reason, the usage if asked for, `[DONE]`. When something
fails after the headers have gone out, the stream ends with `data: {"error": ...}` and no `[DONE]`. A client that leaves ends its
generation: the response is cancelled, and what is cancelled aborts.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from garage.core.types import Completion, TokenLogprob
from garage.serve.loop import EngineLoop, Ticket
from garage.serve.openai import ApiError, Ask, Json, Reply, logprobs_of, usage_of
from garage.tokens.tokenizer import Tokenizer

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Answering:
    """One accepted request of a client: `num_prompts` prompts with `asked.n` choices each."""

    loop: EngineLoop
    ticket: Ticket
    tokenizer: Tokenizer
    asked: Ask
    reply: Reply
    num_prompts: int

    async def whole(self, request: HttpRequest) -> Json:
        """The answer in one piece.

        Raises:
            ApiError: the engine failed, or the client has left.
        """
        gone, done = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ApiError(499, "the client has left")
            completions = done.result()
        finally:
            gone.cancel()
            done.cancel()
            self.loop.abort(self.ticket)
        choices = [self.reply.choice(i, c.text, self._logprobs(c.logprobs), c.finish_reason) for i, c in enumerate(completions)]
        return self.reply.whole(choices, usage_of(completions, self.num_prompts))

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        places = {request.id: i for i, request in enumerate(self.ticket.requests)}
        ended: dict[int, Completion] = {}
        try:
            for place in places.values() if self.reply.is_chat else ():
                yield self._event(place, {"role": "assistant", "content": ""})
            while len(ended) < len(places):
                delta = await self.ticket.deltas.get()
                place, done = places[delta.id], delta.completion
                if done is not None and (failure := _failure(done)):
                    yield _sse(failure.body)
                    return
                if delta.text or (delta.logprobs and self.asked.num_logprobs() is not None):
                    yield self._event(place, {"content": delta.text}, self._logprobs(delta.logprobs))
                if done is not None:
                    ended[place] = done
                    yield self._event(place, {}, finish_reason=done.finish_reason)
            if self.asked.wants_usage:
                yield _sse(self.reply.chunk([], usage_of([ended[i] for i in sorted(ended)], self.num_prompts)))
            yield "data: [DONE]\n\n"
        finally:
            self.loop.abort(self.ticket)

    async def _collect(self) -> list[Completion]:
        ended: dict[str, Completion] = {}
        while len(ended) < len(self.ticket.requests):
            done = (await self.ticket.deltas.get()).completion
            if done is not None:
                if failure := _failure(done):
                    raise failure
                ended[done.id] = done
        return [ended[request.id] for request in self.ticket.requests]

    def _event(self, place: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> str:
        return _sse(self.reply.chunk([self.reply.piece(place, delta, logprobs, finish_reason)]))

    def _logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> Json | None:
        if self.asked.num_logprobs() is None:
            return None
        return logprobs_of(logprobs, self.tokenizer, is_chat=self.reply.is_chat)


def _failure(done: Completion) -> ApiError | None:
    if done.finish_reason == "abort":
        return ApiError(503, "the server stopped before the answer was whole", kind="server_error", code="aborted")
    return ApiError(500, done.error, kind="server_error") if done.finish_reason == "error" else None


def _sse(payload: Json) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
