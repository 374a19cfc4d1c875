"""Tokenizers trained on the spot, a seeded generator of conversations, and the reference renderer (transformers)."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from garage.core.types import Message, ToolCall
from garage.tokens.bpe import train_bpe
from garage.tokens.tokenizer import Tokenizer

os.environ["TOKENIZERS_PARALLELISM"] = "false"
WORDS = ["The", "cat", "sat", "12", "3.5", "naïve", "東京", "🙂👩\u200d🚀", "\n", "  ", "\t", "<b>", "'s", "{\"a\": 1}", "\\n",
         "user", "model", "e\u0301", "think", "ok.", "assistant\n"]
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "Wetter für \"einen\" Ort", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}, {"type": "function", "function": {"name": "clock", "parameters": {}}})
SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@dataclass(frozen=True)
class Case:
    messages: tuple[Message, ...]
    tools: tuple
    thinking: bool | None
    add_generation_prompt: bool


class Conversations:
    """Random conversations; the same seed gives the same ones."""

    def __init__(self, seed: int, *, tools: bool, reasoning: bool) -> None:
        self._rng, self._tools, self._reasoning = random.Random(seed), tools, reasoning

    def text(self) -> str:
        rng = self._rng
        if rng.random() < 0.05:
            return ""
        inner = "".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randint(1, 9)))
        return rng.choice(["", "", "\n", " ", "\n\n"]) + inner + rng.choice(["", "", "\n", "  ", "\n\n"])

    def _answer(self) -> Message:
        rng = self._rng
        if self._reasoning and rng.random() < 0.4:
            thought = self.text()
            if rng.random() < 0.5:
                return Message("assistant", self.text(), reasoning=thought)
            return Message("assistant", f"<think>\n{thought}\n</think>\n\n{self.text()}")
        return Message("assistant", self.text())

    def _tool_turns(self) -> list[Message]:
        rng, turns = self._rng, []
        for _ in range(rng.randint(1, 2)):
            arguments = json.dumps({"city": self.text(), "n": rng.randint(0, 9)}, ensure_ascii=False)
            calls = tuple(ToolCall(f"c{i}", rng.choice(["weather", "clock"]), arguments) for i in range(rng.randint(1, 2)))
            thought = self.text() if self._reasoning and rng.random() < 0.5 else ""
            turns.append(Message("assistant", rng.choice(["", self.text()]), reasoning=thought, tool_calls=calls))
            turns += [Message("tool", self.text() or "none", tool_call_id=c.id, name=c.name) for c in calls]
        return turns

    def case(self) -> Case:
        rng = self._rng
        messages = [Message("system", self.text())] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            messages.append(Message("user", self.text()))
            if self._tools and rng.random() < 0.4:
                messages += self._tool_turns()
            messages.append(self._answer())
        asks = rng.random() < 0.4
        tools = TOOLS[:rng.randint(1, 2)] if self._tools and rng.random() < 0.5 else ()
        thinking = rng.choice([None, True, False]) if self._reasoning else None
        return Case(tuple(messages[:-1] if asks else messages), tools, thinking, asks)


def plain_turn(m: Message) -> dict:
    """A message as a transformers user writes it."""
    turn = {"role": m.role, "content": m.content}
    if m.reasoning:
        turn["reasoning_content"] = m.reasoning
    if m.tool_calls:
        functions = [(c.id, {"name": c.name, "arguments": json.loads(c.arguments)}) for c in m.tool_calls]
        turn["tool_calls"] = [{"type": "function", "id": call, "function": function} for call, function in functions]
    if m.role == "tool":
        turn |= {"name": m.name, "tool_call_id": m.tool_call_id}
    return turn


class Reference:
    """transformers' apply_chat_template on the published template texts that TRL carries."""

    def __init__(self, directory: Path) -> None:
        transformers = pytest.importorskip("transformers")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def ids(self, case: Case, template: str) -> list[int]:
        return self._apply(case, template, return_dict=False)

    def mask(self, case: Case, template: str) -> list[bool]:
        return [bool(v) for v in self._apply(case, template, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]]

    def _apply(self, case: Case, template: str, **options):
        options |= {} if case.thinking is None else {"enable_thinking": case.thinking}
        return self.tokenizer.apply_chat_template([plain_turn(m) for m in case.messages], tools=list(case.tools) or None,
                                                  chat_template=template, add_generation_prompt=case.add_generation_prompt, **options)


@pytest.fixture(scope="session")
def conversations():
    return Conversations


@pytest.fixture(scope="session")
def published():
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return lambda name: (folder / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """One trained tokenizer directory per family."""
    texts = [" ".join(WORDS) + "\n\nassistant user system model Northwards. Which way?\n" * 3] * 20
    out = {}
    for family, tags in {"chatml": (), "qwen3": ("<think>", "</think>", "<tool_call>"), "gemma3": ()}.items():
        out[family] = tmp_path_factory.mktemp(family)
        train_bpe(texts, vocab_size=420, tags=tags, family=family).save(out[family])
    return out


@pytest.fixture(scope="session")
def tokenizers(directories):
    return {family: Tokenizer.load(directory) for family, directory in directories.items()}


@pytest.fixture(scope="session")
def reference_of():
    return Reference


@pytest.fixture(scope="session")
def reference(directories):
    return {family: Reference(directory) for family, directory in directories.items()}


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """The SmolLM tokenizer with the configuration that its chat models use."""
    source = SHARED / "data" / "tokenizers" / "smollm" / "tokenizer.json"
    if not source.exists():
        pytest.skip("the SmolLM tokenizer is not beside the repository")
    directory = tmp_path_factory.mktemp("smollm")
    (directory / "tokenizer.json").write_bytes(source.read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
