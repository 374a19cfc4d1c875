"""Every dataset format people bring, to one canonical `Row`, and back.

A format is a name and the columns its parts stand in; the parts are `prompt input answer system messages tools pairs summary chosen
rejected text`. A file's format is found from its first objects, or given as a mapping of parts to columns. Nothing is guessed after
that: a row that does not fit is a `Fault` with its line number and the other rows remain usable, while a file whose columns fit no
format is refused with the columns found.

Columns that are no part of the format and hold plain values become the row's `meta`, as text. Read and written again, a row of any
format here is the same row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast, get_args

from garage.core.errors import UserError
from garage.core.types import Message, Role, Row, ToolCall
from garage.data.clean import parse_json

Object = Mapping[str, object]

PARTS = ("prompt", "input", "answer", "system", "messages", "tools", "pairs", "summary", "chosen", "rejected", "text")
OPTIONAL = frozenset({"input", "system", "tools", "summary"})
_ROLES = {role: role for role in get_args(Role)} | {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A name, and the column of each part. With `from_value` a turn is {from, value} instead of {role, content}."""

    name: str
    columns: Mapping[str, str]
    from_value: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(column for part, column in self.columns.items() if part not in OPTIONAL)

    def fits(self, columns: Iterable[str]) -> bool:
        return set(self.required) <= set(columns)


def _pair(prompt: str, answer: str) -> Format:
    return Format(f"{prompt}/{answer}", {"prompt": prompt, "answer": answer, "system": "system"})


_EXTRAS = {"tools": "tools", "system": "system"}
FORMATS = (
    Format("preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system"}),
    Format("messages", {"messages": "messages"} | _EXTRAS),
    Format("conversations", {"messages": "conversations"} | _EXTRAS),
    Format("sharegpt", {"messages": "conversations"} | _EXTRAS, from_value=True),
    Format("qa_pairs", {"pairs": "qa_pairs", "summary": "summary"}),
    Format("alpaca", {"prompt": "instruction", "input": "input", "answer": "output", "system": "system"}),
    _pair("question", "answer"),
    _pair("problem", "solution"),
    _pair("prompt", "completion"),
    _pair("prompt", "response"),
    _pair("prompt", "story"),
    _pair("instruction", "response"),
    _pair("question", "response"),
    _pair("query", "response"),
    _pair("input", "output"),
    _pair("input", "target"),
    Format("text", {"text": "text"}),
)


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used. `kind` is one of "unparsable", "empty", "missing"; lines count from 1."""

    line: int
    kind: str
    message: str


class RowError(ValueError):
    """One object that is no row of its format."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def detect(objects: Sequence[Object], where: str) -> Format:
    """The format that most of the objects fit; the first of equals in the order of `FORMATS`.

    Raises:
        UserError: they fit none.
    """
    votes = [sum(fmt.fits(raw) and _turns_fit(fmt, raw) for raw in objects) for fmt in FORMATS]
    if max(votes, default=0) == 0:
        found = sorted({column for raw in objects for column in raw})
        known = "; ".join(sorted({", ".join(fmt.required) for fmt in FORMATS}))
        raise UserError(
            f"{where} has the columns {', '.join(found) or '(none)'}, which are no known format",
            remedy=f"say which column is which (prompt, answer, system, messages, chosen, rejected, text), or rename to one of: {known}",
        )
    return FORMATS[votes.index(max(votes))]


def mapped(columns: Mapping[str, str], objects: Sequence[Object], where: str) -> Format:
    """The format a person described as part -> column, checked against what is there."""
    if unknown := sorted(set(columns) - set(PARTS)):
        raise UserError(f"{unknown[0]!r} is no part of a row", remedy=f"map parts out of: {', '.join(PARTS)}")
    found = {column for raw in objects for column in raw}
    if absent := sorted(set(columns.values()) - found):
        raise UserError(f"{where} has no column {absent[0]!r}", remedy=f"its columns are: {', '.join(sorted(found))}")
    wanted = ({"prompt", "answer"}, {"messages"}, {"text"}, {"pairs"}, {"chosen", "rejected", "prompt"})
    if not any(parts <= set(columns) for parts in wanted):
        raise UserError(f"{', '.join(columns)} make no row", remedy="map prompt and answer, or messages, text, or prompt, chosen, rejected")
    return Format("mapped", dict(columns))


