"""What a server must survive: wrong keys, full queues, large bodies, clients that leave, steps that fail, signals to stop."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from garage.core.errors import UserError
from garage.core.types import Message, Request, Sampling
from garage.engine.engine import Engine
from garage.engine.loading import apart
from garage.serve import loop as loop_module
from garage.serve.asks import ChatAsk
from garage.serve.client import Remote
from garage.serve.metrics import Metrics
from garage.serve.sampling import sampling_of
from garage.serve.server import bind, running
from garage.specs.serve import EngineSpec, ServeSpec

ASK = [{"role": "user", "content": "Which way?"}]
LONG = {"model": "tiny", "messages": ASK, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
Until = Callable[[Callable[[], bool]], bool]


def metrics_of(server: SimpleNamespace) -> dict[str, float]:
    text = httpx2.get(server.url + "/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert all(s.name.startswith("garage:") and s.labels["model_name"] == "tiny" for s in samples)
    out: dict[str, float] = {}
    for s in samples:
        name = s.name.removeprefix("garage:") + (f"/{s.labels['finished_reason']}" if "finished_reason" in s.labels else "")
        out[name] = s.value
    return out


def test_without_the_key_only_health_answers(serving: Any) -> None:
    with serving(api_key="sk-right") as server:
        assert httpx2.get(server.url + "/health").json() == {"status": "ok"}
        for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": "sk-righ"}, {"x-api-key": "é"}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = httpx2.get(server.url + path, headers={k: v.encode() for k, v in headers.items()})
                assert answer.status_code == 401 and "x-request-id" in answer.headers
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(server.url + "/v1/models", headers={"x-api-key": "sk-right"}).status_code == 200
        assert [m.id for m in server.client.models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="sk-wrong").models.list()


def test_a_listener_beyond_loopback_needs_a_key() -> None:
    with pytest.raises(UserError, match="api_key"):
        ServeSpec.parse({"model": "x", "host": "0.0.0.0"})


def test_a_full_queue_is_a_429_that_says_when_to_come_back(serving: Any, until: Until) -> None:
    with serving(engine={"max_num_seqs": 1, "max_waiting": 2}) as server, ThreadPoolExecutor(12) as pool:

        def one(_: int) -> str:
            try:
                return str(server.client.chat.completions.create(**{**LONG, "max_tokens": 200}).choices[0].finish_reason)
            except openai.RateLimitError as error:
                assert error.response.headers["retry-after"] == "1" and error.body["code"] == "rate_limit_exceeded"
                return "refused"

        ends = list(pool.map(one, range(12)))
        assert set(ends) == {"length", "refused"} and len(ends) == 12
        assert until(lambda: not server.engine.has_work)
        assert metrics_of(server)["request_success_total/length"] == ends.count("length")


def test_a_large_body_is_refused_however_it_is_sent(serving: Any) -> None:
    with serving(max_body_bytes=2000) as server:
        pieces = [b"a" * 500] * 10
        for content in (b"".join(pieces), iter(pieces)):
            answer = httpx2.post(server.url + "/v1/chat/completions", content=content)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(serving: Any, until: Until, is_stream: bool) -> None:
    with serving(engine={"max_num_seqs": 2}) as server:
        body = json.dumps({"model": "tiny", "messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": is_stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        host, port = server.url.removeprefix("http://").split(":")
        socks = [socket.create_connection((host, int(port))) for _ in range(5)]  # two run, three wait
        for sock in socks:
            sock.sendall(head.encode() + body)
        assert until(lambda: server.engine.stats().num_running == 2 and server.engine.stats().num_waiting == 3)
        for sock in socks:
            sock.close()
        assert until(lambda: not server.engine.has_work)
        server.engine.check_books()
        assert server.engine.stats().num_pages_used == 0
        seen = metrics_of(server)
        assert seen["request_success_total/abort"] == 5 and "request_success_total/length" not in seen
        assert server.client.chat.completions.create(**{**LONG, "max_tokens": 3}).usage.completion_tokens == 3


def test_a_lost_abort_is_noticed(serving: Any, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken twin: aborts are dropped. The answer then goes on to its end after its reader has left."""
    monkeypatch.setattr(loop_module.EngineLoop, "abort", lambda self, ticket: None)
    with serving() as server:
        stream = server.client.chat.completions.create(stream=True, **{**LONG, "max_tokens": 200})
        next(iter(stream))
        stream.close()
        assert until(lambda: not server.engine.has_work)
        assert metrics_of(server)["request_success_total/length"] == 1


