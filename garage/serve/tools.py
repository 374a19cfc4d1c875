"""Functions a model may call: how they are told to it, and how it is held to calling them.

Two notations. `hermes` is that of the templates of Qwen 3 and ChatML, which print the functions and earlier calls themselves. `gemma3`
is for models whose template knows no functions: Gemma documents a prompt that lists them as JSON and asks for `{"name", "parameters"}`
and nothing else; here it becomes a system text, earlier calls become that JSON, results become user turns.

`required`, a named function, `strict` functions, `parallel_tool_calls` false and a response format beside functions are kept by a
Lark grammar made of the functions' schemas; each schema stays a root of its own, so that its `$ref`s hold.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from garage.core.types import Message, Structure
from garage.serve.asks import ChatPrompt, Tool, ToolChoice
from garage.serve.errors import ApiError
from garage.serve.reading import CALL, CALLED, THINK, THOUGHT, GemmaReader, HermesReader, PlainReader, Reader, ReasoningReader

OPEN = {"allOf", "anyOf", "oneOf", "patternProperties", "$ref"}  # a schema with one of these may mean more arguments than it lists
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How arguments are written: as templates write them, so that a weak model cannot write white space for ever."""
Notation = Literal["hermes", "gemma3", "none"]
GEMMA_PROMPT = """You can call functions. To call one, answer with nothing but one JSON object, {{"name": NAME, "parameters": {{...}}}}; \
to call several, with a JSON list of such objects. Otherwise answer in words. The functions, as JSON Schemas:
{}"""


@dataclass(frozen=True)
class Manner:
    """How one answer is to be read and held: the functions it may call and whether its reasoning is told apart."""

    notation: Notation = "none"
    tools: tuple[Tool, ...] = ()
    is_forced: bool = False
    is_parallel: bool = True
    splits_reasoning: bool = False
    is_open: bool = False

    def reader(self) -> Reader:
        """A new reader for one choice."""
        names = {tool.function.name for tool in self.tools}
        reader: Reader = PlainReader()
        if names:
            reader = HermesReader(names) if self.notation == "hermes" else GemmaReader(names)
        return ReasoningReader(reader, is_open=self.is_open) if self.splits_reasoning else reader

    @property
    def tags(self) -> tuple[str, ...]:
        """What the reader must see in the text."""
        return (CALL, CALLED) * (self.notation == "hermes" and bool(self.tools)) + (THINK, THOUGHT) * self.splits_reasoning


def notation_of(template: str, chosen: str) -> Notation:
    """The notation for a chat template: what was chosen, else what the template shows."""
    if chosen in ("hermes", "gemma3", "none"):
        return chosen  # type: ignore[return-value]
    return "hermes" if CALL in template else "gemma3" if "<start_of_turn>" in template else "none"


def offered(asked: ChatPrompt, notation: Notation) -> tuple[tuple[Tool, ...], bool]:
    """The functions this answer may call, and whether it must call one.

    Raises:
        ApiError: the choice names no function, or the model has no notation for calls.
    """
    choice, tools = asked.tool_choice, tuple(asked.tools)
    if choice == "required" or isinstance(choice, ToolChoice):
        if isinstance(choice, ToolChoice):
            tools = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not tools:
            raise ApiError(400, "tool_choice: there is no such function in tools", param="tool_choice")
    if choice == "none":
        tools = ()
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have the same name", param="tools")
    if tools and notation == "none":
        text = "tools: the chat template of this model knows no functions; start the server with tool_call_parser if the model does"
        raise ApiError(400, text, param="tools")
    return tools, choice == "required" or isinstance(choice, ToolChoice)


def told(messages: Sequence[Message], tools: Sequence[Tool], notation: Notation) -> tuple[Message, ...]:
    """The conversation as the template takes it."""
    has_calls = any(m.tool_calls or m.role == "tool" for m in messages)
    if notation != "gemma3" or not (tools or has_calls):
        return tuple(messages)
    turns: list[Message] = []
    for message in messages:
        turn = _in_gemma(message)
        if turns and turn.role == "user" == turns[-1].role:
            turn = Message("user", f"{turns.pop().content}\n\n{turn.content}")
        turns.append(turn)
    if tools:
        first = [turns.pop(0).content] if turns[0].role in ("system", "developer") else []
        schemas = json.dumps([tool.function.model_dump(exclude_none=True) for tool in tools], ensure_ascii=False)
        turns.insert(0, Message("system", "\n\n".join([*first, GEMMA_PROMPT.format(schemas)])))
    return tuple(turns)


