"""Keys and their limits, hosts and origins, readiness, slow readers, deadlines of the queue, adapters over HTTP, hostile bodies."""

import hashlib
import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from garage.core.errors import UserError
from garage.engine.engine import Engine
from garage.serve import asks
from garage.serve import loop as loop_module
from garage.serve.app import serve_app
from garage.serve.gate import PUBLIC
from garage.serve.keys import Bucket, Keys
from garage.specs.serve import ServeSpec

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Which way?"}], "max_tokens": 4, "temperature": 0}
Until = Callable[[Callable[[], bool]], bool]


def post(server: SimpleNamespace, key: str = "", path: str = "/v1/chat/completions", body: Any = ASK, **headers: str) -> httpx2.Response:
    given = {"authorization": f"Bearer {key}", **headers} if key else headers
    return httpx2.post(server.url + path, json=body, headers=given, timeout=60)


def samples(server: SimpleNamespace, **headers: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx2.get(server.url + "/metrics", headers=headers).text)
    return {s.name.removeprefix("garage:"): s.value for f in families for s in f.samples if "le" not in s.labels}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    hashed = hashlib.sha256(b"sk-hashed").hexdigest()
    path.write_text(f"""# keys
ann sk-ann requests=3 tokens=600
bob sha256:{hashed} concurrency=1
cat sk-cat tokens=20  # few
boss sk-boss admin
""")
    return path


