"""Every field has an effect: the same request with and without it, on a random model, through the openai SDK."""

import base64
import json
import re
import struct
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from garage.core.types import Sampling
from garage.engine.defaults import GenerationDefaults
from garage.serve.asks import NO_EFFECT, Ask, ChatAsk, TextAsk
from garage.serve.sampling import sampling_of

ASK = [{"role": "user", "content": "Which way?"}]


def ask(server: SimpleNamespace, **fields: Any) -> Any:
    return server.client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 24, "temperature": 0, **fields})


def complete(server: SimpleNamespace, **fields: Any) -> Any:
    return server.client.completions.create(**{"model": "tiny", "prompt": "the way", "max_tokens": 6, "temperature": 0, **fields})


def ids_of(server: SimpleNamespace, **fields: Any) -> list[int]:
    extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
    return list(ask(server, extra_body=extra, **fields).choices[0].token_ids)


def test_every_field_reaches_the_sampler() -> None:
    """What a request says is what the engine is asked, field by field; a field of the sampler that no request sets is named here."""
    said = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "presence_penalty": 1.5,
        "frequency_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"5": -3.0}, "bad_words": ["no"], "allowed_token_ids": [1, 5],
        "seed": 3, "stop": ["x"], "stop_token_ids": [2], "ignore_eos": True, "min_tokens": 2, "prompt_logprobs": 4,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "logprobs": 2,
    }  # fmt: skip
    asked = sampling_of(TextAsk.model_validate({"model": "m", "prompt": "p", **said}), GenerationDefaults(), 100, 0)
    names = {"include_stop_str_in_output": "include_stop"}
    wanted: dict[str, Any] = {names.get(name, name): tuple(v) if isinstance(v, list) else v for name, v in said.items()}
    wanted["skip_special"] = wanted.pop("skip_special_tokens")
    wanted["logit_bias"] = ((5, -3.0),)
    assert asked == Sampling(**wanted)
    assert set(wanted) == set(Sampling.__dataclass_fields__)


def test_defaults_of_the_model_give_way_to_the_request() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_k=20, max_new_tokens=50)
    ask: Ask = ChatAsk.model_validate({"model": "m", "messages": ASK})
    assert sampling_of(ask, defaults, 100, 0) == Sampling(max_tokens=50, temperature=0.6, top_k=20)
    assert sampling_of(ask, GenerationDefaults(), 100, 0) == Sampling(max_tokens=100, temperature=1.0)


def test_choices_and_best_of(server: SimpleNamespace) -> None:
    several = complete(server, n=8, temperature=2, seed=1, logprobs=0).choices
    means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in several}
    best = complete(server, n=2, best_of=8, temperature=2, seed=1)
    assert [c.text for c in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert [c.index for c in best.choices] == [0, 1] and best.usage.completion_tokens >= 8 and best.choices[0].logprobs is None
    for fields in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 9}):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, **fields)
        assert caught.value.param == "best_of"


def test_echo_scores_a_prompt_as_lm_eval_asks(server: SimpleNamespace) -> None:
    """Scoring a continuation at once gives what greedy log-probabilities of each of its tokens give one by one."""
    ids = list(range(40, 60))
    scored = complete(server, prompt=[ids, ids[:5]], max_tokens=1, echo=True, logprobs=1, seed=1234)
    first = scored.choices[0].logprobs
    assert [len(c.logprobs.tokens) for c in scored.choices] == [21, 6] and first.token_logprobs[0] is first.top_logprobs[0] is None
    for place in range(12, 20):
        one = complete(server, prompt=ids[:place], max_tokens=1, logprobs=20, logit_bias={str(ids[place]): 100})
        if hasattr(server.engine, "_grammars"):  # bias is honoured
            assert one.choices[0].logprobs.token_logprobs[0] == pytest.approx(first.token_logprobs[place], abs=1e-4)
        likeliest = max(first.top_logprobs[place].values())
        assert max(one.choices[0].logprobs.top_logprobs[0].values()) == pytest.approx(likeliest, abs=1e-4)
    assert "".join(first.tokens) == scored.choices[0].text
    assert first.text_offset == [sum(map(len, first.tokens[:n])) for n in range(21)]
    alone = complete(server, prompt="the way", max_tokens=0, echo=True, logprobs=1).choices[0]
    assert alone.text == "the way" and len(alone.logprobs.tokens) == 7 and alone.finish_reason == "length"
    assert complete(server, echo=True, max_tokens=0).choices[0].text == "the way"
    whole = complete(server, echo=True).choices[0].text
    assert "".join(c.choices[0].text for c in complete(server, echo=True, stream=True)) == whole and whole.startswith("the way")


def test_prompt_logprobs_in_vllms_shape(server: SimpleNamespace) -> None:
    told = complete(server, extra_body={"prompt_logprobs": 2}).choices[0].prompt_logprobs
    assert told[0] is None and len(told) == 7 and all(2 <= len(entry) <= 3 for entry in told[1:])
    assert "h" in {facts["decoded_token"] for facts in told[1].values()}, "the second token of 'the way' is an h"
    chat = ask(server, extra_body={"prompt_logprobs": 0, "return_token_ids": True})
    assert [next(iter(entry)) for entry in chat.prompt_logprobs[1:]] == [str(i) for i in chat.prompt_token_ids[1:]]


