"""What a task is: items to ask, and a judgement of each answer. Adding one is a file in `tasks/` and a line in `tasks/catalogue.py`.

Items come from a file, from a dataset artifact, or from rows a recipe hands over; this module reads all of them as canonical rows.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.rewards.answers import Grade
from garage.specs.evals import TaskSpec
from garage.store.dataset import decode_row, read_rows


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

    def items(self, spec: TaskSpec) -> Sequence[Item]:
        """All items of the split the spec names, in a fixed order, ids unique; the harness applies `limit` and `system`."""
        ...

    def score(self, text: str, gold: str) -> Grade:
        """Judge one completion; any text gets a grade, none an exception."""
        ...


def read_items(path: Path, split: str) -> list[Row]:
    """Rows from a dataset artifact, canonical or question/answer JSONL, or CSV with question and answer columns.

    Raises:
        UserError: nothing is there, or a line is neither.
    """
    if path.is_dir():
        rows = list(read_rows(path, split))
        if not rows:
            raise UserError(f"{path} has no split '{split}'", remedy="give --split train, eval or test, whichever the dataset has")
        return rows
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records: Iterable[object] = csv.DictReader(file) if path.suffix.lower() == ".csv" else _json_lines(file)
            return [_row(record, f"{path.name}:{number}", str(number)) for number, record in enumerate(records, start=1)]
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}", remedy="check --data") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as items: {error}", remedy="give UTF-8 JSONL or CSV with question and answer") from error


def asked(row: Row) -> tuple[tuple[Message, ...], str]:
    """The messages before the last answer, and that answer.

    Raises:
        UserError: the row does not end with an answer to a question.
    """
    if len(row.messages) < 2 or row.messages[-1].role != "assistant" or not row.messages[-1].content.strip():
        raise UserError(f"row {row.id or row.source} has no question followed by an answer", remedy="remove the row or complete it")
    return row.messages[:-1], row.messages[-1].content


def _json_lines(lines: Iterable[str]) -> Iterator[object]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error


def _row(record: object, source: str, number: str) -> Row:
    if isinstance(record, Mapping) and "messages" in record:
        return decode_row({"id": number, **record})
    if not isinstance(record, Mapping) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
        raise ValueError(f"{source} has no text fields 'question' and 'answer'")
    messages = (Message("user", record["question"]), Message("assistant", record["answer"]))
    return Row(str(record.get("id") or number), messages, source=source)