def to_rows(fmt: Format, raw: Object, *, id: str, source: str) -> list[Row]:
    """The rows of one object: one, or one for each of its question/answer pairs.

    Raises:
        RowError: the object is not of this format.
    """
    if missing := [column for column in fmt.required if raw.get(column) is None]:
        raise RowError("missing", f"has no {', '.join(missing)}")
    consumed = set(fmt.columns.values())
    meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in raw.items() if k not in consumed and isinstance(v, str | int | float)}
    parts = {part: raw[column] for part, column in fmt.columns.items() if raw.get(column) is not None}
    if "pairs" in fmt.columns:
        return _pair_rows(parts, Row(id=id, source=source, meta=meta))
    if "text" in fmt.columns:
        return [Row(id=id, text=_filled(parts["text"], "text"), source=source, meta=meta)]
    system = _text(parts["system"], "system") if "system" in parts else ""
    messages: tuple[Message, ...] = (Message("system", system),) if system.strip() else ()
    rejected, tools = "", _tools(parts.get("tools"))
    if "messages" in fmt.columns:
        messages += _conversation(parts["messages"])
    elif "rejected" in fmt.columns:
        prompt = _as_prompt(parts["prompt"])
        messages += (*prompt, _reply(parts["chosen"], prompt))
        rejected = _reply(parts["rejected"], prompt).content
    else:
        messages += (_question(parts, meta), Message("assistant", _filled(parts["answer"], fmt.columns["answer"])))
    return [Row(id, messages, rejected=rejected, tools=tools, source=source, meta=meta)]


def from_rows(rows: Iterable[Row], name: str) -> Iterator[dict[str, object]]:
    """Rows as objects of the format called `name`, for export.

    Raises:
        UserError: there is no such format, or a row does not fit into it.
    """
    fmt = next((fmt for fmt in FORMATS if fmt.name == name), None)
    if fmt is None:
        raise UserError(f"there is no format {name!r}", remedy=f"choose one of: {', '.join(f.name for f in FORMATS)}")
    if "pairs" in fmt.columns:
        for _, group in groupby(rows, key=lambda row: (row.source, row.meta.get("summary", ""))):
            yield _pairs_object(list(group))
    else:
        for row in rows:
            yield _object(fmt, row)


def _turns_fit(fmt: Format, raw: Object) -> bool:
    turns = raw.get(fmt.columns.get("messages", ""))
    first = turns[0] if isinstance(turns, list) and turns else None
    return "messages" not in fmt.columns or not isinstance(first, dict) or ("from" in first) == fmt.from_value


def _text(value: object, column: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), column) for part in value)
    raise RowError("missing", f"{column} is {type(value).__name__}, not text")


def _filled(value: object, column: str) -> str:
    text = _text(value, column)
    if not text.strip():
        raise RowError("empty", f"{column} is empty")
    return text


def _question(parts: Object, meta: dict[str, str]) -> Message:
    """The user's turn; an Alpaca `input` follows the instruction after a blank line and is kept in `meta` for the way back."""
    prompt, extra = _filled(parts["prompt"], "the prompt"), _text(parts.get("input", ""), "input")
    if "input" in parts:
        meta["input"] = extra
    return Message("user", f"{prompt}\n\n{extra}" if extra.strip() else prompt)


def _pair_rows(parts: Object, base: Row) -> list[Row]:
    pairs = parts["pairs"]
    if not isinstance(pairs, list) or not pairs:
        raise RowError("empty", "has no question/answer pairs")
    meta = {**base.meta, "summary": _text(parts["summary"], "summary")} if "summary" in parts else dict(base.meta)
    rows = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, dict) or not {"question", "answer"} <= set(pair):
            raise RowError("missing", f"pair {number} has no question or no answer")
        turns = (Message("user", _filled(pair["question"], "question")), Message("assistant", _filled(pair["answer"], "answer")))
        rows.append(Row(f"{base.id}-{number}", turns, source=base.source, meta=meta))
    return rows


def _conversation(value: object) -> tuple[Message, ...]:
    messages = _messages(value)
    if not any(message.role == "assistant" for message in messages):
        raise RowError("missing", "has no assistant turn")
    if all(not (m.content.strip() or m.tool_calls or m.reasoning) for m in messages if m.role == "assistant"):
        raise RowError("empty", "the assistant says nothing")
    return messages


