"""From the engine's deltas to an answer: whole, or as server-sent events.

All that arrived since the last write goes out in one write, an event for each token. When something fails after the headers have gone
out, the stream ends with the error and no `[DONE]`. A client that leaves ends its generation: the response is cancelled, which
aborts. One that stays but does not read is cut off: at once when too much waits for it, and `LINGER_SECONDS` after the last token.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from garage.core.types import Completion
from garage.engine.request import Delta
from garage.engine.sampler import NOT_FOLLOWED, NOTHING_LEFT
from garage.serve.errors import ApiError, not_now
from garage.serve.loop import EngineLoop, Ticket
from garage.serve.replies import ChatVoice, TextVoice
from garage.serve.responses import ResponseVoice

_log = logging.getLogger("garage.serve")
CLIENT_GONE = 499
LINGER_SECONDS = 60
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
AnyVoice = ChatVoice | TextVoice | ResponseVoice
OnEnd = Callable[[Completion], None]


async def whole(loop: EngineLoop, ticket: Ticket, receive: Receive, on_end: OnEnd) -> list[Completion]:
    """All completions of a ticket, in order.

    Raises:
        ApiError: the engine failed, or the client has left.
    """
    ended: dict[str, Completion] = {}
    async with _watched(loop, ticket, receive):
        while len(ended) < len(ticket.requests):
            for done in [delta.completion for delta in await ticket.read() if delta.completion is not None]:
                on_end(done)
                ended[done.id] = _checked(ticket, done)
    return [ended[request.id] for request in ticket.requests]


class EventStream(Response):
    """A streamed answer."""

    media_type = "text/event-stream"

    def __init__(self, loop: EngineLoop, ticket: Ticket, voice: AnyVoice, on_end: OnEnd, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**HEADERS, **headers})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._loop, self._ticket, self._voice, self._on_end = loop, ticket, voice, on_end
        self._places = {request.id: place for place, request in enumerate(ticket.requests)}
        self._num_left = len(self._places)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._stream(receive, send)
        except TimeoutError:
            _log.warning("a client did not read its stream and was cut off")
        except ApiError as error:
            if error.status != CLIENT_GONE:  # it has begun: nobody is there to be told
                raise

    async def _stream(self, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop()
        async with _watched(self._loop, self._ticket, receive), asyncio.timeout(None) as patience:
            self._ticket.on_overflow = lambda: patience.reschedule(clock.time())
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._voice.begin(), "more_body": True})
            while self._num_left:
                body = self._said(await self._ticket.read())
                if not self._num_left:
                    patience.reschedule(clock.time() + LINGER_SECONDS)
                if body or not self._num_left:
                    await send({"type": "http.response.body", "body": body, "more_body": self._num_left > 0})

    def _said(self, deltas: Sequence[Delta]) -> bytes:
        """The bytes of these deltas; the end of the stream, when one is the last."""
        parts: list[bytes] = []
        try:
            for delta in deltas:
                if delta.completion is not None:
                    self._on_end(delta.completion)
                    _checked(self._ticket, delta.completion)
                    self._num_left -= 1
                parts.append(self._voice.heard(self._places[delta.id], delta))
        except ApiError as error:
            self._num_left = 0
            return b"".join([*parts, self._voice.failed(error)])
        return b"".join(parts) if self._num_left else b"".join([*parts, self._voice.end()])


@asynccontextmanager
async def _watched(loop: EngineLoop, ticket: Ticket, receive: Receive) -> AsyncIterator[None]:
    """Whatever ends this, the client's leaving included, ends the generation."""
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.ensure_future(_gone(receive))
    gone.add_done_callback(lambda done: None if done.cancelled() else task.cancel())
    try:
        yield
    except asyncio.CancelledError:
        if gone.done() and not gone.cancelled():
            task.uncancel()
            raise ApiError(CLIENT_GONE, "the client has left") from None
        raise
    finally:
        gone.cancel()
        loop.abort(ticket)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _checked(ticket: Ticket, done: Completion) -> Completion:
    """The completion, if it is an answer."""
    if done.finish_reason == "abort":
        raise ticket.why or not_now("the server stopped before the answer was whole", "aborted")
    if done.error.startswith((NOTHING_LEFT, NOT_FOLLOWED)):  # what was asked for is at fault
        raise ApiError(400, done.error)
    if done.finish_reason == "error":
        raise ApiError(500, done.error, kind="server_error")
    return done
