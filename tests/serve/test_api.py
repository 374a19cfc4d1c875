"""The API as the openai SDK sees it: a real server on a loopback port, a tiny random model."""

import json
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion

ASK = [{"role": "user", "content": "Which way?"}]


def ask(server: SimpleNamespace, **fields: Any) -> ChatCompletion:
    return server.client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 24, "temperature": 0, **fields})


def read(server: SimpleNamespace, **fields: Any) -> list[Any]:
    return list(ask(server, stream=True, **fields))


def text_of(chunks: list[Any], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def post(server: SimpleNamespace, body: object, path: str = "/v1/chat/completions", **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(server.url + path, content=content, headers={"content-type": "application/json", **headers}, timeout=30)


def test_the_model_is_listed_and_others_are_not(server: SimpleNamespace) -> None:
    assert [m.id for m in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").max_model_len == 1024
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("other")
    assert caught.value.body["code"] == "model_not_found" and caught.value.body["param"] == "model"
    with pytest.raises(openai.NotFoundError):
        ask(server, model="other")


def test_a_greedy_chat_is_what_the_engine_says(server: SimpleNamespace, engine_of: Any) -> None:
    from garage.core.types import Message, Request, Sampling

    own = engine_of().generate([Request("1", (Message("user", "Which way?"),), Sampling(max_tokens=24))])[0]
    answer = ask(server)
    assert answer.choices[0].message.content == own.text and answer.choices[0].finish_reason == own.finish_reason
    assert answer.usage.prompt_tokens == own.prompt_tokens and answer.usage.completion_tokens == len(own.token_ids)
    assert answer.usage.total_tokens == own.prompt_tokens + len(own.token_ids)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "tiny"
    assert ask(server).usage.prompt_tokens_details.cached_tokens == (own.prompt_tokens - 1) // 4 * 4


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.5, "seed": 5}, {"stop": ["e"]}, {"n": 3, "temperature": 1, "seed": 1}])
def test_a_stream_says_what_the_whole_answer_says(server: SimpleNamespace, fields: dict[str, Any]) -> None:
    whole, chunks = ask(server, **fields), read(server, stream_options={"include_usage": True}, **fields)
    for choice in whole.choices:
        assert text_of(chunks, choice.index) == choice.message.content
        ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.index == choice.index and c.finish_reason]
        assert ends == [choice.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.message.content for c in whole.choices}) == len(whole.choices), "choices of one seed are all different"


def test_the_raw_stream_is_server_sent_events(server: SimpleNamespace) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 3, "stream": True}
    answer = post(server, body)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-accel-buffering"] == "no"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: {") for e in events[:-2])


def test_stop_strings_end_the_text_before_them(server: SimpleNamespace) -> None:
    full = ask(server, max_tokens=40).choices[0].message.content
    stop = full[5:8]
    answer = ask(server, max_tokens=40, stop=stop).choices[0]
    assert answer.message.content == full[: full.index(stop)] and answer.finish_reason == "stop"
    assert ask(server, max_tokens=2).choices[0].finish_reason == "length"


def test_a_seed_repeats_and_no_seed_does_not(server: SimpleNamespace) -> None:
    texts = [ask(server, temperature=2.0, seed=seed).choices[0].message.content for seed in (7, 7, 8, None, None)]
    assert texts[0] == texts[1] and len(set(texts)) == 4


def test_extra_sampling_fields_act(server: SimpleNamespace) -> None:
    greedy = ask(server).choices[0].message.content
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert ask(server, temperature=5, extra_body=extra).choices[0].message.content == greedy
    assert ask(server, temperature=5, top_p=1e-6).choices[0].message.content == greedy
    ended = ask(server, extra_body={"stop_token_ids": list(range(256))})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("", "stop", 1)


def test_logprobs_name_the_tokens_of_the_text(server: SimpleNamespace) -> None:
    choice = ask(server, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace") == choice.message.content
    assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob <= 0 for t in content), "greedy takes the likeliest"
    streamed = [t for chunk in read(server, logprobs=True, top_logprobs=3) for c in chunk.choices if c.logprobs for t in c.logprobs.content]
    assert [t.bytes for t in streamed] == [t.bytes for t in content]


