"""Synthesis through a bad connection by a process that keeps dying: the number asked for is delivered, and nothing is paid twice.

The teacher is our own server and engine with the embedded model, whose choice of tokens is scripted: it writes grounded rows by copying
sentences (one in ten it makes up). Between it and `garage synthesize` stands a proxy that spoils 30 % of the requests:

    500, 429        answered without asking the teacher; 429 says when to come back
    cut             the connection ends before, or in the middle of, the answer
    garbage         status 200 and half of a JSON body
    cut content     a proper answer whose text ends in the middle: paid for, and only partly of use
    slow            the answer comes, late

`garage synthesize` is killed with SIGKILL five seconds after its first request, and started again, until it ends by itself. An answer
counts as paid when it left the proxy whole. What a kill may cost is what was in flight: as many answers as `--concurrency`.

    python bench/teacher_faults.py             300 rows, the twin that forgets, and `garage serve nano` as teacher; stores the result
    python bench/teacher_faults.py --small     24 rows, one kill, no twin; prints JSON, stores nothing (what the tests run)

The broken twin loses its calls log at every kill: it must be caught paying twice; it and the small run have a scripted server. The last
part asks the embedded model unscripted: it is too small to write rows, so its part is that all calls are answered, counted and said to be
of no use.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import garage.engine.engine as engines
from garage.data.read import read_dataset
from garage.engine.engine import Engine
from garage.engine.request import Row
from garage.engine.request import Sequence as Running
from garage.engine.sampler import Chosen
from garage.recipes.ingest import ingest
from garage.serve.server import running
from garage.specs.data import IngestSpec
from garage.specs.serve import EngineSpec, ServeSpec
from garage.store.corpus import read_chunks
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer

FAULTS = ("500", "429", "cut before", "cut within", "garbage", "cut content", "slow")
FAULT_SHARE, CONCURRENCY, KEY = 0.3, 8, "sk-bench-0123456789"
PLACES = ("Arden", "Bolney", "Calder", "Dunsop", "Elstow", "Fulmer", "Grimley", "Hartle", "Ilmer", "Jevington", "Kelham", "Lydd")
THINGS = ("mill", "bridge", "orchard", "quarry", "chapel", "ferry", "market", "school", "garden", "harbour", "tower", "library", "bakery",
          "theatre", "station", "museum", "brewery", "stable", "forge", "inn", "granary", "well", "lodge", "barn", "dairy", "pottery",
          "kiln", "tannery", "sawmill", "smithy", "vineyard", "cellar", "gatehouse", "dovecote", "aqueduct")  # fmt: skip
FACT = re.compile(r"The (\w+) of (\w+) was built in (\d+) and holds (\d+) people\.")


def write_documents(place: Path) -> None:
    """A document a place, a sentence a thing: 420 facts, each stated once."""
    place.mkdir()
    draw = random.Random(0)
    for name in PLACES:
        numbers = [(draw.randint(1500, 1999), draw.randint(12, 900)) for _ in THINGS]
        facts = [f"The {thing} of {name} was built in {a} and holds {b} people." for thing, (a, b) in zip(THINGS, numbers, strict=True)]
        (place / f"{name.lower()}.txt").write_text(f"# Guide to {name}\n\n" + "\n\n".join(facts))


@dataclass
class Books:
    """What passed the proxy. `paid` counts whole answers by request."""

    paid: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def twice(self) -> int:
        return sum(count - 1 for count in self.paid.values())


class Handler(BaseHTTPRequestHandler, ABC):
    """A request's body in, an answer out; says nothing on the terminal."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    @abstractmethod
    def answer(self, body: bytes) -> None:
        """Answer one request."""

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def teacher_at(seconds: float) -> type[Handler]:
    """A teacher that takes up to twice `seconds` for an answer."""

    class Teacher(Handler):
        def answer(self, body: bytes) -> None:
            asked = json.loads(body)
            system, user = (message["content"] for message in asked["messages"])
            time.sleep(seconds * 2 * random.Random(asked["seed"]).random())
            text = json.dumps(lesson(system, user, random.Random(asked["seed"])))
            read, written = len(system + user) // 4, len(text) // 4
            usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice], "usage": usage}
            self.send(200, json.dumps(reply).encode())

    return Teacher


