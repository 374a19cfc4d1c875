"""Teachers and judges by name: a model on this disk through our engine, or `http://host:port/v1#model`, any OpenAI-compatible endpoint.

The key of an endpoint is read from OPENAI_API_KEY, kept nowhere and shown to nobody. Both kinds may be asked from many threads at once.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count

from garage.core.errors import UserError
from garage.core.protocols import Generator
from garage.core.types import Completion, Request
from garage.engine.engine import Engine
from garage.recipes.endpoint import address
from garage.serve.client import Remote
from garage.specs.serve import EngineSpec
from garage.store.locate import locate


def open_generator(name: str, *, concurrency: int = 8) -> Generator:
    """The model called `name`; UserError if there is none, or the address does not say which."""
    if (place := address(name)) is not None:
        return Remote(*place, api_key=os.environ.get("OPENAI_API_KEY", ""), concurrency=concurrency)
    source = locate(name)
    return SharedEngine(lambda: Engine.open(source.base, source.adapter, EngineSpec.parse({"max_num_seqs": concurrency})))


class SharedEngine:
    """An engine that any thread may ask, in one batch for all. Replies are cut to what the model can hold.

    One thread alone touches it: OpenMP keeps workers for every thread that computes, and more of them than cores wait for each other.
    """

    def __init__(self, opened: Callable[[], Engine]) -> None:
        self._alone, self._numbers = ThreadPoolExecutor(1, "garage-engine"), count()
        self._engine = self._alone.submit(opened).result()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        done: dict[int, Completion] = {}
        for place, request in enumerate(requests):
            self._alone.submit(self._submit, request, lambda reply, place=place: done.update({place: reply})).result()  # type: ignore[misc]
        while len(done) < len(requests):
            with suppress(Exception):  # a step that fails tells all whom it concerns
                self._alone.submit(self._engine.step).result()
        return [replace(done[place], id=request.id) for place, request in enumerate(requests)]

    def _submit(self, request: Request, take: Callable[[Completion], None]) -> None:
        try:
            room = self._engine.max_model_len - len(self._engine.encode(request))
            sampling = replace(request.sampling, max_tokens=max(1, min(request.sampling.max_tokens, room)))
            asked = replace(request, id=str(next(self._numbers)), sampling=sampling)
            self._engine.submit(asked, lambda delta: take(delta.completion) if delta.completion else None)
        except UserError as error:
            take(Completion(request.id, "", (), "error", 0, error=str(error.args[0])))
