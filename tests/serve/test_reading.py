"""Readers of answers: cut anywhere they say the same, and the grammars that hold calls are those the readers read."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from garage.core.types import Message, Structure, ToolCall
from garage.serve.asks import FunctionSchema, Tool
from garage.serve.errors import ApiError
from garage.serve.reading import GemmaReader, HermesReader, PlainReader, Reader, ReasoningReader, Said, open_tag, said
from garage.serve.tools import Manner, held, told

NAMES = {"add", "find"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "add", "arguments": {"a": 1}}', '{"name": "no", "arguments": {}}',
     CALL, '{"name": "find", "parameters": {}}', "\n", "\n\n", " ", "word", "<", "<to",
     "</thi", "{", "[", "]", ", ", "```json\n", "```", "ä€😀"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def readers() -> list[Reader]:
    plain: list[Reader] = [PlainReader(), HermesReader(NAMES), GemmaReader(NAMES)]
    again: list[Reader] = [PlainReader(), HermesReader(NAMES), GemmaReader(NAMES)]
    return plain + [ReasoningReader(rest, is_open=n == 0) for n, rest in enumerate(again)]


def read(reader: Reader, pieces: list[str]) -> Said:
    seen = said([p for piece in pieces for p in reader.push(piece)] + reader.end())
    return Said(seen.content, seen.reasoning, tuple(ToolCall("", call.name, call.arguments) for call in seen.calls))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.data())
def test_cut_anywhere_an_answer_is_read_the_same(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for whole, cut, each in zip(readers(), readers(), readers(), strict=True):
        assert read(whole, [text]) == read(cut, pieces) == read(each, list(text))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_nothing_but_notation_is_lost(text: str) -> None:
    """Without its calls, tags and white space, what is read is what was written."""
    bare = re.compile(r"\s+")
    for reader in readers():
        seen = read(reader, [text])
        rest = seen.reasoning + seen.content
        assert len(bare.sub("", rest)) <= len(bare.sub("", text))
        if not seen.calls and "think>" not in text:
            assert bare.sub("", rest) == bare.sub("", text)
        if isinstance(reader, PlainReader | GemmaReader) and not seen.calls:
            assert seen.content == text


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("plain", "plain", "", 0), (CALL, "", "", 1), (f"so:\n\n{CALL}\n{CALL}\n", "so:", "", 2), (f"{CALL} then", "then", "", 1),
        ("<think>\nhm\n</think>\n\nyes", "yes", "hm", 0), (f"<think>hm</think>{CALL}", "", "hm", 1), ("<think>\nnever", "", "never", 0),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", 0),
        ("<tool_call>{</tool_call> a", "<tool_call>{</tool_call> a", "", 0), ("a <tool_call>\n", "a <tool_call>\n", "", 0),
        (CALL.removesuffix("</tool_call>"), "", "", 1), ("tail  ", "tail  ", "", 0), ("a <think>b", "a <think>b", "", 0),
        ('<tool_call>[1]</tool_call>', '<tool_call>[1]</tool_call>', "", 0), ("[" * 100_000, "[" * 100_000, "", 0),
    ],
)  # fmt: skip
def test_what_qwen_writes(text: str, content: str, reasoning: str, calls: int) -> None:
    seen = read(ReasoningReader(HermesReader(NAMES), is_open=False), [text])
    assert (seen.content, seen.reasoning, len(seen.calls)) == (content, reasoning, calls)
    assert not calls or seen.calls[0] == ToolCall("", "add", '{"a": 1}')


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "add", "parameters": {"a": 1}}', 1), ('```json\n{"name": "add", "parameters": {"a": 1}}\n```', 1),
        ('[{"name": "add", "parameters": {"a": 1}}, {"name": "find", "parameters": {}}]', 2), ('{"name": "no", "parameters": {}}', 0),
        ("{}", 0), ("[]", 0), ("I think {1}", 0), ("```python\n1\n```", 0), ("", 0),
    ],
)  # fmt: skip
def test_what_gemma_writes(text: str, calls: int) -> None:
    seen = read(GemmaReader(NAMES), [text])
    assert len(seen.calls) == calls and (seen.content == "" if calls else seen.content == text)


def test_a_lost_tail_is_noticed() -> None:
    """Broken twin: a reader that does not hold back the beginning of a tag shows it as text."""
    twin = HermesReader(NAMES)
    twin._release = lambda count: HermesReader._release(twin, len(twin._held))  # type: ignore[method-assign]
    assert read(twin, list(CALL)) != read(HermesReader(NAMES), list(CALL))
    assert open_tag("a <tool", "<tool_call>") == 5 and open_tag("a <tool_call>", "<tool_call>") == 0


TOOLS = tuple(
    Tool(type="function", function=FunctionSchema(name=name, parameters={"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"],
         "additionalProperties": False, "$defs": {"n": {"type": "integer"}}}, strict=is_strict))
    for name, is_strict in (("add", False), ("find", True))
)  # fmt: skip
ADD, FIND = ('{"name": "add", "%s": {"a": 1}}', '{"name": "find", "%s": {"a": 1}}')
HERMES = f"<tool_call>\n{ADD % 'arguments'}\n</tool_call>"
THOUGHT = "<think>\nhm { </think>\n\n"
FORM = Structure("json", '{"type": "integer"}')


def accepts(structure: Structure, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), structure.text)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("manner", "form", "thinking", "good", "bad"),
    [
        (Manner("hermes", TOOLS, is_forced=True), None, None, [HERMES, f"{HERMES}\n{HERMES}"], ["", "hi", f"hi {HERMES}"]),
        (Manner("hermes", TOOLS[:1], is_forced=True), None, None, [HERMES], [HERMES.replace("add", "find"), HERMES.replace("1", '"1"')]),
        (Manner("hermes", TOOLS, is_forced=True, is_parallel=False), None, None, [HERMES], [f"{HERMES}\n{HERMES}"]),
        (Manner("hermes", TOOLS), None, None, ["", "hi", f"hi {HERMES}\n{HERMES} so"], ["<tool_call>", HERMES.replace("1", "{}")]),
        (Manner("hermes", TOOLS, is_parallel=False), None, None, ["hi", f"hi {HERMES}"], [f"{HERMES}\n{HERMES}"]),
        (Manner("hermes", TOOLS), FORM, None, ["12", HERMES], ["hi", f"12{HERMES}"]),
        (Manner("hermes", (), splits_reasoning=True), FORM, True, ["12", f"{THOUGHT}12"], ["hi", f"{THOUGHT}hi"]),
        (Manner("hermes", (), splits_reasoning=True, is_open=True), FORM, None, [THOUGHT.removeprefix("<think>") + "12"], ["12"]),
        (Manner("hermes", TOOLS, is_forced=True, splits_reasoning=True), None, True, [HERMES, THOUGHT + HERMES], [THOUGHT]),
        (Manner("hermes", (), splits_reasoning=True), Structure("regex", "a/b|c"), True, ["a/b", f"{THOUGHT}c"], ["d"]),
        (Manner("hermes", (), splits_reasoning=True), Structure("choice", '["yes", "\\"no"]'), True, ["yes", f'{THOUGHT}"no'], ["no"]),
        (Manner("gemma3", TOOLS, is_forced=True), None, None, [ADD % "parameters", f"[{ADD % 'parameters'}, {FIND % 'parameters'}]"],
         ["hi", ADD % "arguments"]),
        (Manner("gemma3", TOOLS), None, None, ["", "hi {", ADD % "parameters"], ["{", '{"name": "other"}']),
    ],
)  # fmt: skip
def test_grammars_hold_to_what_is_asked(manner: Manner, form: Structure | None, thinking: bool | None, good: list[str],
                                        bad: list[str]) -> None:  # fmt: skip
    structure = held(manner, form, thinking)
    assert structure is not None and structure.kind == "grammar"
    assert [text for text in good if not accepts(structure, text)] == []
    assert [text for text in bad if accepts(structure, text)] == []
    for text in good if manner.tools else ():
        seen = read(manner.reader(), [text])
        assert (len(seen.calls) > 0) == ('"name"' in text)


def test_what_needs_no_grammar_has_none() -> None:
    assert held(Manner("hermes", TOOLS[:1]), None, None) is None
    assert held(Manner("hermes", (), splits_reasoning=True), FORM, False) == FORM
    with pytest.raises(ApiError, match="grammar cannot be joined"):
        held(Manner("hermes", TOOLS), Structure("grammar", "start: /a/"), None)


def test_gemma_is_told_of_functions_in_words() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("1", "add", '{"a": 1}'),))
    turns = (Message("system", "Be brief."), Message("user", "1?"), call, Message("tool", "2", tool_call_id="1"), Message("user", "so?"))
    system, asked, answer, result = told(turns, TOOLS, "gemma3")
    assert system.content.startswith("Be brief.\n\n") and json.loads(system.content.splitlines()[-1])[0]["name"] == "add"
    assert (asked, answer.content) == (turns[1], '{"name": "add", "parameters": {"a": 1}}')
    assert result == Message("user", "```tool_output\n2\n```\n\nso?")
    assert told(turns, TOOLS, "hermes") == turns and told(turns[:2], (), "gemma3") == turns[:2]
