"""From what a request says to the token ids the engine reads, and how its answer is to be read.

A conversation goes through the one renderer. `enable_thinking`, or else `reasoning_effort` (none and minimal are off, the others on:
the models know no degrees), or else the server's default decides about reasoning; a form that the answer is held to turns it off
unless the request turns it on. `continue_final_message` is the prompt for an answer, and then the beginning of that answer.
A template in a request is foreign code: it runs in the renderer's killable process, and only if the server was told to trust it.
"""

from dataclasses import dataclass, field

from garage.core.errors import UserError
from garage.core.types import Message, Request, Structure
from garage.engine.engine import Engine
from garage.serve.asks import ChatAsk, ChatPrompt, TextAsk
from garage.serve.errors import ApiError, refused
from garage.serve.reading import THINK, THOUGHT
from garage.serve.sampling import structure_of
from garage.serve.tools import Manner, held, notation_of, offered, told
from garage.specs.serve import ServeSpec
from garage.tokens.chat import Chat

MAX_TEMPLATES = 4


@dataclass(frozen=True)
class Prompt:
    """One prompt: its ids, its text if it was one, the form of its answer, and how that is read."""

    ids: tuple[int, ...]
    text: str = ""
    form: Structure | None = None
    manner: Manner = field(default_factory=Manner)
    keeps_special: bool = False


class Prompts:
    """Renders for one engine. Any thread may call it."""

    def __init__(self, engine: Engine, spec: ServeSpec) -> None:
        self._engine, self._spec = engine, spec
        self._templates: dict[str, Chat] = {}

    def chat(self, asked: ChatPrompt) -> Prompt:
        """A conversation.

        Raises:
            ApiError: the template refuses it, or it asks for what this model cannot do.
        """
        chat = self._chat(asked.chat_template)
        form = structure_of(asked) if isinstance(asked, ChatAsk) else None
        notation = notation_of(chat.template, self._spec.tool_call_parser)
        tools, is_forced = offered(asked, notation)
        knows = "enable_thinking" in chat.template
        thinking = self._thinking(asked)
        is_strict = is_forced or form is not None or any(tool.function.strict for tool in tools)
        if thinking is None and is_strict and knows:
            thinking = False
        splits = THINK in chat.template if self._spec.reasoning_parser == "auto" else self._spec.reasoning_parser == "qwen3"
        ids, text = self._render(chat, asked, told(self._messages(asked), tools, notation), thinking, bool(tools) and notation == "hermes")
        tail = text.rstrip()[-1024:]
        is_open = (splits and tail.endswith(THINK)) or (asked.continue_final_message and tail.rfind(THINK) > tail.rfind(THOUGHT))
        manner = Manner(notation, tools, is_forced, asked.parallel_tool_calls, splits, is_open)
        whole = held(manner, form, thinking)
        self._check(ids, whole)
        return Prompt(ids, text, whole, manner, any(tag in self._engine.tokenizer.specials for tag in manner.tags))

    def texts(self, asked: TextAsk) -> list[Prompt]:
        """The prompts of a text completion: one or several, as texts or as ids."""
        form = structure_of(asked)
        return [self.text(one, add_special=asked.add_special_tokens, form=form) for one in split(asked.prompt)]

    def text(self, prompt: str | tuple[int, ...], *, add_special: bool = True, form: Structure | None = None,
             param: str = "prompt") -> Prompt:  # fmt: skip
        """One text, or one list of ids."""
        tokenizer = self._engine.tokenizer
        try:
            given = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) and not add_special else prompt
            ids = self._engine.encode(Request("", given))
        except UserError as error:
            raise refused(error, param) from error
        self._check(ids, form)
        return Prompt(ids, prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False), form)

    def _check(self, ids: tuple[int, ...], form: Structure | None) -> None:
        """Compile a form that is new here, where waiting for it holds nobody up."""
        if form is None:
            return
        try:
            self._engine.encode(Request("", ids, structure=form))
        except UserError as error:
            raise refused(error, "response_format") from error

    def _render(self, chat: Chat, asked: ChatPrompt, messages: tuple[Message, ...], thinking: bool | None,
                shows_tools: bool) -> tuple[tuple[int, ...], str]:  # fmt: skip
        start, turns = "", messages
        if asked.continue_final_message:
            start, turns = _start_of(messages[-1]), messages[:-1]
        asks = asked.add_generation_prompt or asked.continue_final_message
        given = [tool.model_dump(exclude_none=True) for tool in asked.tools] if shows_tools else []
        try:
            rendered = chat.render(turns, tools=given, add_generation_prompt=asks, thinking=thinking)
            return (*rendered.ids, *self._engine.tokenizer.encode(start)), rendered.text + start
        except UserError as error:
            raise refused(error, "messages") from error

    def _messages(self, asked: ChatPrompt) -> tuple[Message, ...]:
        messages = tuple(turn.message() for turn in asked.messages)
        if self._spec.system and not any(m.role in ("system", "developer") for m in messages):
            return (Message("system", self._spec.system), *messages)
        return messages

    def _thinking(self, asked: ChatPrompt) -> bool | None:
        if asked.chat_template_kwargs.enable_thinking is not None:
            return asked.chat_template_kwargs.enable_thinking
        if asked.reasoning_effort is not None:
            return asked.reasoning_effort not in ("none", "minimal")
        return self._spec.default_chat_template_kwargs.enable_thinking

    def _chat(self, template: str | None) -> Chat:
        if template is None:
            if self._engine.chat is None:
                raise ApiError(400, "this model has no chat template; send a text to /v1/completions", param="messages")
            return self._engine.chat
        if not self._spec.trust_request_chat_template:
            raise ApiError(400, "chat_template: this server does not run templates of requests", param="chat_template")
        if template not in self._templates:
            try:
                made = Chat(template, self._engine.tokenizer)
            except UserError as error:
                raise refused(error, "chat_template") from error
            for oldest in list(self._templates)[: 1 - MAX_TEMPLATES]:
                self._templates.pop(oldest, None)
            self._templates[template] = made
        return self._templates.get(template) or self._chat(template)


def split(prompt: object) -> list[str | tuple[int, ...]]:
    """One or several prompts, as texts or as ids, each by itself."""
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, list), prompt
    if isinstance(prompt[0], int):
        return [tuple(prompt)]
    return [one if isinstance(one, str) else tuple(one) for one in prompt]


def _start_of(message: Message) -> str:
    """The text an answer has begun with."""
    return f"{THINK}\n{message.reasoning}\n{THOUGHT}\n\n{message.content}" if message.reasoning else message.content
