"""`garage synthesize` with a model as teacher: a scripted endpoint, a bad connection, kills, and the embedded model."""

import importlib.util
import json
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from garage.cli import main
from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.core.types import Message, Request, Sampling, Structure
from garage.data.asking import form_of
from garage.data.read import read_dataset
from garage.recipes.teachers import SharedEngine, open_generator
from garage.serve.client import Remote
from garage.store.corpus import Chunk, Document, write_corpus

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("teacher_faults", ROOT / "bench" / "teacher_faults.py")
bench = importlib.util.module_from_spec(_spec)
sys.modules["teacher_faults"] = bench
_spec.loader.exec_module(bench)

KEY = "sk-test-9876543210"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def corpus(tmp_path):
    documents, chunks = [], []
    for number in range(4):
        facts = [f"The {thing} of Place{number} was built in {1700 + n} and holds {n + 20} people." for n, thing in enumerate(bench.THINGS)]
        text = " ".join(facts)
        documents.append((Document(f"d{number}", f"d{number}.txt", "txt", len(text)), text))
        chunks.append(Chunk(f"d{number}-0", f"d{number}", text, 0, len(text), 400))
    write_corpus(tmp_path / "corpus", documents, chunks, [], spec={})
    return tmp_path / "corpus"


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]) if code == 0 else {}, captured.err


def test_rows_over_http_are_traced_and_the_key_stays_secret(tmp_path, corpus, capsys):
    with bench.serving(bench.teacher_at(0.0)) as url:
        words = ["synthesize", corpus, "--out", tmp_path / "d", "--teacher", f"{url}/v1#copier", "--rows", 40, "--json"]
        code, made, err = run(capsys, *words, "--test_share", 0.25, "--price_per_million_in", 1, "--price_per_million_out", 2)
    assert code == 0 and (made["rows"], made["test_rows"], made["missing"], made["shortfall"]) == (40, 10, 0, "")
    assert made["calls"] > 0 and made["tokens"] > 0 and made["cost"] > 0 and made["parse_rate"] == 1.0
    assert made["rejected"]["evidence not in the text"] == sum(1 for row in read_dataset(tmp_path / "d", split="rejected")
                                                              if row.meta["rejected"] == "evidence not in the text")  # fmt: skip
    manifest = read_manifest(tmp_path / "d", "dataset")
    assert manifest.parents == (read_manifest(corpus).id,) and manifest.facts["rejected_rows"] == sum(made["rejected"].values())
    train, test = ([row.meta["document"] for row in read_dataset(tmp_path / "d", split=split)] for split in ("train", "test"))
    assert set(train) and set(test) and not set(train) & set(test)
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) and KEY not in err
    assert not list(tmp_path.glob(".d*")) and "50/50" in err


def test_what_was_paid_for_is_not_replaced(tmp_path, corpus, capsys):
    with bench.serving(bench.teacher_at(0.0)) as url:
        words = ["synthesize", corpus, "--out", tmp_path / "d", "--teacher", f"{url}/v1#copier", "--rows", 3, "--json"]
        assert run(capsys, *words)[0] == 0
        code, _, err = run(capsys, *words)
    assert code == 2 and "replaces nothing" in err and "choose another --out" in err


