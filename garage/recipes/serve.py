"""`garage serve` and `garage chat`: a model over the OpenAI API, and a model in the terminal."""

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.types import Message, Request, Sampling
from garage.engine.engine import Engine
from garage.engine.request import Delta
from garage.serve.server import bind, run, running
from garage.specs.serve import ChatSpec, EngineSpec, ServeSpec
from garage.store.locate import locate

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt, /temperature X, /exit leaves"


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


def chat(spec: ChatSpec, *_: Listener) -> None:
    """Talk in the terminal, streaming; the conversation is kept until /reset.

    Raises:
        UserError: there is no such model, or it has no chat template.
    """
    source = locate(spec.model)
    engine = Engine.open(source.base, source.adapter, spec.engine)
    if engine.chat is None:
        raise UserError(f"{spec.model} has no chat template", remedy="use an instruction-tuned model")
    print(f"{source.name}. {COMMANDS}.", file=sys.stderr)
    talk = _Talk(engine, spec)
    with suppress(EOFError):
        while talk.hear(input("> " if sys.stdin.isatty() else "").strip()):
            pass


class _Talk:
    """A conversation: its turns and its settings."""

    def __init__(self, engine: Engine, spec: ChatSpec) -> None:
        self.engine, self.max_tokens = engine, spec.max_tokens
        self.system, self.temperature = spec.system, spec.temperature
        self.turns: list[Message] = []

    def hear(self, line: str) -> bool:
        """Obey a command or answer a message; false to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.turns = []
        elif command == "/system":
            self.system, self.turns = rest, []
        elif command == "/temperature":
            self._set_temperature(rest)
        elif command.startswith("/"):
            print(COMMANDS, file=sys.stderr)
        elif line:
            self._answer(line)
        return True

    def _set_temperature(self, text: str) -> None:
        try:
            self.temperature = min(10.0, max(0.0, float(text)))
        except ValueError:
            print("/temperature takes a number from 0 to 10", file=sys.stderr)

    def _answer(self, line: str) -> None:
        self.turns.append(Message("user", line))
        system = (Message("system", self.system),) if self.system else ()
        request = Request("chat", (*system, *self.turns), Sampling(max_tokens=self.max_tokens, temperature=self.temperature))
        done = stream(self.engine, request, lambda text: print(text, end="", flush=True))
        print()
        if done:
            self.turns.append(Message("assistant", done))


def stream(engine: Engine, request: Request, show: Callable[[str], None]) -> str:
    """Answer one request in this process, handing on each piece of text; returns the whole."""
    pieces: list[str] = []

    def hear(delta: Delta) -> None:
        if delta.text:
            pieces.append(delta.text)
            show(delta.text)
        if delta.completion is not None and delta.completion.error:
            print(f"error: {delta.completion.error}", file=sys.stderr)

    engine.submit(request, hear)
    while engine.has_work:
        engine.step()
    return "".join(pieces)


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
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, "temperature": 0, "max_tokens": 64}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        for line in reply:
            chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {"choices": []}
            yield from (choice["delta"].get("content") or "" for choice in chunk["choices"])