def test_a_request_in_the_queue_is_counted_once(engine_of: Callable[..., Engine]) -> None:
    """Also while the event loop is too busy to hear that the engine has taken it: 19 that wait and one that runs do not fill 32 places."""
    engine = engine_of(max_num_seqs=1, max_waiting=32)

    async def burst() -> bool:
        loop = loop_module.EngineLoop(engine, Metrics(engine, "tiny", EngineSpec()), ServeSpec(model="tiny"))
        loop.start()
        requests = [Request(str(n), (65,), Sampling(max_tokens=900, ignore_eos=True)) for n in range(20)]
        waiting = [asyncio.ensure_future(loop.submit([request], is_streamed=False)) for request in requests]
        await asyncio.sleep(0)
        end = time.monotonic() + 20
        while engine.num_free_places > 13 and time.monotonic() < end:
            time.sleep(0.001)
        assert engine.num_free_places <= 13, "the engine has taken them"
        is_full = loop.is_full
        await asyncio.gather(*waiting)
        loop.stop()
        return is_full

    assert not asyncio.run(burst())


def test_many_streams_lose_and_double_nothing(serving: Any, until: Until) -> None:
    """30 clients, a third of which leave in the middle: the others get exactly the text of the same request sent alone."""
    with serving(engine={"num_pages": 260}) as server, ThreadPoolExecutor(30) as pool:

        def fields(n: int) -> dict[str, Any]:
            return {"model": "tiny", "messages": [{"role": "user", "content": f"{n % 7}"}], "max_tokens": 40, "temperature": 1, "seed": n}

        def one(n: int) -> str | None:
            stream = server.client.chat.completions.create(stream=True, **fields(n))
            text = ""
            for place, chunk in enumerate(stream):
                text += chunk.choices[0].delta.content or ""
                if n % 3 == 0 and place == n:
                    stream.close()
                    return None
            return text

        texts = list(pool.map(one, range(30)))
        for n in range(30):
            if n % 3 and n % 4 == 0:
                assert texts[n] == server.client.chat.completions.create(**fields(n)).choices[0].message.content
        assert None not in [t for n, t in enumerate(texts) if n % 3]
        assert until(lambda: not server.engine.has_work)
        server.engine.check_books()
        seen = metrics_of(server)
        ended = sum(value for name, value in seen.items() if name.startswith("request_success_total/"))
        assert ended == 30 + sum(n % 3 > 0 and n % 4 == 0 for n in range(30)), "accepted = finished + aborted"