def test_a_cap_is_told_and_a_higher_one_goes_on(tmp_path, corpus, capsys):
    with bench.serving(bench.teacher_at(0.0)) as url:
        words = ["synthesize", corpus, "--out", tmp_path / "d", "--teacher", f"{url}/v1#copier", "--rows", 60, "--json"]
        _, first, err = run(capsys, *words, "--max_calls", 5)
        assert first["calls"] == 5 and "the cap max_calls is reached" in first["shortfall"] and first["missing"] == 60 - first["rows"] > 0
        assert "pays for nothing again" in err and (tmp_path / ".d.calls").exists()
        _, second, _ = run(capsys, *words, "--max_calls", 500)
    assert second["rows"] == 60 and not (tmp_path / ".d.calls").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--teacher", "http://127.0.0.1:9/v1#m", "--rows", "2"], "cannot be reached"),
        (["--teacher", "http://user:pw@127.0.0.1:9/v1#m", "--rows", "2"], "OPENAI_API_KEY"),
        (["--teacher", "http://127.0.0.1:9/v1?key=pw#m", "--rows", "2"], "OPENAI_API_KEY"),
        (["--teacher", "http://127.0.0.1:9/v1", "--rows", "2"], "#model"),
        (["--teacher", "nosuchmodel", "--rows", "2"], "no model 'nosuchmodel'"),
        (["--teacher", "nano"], "give --rows"),
    ],
)
def test_mistakes_have_a_remedy_and_leave_nothing(tmp_path, corpus, capsys, monkeypatch, options, says):
    monkeypatch.setattr("garage.serve.client.FIRST_PAUSE", 0.0)
    code, _, err = run(capsys, "synthesize", corpus, "--out", tmp_path / "d", *options)
    assert code == 2 and says in err and "remedy" in err and "pw" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_the_embedded_model_runs_and_says_what_it_is_worth(tmp_path, corpus, capsys):
    words = ["synthesize", corpus, "--out", tmp_path / "d", "--teacher", "nano", "--rows", 3, "--max_tokens", 40, "--batch", 2, "--json"]
    code, made, err = run(capsys, *words)
    assert code == 0 and made["rows"] + made["missing"] == 3 and made["calls"] > 0 and made["tokens"] > made["calls"] * 100
    assert made["missing"] == 0 or (made["shortfall"] and sum(made["rejected"].values()) > 0 and "rows fewer than asked for" in err)


