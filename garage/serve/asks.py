"""What a request may say, as strict shapes.

Every field is honoured or refused with a 400 that names it in `param`. Fields in `NO_EFFECT` are the exception, and public: they are
accepted because clients send them, change nothing, and are named in the header `x-garage-no-effect`. A JSON null is the same as an
absent field. Every number has bounds, every list a longest length, and NaN and infinity are no numbers here.

Source: OpenAI API reference; names of the extra fields from vLLM.
"""

import json
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garage.core.types import Message, ToolCall
from garage.serve.errors import ApiError

NO_EFFECT = ("store", "service_tier", "prompt_cache_key", "safety_identifier", "verbosity", "user", "metadata")
SCHEMAS = {"tools", "response_format", "structured_outputs", "text"}
"""Fields that hold JSON Schemas, in which a null means something."""
MAX_SCHEMA, MAX_SCHEMAS = 1 << 16, 1 << 18

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[Id], Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=64)]
Limit = Annotated[int, Field(ge=0, le=1 << 24)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Prompt = str | Annotated[list[str], Field(min_length=1, max_length=64)] | Ids | Annotated[list[Ids], Field(min_length=1, max_length=64)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Shape):
    include_usage: bool = False


class TemplateArguments(Shape):
    enable_thinking: bool | None = None


class Part(Shape):
    type: Literal["text", "input_text", "output_text", "reasoning_text"]
    text: str
    annotations: list[Any] = Field([], max_length=0)
    logprobs: list[Any] = Field([], max_length=0)


class Function(Shape):
    name: str
    arguments: str


class Call(Shape):
    id: str
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str = ""
    reasoning: str = ""
    reasoning_content: str = ""
    refusal: None = None
    tool_calls: list[Call] = []
    tool_call_id: str = ""

    def message(self) -> Message:
        """The same turn as the stages know it."""
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in self.tool_calls)
        return Message(self.role, text_of(self.content), self.reasoning or self.reasoning_content, calls, self.tool_call_id, self.name)


class FunctionSchema(Shape):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    type: Literal["function"]
    function: FunctionSchema


class Named(Shape):
    name: str


class ToolChoice(Shape):
    type: Literal["function"]
    function: Named


class JsonSchema(Shape):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class Form(Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Shape):
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=MAX_SCHEMA)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = Field(None, max_length=MAX_SCHEMA)
    json_object: bool | None = None


class Ask(Shape, ABC):
    """What chat and text completions have in common."""

    model: str
    max_tokens: Limit | None = None
    min_tokens: Limit = 0
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 24)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    bad_words: list[StopText] = Field([], max_length=64)
    allowed_token_ids: list[Id] = Field([], max_length=4096)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopText | Annotated[list[StopText], Field(max_length=8)] = []
    stop_token_ids: list[Id] = Field([], max_length=256)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = Field(1, ge=1, le=8)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    structured_outputs: StructuredOutputs | None = None
    response_format: Form = Form(type="text")
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31)
    cache_salt: str = Field("", max_length=256)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def candidates(self) -> int:
        """Choices to generate for each prompt."""
        return self.n

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many alternatives of each token to report; None = no log-probabilities."""


class ChatPrompt(Shape):
    """A conversation and how it is rendered."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template: str | None = Field(None, max_length=MAX_SCHEMA)
    chat_template_kwargs: TemplateArguments = TemplateArguments()
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatAsk(ChatPrompt, Ask):
    max_completion_tokens: Limit | None = None
    modalities: list[Literal["text"]] = ["text"]
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsk(Ask):
    prompt: Prompt
    max_tokens: Limit | None = 16
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=8)
    add_special_tokens: bool = True

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

    def num_logprobs(self) -> int | None:
        return self.logprobs


class EmbedAsk(Shape):
    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=1 << 20)


class TokenizeAsk(Shape):
    model: str = ""
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatAsk(ChatPrompt):
    model: str = ""
    return_token_strs: bool = False


class DetokenizeAsk(Shape):
    model: str = ""
    tokens: list[Id] = Field(max_length=1 << 20)


