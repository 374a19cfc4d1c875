"""The one renderer: a conversation becomes token ids, which of them are learned, and which message each came from.

What: training, evaluation, rollouts and serving all call `Chat.render`; its `hash` goes into every checkpoint. Our own templates of
ChatML, Qwen 3 and Gemma 3 and a model's own Jinja text go one way: render once, encode once, label by position.
Why so: a template that differs between training and serving is the commonest way to lose a fine-tune (the same model scored 26 % and 57 %).
Learned is what the model writes: the assistant's turn after the generation prompt, up to and with its end-of-turn token, in every turn.
Limits: a control token inside a message is encoded as plain text. Where the turns of a foreign template cannot be told exactly the row
is refused. A token across the border of prompt and answer is not learned. With `add_generation_prompt` nothing is learned: it is a prompt.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from garage.core.errors import UserError
from garage.core.types import Message
from garage.tokens.jail import Jailed, Renderer, Trusted, refused
from garage.tokens.marks import Guard, Marks, expand, kept, shadow_marks
from garage.tokens.sandbox import CLOSE, OPEN
from garage.tokens.tokenizer import Tokenizer, read_file, read_json

CONTROLS = {"chatml": ("<|im_start|>", "<|im_end|>"), "qwen3": ("<|im_start|>", "<|im_end|>"), "gemma3": ("<bos>", "<start_of_turn>", "<end_of_turn>")}
_QUESTION, _ANSWER = Message("user", "Which way?"), Message("assistant", "Northwards.")


@dataclass(frozen=True)
class Rendered:
    """A conversation in tokens. A learned token's origin is its message; elsewhere -1 means that the template wrote it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    origins: tuple[int, ...]
    text: str


