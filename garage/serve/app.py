"""The server as an ASGI app: which path leads to what, and what every request passes on its way there."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from garage.engine.engine import Engine
from garage.serve.errors import KINDS, on_error
from garage.serve.gate import Gate
from garage.serve.operate import Operate
from garage.serve.service import Service
from garage.specs.serve import ServeSpec


def serve_app(engine: Engine, settings: ServeSpec) -> FastAPI:
    """The app; its lifespan starts and stops the engine's thread. `app.state.service` is what it serves."""
    service = Service(engine, settings)
    operate = Operate(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await asyncio.to_thread(service.loop.stop)

    app = FastAPI(title="Garage", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_middleware(Gate, keys=service.keys, spec=settings, loop=service.loop)
    if settings.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    for kind in KINDS:
        app.add_exception_handler(kind, on_error)
    gets: dict[str, Callable[..., Any]] = {
        "/v1/models": service.models, "/v1/models/{name:path}": service.model, "/health": operate.health, "/ping": operate.health,
        "/ready": operate.ready, "/version": operate.version, "/load": operate.load, "/metrics": operate.metrics,
    }  # fmt: skip
    posts: dict[str, Callable[..., Any]] = {
        "/v1/chat/completions": service.chat, "/v1/completions": service.completions, "/v1/responses": service.responses,
        "/v1/embeddings": service.embeddings, "/tokenize": operate.tokenize, "/detokenize": operate.detokenize,
        "/v1/load_lora_adapter": operate.load_adapter, "/v1/unload_lora_adapter": operate.unload_adapter,
    }  # fmt: skip
    for path, route in gets.items():
        app.get(path, response_model=None)(route)
    for path, route in posts.items():
        app.post(path, response_model=None)(route)
    return app