class LoadAsk(Shape):
    lora_name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    lora_path: str = Field(min_length=1, max_length=1024)


class UnloadAsk(Shape):
    lora_name: str


Asked = TypeVar("Asked", bound=Shape)


def parse(shape: type[Asked], body: bytes) -> tuple[Asked, list[str]]:
    """The request in a body, and the names of the fields it has that change nothing.

    Raises:
        ApiError: 400; it is not a JSON object, or a field is unknown, of the wrong kind, out of range or not honoured.
    """
    raw = read_object(body)
    without_effect = [name for name in NO_EFFECT if raw.pop(name, None) is not None]
    if raw.get("suffix"):
        raise ApiError(400, "suffix is refused: the model was not made to fill in a middle", param="suffix")
    if shape is TextAsk:
        raw.pop("suffix", None)
    asked = check(shape, raw)
    if isinstance(asked, Ask):
        _check_together(asked)
    return asked, without_effect


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, without its nulls."""
    try:
        raw = json.loads(body)
        if not isinstance(raw, dict):
            raise ApiError(400, "the body is not a JSON object")
        for name in SCHEMAS & raw.keys():
            if len(json.dumps(raw[name], ensure_ascii=False).encode()) > MAX_SCHEMAS:
                raise ApiError(400, f"{name} is longer than {MAX_SCHEMAS} characters", param=name)
        return {key: value if key in SCHEMAS else _without_nulls(value) for key, value in raw.items() if value is not None}
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON, or is nested too deeply") from error


def check(shape: type[Asked], raw: dict[str, Any]) -> Asked:
    """Plain values as a shape, or a 400 that names what does not fit."""
    try:
        return shape.model_validate(raw)
    except ValidationError as error:
        raise _in_words(error) from error


def text_of(content: str | list[Part] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check_together(asked: Ask) -> None:
    shape, outputs = asked.response_format, asked.structured_outputs
    wrong: dict[str, str | bool] = {
        "stream_options": asked.stream_options is not None and not asked.stream and "it is only allowed when stream is true",
        "prompt_logprobs": asked.prompt_logprobs is not None and asked.stream and "it cannot be streamed",
        "structured_outputs": outputs is not None and shape.type != "text" and "it cannot be combined with response_format",
        "response_format": (shape.type == "json_schema") != (shape.json_schema is not None) and "json_schema goes with its type",
    }
    if isinstance(asked, ChatAsk):
        differ = len({asked.max_tokens, asked.max_completion_tokens} - {None}) > 1
        wrong["top_logprobs"] = asked.top_logprobs is not None and not asked.logprobs and "it needs logprobs to be true"
        wrong["max_tokens"] = differ and "max_completion_tokens is given too and differs"
        wrong["continue_final_message"] = asked.continue_final_message and _cannot_continue(asked)
    if isinstance(asked, TextAsk):
        wrong["best_of"] = _cannot_choose(asked)
        wrong["echo"] = asked.echo and asked.stream and asked.logprobs is not None and "with logprobs it cannot be streamed"
    for param, why in wrong.items():
        if why:
            raise ApiError(400, f"{param}: {why}", param=param)


def _cannot_continue(asked: ChatPrompt) -> str | bool:
    last = asked.messages[-1]
    if asked.add_generation_prompt and "add_generation_prompt" in asked.model_fields_set:
        return "it excludes add_generation_prompt"
    return (last.role != "assistant" or bool(last.tool_calls)) and "the last message is not an assistant's text"


def _cannot_choose(asked: TextAsk) -> str | bool:
    if asked.best_of is not None and asked.stream and asked.candidates > 1:
        return "it cannot be streamed"
    return asked.candidates < asked.n and f"it is {asked.best_of}, less than n = {asked.n}"


def _in_words(error: ValidationError) -> ApiError:
    fault = error.errors(include_input=False, include_url=False)[0]
    place = [str(part) for part in fault["loc"]]
    param = ".".join(place) or None
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"there is no field {param}, or it is not supported here", param=param)
    return ApiError(400, f"{param}: {fault['msg']}", param=param)
