"""The engine's thread: the one place where the server and the engine meet.

Routes hand requests over through an inbox and receive tokens in an asyncio queue. The thread empties the inbox before every step,
so that an abort frees its pages within one step, whatever state the request is in. All tokens of a step cross to the event loop in
one call. A step that raises ends the requests that ran in it; the thread goes on. It counts as stalled when work is queued and no
step has finished for `stall_seconds`, and as broken after three failed steps in a row.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from garage.core.types import Request
from garage.engine.engine import Engine
from garage.engine.request import Delta
from garage.serve.metrics import Metrics

MAX_FAILURES = 3
_log = logging.getLogger("garage.serve")


@dataclass(eq=False)
class Ticket:
    """A group of requests on their way: `accepted` is set or fails once, then deltas arrive in `deltas`."""

    requests: Sequence[Request]
    accepted: "asyncio.Future[None]"
    deltas: "asyncio.Queue[Delta]" = field(default_factory=asyncio.Queue)


class EngineLoop:
    """Runs an engine in a background thread. Everything but `start`, `stop` and `is_healthy` belongs to one event loop."""

    def __init__(self, engine: Engine, metrics: Metrics, *, stall_seconds: float) -> None:
        self._engine, self._metrics, self._stall_seconds = engine, metrics, stall_seconds
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[Callable[[], None]] = []
        self._failures, self._moved = 0, time.monotonic()
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

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Hand a group over, all or none.

        Raises:
            UserError: one of them was refused; `QueueFull` when it may succeed later.
        """
        ticket = Ticket(requests, asyncio.get_running_loop().create_future())
        self._touch()
        self._inbox.put(lambda: self._accept(ticket))
        try:
            await ticket.accepted
        except asyncio.CancelledError:
            self.abort(ticket)
            raise
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """End what is left of a group; harmless when nothing is."""
        self._inbox.put(lambda: self._abort(ticket))

    def _touch(self) -> None:
        """Work that arrives at an idle engine starts the clock of `is_healthy`."""
        if not self._engine.has_work and self._inbox.empty():
            self._moved = time.monotonic()

    def _run(self) -> None:
        while self._empty_inbox():
            if self._engine.has_work:
                self._step()
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

    def _accept(self, ticket: Ticket) -> None:
        """All of a group or none of it; what goes wrong is the group's own error."""
        try:
            for request in ticket.requests:
                self._engine.submit(request, lambda delta: self._hear(ticket, delta))
        except Exception as error:  # the edge of the thread: whoever waits for an answer gets this one
            self._abort(ticket)
            self._outbox.append(_if_waiting(ticket, error))
            return
        self._outbox.append(_if_waiting(ticket, None))

    def _abort(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            self._engine.abort(request.id)

    def _hear(self, ticket: Ticket, delta: Delta) -> None:
        self._metrics.heard(delta)
        self._outbox.append(lambda: ticket.deltas.put_nowait(delta))

    def _flush(self) -> None:
        if not self._outbox or self._loop is None:
            return
        calls, self._outbox = self._outbox, []
        try:
            self._loop.call_soon_threadsafe(lambda: [call() for call in calls])
        except RuntimeError:
            _log.warning("the event loop is gone; %d messages were not delivered", len(calls))


def _if_waiting(ticket: Ticket, error: Exception | None) -> Callable[[], None]:
    def tell() -> None:
        if ticket.accepted.done():
            return
        if error is None:
            ticket.accepted.set_result(None)
        else:
            ticket.accepted.set_exception(error)

    return tell
