"""Calls, reasoning and the Responses API, as the openai SDK sees them; the model's words are scripted, the rest is real."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "What is 1 + 2?"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
Say = Callable[..., None]


@pytest.fixture(scope="module")
def qwen(serving: Any) -> Iterator[SimpleNamespace]:
    with serving(template="qwen3") as started:
        yield started


@pytest.fixture(scope="module")
def gemma(serving: Any) -> Iterator[SimpleNamespace]:
    with serving(template="gemma3") as started:
        yield started


def ask(server: SimpleNamespace, **fields: Any) -> Any:
    return server.client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 200, "temperature": 0, **fields})


def fold(chunks: list[Any]) -> tuple[str, str, dict[int, dict[str, str]], str]:
    """Content, reasoning, calls by index, and the finish reason of a stream."""
    content = reasoning = reason = ""
    calls: dict[int, dict[str, str]] = {}
    for choice in [c for chunk in chunks for c in chunk.choices]:
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            place = calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
            place["id"] += call.id or ""
            place["name"] += call.function.name or ""
            place["arguments"] += call.function.arguments or ""
    return content, reasoning, calls, reason


def test_calls_whole_and_streamed(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted(f"So:\n\n{CALL}\n{CALL}")
    choice = ask(qwen, tools=[TOOL]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "So:"
    assert [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls] == [("add", {"a": 1})] * 2
    content, _, calls, reason = fold(list(ask(qwen, tools=[TOOL], stream=True)))
    assert content == "So:" and reason == "tool_calls" and sorted(calls) == [0, 1]
    assert {(c["name"], c["arguments"]) for c in calls.values()} == {("add", '{"a": 1}')} and calls[0]["id"] != calls[1]["id"]
    assert ask(qwen).choices[0].message.content == f"So:\n\n{CALL}\n{CALL}", "without tools it is text"
    assert ask(qwen, tools=[TOOL], tool_choice="none").choices[0].message.tool_calls is None


def test_a_call_round_trips(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted(CALL)
    message = ask(qwen, tools=[TOOL]).choices[0].message
    scripted("It is 3.")
    turns = [*ASK, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}]
    assert ask(qwen, messages=turns, tools=[TOOL]).choices[0].message.content == "It is 3."
    ids = ask(qwen, messages=turns, tools=[TOOL], max_tokens=1, extra_body={"return_token_ids": True}).prompt_token_ids
    text = qwen.engine.tokenizer.decode(ids, skip_special=False)
    assert CALL in text and "<tool_response>\n3\n</tool_response>" in text and '"name": "add", "description"' in text


def test_what_is_no_call_stays_text(qwen: SimpleNamespace, scripted: Say) -> None:
    for text in ("<tool_call>{not json</tool_call>", CALL.replace("add", "rob"), CALL[:30]):
        scripted(text)
        choice = ask(qwen, tools=[TOOL]).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        assert fold(list(ask(qwen, tools=[TOOL], stream=True)))[0] == text


def test_gemma_calls(gemma: SimpleNamespace, scripted: Say) -> None:
    scripted('```json\n[{"name": "add", "parameters": {"a": 1}}]\n```', "<end_of_turn>")
    answer = ask(gemma, tools=[TOOL], extra_body={"return_token_ids": True})
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}' and answer.choices[0].message.content is None
    assert '"name": "add"' in gemma.engine.tokenizer.decode(answer.prompt_token_ids)
    message = answer.choices[0].message.model_dump(exclude_none=True)
    turns = [*ASK, message, {"role": "tool", "tool_call_id": "1", "content": "3"}]
    scripted("Three.", "<end_of_turn>")
    assert ask(gemma, messages=turns, tools=[TOOL]).choices[0].message.content == "Three."
    assert fold(list(ask(gemma, tools=[TOOL], stream=True)))[0] == "Three."


def test_reasoning_is_told_apart(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted("<think>\nOne and two.\n</think>\n\nThree.")
    answer = ask(qwen)
    assert (answer.choices[0].message.reasoning, answer.choices[0].message.content) == ("One and two.", "Three.")
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>\nOne and two.\n</think>")
    chunks = list(ask(qwen, stream=True, stream_options={"include_usage": True}))
    assert fold(chunks)[:2] == ("Three.", "One and two.")
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == len("<think>\nOne and two.\n</think>")
    spent = ask(qwen, max_tokens=10).choices[0]
    assert (spent.message.content, spent.message.reasoning, spent.finish_reason) == ("", "On", "length")


def test_reasoning_is_turned_off_and_read_back(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted("Three.")

    def prompt(**fields: Any) -> str:
        extra = {"return_token_ids": True, **fields.pop("extra", {})}
        return str(qwen.engine.tokenizer.decode(ask(qwen, extra_body=extra, **fields).prompt_token_ids, skip_special=False))

    assert "<think>" not in prompt()
    for off in ({"extra": {"chat_template_kwargs": {"enable_thinking": False}}}, {"reasoning_effort": "none"}):
        assert prompt(**off).endswith("<think>\n\n</think>\n\n")
    assert "<think>" not in prompt(reasoning_effort="high")
    for name in ("reasoning", "reasoning_content"):
        calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
        turns = [*ASK, {"role": "assistant", "content": "", name: "hm", "tool_calls": calls}, {"role": "tool", "content": "3"}]
        assert "<think>\nhm\n</think>" in prompt(messages=turns)


def test_an_answer_is_continued(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted(" three.")
    extra = {"continue_final_message": True, "return_token_ids": True}
    answer = ask(qwen, messages=[*ASK, {"role": "assistant", "content": "It is"}], extra_body=extra)
    text = qwen.engine.tokenizer.decode(answer.prompt_token_ids, skip_special=False)
    assert text.endswith("<|im_start|>assistant\nIt is") and answer.choices[0].message.content == " three."
    bare = ask(qwen, extra_body={"add_generation_prompt": False, "return_token_ids": True})
    assert qwen.engine.tokenizer.decode(bare.prompt_token_ids, skip_special=False).endswith("<|im_end|>\n")


def test_a_template_of_a_request_needs_trust(qwen: SimpleNamespace, serving: Any) -> None:
    extra = {"chat_template": "{{ 'ask: ' + messages[0].content }}", "return_token_ids": True}
    with pytest.raises(openai.BadRequestError, match="does not run templates"):
        ask(qwen, extra_body=extra)
    with serving(trust_request_chat_template=True) as trusting:
        answer = ask(trusting, max_tokens=1, extra_body=extra)
        assert trusting.engine.tokenizer.decode(answer.prompt_token_ids) == "ask: What is 1 + 2?"
        with pytest.raises(openai.BadRequestError):
            ask(trusting, extra_body={"chat_template": "{% for i in range(10**9) %}{% endfor %}"})


def test_a_model_without_a_notation_refuses_tools(serving: Any) -> None:
    with serving(tool_call_parser="none") as server, pytest.raises(openai.BadRequestError, match="tool_call_parser"):
        ask(server, tools=[TOOL])


def test_responses_whole_and_streamed(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted(f"<think>\nhm\n</think>\n\nSo.\n{CALL}")
    tool = {"type": "function", **TOOL["function"]}
    fields: dict[str, Any] = {"model": "tiny", "input": "What is 1 + 2?", "instructions": "Add.", "tools": [tool], "temperature": 0}
    whole = qwen.client.responses.create(**fields)
    assert whole.status == "completed" and [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text == "So." and whole.output[0].content[0].text == "hm" and whole.output[2].arguments == '{"a": 1}'
    assert whole.usage.output_tokens > 20 and whole.usage.output_tokens_details.reasoning_tokens == len("<think>\nhm\n</think>")
    with qwen.client.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == "So." and [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    for name in ("output_text", "reasoning_text", "function_call_arguments"):
        said = "".join(e.delta for e in events if e.type == f"response.{name}.delta")
        assert said == {"output_text": "So.", "reasoning_text": "hm", "function_call_arguments": '{"a": 1}'}[name]
        assert f"response.{name}.done" in kinds


def test_responses_take_their_own_items_back(qwen: SimpleNamespace, scripted: Say) -> None:
    scripted(f"<think>\nhm\n</think>\n\n{CALL}")
    tool = {"type": "function", **TOOL["function"]}
    first = qwen.client.responses.create(model="tiny", input="1 + 2?", tools=[tool])
    items = [{"role": "user", "content": [{"type": "input_text", "text": "1 + 2?"}]}, *(item.model_dump() for item in first.output)]
    items.append({"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "3"})
    scripted("Three.")
    second = qwen.client.responses.create(model="tiny", input=items, tools=[tool], max_output_tokens=50, store=True)
    assert second.output_text == "Three." and second.store is False
    short = qwen.client.responses.create(model="tiny", input="?", max_output_tokens=2)
    assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"
    for refused in ({"previous_response_id": "resp_1"}, {"background": True}, {"tools": [{"type": "web_search"}]}, {"include": ["a"]}):
        with pytest.raises(openai.BadRequestError) as caught:
            qwen.client.responses.create(model="tiny", input="?", **refused)
        assert caught.value.param.split(".")[0] == next(iter(refused))


class Sum(BaseModel):
    total: int


def test_forms_and_forced_calls_hold_a_random_model(qwen: SimpleNamespace, gemma: SimpleNamespace) -> None:
    """The model is random, so what has the form has it because it was held to it."""
    if not hasattr(qwen.engine, "_grammars"):
        pytest.skip("the engine holds no forms yet")
    parsed = qwen.client.chat.completions.parse(model="tiny", messages=ASK, response_format=Sum, temperature=0, max_tokens=300)
    assert parsed.choices[0].message.parsed is not None or parsed.choices[0].finish_reason == "length"
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    assert isinstance(json.loads(ask(qwen, response_format=form).choices[0].message.content)["ok"], bool)
    held = {"regex": "[ab]{3}c", "choice": ["left", "right"], "grammar": 'start: "x" "y"'}
    wanted = {"regex": {a + b + c + "c" for a in "ab" for b in "ab" for c in "ab"}, "choice": {"left", "right"}, "grammar": {"xy"}}
    for kind, value in held.items():
        assert ask(qwen, extra_body={"structured_outputs": {kind: value}}).choices[0].message.content in wanted[kind]
    strict = {"type": "function", "function": {"name": "go", "parameters": schema, "strict": True}}
    for server in (qwen, gemma):
        for choice in ("required", {"type": "function", "function": {"name": "go"}}):
            answer = ask(server, tools=[strict], tool_choice=choice, parallel_tool_calls=False).choices[0]
            assert answer.finish_reason == "tool_calls", answer
            assert isinstance(json.loads(answer.message.tool_calls[0].function.arguments)["ok"], bool)
    thought = ask(qwen, response_format=form, extra_body={"chat_template_kwargs": {"enable_thinking": True}}, max_tokens=300).choices[0]
    assert thought.message.content is not None
    for bad in ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "colour"}}},):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(qwen, response_format=bad)
        assert caught.value.param == "response_format"


def test_a_forced_call_has_no_arguments_that_are_not_listed(qwen: SimpleNamespace) -> None:
    """The model's own random choice would add some: every string is likelier than the end."""
    listed = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "add", "parameters": listed}}
    for seed in range(8):
        choice = ask(qwen, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=2, seed=seed).choices[0]
        assert json.loads(choice.message.tool_calls[0].function.arguments) in ({"a": 1}, {"a": 2})
