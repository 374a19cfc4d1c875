"""What an answer says: reasoning, text and calls, read from the model's text as it arrives.

A reader takes text in pieces of any size and gives pieces; cut anywhere, the joined pieces are the same. It holds back what could
still become a tag, white space that may stand beside one, and a call until it is whole: what turns out to be no call (no JSON, an
unknown function) stays text. White space beside a call, and newlines around reasoning, belong to the notation and are dropped.

Notations: `<think>...</think>` at the start of an answer (Qwen 3); `<tool_call>{"name", "arguments"}</tool_call>` anywhere (Hermes,
Qwen 3); or an answer that is nothing but `{"name", "parameters"}`, or a list of those, perhaps in a code fence (Gemma 3).
"""

import json
import re
import uuid
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from garage.core.types import ToolCall

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
_FENCED = re.compile(r"\s*```(?:json|tool_code|tool_call)?\s*(.*?)\s*(?:```)?\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer; `text` is empty for a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class Reader(Protocol):
    def push(self, text: str) -> list[Piece]: ...

    def end(self) -> list[Piece]: ...


class PlainReader:
    """All of it is content."""

    def push(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []

    def end(self) -> list[Piece]:
        return []


class ReasoningReader:
    """Takes the reasoning off the front and gives the rest to another reader. `is_open`: the prompt has opened it already."""

    def __init__(self, rest: Reader, *, is_open: bool) -> None:
        self._rest, self._held = rest, ""
        self._state: Literal["start", "inside", "after", "out"] = "inside" if is_open else "start"
        self._is_blank = True

    def push(self, text: str) -> list[Piece]:
        if self._state == "out":
            return self._rest.push(text)
        self._held += text
        out = self._start() if self._state == "start" else []
        if self._state == "inside":
            out += self._inside()
        if self._state == "after" and (rest := self._held.lstrip("\n")):
            self._state, self._held = "out", ""
            out += self._rest.push(rest)
        return out

    def end(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._state == "inside":
            return [*self._thought(held), *self._rest.end()]
        return [*(self._rest.push(held) if self._state == "start" else []), *self._rest.end()]

    def _start(self) -> list[Piece]:
        front = self._held.lstrip()
        if front.startswith(THINK):
            self._state, self._held = "inside", front[len(THINK) :]
        elif not THINK.startswith(front):
            self._state, held, self._held = "out", self._held, ""
            return self._rest.push(held)
        return []

    def _inside(self) -> list[Piece]:
        thought, tag, rest = self._held.partition(THOUGHT)
        if tag:
            self._state, self._held = "after", rest
            return self._thought(thought.rstrip("\n"))
        ready = self._held[: len(self._held) - open_tag(self._held, THOUGHT)].rstrip("\n")
        self._held = self._held[len(ready) :]
        return self._thought(ready)

    def _thought(self, text: str) -> list[Piece]:
        text = text.lstrip("\n") if self._is_blank else text
        self._is_blank &= not text
        return [Piece("reasoning", text)] if text else []


class HermesReader:
    """Calls in tags, between and around text. `names`: the functions that were offered."""

    def __init__(self, names: Set[str]) -> None:
        self._names, self._held, self._space, self._seen = names, "", "", 0
        self._is_inside = self._is_after = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        out: list[Piece] = []
        while (found := self._inside() if self._is_inside else self._text()) is not None:
            out += found
        if not self._is_inside:
            out += self._release(len(self._held) - open_tag(self._held, CALL))
        return out

    def end(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._is_inside:
            call = _call(held, self._names)
            return [call] if call else [Piece("content", self._space + CALL + held)]
        held = held.lstrip() if self._is_after else held
        return [Piece("content", held)] if held else []

    def _text(self) -> list[Piece] | None:
        place = self._held.find(CALL)
        if place < 0:
            return None
        out = self._release(place)
        self._space, self._held = self._held.partition(CALL)[::2]
        self._is_inside, self._seen = True, 0
        return out

    def _inside(self) -> list[Piece] | None:
        place = self._held.find(CALLED, self._seen)
        if place < 0:
            self._seen = max(0, len(self._held) - len(CALLED))
            return None
        inner, self._held = self._held[:place], self._held[place + len(CALLED) :]
        call, self._is_inside = _call(inner, self._names), False
        if call is None:
            self._is_after = False
            return [Piece("content", self._space + CALL + inner + CALLED)]
        self._is_after = True
        return [call]

    def _release(self, count: int) -> list[Piece]:
        """Show the text before `count` but for the white space at its end, which may stand before a call."""
        if self._is_after:
            dropped = len(self._held[:count]) - len(self._held[:count].lstrip())
            self._held, count = self._held[dropped:], count - dropped
        ready = self._held[:count].rstrip()
        self._held = self._held[len(ready) :]
        self._is_after &= not ready
        return [Piece("content", ready)] if ready else []


class GemmaReader:
    """An answer that begins like JSON is held to its end; it is calls, or it is text."""

    def __init__(self, names: Set[str]) -> None:
        self._names, self._held, self._is_text = names, "", False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        front = self._held.lstrip()
        if not self._is_text and (not front or front[0] in "{[`"):
            return []
        self._is_text, held, self._held = True, self._held, ""
        return [Piece("content", held)] if held else []

    def end(self) -> list[Piece]:
        held, self._held = self._held, ""
        fenced = _FENCED.fullmatch(held)
        value = _json(fenced[1] if fenced else held)
        calls = [_as_call(item, self._names) for item in (value if isinstance(value, list) else [value])]
        if calls and None not in calls:
            return [call for call in calls if call]
        return [Piece("content", held)] if held else []


@dataclass(frozen=True)
class Said:
    """A whole answer, read."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def said(pieces: Iterable[Piece]) -> Said:
    """The pieces of one answer, joined."""
    parts = list(pieces)
    content, reasoning = ("".join(p.text for p in parts if p.kind == kind) for kind in ("content", "reasoning"))
    return Said(content, reasoning, tuple(p.call for p in parts if p.call))


def open_tag(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    if tag[0] not in text[1 - len(tag) :]:
        return 0
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)


def _call(text: str, names: Set[str]) -> Piece | None:
    return _as_call(_json(text), names)


def _as_call(value: Any, names: Set[str]) -> Piece | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        return None
    return Piece("call", call=ToolCall(f"call_{uuid.uuid4().hex[:24]}", value["name"], json.dumps(arguments, ensure_ascii=False)))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
