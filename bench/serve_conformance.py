"""Do other people's clients work against the server, and does anything a machine can think of bring it down?

    sdk           the openai SDK, one check a feature: chat, streams, parse, tools, structured output, embeddings, responses, errors
    lm-eval       `local-completions` on a small task that lies here: every log-likelihood within 1e-3 of our engine's own scoring
    langchain     ChatOpenAI and OpenAIEmbeddings as an application uses them
    ollama        an application written for Ollama's OpenAI-compatible endpoint; Ollama's own client speaks /api/*, which is not served
    schemathesis  10,000 cases made from the schema of our endpoints (written from the shapes of requests): no 5xx

The model is nano in float32. Every client but the SDK speaks through a recorder, a proxy on loopback, and what it sent is stored: path,
names of the fields, status. The clients live in an environment of their own; nothing needs a network:

    python3 -m venv C && C/bin/pip install "lm_eval[api]" schemathesis langchain-openai ollama transformers torch==2.13.0+cpu "numpy<2.4"

    python bench/serve_conformance.py --clients-python C/bin/python      stores bench/results/serve_conformance.json (about 6 minutes)
    python bench/serve_conformance.py --part sdk                         one part; stores nothing
    python bench/serve_conformance.py --smoke                            seconds; 200 cases; stores nothing
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel
from record import record, typed
from serve_clients import ITEMS
from serving import CACHE, NANO, Server, served

from garage.core.types import Request, Sampling
from garage.engine.engine import Engine
from garage.serve import asks
from garage.serve.responses import ResponseAsk
from garage.specs.serve import EngineSpec

PARTS = ("sdk", "lm-eval", "langchain", "ollama", "schemathesis")
SHAPES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": asks.ChatAsk, "/v1/completions": asks.TextAsk, "/v1/responses": ResponseAsk, "/v1/embeddings": asks.EmbedAsk,
    "/tokenize": asks.TokenizeAsk, "/detokenize": asks.DetokenizeAsk, "/v1/load_lora_adapter": asks.LoadAsk,
    "/v1/unload_lora_adapter": asks.UnloadAsk,
}  # fmt: skip
READ = ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/version", "/load", "/metrics")
TURNS: Any = [{"role": "user", "content": "Tom has 3 apples and gets 2 more. How many has he?"}]
ADD: Any = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {
    "type": "object", "required": ["left", "right"], "additionalProperties": False, "properties": {
        name: {"type": "integer", "minimum": 0, "maximum": 9} for name in ("left", "right")}}}}  # fmt: skip


Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # nano would write digits for ever


class Sum(BaseModel):
    left: Digit
    right: Digit


# --- the openai SDK -------------------------------------------------------------------------------------------------------------------


def sdk_checks(sdk: openai.OpenAI) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Named checks; each is true or raises."""
    chat, model = sdk.chat.completions, "bench"

    def ask(**more: Any) -> Any:
        return chat.create(**{"model": model, "messages": TURNS, "max_tokens": 32, "temperature": 0, **more})

    def stream(**more: Any) -> list[Any]:
        return list(ask(stream=True, **more))

    def refused(kind: type[openai.APIStatusError], param: str | None, call: Callable[[], object]) -> bool:
        try:
            call()
        except kind as error:
            return error.param == param and error.response.headers["x-request-id"] != ""
        return False

    yield "models.list, retrieve", lambda: sdk.models.retrieve(sdk.models.list().data[0].id).object == "model"
    yield "chat", lambda: (a := ask()).choices[0].message.content and a.usage.total_tokens > a.usage.prompt_tokens > 0
    yield "chat stream is the whole answer", lambda: _joined(stream()) == ask().choices[0].message.content
    yield "stream usage", lambda: stream(stream_options={"include_usage": True})[-1].usage.completion_tokens > 0
    yield "seed", lambda: _said(ask(temperature=3, seed=7)) == _said(ask(temperature=3, seed=7)) != _said(ask(temperature=3, seed=8))
    yield "n", lambda: len(ask(n=3, temperature=1).choices) == 3
    yield "stop", lambda: " " not in _said(ask(stop=" ")) and ask(stop=" ").choices[0].finish_reason == "stop"
    yield "logprobs", lambda: len(ask(logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content[0].top_logprobs) == 3
    yield "logit_bias", lambda: len(set(_said(ask(logit_bias={"50": 100}, max_tokens=6)))) <= 3
    yield "penalties", lambda: bool(_said(ask(presence_penalty=1, frequency_penalty=1)))
    yield "max_completion_tokens", lambda: chat.create(model=model, messages=TURNS, max_completion_tokens=3).usage.completion_tokens <= 3
    yield "json_object", lambda: _is_object(ask(response_format={"type": "json_object"}, max_tokens=200))
    yield "parse", lambda: isinstance(_parsed(chat, model), Sum)
    yield "tools required", lambda: _has_call(ask(tools=[ADD], tool_choice="required", max_tokens=96))
    yield (
        "tools by name",
        lambda: _has_call(ask(tools=[ADD], tool_choice={"type": "function", "function": {"name": "add"}}, max_tokens=96)),
    )
    yield "tools auto, none", lambda: all(ask(tools=[ADD], tool_choice=how).choices[0].message for how in ("auto", "none"))
    yield "tools stream", lambda: _streamed_call(stream(tools=[ADD], tool_choice="required", max_tokens=96))
    yield "tool results", lambda: bool(ask(messages=_tool_turns(), tools=[ADD]).choices[0].finish_reason)
    yield "completions", lambda: bool(sdk.completions.create(model=model, prompt=["Once", "Twice"], max_tokens=4).choices[1].text)
    yield "completions echo logprobs", lambda: _echoed(sdk, model)
    yield "embeddings, float = base64", lambda: _embedded(sdk, model)
    yield "responses", lambda: bool(sdk.responses.create(model=model, input="What is 2 + 2?", max_output_tokens=24).output_text)
    yield "responses stream", lambda: _response_events(sdk, model)
    yield (
        "responses parse",
        lambda: isinstance(sdk.responses.parse(model=model, input="Add.", text_format=Sum, max_output_tokens=400).output_parsed, Sum),
    )
    yield "unknown model", lambda: refused(openai.NotFoundError, "model", lambda: ask(model="other"))
    yield "unknown field", lambda: refused(openai.BadRequestError, "no_such", lambda: ask(extra_body={"no_such": 1}))
    yield "context", lambda: refused(openai.BadRequestError, "messages", lambda: ask(messages=[{"role": "user", "content": "a " * 9000}]))
    yield (
        "with_raw_response",
        lambda: chat.with_raw_response.create(model=model, messages=TURNS, max_tokens=2).http_response.status_code == 200,
    )


def sdk(server: Server, _: argparse.Namespace) -> dict[str, Any]:
    failed, names = {}, []
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        for name, check in sdk_checks(client):
            names.append(name)
            try:
                assert check(), "not true"
            except Exception as error:  # a check that fails is a figure
                failed[name] = f"{type(error).__name__}: {error}"[:300]
    return {"checks": names, "failed": failed, "holds": not failed}


def _said(answer: Any) -> str:
    return answer.choices[0].message.content or ""


def _is_object(answer: Any) -> bool:
    """A JSON object, or the beginning of one that the limit cut."""
    choice = answer.choices[0]
    text = choice.message.content
    return text.lstrip().startswith("{") if choice.finish_reason == "length" else isinstance(json.loads(text), dict)


def _joined(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def _parsed(chat: Any, model: str) -> Any:
    return chat.parse(model=model, messages=TURNS, response_format=Sum, max_tokens=400, temperature=0).choices[0].message.parsed


def _has_call(answer: Any) -> bool:
    calls = answer.choices[0].message.tool_calls
    return bool(calls) and set(json.loads(calls[0].function.arguments)) == {"left", "right"}


def _streamed_call(chunks: list[Any]) -> bool:
    parts = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or ()]
    arguments = "".join(part.function.arguments or "" for part in parts if part.index == 0)
    return parts[0].function.name == "add" and set(json.loads(arguments)) == {"left", "right"}


def _tool_turns() -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"left": 2, "right": 3}'}}
    return [*TURNS, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "5"}]


