"""Every dataset format people bring, to one canonical `Row`, and back.

A format is a name and the column of each of its parts. A file's format is the one that most of its first objects fit, or a mapping that
a person gives. Nothing is guessed after that: a row that does not fit is a fault with its line number and the other rows remain usable,
while a file whose columns fit no format is refused with the columns found.

Columns that are no part of the format and hold plain values become the row's `meta`, as text. Read and written again, a row of any
format here is the same row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast, get_args

from garage.core.errors import UserError
from garage.core.strict_json import parse_json
from garage.core.types import Message, Role, Row, ToolCall

Object = Mapping[str, object]

PARTS = ("prompt", "input", "answer", "system", "messages", "tools", "pairs", "summary", "chosen", "rejected", "text")
OPTIONAL = frozenset({"input", "system", "tools", "summary"})
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_OTHERS = {"model": "assistant", "bot": "assistant", "function": "tool", "observation": "tool"}
_ROLES = {role: role for role in get_args(Role)} | _SHAREGPT | _OTHERS


class RowError(ValueError):
    """An object that is no row of its format; its two arguments are the kind of the fault ("empty" or "missing") and the reason."""


@dataclass(frozen=True)
class Format:
    """A name, and the column of each part. A turn of "sharegpt" is {from, value}, of the others {role, content}."""

    name: str
    columns: Mapping[str, str]

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(column for part, column in self.columns.items() if part not in OPTIONAL)

    def fits(self, raw: Object) -> bool:
        turns = raw.get(self.columns.get("messages", ""))
        is_from_value = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
        return set(self.required) <= set(raw) and is_from_value == (self.name == "sharegpt")


_SYSTEM, _TOOLS = {"system": "system"}, {"system": "system", "tools": "tools"}
_PAIRS = ("question/answer problem/solution prompt/completion prompt/response prompt/story instruction/response question/response "
          "query/response input/output input/target")  # fmt: skip
FORMATS = (
    Format("preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"} | _SYSTEM),
    Format("messages", {"messages": "messages"} | _TOOLS),
    Format("conversations", {"messages": "conversations"} | _TOOLS),
    Format("sharegpt", {"messages": "conversations"} | _TOOLS),
    Format("qa_pairs", {"pairs": "qa_pairs", "summary": "summary"}),
    Format("alpaca", {"prompt": "instruction", "input": "input", "answer": "output"} | _SYSTEM),
    *(Format(pair, dict(zip(("prompt", "answer"), pair.split("/"), strict=True)) | _SYSTEM) for pair in _PAIRS.split()),
    Format("text", {"text": "text"}),
)


def detect(objects: Sequence[Object], where: str) -> Format:
    """The format that most of the objects fit; the first of equals in the order of `FORMATS`.

    Raises:
        UserError: they fit none.
    """
    votes = [sum(fmt.fits(raw) for raw in objects) for fmt in FORMATS]
    if max(votes) == 0:
        found = ", ".join(sorted({column for raw in objects for column in raw})) or "(none)"
        known = "; ".join(sorted({", ".join(fmt.required) for fmt in FORMATS}))
        raise UserError(f"{where} has the columns {found}, which are no known format",
                        remedy=f"say which column is which ({', '.join(PARTS)}), or rename to one of: {known}")  # fmt: skip
    return FORMATS[votes.index(max(votes))]


def mapped(columns: Mapping[str, str], objects: Sequence[Object], where: str) -> Format:
    """The format a person described as part -> column, checked against what is there."""
    found = {column for raw in objects for column in raw}
    if unknown := sorted(set(columns) - set(PARTS)):
        raise UserError(f"{unknown[0]!r} is no part of a row", remedy=f"map parts out of: {', '.join(PARTS)}")
    if absent := sorted(set(columns.values()) - found):
        raise UserError(f"{where} has no column {absent[0]!r}", remedy=f"its columns are: {', '.join(sorted(found))}")
    if not any(set(parts.split()) <= set(columns) for parts in ("prompt answer", "messages", "text", "pairs", "prompt chosen rejected")):
        raise UserError(f"{', '.join(columns)} make no row", remedy="map prompt and answer, or messages, text, or prompt, chosen, rejected")
    return Format("mapped", dict(columns))


def to_rows(fmt: Format, raw: Object, *, id: str, source: str) -> list[Row]:
    """The rows of one object: one, or one for each of its question/answer pairs.

    Raises:
        RowError: the object is not of this format.
    """
    if missing := [column for column in fmt.required if raw.get(column) is None]:
        raise RowError("missing", f"has no {', '.join(missing)}")
    others = {key: value for key, value in raw.items() if key not in fmt.columns.values() and isinstance(value, str | int | float)}
    meta = {key: value if isinstance(value, str) else json.dumps(value) for key, value in others.items()}
    parts = {part: raw[column] for part, column in fmt.columns.items() if raw.get(column) is not None}
    row = Row(id, source=source, meta=meta)
    if "pairs" in fmt.columns:
        return _pair_rows(parts, row)
    if "text" in fmt.columns:
        return [replace(row, text=_filled(parts["text"], "text"))]
    messages: tuple[Message, ...] = (Message("system", _text(parts["system"], "system")),) if parts.get("system") else ()
    if "messages" in fmt.columns:
        return [replace(row, messages=messages + _conversation(parts["messages"]), tools=_tools(parts.get("tools")))]
    if "rejected" in fmt.columns:
        prompt = (Message("user", _filled(parts["prompt"], "prompt")),) if isinstance(parts["prompt"], str) else _messages(parts["prompt"])
        chosen, rejected = (_reply(parts[part], prompt) for part in ("chosen", "rejected"))
        return [replace(row, messages=(*messages, *prompt, chosen), rejected=rejected.content)]
    question, extra = _filled(parts["prompt"], fmt.columns["prompt"]), _text(parts.get("input", ""), "input")
    if "input" in parts:
        row = replace(row, meta=meta | {"input": extra})  # for the way back
    user = Message("user", f"{question}\n\n{extra}" if extra.strip() else question)
    return [replace(row, messages=(*messages, user, Message("assistant", _filled(parts["answer"], fmt.columns["answer"]))))]


def from_rows(rows: Iterable[Row], name: str) -> Iterator[dict[str, object]]:
    """Rows as objects of the format called `name`, for export.

    Raises:
        UserError: there is no such format, or a row does not fit into it.
    """
    fmt = next((fmt for fmt in FORMATS if fmt.name == name), None)
    if fmt is None:
        raise UserError(f"there is no format {name!r}", remedy=f"choose one of: {', '.join(f.name for f in FORMATS)}")
    if "pairs" not in fmt.columns:
        yield from (_object(fmt, row) for row in rows)
        return
    pair = Format(name, {"prompt": "question", "answer": "answer"})
    for _, group in groupby(rows, key=lambda row: (row.source, row.meta)):
        same = list(group)
        yield {"qa_pairs": [_object(pair, replace(row, meta={})) for row in same], **same[0].meta}


def _text(value: object, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), column) for part in value)
    raise RowError("missing", f"{column} is {type(value).__name__}, not text")


def _filled(value: object, column: str) -> str:
    if not (text := _text(value, column)).strip():
        raise RowError("empty", f"{column} is empty")
    return text


def _pair_rows(parts: Object, base: Row) -> list[Row]:
    pairs, rows = parts["pairs"], []
    meta = {**base.meta, "summary": _text(parts["summary"], "summary")} if "summary" in parts else base.meta
    for number, pair in enumerate(pairs if isinstance(pairs, list) else (), start=1):
        if not isinstance(pair, dict) or not {"question", "answer"} <= set(pair):
            raise RowError("missing", f"pair {number} has no question or no answer")
        turns = (Message("user", _filled(pair["question"], "question")), Message("assistant", _filled(pair["answer"], "answer")))
        rows.append(replace(base, id=f"{base.id}-{number}", messages=turns, meta=meta))
    if not rows:
        raise RowError("empty", "has no question/answer pairs")
    return rows


def _conversation(value: object) -> tuple[Message, ...]:
    messages = _messages(value)
    answers = [message for message in messages if message.role == "assistant"]
    if not any(answer.content.strip() or answer.tool_calls or answer.reasoning for answer in answers):
        raise RowError("empty", "the assistant says nothing") if answers else RowError("missing", "has no assistant turn")
    return messages


def _messages(value: object) -> tuple[Message, ...]:
    turns = parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(turns, list) or not turns:
        raise RowError("missing", "has no list of turns")
    return tuple(_message(turn, number) for number, turn in enumerate(turns, start=1))


def _message(turn: object, number: int) -> Message:
    raw = turn if isinstance(turn, dict) else {}
    name, content = raw.get("role", raw.get("from")), raw.get("content", raw.get("value"))
    if not isinstance(name, str) or name not in _ROLES:
        raise RowError("missing", f"turn {number} has " + (f"the unknown role {name!r}" if name else "no role"))
    calls = tuple(_tool_call(call) for call in raw.get("tool_calls") or ())
    call_id, speaker = (_text(raw.get(key) or "", key) for key in ("tool_call_id", "name"))
    reasoning = _text(raw.get("reasoning_content") or raw.get("reasoning") or "", "reasoning")
    said = "" if content is None else _text(content, f"turn {number}")
    return Message(cast(Role, _ROLES[name]), said, reasoning, calls, call_id, speaker)


def _tool_call(raw: object) -> ToolCall:
    call = raw if isinstance(raw, dict) else {}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("missing", "a tool call has no function name")
    given = function.get("arguments", "{}")
    return ToolCall(str(call.get("id", "")), function["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def _tools(value: object) -> tuple[Mapping[str, object], ...]:
    tools = parse_json(value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("missing", "tools is not a list of objects")
    return tuple(tools)


def _reply(value: object, prompt: tuple[Message, ...]) -> Message:
    """The answer of a preference: a text, the last turn alone, or the whole conversation, which then begins with the prompt."""
    turns = (Message("assistant", value),) if isinstance(value, str) else _messages(value)
    if turns[-1].role != "assistant" or (len(turns) > 1 and turns[:-1] != prompt):
        raise RowError("missing", "the chosen and the rejected answer must follow the same prompt")
    _filled(turns[-1].content, "the answer")
    return turns[-1]


def _object(fmt: Format, row: Row) -> dict[str, object]:
    """One row in a format's columns, or the reason why that would lose something."""
    columns, meta = fmt.columns, dict(row.meta)
    if ("text" in columns) == bool(row.messages) or ("rejected" in columns) != bool(row.rejected):
        raise _unfit(row, fmt, "a preference" if row.rejected else "a conversation" if row.messages else "plain text")
    if "text" in columns:
        return {columns["text"]: row.text, **meta}
    if "messages" in columns:
        tools = {"tools": [*row.tools]} if row.tools else {}
        return {columns["messages"]: [_turn(message, fmt, row) for message in row.messages], **tools, **meta}
    has_system = row.messages[0].role == "system" and "system" in columns
    head: dict[str, object] = {columns["system"]: row.messages[0].content} if has_system else {}
    *asked, answer = row.messages[has_system:]
    is_plain = [turn.role for turn in asked] == ["user"] and not (row.tools or answer.tool_calls or answer.reasoning)
    if "rejected" in columns:
        prompt = asked[0].content if is_plain else [_turn(turn, fmt, row) for turn in asked]
        return {"prompt": prompt, "chosen": answer.content, "rejected": row.rejected, **head, **meta}
    if not is_plain:
        raise _unfit(row, fmt, "more than one question and one answer")
    question = asked[0].content
    if "input" in columns and (extra := meta.get("input", "")).strip():
        question = question.removesuffix(f"\n\n{extra}")
    return {columns["prompt"]: question, **head, **({"input": ""} if "input" in columns else {}), columns["answer"]: answer.content, **meta}


def _turn(message: Message, fmt: Format, row: Row) -> dict[str, object]:
    if fmt.name == "sharegpt":
        if message.tool_calls or message.reasoning:
            raise _unfit(row, fmt, "tool calls or reasoning")
        return {"from": {role: name for name, role in _SHAREGPT.items()}.get(message.role, message.role), "value": message.content}
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls]
    extra = {"reasoning_content": message.reasoning, "tool_calls": calls, "tool_call_id": message.tool_call_id, "name": message.name}
    return {"role": message.role, "content": message.content, **{key: value for key, value in extra.items() if value}}


def _unfit(row: Row, fmt: Format, holds: str) -> UserError:
    return UserError(f"row {row.id} does not fit the format {fmt.name}: it holds {holds}", remedy="write messages, text or preference")
