"""`garage serve`: a model over the OpenAI API; and one question to two models over HTTP."""

from collections.abc import Iterator
from dataclasses import dataclass

from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.engine.engine import Engine
from garage.recipes.endpoint import Endpoint, words_of
from garage.serve.server import bind, run, running
from garage.specs.serve import EngineSpec, ServeSpec
from garage.store.locate import locate


@dataclass(frozen=True)
class BothAnswers:
    """One question, answered by two models over HTTP."""

    base: str
    tuned: str


def serve(spec: ServeSpec, *listeners: Listener) -> None:
    """Serve until interrupted. The port is taken before the model loads, so that a taken one is told at once.

    Raises:
        UserError: the port is in use, there is no such model, or its template is not the one it was trained with.
    """
    events, source = EventLog(None, *listeners), locate(spec.model)
    spec = spec.model_copy(update={"served_model_name": spec.served_model_name or source.name})
    with bind(spec) as sock:
        events.emit("stage", name="loading", detail=str(source.newest))
        engine = Engine.open(source.base, source.adapter, spec.engine)
        run(engine, spec, sock=sock, on_ready=lambda url: print(f"{spec.served_model_name} at {url}/v1  (Ctrl-C stops)", flush=True))


def ask_both(base: str, tuned: str, question: str, *listeners: Listener) -> BothAnswers:
    """Serve each model in turn on a free port and stream its answer over HTTP."""
    events = EventLog(None, *listeners)
    events.emit("sample", question=question)
    return BothAnswers(*(_asked(model, question, events) for model in (base, tuned)))


def _asked(model: str, question: str, events: EventLog) -> str:
    source = locate(model)
    engine = Engine.open(source.base, source.adapter, EngineSpec.parse({"max_num_seqs": 1}))
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
