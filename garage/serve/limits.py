"""The gate every request passes first: an id, the key, and a bound on the body.

The id is made here, never taken from the client, and returned as `x-request-id` on every answer, errors and 500s included. Without
the key nothing but `/health` answers. A body is counted as it arrives, whatever its Content-Length says, and has `BODY_SECONDS` to
arrive. What a route raises by mistake becomes a 500 that says nothing about us; the log has the rest under the same id.
"""

import asyncio
import hashlib
import hmac
import logging
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from garage.serve.openai import ApiError

PUBLIC = ("/health",)
BODY_SECONDS = 60
_log = logging.getLogger("garage.serve")


def answer(error: ApiError) -> JSONResponse:
    """The HTTP answer for an error."""
    return JSONResponse(error.body, error.status, error.headers)


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, *, api_key: str, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._key = _hash(api_key) if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        has_begun = False

        async def named(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            self._authorize(scope)
            await self._app(scope, await self._read(receive), named)
        except ApiError as error:
            await answer(error)(scope, receive, named)
        except Exception:  # the edge of the server: nothing of it may reach the client
            _log.exception("request %s failed", number)
            if has_begun:
                raise
            await answer(ApiError(500, f"internal error; request id {number}", kind="server_error"))(scope, receive, named)

    def _authorize(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in PUBLIC:
            return
        headers = Headers(scope=scope)
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(_hash(given), self._key):
            text = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

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


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