def test_keys_have_limits_of_their_own(serving: Any, keys_file: Path) -> None:
    with serving(api_keys_file=keys_file, engine={"max_num_seqs": 4}) as server:
        answers = [post(server, "sk-ann") for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["2", "1", "0", "0"]
        assert answers[0].headers["x-ratelimit-limit-tokens"] == "600"
        assert int(answers[2].headers["x-ratelimit-remaining-tokens"]) < 600
        error = answers[3].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 10 <= int(answers[3].headers["retry-after"]) <= 20, "three a minute is one in twenty seconds"
        assert httpx2.post(server.url + "/v1/chat/completions", json=ASK, headers={"x-api-key": "sk-ann"}).status_code == 429
        assert post(server, "sk-cat").status_code == 200 and post(server, "sk-cat").status_code == 429, "the tokens are overdrawn"
        assert post(server, "sk-boss").status_code == 200, "others are let in"
        with ThreadPoolExecutor(4) as pool:
            long = {**ASK, "max_tokens": 200, "ignore_eos": True}
            codes = [a.status_code for a in pool.map(lambda _: post(server, "sk-hashed", body=long), range(4))]
        assert codes.count(200) >= 1 and codes.count(429) == 4 - codes.count(200) >= 1
        assert post(server, "sk-hashed").status_code == 200, "a place is given back"
        assert post(server, "sk-boss", body={**ASK, "priority": -1}).status_code == 200
        refused = post(server, "sk-hashed", body={**ASK, "priority": -1})
        assert refused.status_code == 403 and refused.json()["error"]["param"] == "priority"


def test_a_bucket_fills_steadily() -> None:
    bucket = Bucket(60, 0.0, time.monotonic() - 30)
    assert bucket.wait(1) == 0 and bucket.level == pytest.approx(30, abs=0.1) and bucket.wait(40) == pytest.approx(10, abs=0.1)
    assert Bucket().wait(10**9) == 0 and Bucket().headers("tokens") == {}


BAD_KEYS = ["ann", "ann sk-a what=3", "ann sk-a requests=x", "ann sha256:zz", "ann sha256:aa", "ann sk-a tokens=-1", "#"]


@pytest.mark.parametrize("line", BAD_KEYS)
def test_a_line_that_is_no_key_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(UserError, match="key") as caught:
        Keys(ServeSpec(model="x", api_keys_file=tmp_path / "keys"))
    assert "sk-a " not in str(caught.value.args[0])


@pytest.mark.parametrize(("shares", "hits"), [(False, 0), (True, 1)])
def test_keys_share_no_cached_prompts_unless_told(serving: Any, shares: bool, hits: int) -> None:
    with serving(api_key=("sk-a", "sk-b"), share_prefix_cache=shares) as server:
        cached = [post(server, key).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for key in ("sk-a", "sk-a", "sk-b")]
        assert cached == [False, True, bool(hits)]


def test_no_route_answers_without_a_key(serving: Any, engine_of: Any) -> None:
    routes = {route.path for route in serve_app(engine_of(), ServeSpec(model="x")).routes}
    assert len(routes) > 15
    with serving(api_key="sk-right") as server, httpx2.Client() as client:
        for path in routes:
            for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
                for form in (path, f"/{path}", f"{path}/", f"{path}?x=/health", path.upper(), path.replace("/", "/%2e/", 1)):
                    if form.partition("?")[0] in PUBLIC:
                        continue
                    answer = client.request(method, server.url + form, headers={"x-api-key": "sk-wrong"})
                    assert answer.status_code in (401, 404, 405), (method, form)
        assert repr(ServeSpec(model="x", api_key="sk-secret")).count("sk-secret") == 0
        assert "sk-secret" not in json.dumps(ServeSpec(model="x", api_key="sk-secret").resolved())


def test_foreign_hosts_and_origins(serving: Any) -> None:
    with serving() as server:
        good, bad = ("localhost:1", "127.0.0.1", "[::1]:80"), ("evil.example", "", "a:localhost")
        for host, status in [*((host, 200) for host in good), *((host, 403) for host in bad)]:
            assert httpx2.get(server.url + "/v1/models", headers={"host": host}).status_code == status, host
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        assert httpx2.options(server.url + "/v1/chat/completions", headers=preflight).status_code == 405
        assert httpx2.get(server.url + "/v1/models", headers={"x-long": "a" * 40_000}).status_code in (400, 431)
    with serving(allowed_origins=("https://a.example",), allowed_hosts=("garage.example",), api_key="sk-a") as server:
        assert httpx2.options(server.url + "/v1/chat/completions", headers=preflight).status_code == 200
        named = {"host": "garage.example", "x-api-key": "sk-a", "origin": "https://a.example"}
        answer = httpx2.get(server.url + "/v1/models", headers=named)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx2.get(server.url + "/v1/models", headers={**named, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_ready_until_it_stops(serving: Any, until: Until) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving() as server:
            assert [httpx2.get(server.url + path).status_code for path in ("/ready", "/health", "/ping", "/load")] == [200] * 4
            asked = pool.submit(post, server, body={**ASK, "max_tokens": 600, "ignore_eos": True})
            assert until(lambda: server.engine.stats().num_running == 1)
            assert httpx2.get(server.url + "/load").json() == {"server_load": 1}
        assert asked.result().json()["usage"]["completion_tokens"] == 600


def test_while_it_stops_it_says_so(serving: Any, until: Until) -> None:
    with serving() as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, server, body={**ASK, "max_tokens": 900, "ignore_eos": True})
        assert until(lambda: server.engine.stats().num_running == 1)
        server.stop()
        assert until(lambda: httpx2.get(server.url + "/ready").status_code == 503)
        assert post(server).json()["error"]["code"] == "draining" and httpx2.get(server.url + "/health").status_code == 200
        assert asked.result().json()["usage"]["completion_tokens"] == 900


def test_a_request_that_waits_too_long_is_told_so(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.002), step(self))[1])
    with serving(engine={"max_num_seqs": 1}, queue_timeout_seconds=0.4) as server, ThreadPoolExecutor(3) as pool:
        long = {**ASK, "max_tokens": 900, "ignore_eos": True}
        first = pool.submit(post, server, body=long)
        time.sleep(0.1)
        streamed, whole = (pool.submit(post, server, body={**long, "stream": stream}) for stream in (True, False))
        assert '"queue_timeout"' in streamed.result().text and "[DONE]" not in streamed.result().text
        assert whole.result().status_code == 503 and whole.result().json()["error"]["code"] == "queue_timeout"
        assert first.result().status_code == 200 and samples(server)["requests_in_flight"] == 0


