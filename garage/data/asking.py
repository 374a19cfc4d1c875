"""What a teacher and a judge are asked, in the words of `assets/teacher.toml`.

A text from a document stands between two lines of a word nobody can guess and is declared to be data. Our own templates are filled in; the
person's task and the text are values in them, never templates themselves, so that braces, quotes and dollars are safe.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from garage.core.types import Message
from garage.data.replies import Item


@dataclass(frozen=True)
class Form:
    """How a kind of row is asked for, and what one item must hold."""

    ask: str
    fields: Sequence[str]
    most: int
    types: Sequence[str]
    has_turns: bool = False
    is_close: bool = False
    questions: Sequence[str] = ()

    def prompt(self, count: int, text: str, nonce: str, **parts: str) -> tuple[Message, ...]:
        """Ask for `count` items about a text; of `task`, `types` and `asked` what is not empty is said, too."""
        item: object = dict.fromkeys(self.fields, "...")
        example = json.dumps({"turns": [item, item]} if self.has_turns else item)
        lines = {part: Template(_assets()["lines"][part]).substitute(parts) if parts.get(part) else "" for part in _assets()["lines"]}
        return _fenced(Template(self.ask).substitute(n=count), example, text, n=str(count), nonce=nonce, **lines)


    @property
    def schema(self) -> dict[str, object]:
        """The JSON Schema of a reply: {"rows": [item, ...]}; a reply that is the list alone is read as well."""
        item = _object({name: {"type": "string"} for name in self.fields})
        item = _object({"turns": {"type": "array", "items": item}}) if self.has_turns else item
        return _object({"rows": {"type": "array", "items": item}})


def _object(properties: Mapping[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False}


def form_of(kind: str) -> Form:
    return Form(**_assets()["kinds"][kind])


def judge_prompt(question: str, reference: str, answer: str, *, nonce: str) -> tuple[Message, ...]:
    """Ask for the marks of one answer."""
    said, text = _assets()["judge"], f"Question:\n{question}\n\nReference:\n{reference}\n\nAnswer:\n{answer}"
    form = ", ".join(f'"{name}": <0 to {most}>' for name, most in said["limits"].items())
    return _fenced(said["ask"], f"{{{form}}}", text, n="1", nonce=nonce, **dict.fromkeys(_assets()["lines"], ""))


def rating_of(items: Sequence[Item]) -> float | None:
    """The sum of a judge's marks, 0 to 10; None if one is missing or out of its range."""
    limits: Mapping[str, int] = _assets()["judge"]["limits"]
    said = items[0] if items else {}
    marks = [mark for name, most in limits.items() if isinstance(mark := said.get(name), int | float) and 0 <= mark <= most]
    return float(sum(marks)) if len(marks) == len(limits) else None


def _fenced(ask: str, form: str, text: str, **parts: str) -> tuple[Message, ...]:
    system = Template(_assets()["system"]).substitute(parts, form=form)
    return Message("system", system), Message("user", Template(_assets()["user"]).substitute(parts, ask=ask, text=text))


@cache
def _assets() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent.parent / "assets" / "teacher.toml").read_text(encoding="utf-8"))