class Chat:
    """A chat template bound to a tokenizer. `stop_ids` end a turn; `template` is what to write as chat_template.jinja."""

    def __init__(self, template: str, tokenizer: Tokenizer, *, renderer: Renderer, family: str) -> None:
        self.template, self.family, self._tokenizer, self._renderer = template, family, tokenizer, renderer
        self._control = re.compile("|".join(re.escape(t) for t in sorted(tokenizer.specials, key=len, reverse=True)) or r"(?!)")
        self._names = frozenset(renderer.facts["names"])
        self._prompts = {thinking: self._generation_prompt(thinking) for thinking in (None, True, False)}
        self._probe = self._text([_QUESTION, _ANSWER] * 2)
        self._header = self._turn_header()
        ends = self._turn_ends()
        eos = [tokenizer.id_to_token(i) for i in tokenizer.eos_ids]
        self._end = re.compile("|".join(map(re.escape, sorted({*ends, *eos}, key=len, reverse=True))) or r"(?!)")
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*(tokenizer.specials[e] for e in ends[-1:]), *tokenizer.eos_ids]))
        facts = [template, sorted(tokenizer.specials.items()), tokenizer.bos_id, [self._prompts[t] for t in (None, True, False)]]
        self.hash = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "Chat":
        """The chat template a model directory carries.

        Raises:
            UserError: there is none, it is damaged, or it breaks the limits of the sandbox.
        """
        text = _template_text(directory)
        if text is None:
            raise UserError(f"{directory} has no chat template", remedy="choose one: chatml, qwen3 or gemma3; a base model learns it in training")
        family = next((name for name in CONTROLS if template_of(name) == text), "own")
        return cls(text, tokenizer, renderer=Jailed(text) if family == "own" else Trusted(text), family=family)

    @classmethod
    def named(cls, family: str, tokenizer: Tokenizer) -> "Chat":
        """One of our own templates: chatml, qwen3 or gemma3."""
        if family not in CONTROLS:
            raise UserError(f"there is no chat template {family!r}", remedy=f"choose one of {', '.join(CONTROLS)}")
        missing = [t for t in CONTROLS[family] if t not in tokenizer.specials]
        if missing:
            raise UserError(f"the tokenizer of {tokenizer.where} lacks {', '.join(missing)}, which {family} needs",
                            remedy="choose the template the model was made for, or train a tokenizer with these control tokens")
        text = template_of(family)
        return cls(text, tokenizer, renderer=Trusted(text), family=family)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] = (), add_generation_prompt: bool = False,
               thinking: bool | None = None) -> Rendered:
        """Tokens of a conversation.

        Raises:
            UserError: the template refuses or drops a message, cannot express something in it, or its turns cannot be told apart.
        """
        self._refuse_unsupported(messages, tools, thinking)
        guard = Guard(self._control, [*messages, *tools])
        offered, turns = guard.hide(list(tools)), [guard.hide(self._turn(m)) for m in messages]
        text, blocks = _unbracket(self._run(turns, offered, add_generation_prompt, thinking))
        spans = [] if add_generation_prompt else self._learned_spans(text, blocks, messages, tools, thinking)
        shadow = [guard.mark(turn, i, self._tags) for i, turn in enumerate(turns)]
        marks = shadow_marks(text, _unbracket(self._run(shadow, offered, add_generation_prompt, thinking))[0], guard)
        self._refuse_dropped(messages, marks, guard)
        origins = marks.origins
        learned = bytearray(len(text))
        for (start, end), index in zip(spans, _assistants(messages), strict=False):
            learned[start:end] = b"\1" * (end - start)
            origins[start:end] = array("i", [index]) * (end - start)
        return self._encode(*expand(text, guard, learned, origins, marks.foreign))

    def _encode(self, text: str, learned: bytearray, origins: "array[int]", foreign: bytearray) -> Rendered:
        pieces, start = [], 0
        controls = list(self._control.finditer(text))
        forged = any(any(foreign[m.start():m.end()]) for m in controls)
        for match in controls if forged else ():
            if not any(foreign[match.start():match.end()]):
                pieces += [(text[start:match.start()], False), (match[0], True)]
                start = match.end()
        pieces.append((text[start:], not forged))
        ids, flags, sources, at = [], [], [], 0
        for piece, special in pieces:
            new, offsets = self._tokenizer.encode_spans(piece, allow_special=special)
            ids += new
            flags += [0 not in learned[at + a:at + b] and a < b for a, b in offsets]
            sources += [max(origins[at + a:at + b], default=-1) for a, b in offsets]
            at += len(piece)
        if self._tokenizer.bos_id is not None and ids[:2] == [self._tokenizer.bos_id] * 2:
            raise refused("it starts with the BOS token twice; remove one from the template")
        return Rendered(tuple(ids), tuple(flags), tuple(sources), text)

    def _learned_spans(self, text: str, blocks: list[tuple[int, int]], messages: Sequence[Message], tools: Sequence[Mapping[str, object]],
                       thinking: bool | None) -> list[tuple[int, int]]:
        """One range of characters per assistant message, in order; empty when there is none."""
        count = len(_assistants(messages))
        if not count:
            return []
        if blocks:
            starts = [a for a, _ in blocks]
        elif self._header:
            starts = [self._after_prompt(text, m.start(), thinking) for m in re.finditer(re.escape(self._header), text)]
        else:
            starts = [self._prefix_length(text, messages[:i], tools, thinking) for i in _assistants(messages)]
        ends = [m.end() if (m := self._end.search(text, start)) else -1 for start in starts]
        in_order = all(end <= start for end, start in zip(ends, starts[1:], strict=False))
        if len(starts) != count or -1 in ends or not in_order:
            raise refused(f"it has {count} assistant turns but their beginnings and end-of-turn tokens cannot be told exactly")
        return list(zip(starts, ends, strict=True))

    def _after_prompt(self, text: str, at: int, thinking: bool | None) -> int:
        """Where the answer begins: after the whole generation prompt if the turn begins with it, else after the header of every turn."""
        prompt = self._prompts[thinking]
        return at + len(prompt if text.startswith(prompt, at) else self._header)

    def _prefix_length(self, text: str, before: Sequence[Message], tools: Sequence[Mapping[str, object]], thinking: bool | None) -> int:
        guard = Guard(self._control, [*before, *tools])
        prompt = _unbracket(self._run([guard.hide(self._turn(m)) for m in before], guard.hide(list(tools)), True, thinking))[0]
        return len(prompt) if text.startswith(prompt) else len(text)

    def _turn(self, message: Message) -> dict[str, Any]:
        """A message as templates expect it: optional fields only when set, arguments as an object."""
        role = "system" if message.role == "developer" and "developer" not in self._names else message.role
        turn: dict[str, Any] = {"role": role, "content": message.content}
        if message.reasoning:
            turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.tool_calls:
            turn["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _object(c.arguments)}} for c in message.tool_calls]
        return turn | {k: v for k, v in (("tool_call_id", message.tool_call_id), ("name", message.name)) if v}

    def _run(self, turns: list[dict[str, Any]], tools: list[Any], add_generation_prompt: bool, thinking: bool | None) -> str:
        choice = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        return self._renderer.render({"messages": turns, "tools": tools or None, "documents": None, "add_generation_prompt": add_generation_prompt,
                                      **self._tokenizer.names, **choice})

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool = False, thinking: bool | None = None) -> str:
        return _unbracket(self._run([self._turn(m) for m in messages], [], add_generation_prompt, thinking))[0]

    def _generation_prompt(self, thinking: bool | None) -> str:
        bare, asking = self._text([_QUESTION], False, thinking), self._text([_QUESTION], True, thinking)
        return asking[len(bare):] if asking.startswith(bare) else ""

    def _turn_header(self) -> str:
        """The longest beginning of every generation prompt that each assistant turn has; empty if none holds a control token."""
        common = os.path.commonprefix(list(self._prompts.values()))
        control = self._control.search(common)
        ends = range(len(common), control.end() - 1, -1) if control else ()
        return next((common[:end] for end in ends if self._probe.count(common[:end]) == 2), "")

    def _turn_ends(self) -> list[str]:
        """The control token after each assistant text of the probe."""
        places = [m.end() for m in re.finditer(re.escape(_ANSWER.content), self._probe)]
        return [m[0] for at in places if (m := self._control.search(self._probe, at))]

    @cached_property
    def _tags(self) -> re.Pattern[str]:
        return kept(self._renderer.facts["constants"])

    def _refuse_unsupported(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]], thinking: bool | None) -> None:
        if not messages:
            raise refused("there are no messages")
        wants = {("tools",): bool(tools), ("tool_calls",): any(m.tool_calls for m in messages), ("enable_thinking", "thinking"): thinking is True,
                 ("reasoning_content", "thinking", "reasoning"): any(m.reasoning for m in messages)}
        for names, is_wanted in wants.items():
            if is_wanted and self._names.isdisjoint(names):
                raise refused(f"the template ({self.family}) has no {names[0]}, so it would be lost silently")

    def _refuse_dropped(self, messages: Sequence[Message], marks: Marks, guard: Guard) -> None:
        for index, message in enumerate(messages):
            can_show = any(c in guard.marks for c in guard.mark(guard.hide(message.content), index, self._tags))
            if marks.is_exact and can_show and index not in marks.seen:
                raise refused(f"message {index} ({message.role}) does not appear in the output")


def template_of(family: str) -> str:
    """The text of one of our own templates."""
    return (resources.files("garage.tokens") / "templates" / f"{family}.jinja").read_text(encoding="utf-8")


def _template_text(directory: Path) -> str | None:
    """Newest place first: a file of its own, a field of tokenizer_config.json (a text, or a list of named ones), chat_template.json."""
    own = read_file(directory / "chat_template.jinja")
    if own is not None:
        return own.decode("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(directory / name).get("chat_template")
        if isinstance(found, list):
            found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
        if isinstance(found, str):
            return found
    return None


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m.role == "assistant"]


def _object(text: str) -> Any:
    """The arguments of a tool call as the object templates expect; text that is not a JSON object stays text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _unbracket(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the brackets of generation blocks out; where the blocks are."""
    pieces, blocks, at = re.split(f"([{OPEN}{CLOSE}])", text), [], 0
    starts: list[int] = []
    for piece in pieces:
        if piece == OPEN:
            starts.append(at)
        elif piece == CLOSE:
            blocks.append((starts.pop(), at))
        else:
            at += len(piece)
    return "".join(p for p in pieces if p not in (OPEN, CLOSE)), sorted(blocks)