def lesson(system: str, user: str, draw: random.Random) -> list[dict[str, str]]:
    """Rows about facts of the fenced text that were not asked before; one in ten is made up."""
    nonce, count = re.search(r"lines that say (\w+) stands", system), re.search(r"at most (\d+) objects", system)
    assert nonce and count
    before, text, _ = user.split(nonce[1])
    rows = []
    for fact in FACT.finditer(text):
        if f"the {fact[1]} of {fact[2]} hold" in before or len(rows) == int(count[1]):
            continue
        evidence = fact[0] if draw.random() > 0.1 else f"Everyone knows that the {fact[1]} is much larger than it looks."
        question = f"How many people does the {fact[1]} of {fact[2]} hold?"
        rows.append({"question": question, "answer": f"The {fact[1]} of {fact[2]} holds {fact[4]} people.", "evidence": evidence})
    return rows


class Script:
    """Stands where the engine's sampler stands: the next token of an answer that is known beforehand."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._answers = tokenizer, dict[str, list[int]]()

    def __call__(self, logits: object, rows: Sequence[Row], vocab_size: int) -> SimpleNamespace:
        chosen = Chosen([self._next(sequence) for sequence, _ in rows], [None] * len(rows), {})
        return SimpleNamespace(read=lambda: chosen)

    def _next(self, sequence: Running) -> int:
        if sequence.id not in self._answers:
            turns = self._tokenizer.decode(sequence.tokens[: sequence.num_prompt], skip_special=False).split("<|im_end|>")
            system, user = (turn.strip().partition("\n")[2] for turn in turns[:2])
            text = json.dumps(lesson(system, user, random.Random(sequence.seed)))
            self._answers[sequence.id] = [*self._tokenizer.encode(text), self._tokenizer.eos_ids[0]]
        return self._answers[sequence.id][len(sequence.tokens) - sequence.num_prompt]


@contextmanager
def our_server() -> Iterator[str]:
    """`garage serve nano`, in this process, with the script for a sampler."""
    engine, real = Engine.open(locate("nano").base, None, EngineSpec(max_num_seqs=CONCURRENCY)), engines.sample
    engines.sample = Script(engine.tokenizer)  # type: ignore[assignment]
    try:
        with running(engine, ServeSpec(model="nano", served_model_name="copier", port=0)) as url:
            yield url
    finally:
        engines.sample = real


def proxy_to(url: str, books: Books) -> type[Handler]:
    """A proxy that spoils requests, drawn anew for each attempt."""
    draw = random.Random(1)

    class Proxy(Handler):
        def answer(self, body: bytes) -> None:
            with books.lock:
                books.requests += 1
                fault = draw.choice(FAULTS) if draw.random() < FAULT_SHARE else ""
                books.faults[fault or "none"] += 1
            if fault in ("500", "429"):
                self.send(int(fault), b'{"error": {"message": "spoilt"}}', **({"Retry_After": "1"} if fault == "429" else {}))
                return
            if fault == "cut before":
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(2)
            status, data = forward(url + self.path, body)
            if status != 200:
                self.send(status, data)
            elif fault == "cut within":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data))
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif fault == "garbage":
                self.send(200, data[: len(data) // 2])
            else:
                self.send(200, cut_content(data) if fault == "cut content" else data)
                with books.lock:
                    books.paid[blake2b(body).hexdigest()] += 1

    return Proxy


def forward(url: str, body: bytes) -> tuple[int, bytes]:
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()


def cut_content(data: bytes) -> bytes:
    reply = json.loads(data)
    message = reply["choices"][0]["message"]
    message["content"] = message["content"][: len(message["content"]) // 2]
    return json.dumps(reply).encode()


class Server(ThreadingHTTPServer):
    """Takes it without a word when a client dies."""

    daemon_threads, request_queue_size = True, 64

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Lives:
    """What the lives of one synthesis came to; `result` is what the last one said, None if it never ended by itself."""

    kills: int
    result: dict[str, object] | None
    seconds: float


def live(command: Sequence[str], books: Books, *, every: float, max_kills: int, work: Path | None = None) -> Lives:
    """Run a command, killing it `every` seconds after its first request; with `work` that directory is lost at every kill."""
    start, kills = time.monotonic(), 0
    while True:
        before = books.requests
        environment = os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        while books.requests == before and process.poll() is None:
            time.sleep(0.02)
        try:
            out, err = process.communicate(timeout=every if kills < max_kills else 600)
            assert process.returncode == 0, err.decode()[-2000:]
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            kills += 1
        if out:  # it has said its result, whether the kill came after that or not
            return Lives(kills, json.loads(out.decode().splitlines()[-1]), time.monotonic() - start)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
            if kills == max_kills:
                return Lives(kills, None, time.monotonic() - start)


def command(corpus: Path, out: Path, teacher: str, rows: int, *options: str) -> list[str]:
    words = ["synthesize", str(corpus), "--out", str(out), "--teacher", teacher, "--rows", str(rows), "--json"]
    return [sys.executable, "-m", "garage", *words, "--concurrency", str(CONCURRENCY), *options]


def checks(corpus: Path, out: Path, rows: int, lives: Lives, books: Books) -> dict[str, bool]:
    """What must hold of the finished dataset and of the books."""
    chunks, made = {chunk.id: chunk for chunk in read_chunks(corpus)}, list(read_dataset(out))
    written = b"".join(path.read_bytes() for path in out.parent.rglob("*") if path.is_file())
    origins = [(chunks[row.meta["chunk"]], row.meta) for row in made]
    quoted = [chunk.text[int(meta["start"]) - chunk.start : int(meta["end"]) - chunk.start] for chunk, meta in origins]
    return {
        "asked_is_delivered": len(made) == rows == (lives.result or {}).get("rows"),
        "no_duplicates": len({row.messages[0].content for row in made}) == len(made),
        "every_row_quotes_its_chunk": quoted == [row.meta["support"] for row in made],
        "nothing_made_up": not any("Everyone knows" in row.meta["support"] for row in made),
        "paid_twice_only_in_flight": books.twice <= lives.kills * CONCURRENCY,
        "no_workspace_left": not list(out.parent.glob(".*.calls")),
        "no_key_on_disk": KEY.encode() not in written,
    }


TOLD = ("rows", "rejected", "calls", "tokens", "parse_rate", "missing", "shortfall")


def disturbed(place: Path, rows: int, teacher: str, *, every: float, max_kills: int) -> dict[str, object]:
    """The synthesis through the proxy under kills."""
    books, corpus, out = Books(), place / "corpus", place / "made" / "dataset"
    with serving(proxy_to(teacher, books)) as proxy:
        words = command(corpus, out, f"{proxy}/v1#copier", rows, "--max_tokens", "800")
        lives = live(words, books, every=every, max_kills=max_kills)
    assert lives.result is not None
    passed = {"requests": books.requests, "answers_paid": books.paid.total(), "paid_twice": books.twice, "faults": dict(books.faults)}
    told = {name: lives.result[name] for name in TOLD}
    found = checks(corpus, out, rows, lives, books)
    return {"asked": rows, "kills": lives.kills, "seconds": round(lives.seconds, 1), "told": told, **passed, "checks": found}


def forgetful(place: Path, rows: int, *, seconds: float, every: float, max_kills: int) -> dict[str, object]:
    """The broken twin: its calls log is lost at every kill. The check of the books must catch it."""
    books, out = Books(), place / "twin" / "dataset"
    with serving(teacher_at(seconds)) as teacher, serving(proxy_to(teacher, books)) as proxy:
        words, work = command(place / "corpus", out, f"{proxy}/v1#copier", rows), out.with_name(f".{out.name}.calls")
        lives = live(words, books, every=every, max_kills=max_kills, work=work)
    is_caught = books.twice > lives.kills * CONCURRENCY
    return {"kills": lives.kills, "answers_paid": books.paid.total(), "paid_twice": books.twice, "is_caught": is_caught}


def nano(place: Path) -> dict[str, object]:
    """The embedded model behind `garage serve` and the proxy, asked for 10 rows."""
    books, out = Books(), place / "nano" / "dataset"
    process = subprocess.Popen([sys.executable, "-m", "garage", "serve", "nano", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
        with serving(proxy_to(url, books)) as proxy:
            words = command(place / "corpus", out, f"{proxy}/v1#nano", 10, "--max_tokens", "200", "--batch", "8")
            lives = live(words, books, every=600, max_kills=0)
    finally:
        process.terminate()
        process.wait()
    assert lives.result is not None
    return {name: lives.result[name] for name in TOLD} | {"answers_paid": books.paid.total(), "paid_twice": books.twice}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="24 rows, prints JSON, stores nothing")
    is_small = parser.parse_args().small
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_documents(place / "documents")
        ingest(IngestSpec(paths=(place / "documents",), out=place / "corpus"))
        if is_small:
            with serving(teacher_at(0.2)) as teacher:
                print(json.dumps(disturbed(place, 24, teacher, every=0.5, max_kills=1)))
            return
        with our_server() as teacher:
            figures = disturbed(place, 300, teacher, every=5.0, max_kills=1000)
        figures["twin_without_log"] = forgetful(place, 300, seconds=1.0, every=5.0, max_kills=3)
        figures["nano_over_our_own_server"] = nano(place)
    from record import record, typed  # beside this file; only a full run stores

    print(json.dumps(figures, indent=1))
    print("->", record("teacher_faults", typed(), figures))


if __name__ == "__main__":
    main()