def test_a_step_that_fails_ends_its_requests_and_no_others(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        forward = type(server.engine._runner._model).forward
        calls = []

        def sometimes(self: Any, *args: Any) -> Any:
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("secret /path/of/ours")
            return forward(self, *args)

        monkeypatch.setattr(type(server.engine._runner._model), "forward", sometimes)
        with pytest.raises(openai.APIError) as caught:
            list(server.client.chat.completions.create(stream=True, **LONG))
        assert "secret" not in str(caught.value) and "RuntimeError" in str(caught.value)
        calls[:] = [1] * 4
        with pytest.raises(openai.InternalServerError) as whole:
            server.client.chat.completions.create(**LONG)
        assert whole.value.status_code == 500 and "secret" not in str(whole.value.body)
        assert server.client.chat.completions.create(**{**LONG, "max_tokens": 3}).usage.completion_tokens == 3
        assert httpx2.get(server.url + "/health").status_code == 200


def test_an_engine_that_does_not_advance_is_unhealthy(serving: Any, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(stall_seconds=0.2) as server:
        gate = threading.Event()
        step = Engine.step
        monkeypatch.setattr(Engine, "step", lambda self: (gate.wait(10), step(self))[1])
        time.sleep(0.3)
        assert httpx2.get(server.url + "/health").status_code == 200, "an idle engine is healthy"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.client.chat.completions.create, **{**LONG, "max_tokens": 2})
            assert until(lambda: httpx2.get(server.url + "/health").status_code == 503)
            assert httpx2.get(server.url + "/health").json()["error"]["code"] == "unhealthy"
            gate.set()
            assert asked.result().usage.completion_tokens == 2
        assert httpx2.get(server.url + "/health").status_code == 200


def test_stopping_lets_running_answers_end(serving: Any, until: Until) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving() as server:
            body = {"model": "tiny", "messages": ASK, "max_tokens": 400, "ignore_eos": True}
            asked = pool.submit(httpx2.post, server.url + "/v1/chat/completions", json=body, timeout=60)
            assert until(lambda: server.engine.stats().num_running == 1)
        assert asked.result().json()["usage"]["completion_tokens"] == 400
    assert threading.active_count() < 20 and not [t for t in threading.enumerate() if t.name.startswith("garage-")]


def test_a_taken_port_is_an_error_for_people(engine_of: Callable[..., Engine]) -> None:
    with bind(ServeSpec(model="x", port=0)) as sock:
        spec = ServeSpec(model="x", port=sock.getsockname()[1])
        with pytest.raises(UserError, match="is in use") as caught, running(engine_of(), spec):
            pass
        assert "--port" in caught.value.remedy


def test_metrics_move_with_the_load(serving: Any) -> None:
    with serving() as server:
        before = metrics_of(server)
        for _ in range(2):
            server.client.chat.completions.create(**{**LONG, "max_tokens": 9, "n": 2})
        after = metrics_of(server)
        assert before["kv_cache_usage_perc"] == before["generation_tokens_total"] == 0
        prompt = after["request_prompt_tokens_sum"] / 4
        want = {
            "generation_tokens_total": 36, "prompt_tokens_total": 4 * prompt, "request_success_total/length": 4, "request_params_n_sum": 4,
            "request_params_max_tokens_sum": 18, "request_generation_tokens_sum": 36, "time_to_first_token_seconds_count": 4,
            "e2e_request_latency_seconds_count": 4, "inter_token_latency_seconds_count": 32, "prefix_cache_queries_total": 4 * prompt,
            "num_requests_running": 0, "num_requests_waiting": 0, "num_preemptions_total": 0,
        }  # fmt: skip
        assert {name: after[name] for name in want} == want
        assert after["prefix_cache_hits_total"] >= 3 * ((prompt - 1) // 4 * 4)
        assert after["iteration_tokens_total_sum"] == 4 * prompt - after["prefix_cache_hits_total"] + 4 * 8


def test_generation_config_gives_the_defaults(model_dir: Any, tmp_path: Any, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "tuned"
    shutil.copytree(model_dir, place)
    values = {"eos_token_id": [258, 5], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    values |= {"max_new_tokens": 50, "no_repeat_ngram_size": 3}
    (place / "generation_config.json").write_text(json.dumps(values))
    engine = Engine.open(place, None, engine_spec := ServeSpec(model="x").engine.model_copy(update={"num_pages": 64}))
    assert engine_spec.num_pages == 64 and engine.defaults.ignored == ("no_repeat_ngram_size",) and 5 in engine._eos_ids
    plain = ChatAsk.model_validate({"model": "x", "messages": ASK})
    assert sampling_of(plain, engine.defaults, 1000, 0) == Sampling(
        max_tokens=50, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1
    )
    own = ChatAsk.model_validate({"model": "x", "messages": ASK, "temperature": 0, "max_tokens": 7, "top_p": 1.0, "top_k": -1,
                                  "repetition_penalty": 1.0})  # fmt: skip
    assert sampling_of(own, engine.defaults, 1000, 0) == Sampling(max_tokens=7)


def test_a_template_that_the_model_was_not_trained_with_is_refused(model_dir: Any, tmp_path: Any, engine_of: Callable[..., Engine]) -> None:
    place = tmp_path / "tuned"
    shutil.copytree(model_dir, place)
    spec = ServeSpec(model="x").engine.model_copy(update={"num_pages": 64})
    for trained, is_fine in ((engine_of().chat.hash, True), ("0" * 32, False)):
        stated = {"kind": "model", "id": "m", "parents": [], "spec": {}, "created": "", "version": "1", "facts": {"template_hash": trained}}
        (place / "manifest.json").write_text(json.dumps(stated))
        if is_fine:
            assert Engine.open(place, None, spec).chat is not None
            continue
        with pytest.raises(UserError, match="chat template 000") as caught:
            Engine.open(place, None, spec)
        assert "chat_template.jinja" in caught.value.remedy


def test_remote_is_the_engine_at_a_distance(serving: Any, engine_of: Callable[..., Engine]) -> None:
    samplings = [Sampling(max_tokens=12, temperature=n % 2, seed=n, top_k=9) for n in range(12)]
    requests = [Request(str(n), (Message("user", f"Way {n}?"),), sampling) for n, sampling in enumerate(samplings)]
    requests += [Request("text", "the way", Sampling(max_tokens=5)), Request("ids", (1, 2, 3), Sampling(max_tokens=5))]
    own = engine_of().generate(requests)
    with serving() as server:
        far = Remote(server.url + "/v1", "tiny", concurrency=6).generate(requests)
        refused = Remote(server.url + "/v1", "tiny").generate(
            [Request("long", "the way", Sampling(max_tokens=5000)), Request("vector", "a", wants_embedding=True)]
        )
        with pytest.raises(UserError, match="other"):
            Remote(server.url + "/v1", "other").generate(requests[:2])
    seen, wanted = ([(c.id, c.text, c.finish_reason, c.prompt_tokens) for c in answers] for answers in (far, own))
    assert seen == wanted
    assert [c.finish_reason for c in refused] == ["error"] * 2
    assert "5000 new ones" in refused[0].error and "embeddings" in refused[1].error
    with pytest.raises(UserError, match="cannot be reached"):
        Remote(server.url + "/v1", "tiny", retries=0).generate(requests[:1])


def test_remote_brings_back_ids_and_log_probabilities(serving: Any, engine_of: Callable[..., Engine]) -> None:
    sampling = Sampling(max_tokens=8, temperature=0.7, seed=3, logprobs=3, prompt_logprobs=2)
    requests = [Request(str(n), prompt, sampling) for n, prompt in enumerate([(Message("user", "Which way?"),), "the way", (5, 6, 7)])]
    own = engine_of().generate(requests)
    with serving() as server:
        far = Remote(server.url + "/v1", "tiny").generate(requests)
    for ours, theirs in zip(own, far, strict=True):
        assert theirs.token_ids == ours.token_ids and len(theirs.logprobs) == 8 and theirs.prompt_logprobs[0] is None
        for near, distant in zip((*ours.logprobs, *ours.prompt_logprobs[1:]), (*theirs.logprobs, *theirs.prompt_logprobs[1:]), strict=True):
            assert near.token_id == distant.token_id and distant.logprob == pytest.approx(near.logprob, abs=1e-4)
            assert [i for i, _ in distant.top][:2] == [i for i, _ in near.top][:2]


def test_remote_brings_back_calls(serving: Any, scripted: Callable[..., None]) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with serving(template="qwen3") as server:
        for text in (call, f"So:\n{call}"):
            scripted(text)
            (done,) = Remote(server.url + "/v1", "tiny").generate([Request("1", (Message("user", "?"),), tools=(tool,))])
            assert (done.text, done.finish_reason) == (text, "tool_calls")


def test_tokens_are_written_together_and_the_first_at_once(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True, "temperature": 0}
    texts, writes, first = {}, {}, 0.0
    for pause, most in ((0.0, 640), (1.0, 640), (0.001, 640), (0.001, 1)):
        monkeypatch.setattr(loop_module, "WRITES", most)
        with serving(stream_seconds=pause) as server, httpx2.stream("POST", server.url + "/v1/completions", json=body) as answer:
            began, pieces = time.monotonic(), []
            for piece in answer.iter_raw():
                first = time.monotonic() - began if not pieces else first
                pieces.append(piece)
        events = events_of(b"".join(pieces))
        texts[pause, most] = "".join(each["choices"][0]["text"] for each in events)
        writes[pause, most] = len(pieces)
    assert len(set(texts.values())) == 1 and first < 0.5, (texts, first)
    assert max(writes[1.0, 640], writes[0.001, 1]) < 20 < min(writes[0.0, 640], writes[0.001, 640]), writes


def events_of(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]


def test_what_runs_apart_ends_apart() -> None:
    """OpenMP's workers end with the thread that called them, so none may stay; errors come through."""
    assert apart(lambda: threading.current_thread().name) == "garage-start"
    assert not [thread for thread in threading.enumerate() if thread.name == "garage-start"]
    with pytest.raises(UserError, match="no room"):
        apart(lambda: (_ for _ in ()).throw(UserError("no room", remedy="less")))


def test_a_request_that_leaves_nothing_to_say_is_its_own_fault(server: SimpleNamespace) -> None:
    (letter,) = server.engine.tokenizer.encode("a")
    body = {"model": "tiny", "prompt": "b", "allowed_token_ids": [letter], "bad_words": ["a"], "max_tokens": 3}
    answer = httpx2.post(server.url + "/v1/completions", json=body)
    assert answer.status_code == 400 and "no token is left" in answer.json()["error"]["message"]
    streamed = httpx2.post(server.url + "/v1/completions", json=body | {"stream": True})
    assert "no token is left" in streamed.text and "[DONE]" not in streamed.text