def _messages(value: object) -> tuple[Message, ...]:
    turns = parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(turns, list) or not turns:
        raise RowError("missing", "has no list of turns")
    return tuple(_message(turn, number) for number, turn in enumerate(turns, start=1))


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise RowError("missing", f"turn {number} has no role")
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError("missing", f"turn {number} has the unknown role {name!r}")
    content = turn.get("content", turn.get("value"))
    return Message(
        role=cast(Role, role),
        content="" if content is None else _text(content, f"turn {number}"),
        reasoning=_text(turn.get("reasoning_content") or turn.get("reasoning") or "", "reasoning"),
        tool_calls=tuple(_tool_call(call) for call in turn.get("tool_calls") or ()),
        tool_call_id=_text(turn.get("tool_call_id") or "", "tool_call_id"),
        name=_text(turn.get("name") or "", "name"),
    )


def _tool_call(raw: object) -> ToolCall:
    call = raw if isinstance(raw, dict) else {}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("missing", "a tool call has no function name")
    given = function.get("arguments", "{}")
    return ToolCall(str(call.get("id", "")), function["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def _tools(value: object) -> tuple[Mapping[str, object], ...]:
    tools = parse_json(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("missing", "tools is not a list of objects")
    return tuple(tools)


def _as_prompt(value: object) -> tuple[Message, ...]:
    return (Message("user", _filled(value, "prompt")),) if isinstance(value, str) else _messages(value)


def _reply(value: object, prompt: tuple[Message, ...]) -> Message:
    """The answer of a preference: a text, the last turn alone, or the whole conversation, which then begins with the prompt."""
    if isinstance(value, str):
        return Message("assistant", _filled(value, "the answer"))
    turns = _messages(value)
    if turns[-1].role != "assistant" or (len(turns) > 1 and turns[:-1] != prompt):
        raise RowError("missing", "the chosen and the rejected answer must follow the same prompt")
    _filled(turns[-1].content, "the answer")
    return turns[-1]


def _object(fmt: Format, row: Row) -> dict[str, object]:
    columns = fmt.columns
    if "text" in columns:
        if row.messages:
            raise _unfit(row, fmt, "it is a conversation")
        return {columns["text"]: row.text, **row.meta}
    if not row.messages or (bool(row.rejected) != ("rejected" in columns)):
        raise _unfit(row, fmt, "plain text" if not row.messages else "a preference" if row.rejected else "it has no rejected answer")
    if "messages" in columns:
        extra: dict[str, object] = {columns["tools"]: list(row.tools)} if row.tools else {}
        return {columns["messages"]: [_turn(message, fmt) for message in row.messages], **extra, **row.meta}
    has_system = row.messages[0].role == "system"
    head: dict[str, object] = {columns["system"]: row.messages[0].content} if has_system else {}
    turns, meta = row.messages[has_system:], dict(row.meta)
    if "rejected" in columns:
        plain = [turn.role for turn in turns] == ["user", "assistant"]
        head |= {"prompt": turns[0].content if plain else [_turn(turn, fmt) for turn in turns[:-1]]}
        return head | {"chosen": turns[-1].content, "rejected": row.rejected} | meta
    if [turn.role for turn in turns] != ["user", "assistant"] or any(turn.tool_calls or turn.reasoning for turn in turns):
        raise _unfit(row, fmt, "it is more than one question and one answer")
    question = turns[0].content
    if "input" in columns:
        extra_input = meta.pop("input", "")
        head |= {columns["input"]: extra_input}
        question = question.removesuffix(f"\n\n{extra_input}") if extra_input.strip() else question
    return {columns["prompt"]: question, **head, columns["answer"]: turns[1].content, **meta}


def _pairs_object(rows: list[Row]) -> dict[str, object]:
    fmt = Format("qa_pairs", {"prompt": "question", "answer": "answer"})
    meta = dict(rows[0].meta)
    summary = {"summary": meta.pop("summary")} if "summary" in meta else {}
    return {**summary, "qa_pairs": [_object(fmt, replace(row, meta={})) for row in rows], **meta}


def _turn(message: Message, fmt: Format) -> dict[str, object]:
    if fmt.from_value:
        if message.tool_calls or message.reasoning:
            raise UserError("sharegpt turns hold text only, and a turn has tool calls or reasoning", remedy="write the format messages")
        return {"from": {"user": "human", "assistant": "gpt"}.get(message.role, message.role), "value": message.content}
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls]
    extra = {"reasoning_content": message.reasoning, "tool_calls": calls, "tool_call_id": message.tool_call_id, "name": message.name}
    return {"role": message.role, "content": message.content, **{k: v for k, v in extra.items() if v}}


def _unfit(row: Row, fmt: Format, reason: str) -> UserError:
    return UserError(f"row {row.id} does not fit the format {fmt.name}: {reason}", remedy="write messages, text or preference instead")