def test_text_completions(server: SimpleNamespace) -> None:
    both = server.client.completions.create(model="tiny", prompt=["the", "one"], max_tokens=6, temperature=0, n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.usage.prompt_tokens == 6 and both.usage.completion_tokens == 24
    one = server.client.completions.create(model="tiny", prompt="one", max_tokens=6, temperature=0, logprobs=2)
    assert server.client.completions.create(model="tiny", prompt=[1, 2], max_tokens=1).usage.prompt_tokens == 2, "ids are a prompt"
    assert one.choices[0].text == both.choices[2].text and len(one.choices[0].logprobs.token_logprobs) == 6
    chunks = server.client.completions.create(model="tiny", prompt="one", max_tokens=6, temperature=0, stream=True)
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == one.choices[0].text


def test_messages_of_every_role_and_in_parts(server: SimpleNamespace) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "way?"}]}]
    assert ask(server, messages=parts).choices[0].message.content == ask(server).choices[0].message.content
    turns = [{"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "North."}, *ASK]
    assert ask(server, messages=turns).usage.prompt_tokens > ask(server).usage.prompt_tokens


def test_fields_without_effect_are_named(server: SimpleNamespace) -> None:
    answer = server.client.chat.completions.with_raw_response.create(
        model="tiny", messages=ASK, max_tokens=1, store=True, user="me", metadata={"a": "b"}, frequency_penalty=0, n=1, logit_bias={}
    )
    assert answer.headers["x-garage-no-effect"] == "store, user, metadata"
    assert "x-garage-no-effect" not in post(server, {"model": "tiny", "messages": ASK, "max_tokens": 1}).headers


BAD = [
    ({"frequency_penalty": 2.5}, "frequency_penalty"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"logit_bias": {"999": 1}}, "logit_bias"), ({"logit_bias": {"5": 101}}, "logit_bias"), ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"response_format": {"type": "xml"}}, "response_format"), ({"allowed_token_ids": [264]}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"typical_p": 0}, "typical_p"),
    ({"min_tokens": 30, "max_tokens": 20}, "min_tokens"), ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"), ({"suffix": "end"}, "suffix"), ({"echo": True}, "echo"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"), ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_schema", "json_schema": {}}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"), ({"priority": 2**40}, "priority"), ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"), ({"modalities": ["audio"]}, "modalities"),
    ({"colour": "blue"}, "colour"), ({"temperature": -1}, "temperature"), ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 9}, "n"), ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"), ({"stop": ["a"] * 9}, "stop"),
    ({"stop": ""}, "stop"), ({"stop": "a" * 65}, "stop"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"seed": 2**64}, "seed"), ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_is_not_honoured_is_a_400_that_names_it(server: SimpleNamespace, fields: dict[str, Any], param: str) -> None:
    answer = post(server, {"model": "tiny", "messages": ASK, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param, error
    assert "/" not in error["message"], error["message"]


NO_REQUESTS = [
    b"", b"{", b"[]", b"[" * 100_000, b'{"model": NaN}', b"\xff", b'{"n": ' + b"1" * 5000 + b"}", b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"model": "tiny", "tools": ["\\ud800"]}',
]  # fmt: skip


@pytest.mark.parametrize("body", NO_REQUESTS)
def test_a_body_that_is_no_request_is_a_400(server: SimpleNamespace, body: bytes) -> None:
    answer = post(server, body)
    assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_web_page_cannot_post_without_asking(server: SimpleNamespace) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 1}
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert post(server, body, **{"content-type": kind}).status_code == 415
    assert httpx2.options(server.url + "/v1/chat/completions").status_code == 405


def test_not_a_number_is_not_a_number(server: SimpleNamespace) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = json.dumps({"model": "tiny", "messages": ASK, "temperature": 0}).replace('"temperature": 0', f'"temperature": {number}')
        assert post(server, body.encode()).json()["error"]["param"] == "temperature"


def test_a_prompt_that_cannot_fit_is_a_400_with_the_numbers(server: SimpleNamespace) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2000 new ones.*at most 1024"):
        ask(server, max_tokens=2000)
    with pytest.raises(openai.BadRequestError, match="at most 1024"):
        ask(server, messages=[{"role": "user", "content": "a" * 2000}], max_tokens=None)


def test_unknown_routes_and_methods_have_the_same_shape(server: SimpleNamespace) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/docs", 404)):
        answer = httpx2.request(method, server.url + path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_answer_has_an_id_of_the_servers_own(server: SimpleNamespace) -> None:
    paths = ("/health", "/metrics", "/v1/models", "/nothing")
    answers = [httpx2.get(server.url + path, headers={"x-request-id": "mine"}) for path in paths]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 4 and "mine" not in ids


def test_the_context_is_the_default_length(server: SimpleNamespace) -> None:
    answer = ask(server, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 1024 and answer.choices[0].finish_reason == "length"


def test_thinking_is_passed_to_the_template_or_refused(server: SimpleNamespace) -> None:
    with pytest.raises(openai.BadRequestError, match="enable_thinking"):
        ask(server, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