def test_token_ids_come_back(server: SimpleNamespace) -> None:
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    whole = ask(server, logprobs=True, top_logprobs=2, extra_body=extra)
    ids = whole.choices[0].token_ids
    assert [t.token for t in whole.choices[0].logprobs.content] == [f"token_id:{i}" for i in ids] and len(ids) == 24
    chunks = list(ask(server, stream=True, extra_body=extra))
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids and chunks[-1].choices[0].token_ids == ids
    text = complete(server, extra_body=extra).choices[0]
    assert len(text.token_ids) == 6 and len(text.prompt_token_ids) == 7


def test_penalties_bias_words_and_limits_act(server: SimpleNamespace) -> None:
    if not hasattr(server.engine, "_grammars"):
        pytest.skip("the engine does not honour them yet")
    greedy = ids_of(server)
    for name in ("presence_penalty", "frequency_penalty"):
        long, punished = ids_of(server, max_tokens=200), ids_of(server, max_tokens=200, **{name: 2.0})
        assert len(set(punished)) > len(set(long)), f"{name} makes for more different tokens"
    assert ids_of(server, extra_body={"repetition_penalty": 5.0}, max_tokens=100) != ids_of(server, max_tokens=100)
    assert set(ids_of(server, logit_bias={"65": 100.0}, max_tokens=5)) == {65}
    assert greedy[0] not in ids_of(server, logit_bias={str(greedy[0]): -100.0})
    assert set(ids_of(server, extra_body={"allowed_token_ids": [65, 66]}, max_tokens=9)) <= {65, 66}
    word = re.search("[ -~]{2}", complete(server).choices[0].text)[0]  # bytes that are no text cannot be asked for
    assert word not in complete(server, extra_body={"bad_words": [word]}).choices[0].text
    ended = ids_of(server, extra_body={"stop_token_ids": list(range(256)), "min_tokens": 4})
    assert len(ended) == 5
    assert ids_of(server, temperature=5, extra_body={"typical_p": 1e-6}) == ids_of(server, temperature=5, extra_body={"typical_p": 1e-6})
    stop = complete(server, max_tokens=40).choices[0].text[3:5]
    with_stop = complete(server, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True}).choices[0].text
    assert with_stop == complete(server, max_tokens=40, stop=stop).choices[0].text + stop
    shown = complete(server, logit_bias={"260": 100}, max_tokens=2, extra_body={"skip_special_tokens": False, "ignore_eos": True})
    assert shown.choices[0].text == "<end_of_turn>" * 2


def test_salt_and_special_tokens_and_priority(server: SimpleNamespace) -> None:
    long = {"prompt": "a long enough prompt to fill some pages", "max_tokens": 1}
    cached = [complete(server, **long, extra_body={"cache_salt": salt}).usage.prompt_tokens_details.cached_tokens for salt in "aab"]
    assert cached[0] == cached[2] == 0 < cached[1]
    assert complete(server, extra_body={"priority": -3}).usage.completion_tokens == 6
    assert complete(server, extra_body={"add_special_tokens": False}).usage.prompt_tokens == 7


def test_every_name_without_effect_is_accepted_and_named(server: SimpleNamespace) -> None:
    values = {name: {"a": "b"} if name == "metadata" else True if name == "store" else "low" for name in NO_EFFECT}
    body = {"model": "tiny", "messages": ASK, "max_tokens": 1, **values}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200 and set(answer.headers["x-garage-no-effect"].split(", ")) == set(NO_EFFECT)
    no_samplers = set(NO_EFFECT) & set(Sampling.__dataclass_fields__)
    assert not no_samplers


def test_embeddings(server: SimpleNamespace) -> None:
    texts = ["the way north", "a different thing", "the way north"]
    plain = server.client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    vectors = [item.embedding for item in plain.data]
    assert all(sum(x * x for x in v) == pytest.approx(1, abs=1e-5) for v in vectors) and [i.index for i in plain.data] == [0, 1, 2]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5) and vectors[0] != pytest.approx(vectors[1], abs=1e-2)
    assert server.client.embeddings.create(model="tiny", input=texts).data[1].embedding == pytest.approx(vectors[1], abs=1e-6)
    raw = httpx2.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": texts[1], "encoding_format": "base64"}).json()
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(vectors[1], abs=1e-6)
    short = server.client.embeddings.create(model="tiny", input=texts[1], dimensions=4, encoding_format="float").data[0].embedding
    norm = sum(x * x for x in vectors[1][:4]) ** 0.5
    assert short == pytest.approx([x / norm for x in vectors[1][:4]], abs=1e-5)
    assert plain.usage.prompt_tokens == sum(map(len, texts)) and server.client.models.retrieve("tiny").embedding.startswith("mean of")
    for fields, param in (({"dimensions": 10_000}, "dimensions"), ({"input": "a" * 2000}, "input"), ({"input": [999]}, "input")):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.embeddings.create(**{"model": "tiny", "input": "a", **fields})
        assert caught.value.param == param


def test_tokenize_and_back(server: SimpleNamespace) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx2.post(server.url + path, json=body).json()

    for text in ("the way", "ä€😀 <|im_end|>"):
        told = post("/tokenize", model="tiny", prompt=text)
        assert told["count"] == len(told["tokens"]) == len(text.encode()) and told["max_model_len"] == 1024
        assert post("/detokenize", model="tiny", tokens=told["tokens"]) == {"prompt": text}
    chat = post("/tokenize", messages=ASK, return_token_strs=True)
    assert chat["tokens"] == ask(server, extra_body={"return_token_ids": True}).prompt_token_ids and chat["token_strs"][0] == "<|im_start|>"
    assert post("/detokenize", tokens=[999])["error"]["param"] == "tokens"
    assert json.loads(httpx2.get(f"{server.url}/version").text)["version"]
