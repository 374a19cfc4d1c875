"""What the routes do. Each reads top to bottom: parse, check the model, encode, submit, answer.

Only rendering and encoding leave the event loop for a worker thread, and only the engine's own thread runs the model, so a long
prompt or a long step never delays another client's tokens.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from garage.core.types import Completion, Request, Sampling
from garage.engine.defaults import GenerationDefaults
from garage.engine.engine import Engine
from garage.serve.asks import Ask, Asked, ChatAsk, EmbedAsk, TextAsk, parse
from garage.serve.embeddings import ABOUT, embeddings_of
from garage.serve.errors import ApiError, Json, not_now
from garage.serve.keys import Keys, Tenant
from garage.serve.loop import EngineLoop
from garage.serve.metrics import Metrics
from garage.serve.prompts import Prompt, Prompts, split
from garage.serve.replies import ChatVoice, Head, TextVoice
from garage.serve.responses import ResponseAsk, ResponseVoice
from garage.serve.sampling import check_fits, check_ids, check_length, sampling_of
from garage.serve.stream import AnyVoice, EventStream, whole
from garage.specs.serve import ServeSpec

_log = logging.getLogger("garage.serve")


class Service:
    """One engine behind one set of routes."""

    def __init__(self, engine: Engine, spec: ServeSpec) -> None:
        self.engine, self.spec, self.created = engine, spec, int(time.time())
        self.name = spec.served_model_name or (Path(spec.model).resolve().name if Path(spec.model).is_dir() else spec.model)
        self.keys, self.prompts = Keys(spec), Prompts(engine, spec)
        self.metrics = Metrics(engine, self.name, spec.engine)
        self.loop = EngineLoop(engine, self.metrics, spec)
        self.is_draining = False
        self.defaults = engine.defaults if spec.generation_config == "auto" else GenerationDefaults()
        if self.defaults.ignored:
            _log.warning("generation_config.json asks for %s, which this server does not apply", ", ".join(self.defaults.ignored))

    async def models(self) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [self.card(name) for name in (self.name, *self.adapters)]})

    async def model(self, name: str) -> JSONResponse:
        self.adapter(name)
        return JSONResponse(self.card(name))

    async def chat(self, request: HttpRequest) -> Response:
        asked, without_effect = await self.read(ChatAsk, request)
        if asked.reasoning_effort not in (None, "none"):
            without_effect.append("the degree of reasoning_effort")
        prompt = await asyncio.to_thread(self.prompts.chat, asked)
        voice = ChatVoice(Head(request.state.request_id, asked.model), asked, [prompt], self.engine.tokenizer)
        return await self._answer(request, asked, [prompt], voice, without_effect)

    async def completions(self, request: HttpRequest) -> Response:
        asked, without_effect = await self.read(TextAsk, request)
        prompts = await asyncio.to_thread(self.prompts.texts, asked)
        voice = TextVoice(Head(request.state.request_id, asked.model), asked, prompts, self.engine.tokenizer)
        return await self._answer(request, asked, prompts, voice, without_effect)

    async def responses(self, request: HttpRequest) -> Response:
        asked, without_effect = await self.read(ResponseAsk, request)
        if asked.text.verbosity is not None:
            without_effect.append("text.verbosity")
        chat = asked.chat()
        prompt = await asyncio.to_thread(self.prompts.chat, chat)
        voice = ResponseVoice(Head(request.state.request_id, asked.model), asked, prompt, self.engine.tokenizer)
        return await self._answer(request, chat, [prompt], voice, without_effect)

    async def embeddings(self, request: HttpRequest) -> Response:
        asked, without_effect = await self.read(EmbedAsk, request)
        adapter, tenant = self.adapter(asked.model), _tenant(request)
        prompts = await asyncio.to_thread(lambda: [self.prompts.text(one, param="input") for one in split(asked.input)])
        for prompt in prompts:
            check_fits(len(prompt.ids), 0, self.engine.max_model_len, "input")
        requests = [Request(f"{request.state.request_id}-{n}-0", prompt.ids, Sampling(max_tokens=0), adapter=adapter,
                            cache_salt=tenant.salt, wants_embedding=True) for n, prompt in enumerate(prompts)]  # fmt: skip
        ticket = await self.loop.submit(requests, is_streamed=False)
        completions = await whole(self.loop, ticket, request.receive, _spender(tenant))
        return JSONResponse(embeddings_of(asked, completions), headers=_no_effect(without_effect))

    async def read(self, shape: type[Asked], request: HttpRequest) -> tuple[Asked, list[str]]:
        """The request in a body, if the server takes any and knows the model. The body must say that it is JSON: a web page cannot
        send that to us without asking first, and we agree only to `allowed_origins`."""
        if self.is_draining:
            raise not_now("the server is stopping", "draining")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the request with Content-Type: application/json")
        asked, without_effect = parse(shape, await request.body())
        name, field = getattr(asked, "model", ""), shape.model_fields.get("model")
        if name or (field is not None and field.is_required()):
            self.adapter(name)
        return asked, without_effect

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.engine.adapters

    def adapter(self, name: str) -> str:
        """The adapter that a model's name stands for, empty for the base.

        Raises:
            ApiError: 404, there is no such model.
        """
        if name == self.name:
            return ""
        if name in self.adapters:
            return name
        raise ApiError(404, f"there is no model {name[:100]!r} here", param="model", code="model_not_found")

    def card(self, name: str) -> Json:
        """One entry of `/v1/models`; the fields after `owned_by` are vLLM's, the last is ours."""
        parent = None if name == self.name else self.name
        card: Json = {"id": name, "object": "model", "created": self.created, "owned_by": "garage"}
        return {**card, "root": name, "parent": parent, "max_model_len": self.engine.max_model_len, "embedding": ABOUT}

    async def _answer(self, request: HttpRequest, asked: Ask, prompts: Sequence[Prompt], voice: AnyVoice,
                      without_effect: list[str]) -> Response:  # fmt: skip
        requests, tenant = self._requests(request, asked, prompts), _tenant(request)
        ticket = await self.loop.submit(requests, is_streamed=asked.stream)
        self.metrics.asked(asked.n, requests[0].sampling.max_tokens)
        on_end = _spender(tenant)
        if asked.stream:
            return EventStream(self.loop, ticket, voice, on_end, _no_effect(without_effect))
        completions = await whole(self.loop, ticket, request.receive, on_end)
        return JSONResponse(voice.whole(completions), headers=_no_effect(without_effect))

    def _requests(self, request: HttpRequest, asked: Ask, prompts: Sequence[Prompt]) -> list[Request]:
        """What the engine is asked: every candidate of every prompt, in order."""
        adapter, tenant = self.adapter(asked.model), _tenant(request)
        if asked.priority < 0 and not (tenant.is_admin or self.keys.is_open):
            raise ApiError(403, "priority: only an admin key may go before others", param="priority")
        check_ids(asked, self.engine.vocab_size)
        salt = f"{tenant.salt}/{asked.cache_salt}" if tenant.salt or asked.cache_salt else ""
        param, out = "messages" if isinstance(asked, ChatAsk) else "prompt", []
        for place, prompt in enumerate(prompts):
            check_length(asked, len(prompt.ids), self.engine.max_model_len, param)
            room = self.engine.max_model_len - len(prompt.ids)
            for choice in range(asked.candidates):
                sampling = sampling_of(asked, self.defaults, room, choice, keep_special=prompt.keeps_special)
                name = f"{request.state.request_id}-{place}-{choice}"
                out.append(Request(name, prompt.ids, sampling, structure=prompt.form, adapter=adapter, cache_salt=salt,
                                   priority=asked.priority))  # fmt: skip
        return out


def _tenant(request: HttpRequest) -> Tenant:
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant), tenant
    return tenant


def _spender(tenant: Tenant) -> Callable[[Completion], None]:
    """Charges a key for what a request used: each prompt once, every answer."""
    return lambda done: tenant.spend(len(done.token_ids) + done.prompt_tokens * done.id.endswith("-0"))


def _no_effect(names: Sequence[str]) -> dict[str, str]:
    return {"x-garage-no-effect": ", ".join(names)} if names else {}
