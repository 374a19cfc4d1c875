"""A model behind the OpenAI API, wherever it runs: at an address, or on this disk and served from a thread of this process.

Batches and conversations ask through the same routes as every client, so that whatever a request may say is honoured or refused, and the
answer split into text, reasoning and calls, by one piece of code. The local server listens on loopback, with a key nobody else has.

Asked again with growing pauses: 408, 409, 429, 5xx and cut connections of an address; of our own server only "come back later". What
`Retry-After` says is waited for, up to two minutes. No redirect is followed: it would carry the key elsewhere.
"""

import json
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from garage.core.errors import UserError
from garage.specs.generate import AskSpec
from garage.specs.serve import ServeSpec
from garage.store.locate import locate

if TYPE_CHECKING:
    from garage.engine.engine import Engine

RETRIES, FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ORDERED = 4, 0.5, 8.0, 120.0
TIMEOUT, MOST_BYTES = 600.0, 256 << 20
Json = dict[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """Where `model` answers. `engine` is there when it runs in this process, with the `adapters` loaded over it."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    engine: "Engine | None" = None
    adapters: tuple[str, ...] = ()

    def post(self, route: str, body: Mapping[str, object]) -> tuple[int, Json]:
        """Status and answer, after as many tries as are worth it; status 0 when there was no answer, and why.

        Raises:
            UserError: the key is refused.
        """
        for attempt in range(RETRIES + 1):
            pause = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt)
            try:
                with self._open(route, body) as reply:
                    return reply.status, _object(reply.read(MOST_BYTES))
            except HTTPError as error:
                status, answer = error.code, _object(error.read(1 << 20))
                ordered = error.headers.get("retry-after") or ""
            except (OSError, HTTPException) as error:
                status, answer, ordered = 0, _failure(f"no answer: {getattr(error, 'reason', error)}"), ""
            if status in (401, 403):
                raise UserError(f"{self.url} refuses the key: {words_of(answer)}", remedy="put the right one into OPENAI_API_KEY")
            is_worth = status in (429, 503) or (self.engine is None and (status in (0, 408, 409) or status >= 500))
            if not is_worth or attempt == RETRIES or (ordered.isdecimal() and float(ordered) > LONGEST_ORDERED):
                break
            time.sleep(float(ordered) if ordered.isdecimal() else pause)
        return status, answer

    def stream(self, route: str, body: Mapping[str, object]) -> Iterator[Json]:
        """The events of an answer; closing the iterator ends it. The last event of one that failed is `{"error": ...}`."""
        try:
            with self._open(route, {**body, "stream": True, "stream_options": {"include_usage": True}}) as reply:
                yield from (json.loads(line[6:]) for line in reply if line.startswith(b"data: {"))
        except HTTPError as error:
            yield _object(error.read(1 << 20))
        except (OSError, HTTPException, ValueError) as error:
            yield _failure(f"the connection to {self.url} failed: {getattr(error, 'reason', error)}")

    def _open(self, route: str, body: Mapping[str, object]) -> HTTPResponse:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = Request(f"{self.url}{route}", json.dumps(body).encode(), headers)
        return _opener(self.engine is not None).open(request, timeout=None if self.engine else TIMEOUT)  # type: ignore[no-any-return]


def address(name: str) -> tuple[str, str] | None:
    """URL and model of a name that is an address, None of one that is not."""
    if not name.startswith(("http://", "https://")):
        return None
    url, _, model = name.partition("#")
    if not model or not urlsplit(url).hostname or "@" in url or "?" in url:
        remedy = "write http://host:port/v1#model, and give the key in the environment variable OPENAI_API_KEY"
        raise UserError("the address of a model lacks its name, or holds a password or key", remedy=remedy)
    return url, model


@contextmanager
def open_endpoint(spec: AskSpec) -> Iterator[Endpoint]:
    """The model a spec names, ready to be asked.

    Raises:
        UserError: there is no such model or adapter.
    """
    if (place := address(spec.model)) is not None:
        yield Endpoint(place[0].rstrip("/"), place[1], os.environ.get("OPENAI_API_KEY", ""))
        return
    from garage.engine.loading import apart  # torch is loaded only for a model that runs here
    from garage.recipes.opening import open_engine
    from garage.serve.server import running

    source, key = locate(spec.model), secrets.token_urlsafe(16)
    engine = apart(lambda: open_engine(source, spec.engine, spec.lora_modules))
    serving = {"model": spec.model, "port": 0, "served_model_name": source.name, "api_key": key, "max_body_bytes": 1 << 26}
    with running(engine, ServeSpec.parse({**serving, "drain_seconds": 1, "engine": spec.engine.model_dump()})) as url:
        yield Endpoint(f"{url}/v1", source.name, key, engine, engine.adapters)


def words_of(answer: Json) -> str:
    """What an error says, in whatever shape it came."""
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _failure(why: str) -> Json:
    return {"error": {"message": why, "type": "connection_error", "param": None, "code": None}}


def _object(data: bytes) -> Json:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else _failure(f"an answer that is no JSON object: {data[:200]!r}")


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _opener(is_local: bool) -> OpenerDirector:
    return build_opener(_NoRedirect, *([ProxyHandler({})] if is_local else []))
