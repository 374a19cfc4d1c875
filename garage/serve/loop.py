"""The engine's thread: the one place where the server and the engine meet.

Routes hand requests over through an inbox and receive tokens in a ticket. The thread empties the inbox before every step, so that an
abort frees its pages within one step, whatever state the request is in. Tokens cross to the event loop together, at most every
`stream_seconds` and for at most `WRITES` streams a second, because every write takes time from the model; first and last tokens at once.
A step that raises ends the requests that ran in it; the thread goes on. It counts as stalled when work is queued and no step has
finished for `stall_seconds`, and as broken after three failed steps in a row.

Bounds: a request that has not started after `queue_seconds` ends with 503; a stream whose client leaves `MAX_UNREAD` deltas unread
is aborted, and its connection is cut.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from garage.core.types import Request
from garage.engine.engine import Engine
from garage.engine.request import Delta
from garage.serve.errors import ApiError, not_now
from garage.serve.metrics import Metrics
from garage.specs.serve import ServeSpec

MAX_FAILURES = 3
MAX_UNREAD = 1024
WRITES = 640
LOOK_SECONDS = 0.25  # how often the queue is searched for requests that have waited too long
_log = logging.getLogger("garage.serve")
T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """A group of requests on their way: `accepted` is set or fails once, then deltas arrive; without `is_streamed` only last ones."""

    requests: Sequence[Request]
    accepted: "asyncio.Future[None]"
    is_streamed: bool
    unread: list[Delta] = field(default_factory=list)
    has_begun: bool = False  # something of it has been told
    why: ApiError | None = None  # set by whoever ends it from outside
    on_overflow: Callable[[], None] | None = None
    _reader: "asyncio.Future[None] | None" = None

    async def read(self) -> list[Delta]:
        """What has arrived since the last time; waits for something."""
        while not self.unread:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        out, self.unread = self.unread, []
        return out

    def put(self, delta: Delta) -> None:
        """A delta has crossed to the event loop."""
        self.unread.append(delta)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if len(self.unread) > MAX_UNREAD and self.on_overflow is not None:
            self.on_overflow()


class EngineLoop:
    """Runs an engine in a background thread. Everything but `start`, `stop` and `is_healthy` belongs to one event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, spec: ServeSpec) -> None:
        self._engine, self._metrics = engine, metrics
        self._stall_seconds, self._queue_seconds, self._pause = spec.stall_seconds, spec.queue_timeout_seconds, spec.stream_seconds
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[tuple[Callable[[Any], None], Any]] = []
        self._tickets: dict[str, Ticket] = {}
        self._failures, self._moved, self._looked, self._flushed = 0, time.monotonic(), 0.0, 0.0
        self._num_sent = self._num_taken = 0  # requests put into the inbox, by the event loop, and taken out, by the thread
        self._is_urgent = False  # something in the outbox does not wait
        self._thread = threading.Thread(target=self._run, name="garage-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Call it from the event loop that will be served."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests still inside are aborted."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """The thread lives, steps succeed, and queued work advances."""
        is_stalled = (self._engine.has_work or not self._inbox.empty()) and time.monotonic() - self._moved > self._stall_seconds
        return self._thread.is_alive() and self._failures < MAX_FAILURES and not is_stalled

    @property
    def is_full(self) -> bool:
        """Whether a request that comes now would be refused, whatever it is."""
        return self._num_sent - self._num_taken >= self._engine.num_free_places

    async def submit(self, requests: Sequence[Request], *, is_streamed: bool) -> Ticket:
        """Hand a group over, all or none.

        Raises:
            UserError: one of them was refused; `QueueFull` when it may succeed later.
        """
        ticket = Ticket(requests, asyncio.get_running_loop().create_future(), is_streamed)
        self._num_sent += len(requests)
        self._put(lambda: self._accept(ticket))
        try:
            await ticket.accepted
        except asyncio.CancelledError:
            self.abort(ticket)
            raise
        return ticket

    async def call(self, do: Callable[[], T]) -> T:
        """Let the engine's thread do something between two steps; raises what it raises."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(lambda: self._do(do, future))
        return await future

    def abort(self, ticket: Ticket) -> None:
        """End what is left of a group; harmless when nothing is."""
        self._inbox.put(lambda: self._abort(ticket))

    def _put(self, do: Callable[[], None]) -> None:
        """Work that arrives at an idle engine starts the clock of `is_healthy`."""
        if not self._engine.has_work and self._inbox.empty():
            self._moved = time.monotonic()
        self._inbox.put(do)

    def _run(self) -> None:
        while self._empty_inbox():
            if self._engine.has_work:
                self._step()
            pause = max(self._pause, self._engine.stats().num_running / WRITES) if self._pause else 0.0
            if self._is_urgent or not self._engine.has_work or self._moved - self._flushed >= pause:
                self._flush()
        for name in self._engine.active_ids:
            self._engine.abort(name)
        self._flush()

    def _empty_inbox(self) -> bool:
        """Do what the inbox says; waits for something when the engine is idle. False: stop."""
        while not self._inbox.empty() or not self._engine.has_work:
            do = self._inbox.get()
            if do is None:
                return False
            do()
            if not self._engine.has_work:
                self._flush()
        return True

    def _step(self) -> None:
        try:
            self._engine.step()
            self._failures = 0
        except Exception:  # the edge of the thread: what ran has been told, the next step may succeed
            self._failures += 1
            _log.exception("a step of the engine failed")
        self._moved = time.monotonic()
        self._metrics.stepped(self._engine.last_step_tokens)
        if self._moved - self._looked > LOOK_SECONDS:
            self._looked = self._moved
            self._end_overdue()

    def _end_overdue(self) -> None:
        for name in self._engine.overdue(self._queue_seconds):
            ticket = self._tickets[name]
            ticket.why = not_now(f"the request waited {self._queue_seconds:g} seconds and did not start", "queue_timeout")
            self._abort(ticket)

    def _accept(self, ticket: Ticket) -> None:
        """All of a group or none of it; what goes wrong is the group's own error."""
        self._num_taken += len(ticket.requests)
        try:
            for request in ticket.requests:
                self._engine.submit(request, lambda delta: self._hear(ticket, delta))
                self._tickets[request.id] = ticket
                self._metrics.accepted(request)
        except Exception as error:  # the edge of the thread: whoever waits for an answer gets this one
            self._abort(ticket)
            self._outbox.append((_finish(ticket.accepted, error), None))
            self._is_urgent = True
            return
        self._outbox.append((_finish(ticket.accepted), None))
        self._is_urgent = True

    def _do(self, do: Callable[[], T], future: "asyncio.Future[T]") -> None:
        try:
            self._outbox.append((_finish(future), do()))
        except Exception as error:  # the edge of the thread: whoever called gets it
            self._outbox.append((_finish(future, error), None))
        self._flush()

    def _abort(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            self._engine.abort(request.id)

    def _hear(self, ticket: Ticket, delta: Delta) -> None:
        self._metrics.heard(delta)
        if delta.completion is not None:
            self._tickets.pop(delta.id, None)
        elif not ticket.is_streamed:
            return
        self._is_urgent |= delta.completion is not None or not ticket.has_begun
        ticket.has_begun = True
        self._outbox.append((ticket.put, delta))

    def _flush(self) -> None:
        if not self._outbox or self._loop is None:
            return
        calls, self._outbox = self._outbox, []
        self._is_urgent, self._flushed = False, self._moved
        try:
            self._loop.call_soon_threadsafe(_deliver, calls)
        except RuntimeError:
            _log.warning("the event loop is gone; %d messages were not delivered", len(calls))


def _deliver(calls: list[tuple[Callable[[Any], None], Any]]) -> None:
    for do, value in calls:
        do(value)


def _finish(future: "asyncio.Future[Any]", error: Exception | None = None) -> Callable[[Any], None]:
    """What sets a future on the event loop, to its value or to an error, if anyone still waits."""

    def finish(value: object) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(value)

    return finish
