"""The one renderer: a conversation becomes token ids, which of them are learned, and which message each came from.

What: training, evaluation, rollouts and serving all call `Chat.render`; its `hash` goes into every checkpoint. Our own templates of
ChatML, Qwen 3 and Gemma 3 and a model's own Jinja text go one way: render, encode once, label by position.
Why so: a template that differs between training and serving is the commonest way to lose a fine-tune (one model scored 26 % and 57 %).
Learned is what the model writes: the assistant's turn after the generation prompt, up to and with its end-of-turn token, in every turn.
Limits: control tokens inside messages are encoded as text. Where the turns of a foreign template cannot be told exactly the row is
refused. A token across the border of prompt and answer is not learned. With `add_generation_prompt` nothing is learned: it is a prompt.

How origins are known: the template runs a second time on a copy whose characters are replaced, one for one, by a private-use character
that names their message. Where the two outputs have the same length and differ only there, the second is a map of the first, and what it
still shows was written by the template. White space, quotes and tags the template knows stay, so that it takes the same branches. A
template that changes lengths leaves no map: then origins are -1, and a control token in a message is refused.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from garage.core.errors import UserError
from garage.core.files import read_file, read_object
from garage.core.types import Message
from garage.core.worker import Worker
from garage.tokens import sandbox
from garage.tokens.tokenizer import Tokenizer, alternatives

CONTROLS = {"chatml": ("<|im_start|>", "<|im_end|>"), "qwen3": ("<|im_start|>", "<|im_end|>"),
            "gemma3": ("<start_of_turn>", "<end_of_turn>")}
ANSWER_SECONDS = 2.0
_QUESTION, _ANSWER = Message("user", "Which way?"), Message("assistant", "Northwards.")
Span = tuple[int, int]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation in tokens. A learned token's origin is its message; elsewhere -1 means that the template wrote it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    origins: tuple[int, ...]
    text: str


class Chat:
    """A chat template bound to a tokenizer. `stop_ids` end a turn; `template` is what to write as chat_template.jinja."""

    def __init__(self, template: str, tokenizer: Tokenizer, *, family: str = "own") -> None:
        self.template, self.family, self._tokenizer = template, family, tokenizer
        compiling = {"template": template}
        self._program = Worker(Path(sandbox.__file__), first=compiling, seconds=ANSWER_SECONDS) if family == "own" else sandbox.Program()
        source = self._ask(compiling)
        self._names, self._control = frozenset(source["names"]), alternatives(tokenizer.specials)
        self._mark = _marker(source["constants"], self._control)
        self._prompts = {thinking: self._generation_prompt(thinking) for thinking in (None, True, False)}
        probe = self._run([self._turn(m) for m in (_QUESTION, _ANSWER) * 2], [], False, None)[0]
        self._header = self._turn_header(probe)
        answers = [m.end() for m in re.finditer(re.escape(_ANSWER.content), probe)]
        ends = [found[0] for at in answers if (found := self._control.search(probe, at))]
        self._end = alternatives([*ends, *map(tokenizer.id_to_token, tokenizer.eos_ids)])
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*(tokenizer.specials[e] for e in ends[-1:]), *tokenizer.eos_ids]))
        facts = [template, sorted(tokenizer.specials.items()), tokenizer.bos_id, list(self._prompts.values())]
        self.hash = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "Chat":
        """The chat template a model directory carries.

        Raises:
            UserError: there is none, it is damaged, or it breaks the limits of the sandbox.
        """
        if (text := _template_text(directory)) is None:
            raise UserError(f"{directory} has no chat template", remedy="choose chatml, qwen3 or gemma3; a base model learns it")
        return cls(text, tokenizer, family=next((name for name in CONTROLS if template_of(name) == text), "own"))

    @classmethod
    def named(cls, family: str, tokenizer: Tokenizer) -> "Chat":
        """One of our own templates: chatml, qwen3 or gemma3."""
        if family not in CONTROLS:
            raise UserError(f"there is no chat template {family!r}", remedy=f"choose one of {', '.join(CONTROLS)}")
        if missing := [t for t in CONTROLS[family] if t not in tokenizer.specials]:
            raise UserError(f"the tokenizer of {tokenizer.where} lacks {', '.join(missing)}, which {family} needs",
                            remedy="choose the template the model was made for, or train a tokenizer with these control tokens")
        return cls(template_of(family), tokenizer, family=family)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Values] = (), add_generation_prompt: bool = False,
               thinking: bool | None = None) -> Rendered:
        """Tokens of a conversation.

        Raises:
            UserError: the template refuses or drops a message, cannot express something in it, or its turns cannot be told apart.
        """
        self._refuse_unsupported(messages, tools, thinking)
        turns, options = [self._turn(m) for m in messages], (add_generation_prompt, thinking)
        text, blocks = self._run(turns, tools, *options)
        free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in text)  # private use
        tools_mark, marks = next(free), dict(zip(free, range(len(turns)), strict=False))
        marked = [self._mark(turn, mark) for turn, mark in zip(turns, marks, strict=True)]
        shadow, same_blocks = self._run(marked, self._mark(tools, tools_mark), *options)
        found = _read_map(text, shadow, marks | {tools_mark: -1})
        controls, seen = (len(self._control.findall(t)) for t in (text, shadow))
        if len(blocks) != len(same_blocks) or (not found.is_exact and controls != seen):
            raise refused("control characters or tokens in a message cannot be told from its own")
        for (mark, index), message in zip(marks.items(), messages, strict=True):
            if found.is_exact and message.role != "assistant" and mark not in shadow and mark in self._mark(message.content, mark):
                raise refused(f"message {index} ({message.role}) does not appear in the output")
        learned = bytearray(len(text))
        spans = [] if add_generation_prompt else self._learned_spans(text, found.shape, blocks, turns, tools, thinking)
        for (start, end), index in zip(spans, _assistants(turns), strict=False):
            learned[start:end] = b"\1" * (end - start)
            found.origins[start:end] = array("i", [index]) * (end - start)
        return self._encode(text, learned, found)

    def _encode(self, text: str, learned: bytearray, found: "_Map") -> Rendered:
        """Encode once; but where a message holds control tokens, in pieces between those of the template."""
        controls = [m.span() for m in self._control.finditer(text)]
        ours = [(a, b) for a, b in controls if 1 not in found.foreign[a:b]]
        cuts = [0, len(text)] if ours == controls else [0, *(at for span in ours for at in span), len(text)]
        ids, flags, origins = [], [], []
        for start, end in pairwise(cuts):
            new, offsets = self._tokenizer.encode_spans(text[start:end], allow_special=ours == controls or (start, end) in ours)
            ids += new
            flags += [a < b and 0 not in learned[start + a:start + b] for a, b in offsets]
            origins += [max(found.origins[start + a:start + b], default=-1) for a, b in offsets]
        if self._tokenizer.bos_id is not None and ids[:2] == [self._tokenizer.bos_id] * 2:
            raise refused("it starts with the BOS token twice; remove one from the template")
        return Rendered(tuple(ids), tuple(flags), tuple(origins), text)

    def _learned_spans(self, text: str, shape: str, blocks: list[Span], turns: list[Values], tools: Sequence[Values],
                       thinking: bool | None) -> list[Span]:
        """One range of characters per assistant turn: by generation tags, by the header of its turns, or by rendering up to each."""
        places, prompt = _assistants(turns), self._prompts[thinking]
        if len(blocks) == len(places):
            starts = [a for a, _ in blocks]
        elif self._header:
            headers = [m.start() for m in re.finditer(re.escape(self._header), shape)]
            starts = [at + len(prompt if shape.startswith(prompt, at) else self._header) for at in headers]
        else:
            before = [self._run(turns[:i], tools, True, thinking)[0] for i in places]
            starts = [len(start) for start in before if text.startswith(start)]
        ends = [m.end() if (m := self._end.search(shape, start)) else -1 for start in starts]
        if len(starts) != len(places) or -1 in ends or any(end > start for end, start in zip(ends, starts[1:], strict=False)):
            raise refused(f"it has {len(places)} assistant turns but their beginnings and end-of-turn tokens cannot be told exactly")
        return list(zip(starts, ends, strict=True))

    def _turn(self, message: Message) -> Values:
        """A message as templates expect it: optional fields only when set, arguments as an object."""
        role = "system" if message.role == "developer" and "developer" not in self._names else message.role
        functions = [(c.id, {"name": c.name, "arguments": _object(c.arguments)}) for c in message.tool_calls]
        extra = {"reasoning_content": message.reasoning, "thinking": message.reasoning, "name": message.name,
                 "tool_call_id": message.tool_call_id,
                 "tool_calls": [{"id": call, "type": "function", "function": function} for call, function in functions]}
        return {"role": role, "content": message.content} | {k: v for k, v in extra.items() if v}

    def _run(self, turns: Sequence[Values], tools: Sequence[Values], asks: bool, thinking: bool | None) -> tuple[str, list[Span]]:
        """The rendered text, its brackets taken out, and where its generation blocks are."""
        choice = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        values = {"messages": turns, "tools": list(tools) or None, "documents": None, "add_generation_prompt": asks}
        pieces = re.split(f"[{sandbox.OPEN}{sandbox.CLOSE}]", self._ask({"values": values | self._tokenizer.names | choice})["text"])
        if len(pieces) % 2 == 0:
            raise refused("its generation blocks are nested or contain a reserved character")
        edges = [sum(map(len, pieces[:n])) for n in range(1, len(pieces))]
        return "".join(pieces), list(zip(edges[::2], edges[1::2], strict=True))

    def _ask(self, question: Values) -> dict[str, Any]:
        try:
            answer = self._program.ask(question)
        except TimeoutError as error:
            raise refused(f"{error}, or more than {sandbox.MEMORY_BYTES >> 20} MB") from error
        if "error" in answer:
            raise refused(answer["error"])
        return answer

    def _generation_prompt(self, thinking: bool | None) -> str:
        bare, asking = (self._run([self._turn(_QUESTION)], [], asks, thinking)[0] for asks in (False, True))
        return asking[len(bare):] if asking.startswith(bare) else ""

    def _turn_header(self, probe: str) -> str:
        """The longest beginning of every generation prompt that both assistant turns of the probe have; empty without a control token."""
        columns = zip(*self._prompts.values(), strict=False)
        common = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
        control = self._control.search(common)
        lengths = range(len(common), control.end() - 1, -1) if control else ()
        return next((common[:length] for length in lengths if probe.count(common[:length]) == 2), "")

    def _refuse_unsupported(self, messages: Sequence[Message], tools: Sequence[Values], thinking: bool | None) -> None:
        wants = {("tools",): tools, ("tool_calls",): any(m.tool_calls for m in messages), ("enable_thinking", "thinking"): thinking is True,
                 ("reasoning_content", "thinking", "reasoning"): any(m.reasoning for m in messages)}
        for names, is_wanted in wants.items():
            if is_wanted and self._names.isdisjoint(names):
                raise refused(f"the template ({self.family}) has no {names[0]}, so it would be lost silently")
        if not messages:
            raise refused("there are no messages")


@dataclass(frozen=True)
class _Map:
    """Per character of a text: its message (-1: template or tools) and whether it was put in. `shape` is the text with those blotted out,
    or the text itself when there is no exact map."""

    origins: "array[int]"
    foreign: bytearray
    shape: str
    is_exact: bool


def _marker(constants: Sequence[str], control: re.Pattern[str]) -> Callable[[Any, str], Any]:
    """A function that replaces the characters of all strings in a value by a mark, for a template with these constants."""
    tags = [c for c in constants if len(c) > 1 and re.search(r"[^\w\s]", c) and not control.search(c)]
    kept = re.compile(rf'({alternatives(tags).pattern}|[\s"\\\x00-\x1f]+)')

    def mark(value: Any, char: str) -> Any:
        if isinstance(value, str):
            return "".join(piece if n % 2 else char * len(piece) for n, piece in enumerate(kept.split(value)))
        if isinstance(value, Mapping):
            return {k: v if k in ("role", "type") else mark(v, char) for k, v in value.items()}
        return [mark(v, char) for v in value] if isinstance(value, list | tuple) else value

    return mark


def _read_map(text: str, shadow: str, marks: Mapping[str, int]) -> _Map:
    """Read the origins of `text` off its marked copy; white space and tags between two marks of one message are that message's."""
    chars = "".join(marks)
    out = _Map(array("i", [-1]) * len(text), bytearray(len(text)), text, is_exact=False)
    runs = [m.span() for m in re.finditer(f"[{chars}]+", shadow)]
    gaps = zip([0, *(b for _, b in runs)], [*(a for a, _ in runs), len(text)], strict=True)
    if len(text) != len(shadow) or any(text[a:b] != shadow[a:b] for a, b in gaps):
        return out
    for start, end in runs:
        out.foreign[start:end] = b"\1" * (end - start)
    for run in re.finditer(rf"([{chars}])(?:[^{chars}]*\1)*", shadow):
        out.origins[run.start():run.end()] = array("i", [marks[run[1]]]) * len(run[0])
    return replace(out, shape=shadow, is_exact=True)


def refused(why: object) -> UserError:
    """A template said no, or broke a limit."""
    return UserError(f"the chat template refuses this conversation: {str(why)[:300]}",
                     remedy="change the messages as it says, or choose another template (chatml, qwen3, gemma3)")


def template_of(family: str) -> str:
    """The text of one of our own templates."""
    return (resources.files("garage.tokens") / "templates" / f"{family}.jinja").read_text(encoding="utf-8")


def _template_text(directory: Path) -> str | None:
    """Newest place first: a file of its own, a field of tokenizer_config.json (a text, or a list of named ones), chat_template.json."""
    if (own := read_file(directory / "chat_template.jinja")) is not None:
        return own.decode("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_object(directory / name).get("chat_template")
        if isinstance(found, list):
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
        if isinstance(found, str):
            return found
    return None


def _assistants(turns: Sequence[Values]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def _object(text: str) -> Any:
    """The arguments of a tool call as the object templates expect; text that is not a JSON object stays text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
