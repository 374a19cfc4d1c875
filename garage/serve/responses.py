"""The Responses API, stateless: a request becomes a chat, its answer becomes output items.

Nothing is kept: `store` has no effect, `previous_response_id` is refused, and the whole conversation comes with every request. Whole
answers and streams are made by one writer of items, so they say the same. Fields that ask for what is not here (other kinds of tools,
background work, summaries, `include`) are no fields of the shape, and therefore a 400 that names them.

Source: OpenAI API reference, Responses and its streaming events.
"""

import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from garage.core.types import Completion, ToolCall
from garage.engine.request import Delta
from garage.serve.asks import ChatAsk, FunctionSchema, JsonSchema, Limit, Named, Part, Shape, check, text_of
from garage.serve.errors import ApiError, Json
from garage.serve.prompts import Prompt
from garage.serve.reading import Piece
from garage.serve.replies import Head, sse, usage_of
from garage.tokens.tokenizer import Tokenizer


class Item(Shape):
    """What `input` may list: a message, a call, what it gave, or reasoning; empty fields are those of the other kinds."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"] = "assistant"
    content: str | list[Part] = ""
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[Part] = ""
    summary: list[Any] = Field([], max_length=64)


class FunctionTool(FunctionSchema):
    type: Literal["function"]


class NamedTool(Named):
    type: Literal["function"]


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]


class TextForm(Shape):
    format: TextFormat = TextFormat(type="text")
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Shape):
    effort: str | None = None


class ResponseAsk(Shape):
    model: str
    input: str | list[Item] = Field(min_length=1)
    instructions: str = ""
    max_output_tokens: Limit | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: list[FunctionTool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning()
    text: TextForm = TextForm()
    truncation: Literal["disabled"] = "disabled"
    include: list[str] = Field([], max_length=0)
    background: Literal[False] = False
    stream: bool = False

    def chat(self) -> ChatAsk:
        """The same request as a chat.

        Raises:
            ApiError: a value is out of range.
        """
        raw: dict[str, Any] = {"model": self.model, "messages": self._messages(), "stream": self.stream}
        named = {"max_completion_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p,
                 "reasoning_effort": self.reasoning.effort}  # fmt: skip
        raw |= {name: value for name, value in named.items() if value is not None}
        choice, form = self.tool_choice, self.text.format
        if self.tools:
            raw["tools"] = [{"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)} for tool in self.tools]
            raw["parallel_tool_calls"] = self.parallel_tool_calls
        raw["tool_choice"] = choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        schema = {"json_schema": form.model_dump(exclude={"type"}, by_alias=True)} if form.type == "json_schema" else {}
        raw["response_format"] = {"type": form.type, **schema}
        return check(ChatAsk, raw)

    def _messages(self) -> list[Json]:
        """The items as turns: reasoning and calls belong to the assistant's turn they stand at."""
        turns: list[Json] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        is_open = False  # the last turn is an assistant's that may go on
        for item in [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            if item.type == "function_call_output":
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
                is_open = False
                continue
            is_said = item.type == "message" and (item.role != "assistant" or (is_open and bool(turns[-1]["content"])))
            if is_said or not is_open:
                turns.append({"role": item.role, "content": ""})
                is_open = item.role == "assistant"
            if item.type == "function_call":
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                turns[-1]["tool_calls"] = [*turns[-1].get("tool_calls", []), call]  # type: ignore[misc]
            else:
                turns[-1]["content" if item.type == "message" else "reasoning"] = text_of(item.content)
        return turns


class ResponseVoice:
    """Writes one response: items as they are said, and the events that tell of them."""

    def __init__(self, head: Head, asked: ResponseAsk, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self._head, self._asked, self._prompt, self._tokenizer = head, asked, prompt, tokenizer
        self._reader = prompt.manner.reader()
        self._output: list[Json] = []
        self._kind, self._name, self._text, self._sequence = "", "", "", 0
        self._done: Completion | None = None

    def begin(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event("response.in_progress", response=response)

    def heard(self, place: int, delta: Delta) -> bytes:
        out = [self._say(piece) for piece in self._reader.push(delta.text)]
        if delta.completion is not None:
            self._done = delta.completion
            out += [*(self._say(piece) for piece in self._reader.end()), self._close()]
        return b"".join(out)

    def end(self) -> bytes:
        status = self._status()
        return self._event(f"response.{status}", response=self._response(status))

    def failed(self, error: ApiError) -> bytes:
        fault = error.body["error"]
        assert isinstance(fault, dict), fault
        response = {**self._response("failed"), "error": {"code": "server_error", "message": fault["message"]}}
        return self._event("error", **fault) + self._event("response.failed", response=response)

    def whole(self, completions: Sequence[Completion]) -> Json:
        """The answer that is not streamed."""
        self._done = completions[0]
        for piece in [*self._reader.push(self._done.text), *self._reader.end()]:
            self._say(piece)
        self._close()
        return self._response(self._status())

    def _say(self, piece: Piece) -> bytes:
        out = [self._close()] if piece.kind == "call" or piece.kind != self._kind else []
        if piece.call is not None:
            return b"".join([*out, *self._call(piece.call)])
        if not self._kind:
            out.append(self._open(piece.kind))
        self._text += piece.text
        return b"".join([*out, self._event(f"response.{self._name}.delta", **self._where(), delta=piece.text)])

    def _call(self, call: ToolCall) -> list[bytes]:
        item = self._add("fc", "function_call", {"call_id": call.id, "name": call.name, "arguments": ""})
        out = [self._event("response.output_item.added", **self._at(), item=dict(item))]
        item["arguments"], item["status"] = call.arguments, "completed"
        where, name = {**self._at(), "item_id": item["id"]}, "response.function_call_arguments"
        out.append(self._event(f"{name}.delta", **where, delta=call.arguments))
        out.append(self._event(f"{name}.done", **where, name=call.name, arguments=call.arguments))
        return [*out, self._event("response.output_item.done", **self._at(), item=item)]

    def _open(self, kind: str) -> bytes:
        self._kind, self._text = kind, ""
        is_thought = kind == "reasoning"
        self._name = "reasoning_text" if is_thought else "output_text"
        fields: Json = {"summary": [], "content": []} if is_thought else {"role": "assistant", "content": []}
        item = self._add("rs" if is_thought else "msg", kind if is_thought else "message", fields)
        out = self._event("response.output_item.added", **self._at(), item=dict(item))
        return out + self._event("response.content_part.added", **self._where(), part=self._part())

    def _close(self) -> bytes:
        """End the item that is being written, if there is one."""
        if not self._kind:
            return b""
        item, part = self._output[-1], self._part()
        item["content"], item["status"] = [part], "completed"
        out = self._event(f"response.{self._name}.done", **self._where(), text=self._text)
        out += self._event("response.content_part.done", **self._where(), part=part)
        self._kind = ""
        return out + self._event("response.output_item.done", **self._at(), item=item)

    def _part(self) -> Json:
        more: Json = {} if self._kind == "reasoning" else {"annotations": [], "logprobs": []}
        return {"type": self._name, "text": self._text, **more}

    def _add(self, prefix: str, kind: str, fields: Json) -> Json:
        item: Json = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self._output.append(item)
        return item

    def _at(self) -> Json:
        return {"output_index": len(self._output) - 1}

    def _where(self) -> Json:
        more: Json = {} if self._kind == "reasoning" else {"logprobs": []}
        return {"item_id": self._output[-1]["id"], **self._at(), "content_index": 0, **more}

    def _status(self) -> str:
        return "incomplete" if self._done is not None and self._done.finish_reason == "length" else "completed"

    def _event(self, kind: str, **fields: object) -> bytes:
        self._sequence += 1
        return sse({**fields, "type": kind, "sequence_number": self._sequence - 1}, kind)

    def _response(self, status: str) -> Json:
        asked = self._asked.model_dump(by_alias=True, exclude={"input", "stream", "include"})
        usage: Json | None = None
        if self._done is not None:
            usage = {name.replace("prompt", "input").replace("completion", "output"): count for name, count in
                     usage_of({0: self._done}, [self._prompt.manner.is_open], self._tokenizer).items()}  # fmt: skip
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        head: Json = {"id": f"resp_{self._head.number}", "object": "response", "created_at": self._head.created, "status": status}
        return {**asked, **head, "model": self._head.model, "output": self._output, "error": None, "incomplete_details": reason,
                "usage": usage, "previous_response_id": None, "store": False, "metadata": {}}  # fmt: skip
