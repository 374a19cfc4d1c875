"""The routes. Each reads top to bottom: parse, check the model, encode, submit, answer.

Only rendering and encoding leave the event loop for a worker thread, and only the engine's own thread runs the model, so a long
prompt or a long step never delays another client's tokens.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from garage.core.errors import UserError
from garage.core.types import Message, Request
from garage.engine.engine import Engine
from garage.engine.request import QueueFull
from garage.serve.limits import Gate, answer
from garage.serve.loop import EngineLoop
from garage.serve.metrics import Metrics
from garage.serve.openai import ApiError, Ask, ChatAsk, Reply, TextAsk, model_card, parse, sampling_of
from garage.serve.stream import HEADERS, Answering
from garage.specs.serve import ServeSpec

_log = logging.getLogger("garage.serve")


class Service:
    """One engine behind one set of routes."""

    def __init__(self, engine: Engine, spec: ServeSpec) -> None:
        self.engine, self.spec, self.created = engine, spec, int(time.time())
        self.name = spec.served_model_name or (Path(spec.model).resolve().name if Path(spec.model).is_dir() else spec.model)
        self.metrics = Metrics(engine, self.name)
        self.loop = EngineLoop(engine, self.metrics, stall_seconds=spec.stall_seconds)
        if engine.defaults.ignored:
            _log.warning("generation_config.json asks for %s, which this server does not apply", ", ".join(engine.defaults.ignored))

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> JSONResponse:
        self._check_model(name)
        return JSONResponse(self._card())

    async def chat(self, request: HttpRequest) -> Response:
        asked, without_effect = parse(ChatAsk, await _body(request))
        self._check_model(asked.model)
        messages = tuple(turn.message() for turn in asked.messages)
        if self.spec.system and not any(m.role in ("system", "developer") for m in messages):
            messages = (Message("system", self.spec.system), *messages)
        prompt = Request("", messages, thinking=asked.chat_template_kwargs.enable_thinking)
        return await self._answer(request, asked, [await self._encode(prompt, "messages")], without_effect)

    async def completions(self, request: HttpRequest) -> Response:
        asked, without_effect = parse(TextAsk, await _body(request))
        self._check_model(asked.model)
        prompts = [await self._encode(Request("", prompt), "prompt") for prompt in _prompts(asked)]
        return await self._answer(request, asked, prompts, without_effect)

    async def health(self) -> JSONResponse:
        """200 while the engine's thread lives and queued work advances."""
        if self.loop.is_healthy:
            return JSONResponse({"status": "ok"})
        return answer(ApiError(503, "the engine does not advance", kind="server_error", code="unhealthy"))

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _encode(self, prompt: Request, param: str) -> tuple[int, ...]:
        try:
            return await asyncio.to_thread(self.engine.encode, prompt)
        except UserError as error:
            raise ApiError(400, _words(error), param=param) from error

    async def _answer(self, request: HttpRequest, asked: Ask, prompts: Sequence[tuple[int, ...]], without_effect: list[str]) -> Response:
        number = request.state.request_id
        requests: list[Request] = []
        for place, ids in enumerate(prompts):
            room = self.engine.max_model_len - len(ids)
            choices = [sampling_of(asked, self.engine.defaults, room, choice) for choice in range(asked.n)]
            requests += [Request(f"{number}-{place}-{choice}", ids, sampling) for choice, sampling in enumerate(choices)]
        ticket = await self.loop.submit(requests)
        self.metrics.asked(asked.n, requests[0].sampling.max_tokens)
        reply = Reply.new(number, self.name, is_chat=isinstance(asked, ChatAsk))
        answering = Answering(self.loop, ticket, self.engine.tokenizer, asked, reply, len(prompts))
        headers = {"x-garage-no-effect": ", ".join(without_effect)} if without_effect else {}
        if asked.stream:
            return StreamingResponse(answering.events(), media_type="text/event-stream", headers={**HEADERS, **headers})
        return JSONResponse(await answering.whole(request), headers=headers)

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"there is no model {name[:100]!r} here", param="model", code="model_not_found")

    def _card(self) -> dict[str, object]:
        return model_card(self.name, self.created, self.engine.max_model_len)


def serve_app(engine: Engine, settings: ServeSpec) -> FastAPI:
    """The server as an ASGI app; its lifespan starts and stops the engine's thread."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await asyncio.to_thread(service.loop.stop)

    app = FastAPI(title="Garage", lifespan=lifespan, openapi_url=None)
    app.add_middleware(Gate, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    for kind in (ApiError, UserError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.completions)
    app.get("/health")(service.health)
    app.get("/metrics")(service.show_metrics)
    return app


async def _body(request: HttpRequest) -> bytes:
    """The body, if it says it is JSON: a web page cannot send that to us without asking first, and we never agree (no CORS)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request with Content-Type: application/json")
    return await request.body()


def _prompts(asked: TextAsk) -> list[str | tuple[int, ...]]:
    """The prompts of a text completion: one or several, as texts or as ids."""
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [tuple(i for i in prompt if isinstance(i, int))]
    return [one if isinstance(one, str) else tuple(one) for one in prompt if not isinstance(one, int)]


def _words(error: UserError) -> str:
    return f"{error.args[0]}; {error.remedy}"


async def _on_error(request: HttpRequest, error: Exception) -> Response:
    """Every error in the one shape."""
    if isinstance(error, ApiError):
        return answer(error)
    if isinstance(error, QueueFull):
        return answer(ApiError(503, _words(error), kind="server_error", code="overloaded", headers={"Retry-After": "1"}))
    if isinstance(error, UserError):
        return answer(ApiError(400, _words(error)))
    assert isinstance(error, HTTPException), error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return answer(ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))