def test_rows_of_a_file_become_preferences(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": f"Q{n}?", "answer": f"A{n}"}) + "\n" for n in range(8)) + "oops\n")

    def say(asked):
        user, draw = asked["messages"][-1]["content"], asked["seed"]
        if "Rate the answer" in user:
            return json.dumps({"accuracy": min(3, user.count("very")), "relevance": 2, "clarity": 1, "usefulness": 1})
        return f"It is {'very ' * (draw % 4)}so."

    with scripted(say) as url:
        words = ["synthesize", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "d", "--teacher", f"{url}/v1#m"]
        code, made, err = run(capsys, *words, "--kind", "preference", "--rows", 4, "--margin", 2, "--json")
    rows = list(read_dataset(tmp_path / "d"))
    assert code == 0 and made["rows"] == len(rows) == 4 and "line 9" in err
    assert all(row.rejected and row.messages[-1].content.count("very") - row.rejected.count("very") >= 2 for row in rows)
    assert read_manifest(tmp_path / "d").parents == ()


@contextmanager
def scripted(say, faults=()):
    """An endpoint that first commits `faults`, one a request, then answers; `say` gets the request's body."""
    todo, lock = list(faults), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.times.append(time.monotonic())
                server.keys.add(self.headers["Authorization"])
                fault = todo.pop(0) if todo else None
            if fault == "cut":
                return self.connection.close()
            status, data, headers = fault or (200, json.dumps(completion(say(asked))).encode(), {})
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.times, server.keys = [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scripted.server = server
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def completion(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}  # fmt: skip


ASK = [Request("a", (Message("user", "Hello"),), Sampling(max_tokens=5))]
BROKEN = b'{"choices": [{"mess'


@pytest.mark.parametrize(
    "fault",
    [
        (500, b"{}", {}),
        (503, b"<html>", {}),
        (429, b"{}", {}),
        "cut",
        (200, BROKEN, {}),
        (200, BROKEN, {"Content-Length": "500"}),
        (200, b"<html>hi</html>", {"Content-Type": "text/html"}),
        (200, b'{"choices": null}', {}),
        (200, b'{"choices": [{}]}', {}),
    ],
)
def test_every_passing_fault_is_asked_again(fault, monkeypatch):
    monkeypatch.setattr("garage.serve.client.FIRST_PAUSE", 0.01)
    with scripted(lambda asked: "hi", [fault, fault]) as url:
        (done,) = Remote(f"{url}/v1", "m", api_key=KEY, retries=2).generate(ASK)
        assert (done.text, done.finish_reason, done.prompt_tokens, done.output_tokens) == ("hi", "stop", 7, 3)
        assert len(scripted.server.times) == 3 and scripted.server.keys == {f"Bearer {KEY}"}
    with scripted(lambda asked: "hi", [(500, b"{}", {}), *[fault] * 3]) as url:
        remote = Remote(f"{url}/v1", "m", retries=0)
        assert [remote.generate(ASK)[0].finish_reason for _ in range(3)] == ["error"] * 3


def test_the_endpoint_says_how_long_to_wait_and_pauses_grow():
    with scripted(lambda asked: "hi", [(429, b"{}", {"Retry-After": "1"})]) as url:
        assert Remote(f"{url}/v1", "m").generate(ASK)[0].text == "hi"
        first, second = scripted.server.times
        assert 1.0 <= second - first < 3
    with scripted(lambda asked: "hi", [(429, b"{}", {"Retry-After": "999"})]) as url:
        assert Remote(f"{url}/v1", "m").generate(ASK)[0].finish_reason == "error" and len(scripted.server.times) == 1
    with scripted(lambda asked: "hi", [(500, b"{}", {})] * 2) as url:
        Remote(f"{url}/v1", "m").generate(ASK)
        first, second, third = scripted.server.times
        assert second - first >= 0.25 and third - second >= 0.5


@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_request_is_not_asked_again(status):
    with scripted(lambda asked: "hi", [(status, b'{"error": {"message": "too long"}}', {})]) as url:
        (done,) = Remote(f"{url}/v1", "m").generate(ASK)
        assert done.finish_reason == "error" and len(scripted.server.times) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_the_whole(status):
    with scripted(lambda asked: "hi", [(status, b'{"error": {"message": "no"}}', {})]) as url, pytest.raises(UserError, match="refuses"):
        Remote(f"{url}/v1", "m").generate(ASK)


def test_a_shared_engine_answers_many_threads_and_cuts_to_fit():
    teacher = open_generator("nano", concurrency=4)
    assert isinstance(teacher, SharedEngine)
    requests = [Request(str(n), (Message("user", f"What is {n}?"),), Sampling(max_tokens=8, seed=n)) for n in range(6)]
    answers = {}

    def ask(request):
        answers[request.id] = teacher.generate([request])[0]

    threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: done.id for name, done in answers.items()} == {str(n): str(n) for n in range(6)}
    assert all(done.finish_reason in ("stop", "length") and 0 < done.output_tokens == len(done.token_ids) <= 8 for done in answers.values())
    long = [Request("long", (Message("user", "word " * 100),), Sampling(max_tokens=10**6)), Request("x", (Message("user", "w " * 9000),))]
    cut, refused = teacher.generate(long)
    assert cut.finish_reason in ("stop", "length") and refused.finish_reason == "error" and refused.error


def test_the_bench_holds_in_small(tmp_path, corpus):
    """Two lives with a kill between them, 30 % faults, 24 rows."""
    with bench.serving(bench.teacher_at(0.2)) as teacher:
        found = bench.disturbed(tmp_path, 24, teacher, every=0.5, max_kills=1)
    assert found["kills"] == 1 and all(found["checks"].values()), found


def test_a_schema_is_sent_to_those_who_know_schemas_and_left_out_for_the_others():
    bodies, wanted = [], replace(ASK[0], structure=Structure("json", json.dumps(form_of("qa").schema)))

    def say(asked):
        bodies.append(asked)
        return "hi"

    with scripted(say) as url:
        Remote(f"{url}/v1", "m").generate([wanted, ASK[0]])
    sent = [body.get("response_format", {}).get("json_schema", {}).get("schema") for body in bodies]
    assert sorted(sent, key=bool) == [None, form_of("qa").schema] and set(form_of("qa").schema["properties"]) == {"rows"}
    bodies.clear()
    with scripted(say, [(422, b'{"error": {"message": "unknown field response_format"}}', {})]) as url:
        remote = Remote(f"{url}/v1", "m")
        assert [done.text for _ in range(2) for done in remote.generate([wanted])] == ["hi", "hi"]
        assert len(scripted.server.times) == 3, "it is refused once, and not offered again"
    assert not any("response_format" in body for body in bodies)