def _echoed(sdk: openai.OpenAI, model: str) -> bool:
    probs = sdk.completions.create(model=model, prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    return (
        "".join(probs.tokens) == "Once upon a time" and probs.token_logprobs[0] is None and all(p <= 0 for p in probs.token_logprobs[1:])
    )


def _embedded(sdk: openai.OpenAI, model: str) -> bool:
    made = [sdk.embeddings.create(model=model, input=["a fox"], encoding_format=how).data[0].embedding for how in ("float", "base64")]
    packed = sdk.embeddings.create(model=model, input=["a fox"]).data[0].embedding
    return abs(sum(v * v for v in made[0]) - 1) < 1e-3 and max(abs(a - b) for a, b in zip(made[0], packed, strict=True)) < 1e-6


def _response_events(sdk: openai.OpenAI, model: str) -> bool:
    events = list(sdk.responses.create(model=model, input="What is 2 + 2?", max_output_tokens=24, stream=True, temperature=0))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return events[0].type == "response.created" and text == events[-1].response.output_text and bool(text)


# --- clients behind a recorder --------------------------------------------------------------------------------------------------------


@contextmanager
def recorder(server: Server) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A proxy on loopback before the server; gives its URL and the list it fills."""
    seen: list[dict[str, Any]] = []
    target = urlsplit(server.url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            onward = http.client.HTTPConnection(str(target.hostname), target.port, timeout=300)
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection", "content-length")}
            onward.request(self.command, self.path, body or None, kept)
            reply = onward.getresponse()
            seen.append({"request": f"{self.command} {self.path[:200]}", "fields": _fields(body), "status": reply.status})
            said = reply.read()
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said if self.command != "HEAD" else b"")
            onward.close()

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_TRACE = _pass

        def log_message(self, *_: object) -> None:
            """Quiet."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", seen
    finally:
        proxy.shutdown()


def _fields(body: bytes) -> list[str]:
    try:
        raw = json.loads(body)
    except ValueError:
        return []
    return sorted(raw) if isinstance(raw, dict) else []


def client(kind: str) -> Callable[[Server, argparse.Namespace], dict[str, Any]]:
    """Run one of serve_clients behind the recorder; true, or what it says is not supported, is what holds."""

    def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
        with recorder(server) as (url, seen):
            found = _client(options, kind, url)
        if "failed" in found:
            return {**found, "requests": _summary(seen), "holds": False}
        holds = all(value is True or str(value).startswith("not supported") for value in found.values())
        return {"found": found, "requests": _summary(seen), "holds": holds}

    return run


def lm_eval(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Its log-likelihoods beside those of our engine, offline."""
    with recorder(server) as (url, seen):
        found = _client(options, "lm-eval", url)
    if "failed" in found:
        return {**found, "requests": _summary(seen), "holds": False}
    engine = Engine.open(NANO, None, EngineSpec.parse({"dtype": "float32", "max_model_len": 1024}))
    ours = [[_score(engine, context, " " + choice) for choice in choices] for context, choices in ITEMS]
    theirs = [[each["logprob"] for each in row] for row in found["told"]]
    error = max(abs(a - b) for mine, told in zip(ours, theirs, strict=True) for a, b in zip(mine, told, strict=True))
    return {"accuracy": found["accuracy"], "largest_difference": error, "scored": sum(map(len, ours)), "requests": _summary(seen),
            "holds": error <= 1e-3}  # fmt: skip


def _score(engine: Engine, context: str, choice: str) -> float:
    """The log-likelihood of a continuation: the sum over its tokens, as lm-eval splits them."""
    whole, start = engine.tokenizer.encode(context + choice), len(engine.tokenizer.encode(context))
    (done,) = engine.generate([Request("1", tuple(whole), Sampling(max_tokens=0, prompt_logprobs=0))])
    assert not done.error, done.error
    return sum(place.logprob for place in done.prompt_logprobs[start:] if place is not None)


def _client(options: argparse.Namespace, kind: str, url: str) -> dict[str, Any]:
    command = [options.clients_python, str(Path(__file__).with_name("serve_clients.py")), kind, url, "bench", str(NANO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _summary(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each kind of request once, and how often it came."""
    counts = Counter((each["request"], tuple(each["fields"]), each["status"]) for each in seen)
    return [{"request": r, "fields": list(f), "status": s, "times": n} for (r, f, s), n in sorted(counts.items())]


# --- schemathesis ---------------------------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """OpenAPI of our endpoints, from the shapes of requests; the model's name is given, or every case would end at a 404."""
    parts: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    answers = {"default": {"description": "an answer or an error"}}
    for path, shape in SHAPES.items():
        body = shape.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= body.pop("$defs", {})
        if "model" in body["properties"]:
            body["properties"]["model"] = {"const": "bench"}
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if name in body["properties"]:
                body["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 4}
        paths[path] = {
            "post": {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}, "responses": answers}
        }
    for path in READ:
        named = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}] if "{" in path else []
        paths[path] = {"get": {"parameters": named, "responses": answers}}
    return {"openapi": "3.1.0", "info": {"title": "Garage", "version": "1"}, "paths": paths, "components": {"schemas": parts}}


