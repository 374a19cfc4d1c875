"""The gate every request passes first: an id, the host, the key and its limits, and a bound on the body.

The id is made here, never taken from the client, and returned as `x-request-id` on every answer, errors and 500s included. Without
a key nothing but `PUBLIC` answers, if there are keys. On a loopback address a Host that is not ours is refused: it is how a web page
reaches a local server through its own name (DNS rebinding). A body is counted as it arrives, whatever its Content-Length says, and
has `BODY_SECONDS` to arrive; when the queue is full it is not even read, so that refusing costs those who are served little. What a
route raises by mistake becomes a 500 that says nothing about us; the log has the rest under the same id.
"""

import asyncio
import logging
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from garage.serve.errors import ApiError, answer, limited
from garage.serve.keys import Keys, Tenant
from garage.serve.loop import EngineLoop
from garage.specs.serve import LOOPBACK, ServeSpec

PUBLIC = ("/health", "/ready", "/ping")
QUEUED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
BODY_SECONDS = 60
MAX_HEADERS = 1 << 15
_log = logging.getLogger("garage.serve")


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, *, keys: Keys, spec: ServeSpec, loop: EngineLoop) -> None:
        self._app, self._keys, self._max_body_bytes, self._loop = app, keys, spec.max_body_bytes, loop
        own = (*LOOPBACK, "[::1]") if spec.host in LOOPBACK else ()
        self._hosts = {*own, *spec.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        number, has_begun = uuid.uuid4().hex, False
        state["request_id"] = number
        more: Mapping[str, str] = {}

        async def named(message: Message) -> None:
            nonlocal has_begun
            if not has_begun and message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = number
                headers.update(more)
            await send(message)

        try:
            tenant = state["tenant"] = self._admit(scope)
            if scope["method"] != "POST":
                await self._app(scope, await self._read(receive), named)
                return
            tenant.enter()
            try:
                more = tenant.headers()
                await self._app(scope, await self._read(receive), named)
            finally:
                tenant.leave()
        except ApiError as error:
            if not has_begun:
                await answer(error)(scope, receive, named)
        except Exception:  # the edge of the server: nothing of it may reach the client
            _log.exception("request %s failed", number)
            if has_begun:
                raise
            await answer(ApiError(500, f"internal error; request id {number}", kind="server_error"))(scope, receive, named)

    def _admit(self, scope: Scope) -> Tenant:
        """Whose request this is, if it may come in at all."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            raise ApiError(431, f"the headers are longer than {MAX_HEADERS} bytes", code="headers_too_large")
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self._hosts and host not in self._hosts and host.rpartition(":")[0] not in self._hosts:
            raise ApiError(403, f"this server is not called {host[:100]!r}; see allowed_hosts", code="wrong_host")
        if scope["path"] in PUBLIC:
            return Tenant()
        tenant = self._keys.find(headers)
        if self._loop.is_full and scope["path"] in QUEUED and scope["method"] == "POST":
            raise limited("too many requests wait already; send the request again in a moment", 1)
        return tenant

    async def _read(self, receive: Receive) -> Receive:
        """Take the whole body in; returns a `receive` that gives it again."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return _replay(await self._collect(receive), receive)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds", code="request_timeout") from error

    async def _collect(self, receive: Receive) -> Message:
        pieces, size, has_more = [], 0, True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            size, has_more = size + len(pieces[-1]), message.get("more_body", False)
            if size > self._max_body_bytes:
                raise ApiError(413, f"the body is larger than {self._max_body_bytes} bytes", code="request_too_large")
        return {"type": "http.request", "body": b"".join(pieces), "more_body": False}


def _replay(first: Message, receive: Receive) -> Receive:
    messages = [first]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
