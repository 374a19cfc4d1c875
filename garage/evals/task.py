"""What a task is: items to ask, and a judgement of each answer. Adding one is a file in `tasks/` and a line in `tasks/catalogue.py`.

A task makes its items of canonical rows; a recipe reads or generates those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.rewards.answers import Grade
from garage.specs.evals import TaskSpec


@dataclass(frozen=True)
class Item:
    """One question as it is sent to the model, and its right answer."""

    id: str
    messages: tuple[Message, ...]
    gold: str

    @property
    def question(self) -> str:
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")


class Task(Protocol):
    """A benchmark. `extraction` names the rules by which `score` reads answers; a change of rules is a change of the name."""

    name: str
    extraction: str

    def items(self, rows: Sequence[Row], spec: TaskSpec) -> Sequence[Item]:
        """The rows as items, in their order, ids unique; the harness applies `limit` and `system`."""
        ...

    def score(self, text: str, gold: str) -> Grade:
        """Judge one completion; any text gets a grade, none an exception."""
        ...


def asked(row: Row) -> tuple[tuple[Message, ...], str]:
    """The messages before the last answer, and that answer.

    Raises:
        UserError: the row does not end with an answer to a question.
    """
    if len(row.messages) < 2 or row.messages[-1].role != "assistant" or not row.messages[-1].content.strip():
        raise UserError(f"row {row.id or row.source} has no question followed by an answer", remedy="remove the row or complete it")
    return row.messages[:-1], row.messages[-1].content
