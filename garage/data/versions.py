"""Editing a dataset: the rows of one version and a list of changes give the rows of the next.

A change is one JSON object: {"add": ROW} in any known format, {"change": ID, "question": ..., "answer": ..., "system": ...},
{"delete": ID} or {"rate": ID, "rating": 0 to 10}. Changes apply in their order; one that names no row, or a row twice deleted, is an error
with its line, and nothing is written. The old version is never touched, so undoing an edit is naming its parent.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from garage.core.errors import UserError
from garage.core.types import Message, Role, Row
from garage.data.formats import detect, to_rows

VERBS = ("add", "change", "delete", "rate")
_ROLES: Mapping[str, Role] = {"question": "user", "answer": "assistant", "system": "system"}


@dataclass(frozen=True)
class Edited:
    """The rows of the new version, and how many were added, changed, deleted and rated."""

    rows: tuple[Row, ...]
    counts: Mapping[str, int]


def apply_changes(rows: Iterable[Row], changes: Sequence[tuple[int, Mapping[str, object]]]) -> Edited:
    """Apply (line, change) pairs.

    Raises:
        UserError: a change is malformed, or its row does not exist; the line is named.
    """
    kept: dict[str, Row] = {}
    for row in rows:
        if kept.setdefault(row.id, row) is not row:
            raise UserError(f"two rows have the id {row.id!r}", remedy="give every row an id of its own: an edit names rows by it")
    counts: Counter[str] = Counter()
    for line, change in changes:
        verb = next((verb for verb in VERBS if verb in change), "")
        try:
            counts[_apply(kept, verb, change)] += 1
        except (ValueError, KeyError) as error:
            reason = f"there is no row {change[verb]!r}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"line {line} of the changes: {reason}", remedy="repair this line; nothing was written") from error
    return Edited(tuple(kept.values()), dict(counts))


def _apply(kept: dict[str, Row], verb: str, change: Mapping[str, object]) -> str:
    if verb == "add":
        row = _added(change["add"], f"added-{len(kept) + 1}")
        if row.id in kept:
            raise ValueError(f"there is a row {row.id!r} already")
        kept[row.id] = row
        return "added"
    id = str(change[verb]) if verb else ""
    if verb == "delete":
        del kept[id]
        return "deleted"
    if verb == "rate":
        rating = change.get("rating")
        if not isinstance(rating, int | float) or not 0 <= rating <= 10:
            raise ValueError("a rating is a number from 0 to 10")
        kept[id] = replace(kept[id], meta={**kept[id].meta, "rating": f"{rating:g}"})
        return "rated"
    if verb == "change":
        kept[id] = _changed(kept[id], {key: value for key, value in change.items() if key != "change"})
        return "changed"
    raise ValueError(f"a change begins with one of: {', '.join(VERBS)}")


def _added(raw: object, id: str) -> Row:
    if not isinstance(raw, Mapping):
        raise ValueError("what is added is no JSON object")
    (row,) = to_rows(detect([raw], "the row"), raw, id=str(raw.get("id") or id), source="edit")
    return row


def _changed(row: Row, parts: Mapping[str, object]) -> Row:
    """The row with its last question or answer, its system prompt or its text replaced."""
    for name, value in parts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is no text")
        if name == "text" and not row.messages:
            row = replace(row, text=value)
        elif name in _ROLES:
            row = replace(row, messages=_with_turn(row.messages, _ROLES[name], value))
        else:
            raise ValueError(f"a row's {name} cannot be changed: name one of {', '.join(_ROLES)}, text")
    return row


def _with_turn(messages: Sequence[Message], role: Role, text: str) -> tuple[Message, ...]:
    places = [place for place, message in enumerate(messages) if message.role == role]
    if not places and role == "system":
        return (Message("system", text), *messages)
    if not places:
        raise ValueError(f"it has no {role} turn")
    return tuple(replace(message, content=text) if place == places[-1] else message for place, message in enumerate(messages))
