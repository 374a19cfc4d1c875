"""The routes beside the model's work: tokens, health, metrics, and adapters that come and go.

`/health` (and `/ping`) fails when the engine's thread is gone or queued work does not advance: restart. `/ready` fails while the
server stops or cannot work: send nothing new.

Adapters over HTTP are off by default, because who can load one changes what others are answered. They are loaded only from below
`lora_directory`, links followed, by an admin key, or from this machine by a server without keys. No answer names a path.
"""

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from garage import __version__
from garage.core.errors import UserError
from garage.engine.loading import apart
from garage.serve.asks import DetokenizeAsk, LoadAsk, TokenizeAsk, TokenizeChatAsk, UnloadAsk
from garage.serve.errors import ApiError, answer, not_now, refused
from garage.serve.service import Service
from garage.specs.serve import LOOPBACK


class Operate:
    """The routes of one service."""

    def __init__(self, service: Service) -> None:
        self._service, self._engine = service, service.engine

    async def health(self) -> JSONResponse:
        """200 while the engine's thread lives and queued work advances."""
        if self._service.loop.is_healthy:
            return JSONResponse({"status": "ok"})
        return answer(not_now("the engine does not advance", "unhealthy"))

    async def ready(self) -> JSONResponse:
        """200 while new requests are taken."""
        if self._service.is_draining:
            return answer(not_now("the server is stopping", "draining"))
        return await self.health()

    async def version(self) -> JSONResponse:
        return JSONResponse({"version": __version__})

    async def load(self) -> JSONResponse:
        """Requests inside, as vLLM counts them."""
        return JSONResponse({"server_load": self._service.metrics.in_flight})

    async def metrics(self) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, request: HttpRequest) -> JSONResponse:
        prompts = self._service.prompts
        if b'"messages"' in await request.body():
            turns, _ = await self._service.read(TokenizeChatAsk, request)
            ids, is_named = (await asyncio.to_thread(prompts.chat, turns)).ids, turns.return_token_strs
        else:
            asked, _ = await self._service.read(TokenizeAsk, request)
            prompt = await asyncio.to_thread(prompts.text, asked.prompt, add_special=asked.add_special_tokens)
            ids, is_named = prompt.ids, asked.return_token_strs
        named = [self._engine.tokenizer.id_to_token(i) for i in ids] if is_named else None
        return JSONResponse({"count": len(ids), "max_model_len": self._engine.max_model_len, "tokens": ids, "token_strs": named})

    async def detokenize(self, request: HttpRequest) -> JSONResponse:
        """The text of ids; a BOS that `/tokenize` has put before them is left out."""
        asked, _ = await self._service.read(DetokenizeAsk, request)
        tokenizer, ids = self._engine.tokenizer, asked.tokens
        wrong = next((i for i in ids if i >= tokenizer.vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"tokens: the model has no token {wrong}, only {tokenizer.vocab_size}", param="tokens")
        if tokenizer.adds_bos and ids[:1] == [tokenizer.bos_id]:
            ids = ids[1:]
        return JSONResponse({"prompt": tokenizer.decode(ids, skip_special=False)})

    async def load_adapter(self, request: HttpRequest) -> JSONResponse:
        self._check_operator(request)
        asked, _ = await self._service.read(LoadAsk, request)
        assert self._service.spec.lora_directory is not None
        home = self._service.spec.lora_directory.resolve()
        path = (home / asked.lora_path).resolve()
        if not path.is_relative_to(home) or path == home:
            raise ApiError(403, "lora_path: it is not below the directory that adapters may come from", param="lora_path")
        if asked.lora_name == self._service.name:
            raise ApiError(400, "lora_name: the base model has this name", param="lora_name")
        try:
            ready = await asyncio.to_thread(apart, lambda: self._engine.read_adapter(path))
            await self._service.loop.call(lambda: self._engine.load_adapter(asked.lora_name, ready))
        except UserError as error:
            fault = refused(error)
            raise ApiError(fault.status, str(fault).replace(str(home), ""), param="lora_path") from error
        return JSONResponse(self._service.card(asked.lora_name))

    async def unload_adapter(self, request: HttpRequest) -> JSONResponse:
        self._check_operator(request)
        asked, _ = await self._service.read(UnloadAsk, request)
        if asked.lora_name not in self._service.adapters:
            raise ApiError(404, f"there is no adapter {asked.lora_name[:100]!r} here", param="lora_name", code="model_not_found")
        await self._service.loop.call(lambda: self._engine.unload_adapter(asked.lora_name))
        return JSONResponse({"id": asked.lora_name, "object": "model", "deleted": True})

    def _check_operator(self, request: HttpRequest) -> None:
        if not self._service.spec.allow_runtime_lora:
            raise ApiError(403, "adapters cannot be loaded here: the server was started without allow_runtime_lora")
        is_local = request.client is not None and request.client.host in LOOPBACK
        if not (is_local if self._service.keys.is_open else request.state.tenant.is_admin):
            raise ApiError(403, "adapters are loaded with an admin key, or from this machine if there are no keys")