def held(manner: Manner, form: Structure | None, thinking: bool | None) -> Structure | None:
    """The form of a whole answer: calls, a response format, and reasoning before them; None if nothing need be held.

    Raises:
        ApiError: a grammar was given, which cannot be joined with calls or reasoning.
    """
    is_strict = any(tool.function.strict for tool in manner.tools) or (bool(manner.tools) and not manner.is_parallel)
    has_calls = bool(manner.tools) and (manner.is_forced or is_strict or form is not None)
    thinks = manner.splits_reasoning and thinking is True and (has_calls or form is not None)
    if not has_calls and not thinks and not (manner.is_open and form is not None):
        return form
    if form is not None and form.kind == "grammar":
        raise ApiError(400, "structured_outputs: a grammar cannot be joined with tools or reasoning", param="structured_outputs")
    rules = ["%llguidance {}", f"TEXT: /(.|\\n)*/\nstart: {_reasoning(manner, thinks)}turn"]
    if form is not None:
        rules.append(f"body: {_body(form)}")
    if has_calls:
        rules += _call_rules(manner)
    rules.append(f"turn: {_turn(manner, has_calls, form is not None)}")
    if thinks or manner.is_open:
        opening = "" if manner.is_open else json.dumps(THINK)
        rules.append(f"thought[lazy]: {opening} TEXT {json.dumps(THOUGHT)}\nreasoning: thought /\\n*/")
    return Structure("grammar", "\n".join(rules) + "\n")


def _reasoning(manner: Manner, thinks: bool) -> str:
    return "reasoning " if manner.is_open else "reasoning? " if thinks else ""


def _turn(manner: Manner, has_calls: bool, has_body: bool) -> str:
    calls = ("calls" if manner.is_parallel else "call") if has_calls else ""
    if manner.is_forced or not has_calls or has_body:
        return " | ".join([*([calls] if calls else []), *(["body"] if has_body and not manner.is_forced else [])])
    if manner.notation == "gemma3":
        return f"{calls} | /([^{{\\[`](.|\\n)*)?/"
    return "late* TEXT" if manner.is_parallel else "TEXT | late"


def _call_rules(manner: Manner) -> list[str]:
    """`call`, `calls` and, for a call after text, `late`."""
    field = "arguments" if manner.notation == "hermes" else "parameters"
    rules = [f"object: {' | '.join(f'object_{n}' for n in range(len(manner.tools)))}"]
    for n, tool in enumerate(manner.tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "{field}": ')
        given = tool.function.parameters or {}
        closed = {} if OPEN & given.keys() or "properties" not in given else {"additionalProperties": False}
        schema = json.dumps({"type": "object", **closed, **given, "x-guidance": SPACING})
        rules.append(f'object_{n}: {head} arguments_{n} "}}"\narguments_{n}: %json {schema}')
    if manner.notation == "gemma3":
        return [*rules, 'call: object\ncalls: object | "[" object (", " object)* "]"']
    rest = f'"\\n" object "\\n" {json.dumps(CALLED)}'
    rules.append(f'call: {json.dumps(CALL)} {rest}\ncalls: call ("\\n" call)*')
    return [*rules, f"late_head[lazy]: TEXT {json.dumps(CALL)}\nlate: late_head {rest}"]


def _body(form: Structure) -> str:
    if form.kind == "json":
        return f"%json {form.text}"
    if form.kind == "choice":
        return " | ".join(json.dumps(choice) for choice in json.loads(form.text))
    return "/" + re.sub(r"(?<!\\)/", r"\\/", form.text) + "/"


def _in_gemma(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"```tool_output\n{message.content}\n```")
    if not message.tool_calls:
        return message
    calls = [f'{{"name": {json.dumps(c.name)}, "parameters": {c.arguments or "{}"}}}' for c in message.tool_calls]
    text = calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"
    return Message("assistant", "\n".join(filter(None, [message.content, text])))
