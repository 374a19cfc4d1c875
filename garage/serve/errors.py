"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`, always, with the status their SDK knows.

400 a request that cannot be honoured, 401 no key, 403 not allowed, 404 no such thing, 413 too large, 415 not JSON, 429 too much for
now (with Retry-After), 500 our fault, 503 not now. No message names a path of the server or shows a stack.
"""

from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from garage.core.errors import UserError
from garage.engine.request import QueueFull

Json = dict[str, object]


class ApiError(Exception):
    """An answer that is an error: status, and the four fields of the body."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def limited(message: str, seconds: float) -> ApiError:
    """429: too much for now; come back in `seconds`."""
    headers = {"Retry-After": str(max(1, -int(-seconds // 1)))}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def not_now(message: str, code: str) -> ApiError:
    """503: the server cannot take or finish this now, whoever asks."""
    return ApiError(503, message, kind="server_error", code=code, headers={"Retry-After": "1"})


def refused(error: UserError, param: str | None = None) -> ApiError:
    """What the engine refuses, for the client: 429 when it may succeed later, else 400."""
    words = f"{error.args[0]}; {error.remedy}"
    return limited(words, 1) if isinstance(error, QueueFull) else ApiError(400, words, param=param)


def answer(error: ApiError) -> JSONResponse:
    """The HTTP answer for an error."""
    return JSONResponse(error.body, error.status, error.headers)


async def on_error(request: HttpRequest, error: Exception) -> Response:
    """Every error a route may raise, in the one shape."""
    if isinstance(error, ApiError):
        return answer(error)
    if isinstance(error, UserError):
        return answer(refused(error))
    if isinstance(error, RequestValidationError):
        return answer(ApiError(422, "the request cannot be processed"))
    assert isinstance(error, HTTPException), error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return answer(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))


KINDS = (ApiError, UserError, HTTPException, RequestValidationError)
