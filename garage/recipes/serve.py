"""`garage serve`: a model over the OpenAI API; and one question to two models over HTTP."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.types import Request, Sampling
from garage.engine.engine import Engine
from garage.engine.loading import apart
from garage.kernels import compiled
from garage.models.families import config_of
from garage.models.weights import pick_device
from garage.recipes.endpoint import Endpoint, words_of
from garage.recipes.opening import Holding, holding, open_engine, require_room, with_adapters
from garage.serve.server import bind, run, running
from garage.specs.serve import EngineSpec, ServeSpec
from garage.store.locate import locate

WARM_UP = 16
"""Tokens of the prompt that is answered before anyone is."""


@dataclass(frozen=True)
class BothAnswers:
    """One question, answered by two models over HTTP."""

    base: str
    tuned: str


def serve(spec: ServeSpec, *listeners: Listener) -> None:
    """Serve until interrupted, and say what every part of the start took. The port is taken before anything is read, so that a taken one
    is told at once; who connects meanwhile waits, and is answered when the engine is warm. `ready` is the event with the URL.

    Raises:
        UserError: the port is in use, there is no such model or adapter, its template is not the one it was trained with, or the memory
            is too small.
    """
    events, source = EventLog(None, *listeners), locate(spec.model)
    spec = spec.model_copy(update={"served_model_name": spec.served_model_name or source.name})
    with bind(spec) as sock:
        phases, device = _Phases(events), pick_device(spec.engine.device)

        def start() -> tuple[Engine, Holding]:
            phases("native code")
            if device == "cpu":
                compiled.prepare()
            phases("memory")
            found = _holding(spec)
            require_room(found, device)
            phases.detail = f"of {found}"
            engine = open_engine(source, spec.engine, spec.lora_modules, tell=phases)
            phases("warm-up")
            warm_up(engine)
            return engine, found

        engine, found = apart(start)
        phases("listening")

        def tell(url: str) -> None:
            phases("")
            events.emit("ready", url=f"{url}/v1", model=spec.served_model_name, phases=phases.seconds, bytes=dict(found.items))
            print(f"{spec.served_model_name} at {url}/v1  (Ctrl-C stops)", flush=True)

        run(engine, spec, sock=sock, on_ready=tell)


def plan(spec: ServeSpec) -> dict[str, object]:
    """What a dry run says: the bytes of each part, and what fits."""
    found = _holding(spec)
    return {**found.items, "total": found.total, "tokens": found.tokens, "longest": found.longest, "summary": str(found)}


def _holding(spec: ServeSpec) -> Holding:
    settings = with_adapters(spec.engine, len(spec.lora_modules))
    return holding(config_of(locate(spec.model).base), settings, pick_device(settings.device))


class _Phases:
    """Says what each part of the start took; the first began with the process."""

    def __init__(self, events: EventLog) -> None:
        self._events, self._name, self._since = events, "imports", psutil.Process().create_time()
        self.seconds: dict[str, float] = {}
        self.detail = ""

    def __call__(self, name: str) -> None:
        """The phase that runs is over, `name` begins."""
        now = time.time()
        self.seconds[self._name] = round(now - self._since, 3)
        self._events.emit("phase", name=self._name, seconds=f"{now - self._since:.2f}", detail=self.detail)
        self._name, self._since, self.detail = name, now, ""


def warm_up(engine: Engine) -> None:
    """Answer a short prompt, so that whoever asks first does not wait for what is made on first use."""
    engine.generate([Request("warm-up", (0,) * WARM_UP, Sampling(max_tokens=2, ignore_eos=True), cache_salt="warm-up")])


def ask_both(base: str, tuned: str, question: str, *listeners: Listener) -> BothAnswers:
    """Serve each model in turn on a free port and stream its answer over HTTP."""
    events = EventLog(None, *listeners)
    events.emit("sample", question=question)
    return BothAnswers(*(_asked(model, question, events) for model in (base, tuned)))


def _asked(model: str, question: str, events: EventLog) -> str:
    source = locate(model)
    engine = apart(lambda: Engine.open(source.base, source.adapter, EngineSpec.parse({"max_num_seqs": 1})))
    with running(engine, ServeSpec(model=model, port=0, served_model_name=source.name)) as url:
        answer = ""
        for piece in stream_http(url, source.name, question):
            answer += piece
            events.emit("stage", name=f"{source.name} answers", detail=" ".join(answer.split())[-60:])
        events.emit("sample", **{source.name: answer})
        return answer


def stream_http(url: str, model: str, question: str) -> Iterator[str]:
    """Pieces of the answer of an OpenAI-compatible server, as server-sent events bring them."""
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 64}
    for event in Endpoint(f"{url}/v1", model).stream("/chat/completions", asked):
        if "error" in event:
            raise UserError(f"{url} did not answer: {words_of(event)}", remedy="its log says why")
        yield from (choice["delta"].get("content") or "" for choice in event["choices"])
