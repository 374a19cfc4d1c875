"""`garage chat`: a conversation in the terminal, with a model of this disk or of an address; what is piped in is a turn a line.

Ctrl-C stops an answer, of which the part that was said stays in the conversation, and not the program; Ctrl-D leaves. When the context is
full the oldest turns are dropped, and that is said. Answers go to stdout, all else to stderr; reasoning is shown on a terminal alone.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from garage.core.errors import UserError
from garage.core.events import Listener
from garage.core.types import Message, Request
from garage.data.formats import from_rows
from garage.data.read import read_dataset
from garage.recipes.endpoint import Endpoint, open_endpoint, words_of
from garage.specs.generate import SAMPLING, ChatSpec

HELP = f"""/system TEXT     another system prompt, and a new conversation
/adapter NAME    the adapter that answers from now on; base = none
/thinking BOOL   whether a model that can reason does
/NAME X          another value, none = the authors': {", ".join(SAMPLING)}
/retry           answer the last message again
/reset           forget the conversation
/save FILE       append the conversation to a dataset, as one row
/load FILE       go on with the last conversation of a dataset
/stats           speed of the last answer, and how full the context is
/exit            leave, as Ctrl-D does; Ctrl-C stops an answer; a line that ends in \\ goes on"""
HISTORY, LEAST_ROOM = 1000, 64
Turn = dict[str, Any]


def chat(spec: ChatSpec, *_: Listener) -> None:
    """Talk in the terminal, streaming; the conversation is kept until /reset.

    Raises:
        UserError: there is no such model, or it has no chat template.
    """
    with suppress(ValueError):  # no main thread
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler would wait for the next key; the history is kept line by line
    with open_endpoint(spec) as endpoint:
        if endpoint.engine is not None and endpoint.engine.chat is None:
            raise UserError(f"{spec.model} has no chat template", remedy="use an instruction-tuned model")
        talk = _Talk(endpoint, spec)
        print(f"{endpoint.model}. /help lists what can be said beside messages.", file=sys.stderr)
        for line in _lines():
            if not talk.hear(line):
                return


def _lines() -> Iterator[str]:
    """What is typed, with the lines of a message joined and, on a terminal, a history that stays."""
    is_terminal = sys.stdin.isatty()
    keep = _with_history() if is_terminal else lambda: None
    while True:
        try:
            said = input("> " * is_terminal)
            while said.endswith("\\"):
                said = said[:-1] + "\n" + input(". " * is_terminal)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(file=sys.stderr)
            continue
        keep()
        yield said.strip()


def _with_history() -> Any:
    """Read the history of earlier conversations; gives what writes it."""
    try:
        import readline  # not on every system
    except ImportError:
        return lambda: None
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "garage"
    path = Path(os.environ.get("GARAGE_HOME") or state) / "chat_history"
    readline.set_history_length(HISTORY)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)

    def keep() -> None:
        with suppress(OSError):  # a history that cannot be written is no reason to stop talking
            readline.write_history_file(path)

    return keep


class _Talk:
    """A conversation: its turns, its settings and what the last answer took."""

    def __init__(self, endpoint: Endpoint, spec: ChatSpec) -> None:
        self.endpoint, self.spec = endpoint, spec
        self.turns: list[Turn] = []
        self.is_shown = sys.stdout.isatty()
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if self.is_shown and not os.environ.get("NO_COLOR") else ("", "")
        self.stats = "nothing was answered yet"
        if spec.load is not None:
            self._load(str(spec.load))

    def hear(self, line: str) -> bool:
        """Obey a command or answer a message; false to leave."""
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        try:
            if command.startswith("/"):
                self._obey(command[1:], rest.strip())
            elif line:
                self.turns.append({"role": "user", "content": line})
                self._answer()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def _obey(self, name: str, rest: str) -> None:
        if name == "system":
            self._set(name, rest)
            self.turns = []
        elif name in (*SAMPLING, "thinking"):
            self._set(name, None if rest == "none" else rest)
        elif name == "adapter":
            self._set_adapter("" if rest == "base" else rest)
        elif name == "retry":
            self._retry()
        elif name == "reset":
            self.turns = []
        elif name in ("save", "load") and rest:
            (self._save if name == "save" else self._load)(rest)
        else:
            print(self.stats if name == "stats" else HELP, file=sys.stderr)

    def _set(self, name: str, value: object) -> None:
        self.spec = ChatSpec.parse({**self.spec.model_dump(), name: value}, where=f"/{name}")

    def _set_adapter(self, name: str) -> None:
        if name and self.endpoint.engine is not None and name not in self.endpoint.adapters:
            remedy = f"/adapter takes {', '.join(('base', *self.endpoint.adapters))}; --lora_modules name=DIRECTORY loads them"
            raise UserError(f"there is no adapter {name!r}", remedy=remedy)
        self._set("adapter", name)

    def _retry(self) -> None:
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        if not self.turns:
            raise UserError("there is no message to answer again", remedy="write one")
        self._answer()

    def _save(self, name: str) -> None:
        line = json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n"
        try:
            with open(Path(name).expanduser(), "ab") as file:
                file.write(line.encode(errors="backslashreplace"))
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror}", remedy="give another file") from error
        print(f"{len(self.turns)} turns written to {name}", file=sys.stderr)

    def _load(self, name: str) -> None:
        *_, row = [None, *read_dataset(Path(name).expanduser())]
        if row is None or not row.messages:
            raise UserError(f"{name} holds no conversation", remedy="give a dataset, as /save writes it")
        turns: Any = next(from_rows([row], "messages"))["messages"]
        is_led = turns[0]["role"] == "system"
        self._set("system", turns[0]["content"] if is_led else "")
        self.turns = turns[is_led:]
        print(f"{len(self.turns)} turns read from {name}", file=sys.stderr)

    def _messages(self) -> list[Turn]:
        return [*([{"role": "system", "content": self.spec.system}] if self.spec.system else []), *self.turns]

    def _answer(self) -> None:
        """Stream the answer to the last turn; what fails leaves the conversation as it was before that turn."""
        answer: Turn = {"role": "assistant", "content": ""}
        started, first = time.monotonic(), 0.0
        usage: Turn = {}
        error: Turn = {}
        try:
            for event in self._events():
                error, usage = event if "error" in event else error, event.get("usage") or usage
                delta = event["choices"][0].get("delta", {}) if event.get("choices") else {}
                first = first or (time.monotonic() if delta.get("content") or delta.get("reasoning") else 0.0)
                self._show(answer, delta)
        except KeyboardInterrupt:
            print(f"{self.plain}\n(stopped)", file=sys.stderr)
        print(self.plain)
        if error:
            self.turns.pop()
            raise UserError(words_of(error), remedy="the message was taken back; change it or a setting")
        self.turns.append(answer)
        self._measure(usage, first - started, time.monotonic() - first)

    def _show(self, answer: Turn, delta: Turn) -> None:
        """Write a piece of the answer, dim as long as it is reasoning, and keep it."""
        for name, begins, is_shown in (("reasoning", self.dim, self.is_shown), ("content", self.plain, True)):
            if not (text := delta.get(name)):
                continue
            if name == "content" and not answer["content"] and answer.get("reasoning") and self.is_shown:
                print(f"{self.plain}\n")
            if is_shown:
                print(text if answer.get(name) else begins + text, end="", flush=True)
            answer[name] = answer.get(name, "") + text

    def _events(self) -> Iterator[Turn]:
        """The events of the answer, asked for with as many turns as the context holds."""
        while True:
            body = {**self.spec.asked(), "model": self.spec.adapter or self.endpoint.model, **self._fitted()}
            events = self.endpoint.stream("/chat/completions", body)
            first = next(events, {"error": "no answer"})
            if not (_is_overfull(first) and self._drop_oldest()):
                break
        yield first
        yield from events

    def _fitted(self) -> Turn:
        """The messages, and what the context leaves for the answer; an address says itself when it is too much."""
        engine = self.endpoint.engine
        while engine is not None:
            turns = tuple(Message(turn["role"], turn["content"], turn.get("reasoning", "")) for turn in self._messages())
            room = engine.max_model_len - len(engine.encode(Request("", turns, thinking=self.spec.thinking)))
            if room >= min(self.spec.max_tokens or LEAST_ROOM, engine.max_model_len // 4) or not self._drop_oldest():
                return {"messages": self._messages(), "max_tokens": max(1, min(self.spec.max_tokens or room, room))}
        return {"messages": self._messages()}

    def _drop_oldest(self) -> bool:
        """Forget the oldest message with its answer; false when there is only the one to be answered."""
        places = [place for place, turn in enumerate(self.turns) if turn["role"] == "user"][1:]
        if not places:
            return False
        print(f"(the context is full: the {places[0]} oldest turns are dropped)", file=sys.stderr)
        self.turns = self.turns[places[0] :]
        return True

    def _measure(self, usage: Turn, waited: float, seconds: float) -> None:
        made, read = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
        speed = f"{(made - 1) / seconds:.1f} tokens/s" if made > 1 and seconds > 0 else "too short to measure"
        of = f" of {self.endpoint.engine.max_model_len}" if self.endpoint.engine else ""
        self.stats = f"{made} tokens, the first after {waited:.2f} s, then {speed}; context {read + made}{of} tokens"


def _is_overfull(event: Turn) -> bool:
    error = event.get("error")
    return isinstance(error, dict) and (error.get("code") == "context_length_exceeded" or "context length" in str(error.get("message")))