def test_a_reader_that_does_not_read_is_cut_off(serving: Any, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "MAX_UNREAD", 8)
    with serving() as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({**ASK, "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20,
                           "n": 8}).encode()  # fmt: skip
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert until(lambda: samples(server)["requests_accepted_total"] == 8 and samples(server)["requests_in_flight"] == 0)
        seen = samples(server)
        assert seen["requests_aborted_total"] == 8 and seen["generation_tokens_total"] < 8 * 900
        sock.close()
        assert post(server).status_code == 200


def test_conservation_under_a_mixed_load(serving: Any, until: Until) -> None:
    """accepted = finished + aborted + failed + in flight, whatever happens to a request; hostile bodies change no other's answer."""
    rng = random.Random(0)
    values: list[Any] = [-1, 0, 1, 2**70, 1e308, "", "a" * 99, [], {}, [[]], True, None, "\ud800", {"type": "object"}, [1, "a"], 0.5]
    with serving(engine={"max_num_seqs": 4}) as server, ThreadPoolExecutor(8) as pool, httpx2.Client(timeout=60) as client:
        wanted = post(server).json()["choices"][0]["message"]
        fields = [*ASK, "tools", "stop", "n", "logprobs", "response_format", "stream", "logit_bias", "prompt_logprobs", "top_p",
                  "input", "structured_outputs", "prompt", "echo", "best_of", "stream_options", "tool_choice"]  # fmt: skip
        paths = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
                 "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]  # fmt: skip

        def hostile(n: int) -> int:
            body = {**ASK, **{rng.choice(fields): rng.choice(values) for _ in range(rng.randrange(1, 4))}}
            try:
                return client.post(server.url + rng.choice(paths), content=json.dumps(body).encode(),
                                   headers={"content-type": "application/json"}).status_code  # fmt: skip
            except httpx2.HTTPError:
                return 0

        codes = pool.map(hostile, range(300))
        victims = [post(server).json()["choices"][0]["message"] for _ in range(20)]
        assert {code for code in codes if code >= 500 or code == 0} == set() and victims == [wanted] * 20
        assert until(lambda: not server.engine.has_work)
        seen = samples(server)
        ends = sum(seen[f"requests_{name}_total"] for name in ("finished", "aborted", "failed"))
        assert seen["requests_accepted_total"] == ends > 20 and seen["requests_in_flight"] == 0
        assert {"lora_requests_info", "cache_config_info", "spec_decode_num_draft_tokens_total"} <= set(seen)


def test_adapters_over_http_need_leave_and_a_place(serving: Any, keys_file: Path, tmp_path: Path) -> None:
    body = {"lora_name": "mine", "lora_path": "mine"}
    with serving() as server:
        assert post(server, path="/v1/load_lora_adapter", body=body).status_code == 403
    home = tmp_path / "loras"
    home.mkdir()
    (home / "link").symlink_to(tmp_path)
    with serving(api_keys_file=keys_file, allow_runtime_lora=True, lora_directory=home) as server:
        assert post(server, "sk-ann", "/v1/load_lora_adapter", body).status_code == 403
        for path in ("..", "../x", "/etc", "link", "link/x", "."):
            answer = post(server, "sk-boss", "/v1/load_lora_adapter", {**body, "lora_path": path})
            assert answer.status_code == 403 and answer.json()["error"]["param"] == "lora_path", path
        assert post(server, "sk-boss", "/v1/unload_lora_adapter", {"lora_name": "mine"}).status_code == 404
    with pytest.raises(UserError, match="lora_directory"):
        ServeSpec.parse({"model": "x", "allow_runtime_lora": True})


def test_the_guide_names_every_route_and_field(engine_of: Any) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    shapes = (asks.ChatAsk, asks.TextAsk, asks.StructuredOutputs)
    obvious = {"model", "messages", "prompt", "modalities", "add_special_tokens"}
    names = {info.alias or name for shape in shapes for name, info in shape.model_fields.items()} - obvious | set(asks.NO_EFFECT)
    routes = {route.path for route in serve_app(engine_of(), ServeSpec(model="x")).routes} - {"/v1/models/{name:path}"}
    assert [name for name in (*names, *routes) if name not in guide and not name.startswith(("/docs", "/redoc"))] == []