def schemathesis(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Cases for every endpoint, counted by the recorder; repeated with another seed until there are enough."""
    seconds, seed, logs = time.perf_counter(), 0, ""
    with tempfile.TemporaryDirectory() as place, recorder(server) as (url, seen):
        file = Path(place, "openapi.json")
        file.write_text(json.dumps(schema()))
        while len(seen) < options.cases and seed < 20:
            each = max(20, (options.cases - len(seen)) // len(SHAPES))
            command = [str(Path(options.clients_python).with_name("schemathesis")), "run", str(file), "--url", url, "--workers", "2",
                       "--checks", "not_a_server_error", "--max-examples", str(each), "--mode", "all", "--seed", str(seed), "--no-color",
                       "--generation-database", "none", "--continue-on-failure", "--suppress-health-check", "all",
                       "--request-timeout", "60", "--phases", "examples,coverage,fuzzing"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, cwd=place)
            logs, seed = done.stdout[-3000:] + done.stderr[-1000:], seed + 1
            if done.returncode not in (0, 1):
                return {"failed": logs, "holds": False}
    statuses = Counter(each["status"] for each in seen)
    broken = [each for each in seen if each["status"] >= 500]
    ended = re.findall(r"(\d+) (?:generated|failed|errored|passed|found)", logs)
    return {"cases": len(seen), "runs": seed, "seconds": round(time.perf_counter() - seconds), "statuses": dict(statuses),
            "5xx": broken[:20],
            "by_path": dict(Counter(each["request"].partition("?")[0][:60] for each in seen).most_common(20)), "said": ended,
            "log": logs if broken else "", "same_process": server.process.poll() is None,
            "holds": not broken and len(seen) >= options.cases and server.process.poll() is None}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--clients-python", required=True, help="a Python with lm-eval, schemathesis, langchain-openai and ollama")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    if options.smoke:
        options.cases, options.threads = 200, 1
    runs = {"sdk": sdk, "lm-eval": lm_eval, "langchain": client("langchain"), "ollama": client("ollama"), "schemathesis": schemathesis}
    figures: dict[str, Any] = {}
    settings = {"dtype": "float32", "max_model_len": 1024, "threads": options.threads, "log": CACHE / "conformance.log"}
    with served(NANO, **settings) as server:
        for name in PARTS:
            if options.part in (None, name):
                figures[name] = runs[name](server, options)
                print(name, json.dumps(figures[name], indent=1), flush=True)
    holds = all(each["holds"] for each in figures.values())
    if not options.smoke and options.part is None:
        print(record("serve_conformance", typed(), figures))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
