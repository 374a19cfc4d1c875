"""The calls of one synthesis: several at once, each written down before its reply is used, none paid twice.

    spec.json     what is asked for; a rerun must ask for the same
    calls.jsonl   one line a call: hash of the request, reply, how it ended, tokens; appended and flushed to the disk at once

A killed run loses at most the calls that were under way. A rerun plans the same requests in the same order, finds their replies here and
asks only for the others; a line cut by the kill is dropped. A changed spec is refused, apart from the caps, prices and concurrency, which
may change between two runs. A call is made only if the most it can cost still fits under every cap, so that caps are kept, not passed.

Limits: a prompt is taken to have at most a token a byte, as is a reply whose endpoint does not count; a failed call counts as free.
"""

import fcntl
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import IO, Any

from garage.core.artifact import disk_error, write_file
from garage.core.errors import UserError
from garage.core.protocols import Generator
from garage.core.types import Completion, Message, Request
from garage.specs.data import SynthesizeSpec

PACE = {"max_calls", "max_tokens_spent", "max_cost", "price_per_million_in", "price_per_million_out", "concurrency"}
PLACES = {"corpus", "data", "out"}
DEAD, RETRY = 8, "see that it runs and what it says; the same command then goes on, and finished calls are not made again"
"""Calls failing one after another, each already asked again by its client, after which the teacher is taken to be down; what to do then."""


@contextmanager
def open_calls(place: Path, spec: SynthesizeSpec, *, parent: str) -> Iterator["Calls"]:
    """The calls of the synthesis of `spec` from the artifact or file `parent`, kept in the directory `place`; empty ones leave no trace.

    Raises:
        UserError: the calls there are of another spec, or another process is making them.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = open(place / "calls.jsonl", "a+b", buffering=0)  # noqa: SIM115  (closed below)
    except OSError as error:
        raise disk_error(error, place) from error
    with file:
        _lock(file, place)
        _require_same(place / "spec.json", {k: v for k, v in spec.resolved().items() if k not in PACE | PLACES} | {"parent": parent})
        calls = Calls(file, spec)
        try:
            yield calls
        finally:
            if not calls.num_calls:
                shutil.rmtree(place)


def request_key(name: str, request: Request) -> str:
    """The hash under which the reply of the model `name` to a request is kept."""
    text = json.dumps([name, asdict(request) | {"id": ""}], sort_keys=True, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


class Calls:
    """Asks, remembers and counts. `over` names the cap that stopped it, empty if none did."""

    def __init__(self, file: IO[bytes], spec: SynthesizeSpec, on_call: Callable[[], None] = lambda: None) -> None:
        self._file, self._spec, self.on_call = file, spec, on_call
        self._known, self._failed, self._failures, self._lock = dict[str, Completion](), dict[str, Completion](), 0, Lock()
        self.num_calls = self.tokens_in = self.tokens_out = 0
        self.over = ""
        for record in _whole_lines(file):
            self._note(str(record["request"]), Completion(**record["completion"]))

    @property
    def cost(self) -> float:
        return self._cost(self.tokens_in, self.tokens_out)

    def ask(self, name: str, generator: Generator, requests: Sequence[Request]) -> list[Completion | None]:
        """Replies of the model `name` in the order of the requests; None for those that a cap does not allow any more.

        Raises:
            UserError: the generator cannot go on, or fails call after call; what was answered is kept.
        """
        keys = [request_key(name, request) for request in requests]
        todo = deque((key, r) for key, r in dict(zip(keys, requests, strict=True)).items() if key not in self._known)
        running, num_asked = dict[Future[Completion], tuple[str, Request]](), len(todo)
        with ThreadPoolExecutor(self._spec.concurrency) as pool:
            while todo or running:
                while todo and len(running) < self._spec.concurrency and not self._over([todo[0], *running.values()]):
                    call = todo.popleft()
                    running[pool.submit(self._call, generator, *call)] = call
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._took(future.result(), running.pop(future)[0])
        self.over = self.over or (self._over([todo[0]]) if todo else "")
        if len(self._failed) < num_asked - len(todo):  # where all fail the teacher may be down, and the next run asks again
            self._write({})
        return [self._known.get(key) or self._failed.get(key) for key in keys]

    def require_answers(self) -> None:
        """UserError if no call was ever answered."""
        if self._failed and not self.num_calls:
            raise UserError(f"the teacher answered no call: {next(iter(self._failed.values())).error}", remedy=RETRY)

    def _call(self, generator: Generator, key: str, request: Request) -> Completion:
        done = generator.generate([request])[0]
        if done.finish_reason != "error":
            text = done.text.encode("utf-8", "replace")  # as it will be read again
            read, written = done.prompt_tokens or _bytes(request), done.output_tokens or len(done.token_ids) or len(text)
            self._write({key: Completion(request.id, text.decode(), (), done.finish_reason, read, output_tokens=written)})
        return done

    def _took(self, done: Completion, key: str) -> None:
        self._failures = self._failures + 1 if done.finish_reason == "error" else 0
        with self._lock:
            self._failed |= {key: Completion(done.id, "", (), "error", 0, error=done.error)} if self._failures else {}
        if self._failures >= DEAD:
            raise UserError(f"the teacher failed {DEAD} times one after another: {done.error}", remedy=RETRY)
        self.on_call()

    def _write(self, answered: Mapping[str, Completion]) -> None:
        """Append replies, and before them the failures that came before: what was planned after a failure counts on it."""
        with self._lock:
            records, self._failed = {**self._failed, **answered}, {}
            lines = [json.dumps({"request": key, "completion": asdict(done)}, ensure_ascii=False) + "\n" for key, done in records.items()]
            data = "".join(lines).encode("utf-8", "replace")
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                raise disk_error(error, Path(self._file.name)) from error
            for key, done in records.items():
                self._note(key, done)

    def _note(self, key: str, completion: Completion) -> None:
        self._known[key] = completion
        self.num_calls += 1
        self.tokens_in += completion.prompt_tokens
        self.tokens_out += completion.output_tokens

    def _over(self, calls: Iterable[tuple[str, Request]]) -> str:
        """The cap that these calls might pass, together with all that was spent; empty if none."""
        requests, spec = [request for _, request in calls], self._spec
        tokens_in = self.tokens_in + sum(map(_bytes, requests))
        tokens_out = self.tokens_out + sum(request.sampling.max_tokens for request in requests)
        caps = {
            "max_calls": (spec.max_calls, self.num_calls + len(self._failed) + len(requests)),
            "max_tokens_spent": (spec.max_tokens_spent, tokens_in + tokens_out),
            "max_cost": (spec.max_cost, self._cost(tokens_in, tokens_out)),
        }
        return next((name for name, (cap, most) in caps.items() if cap is not None and most > cap), "")

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self._spec.price_per_million_in + tokens_out * self._spec.price_per_million_out) / 1e6


def _bytes(request: Request) -> int:
    """The most tokens a prompt can have: one a byte, and a few for each turn's template."""
    return sum(16 + len(part.content.encode("utf-8", "replace")) for part in request.prompt if isinstance(part, Message))


def _lock(file: IO[bytes], place: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is making the calls in {place}", remedy="wait for it, or choose another --out") from error


def _require_same(path: Path, asked: Mapping[str, Any]) -> None:
    if not path.exists():
        write_file(path, json.dumps(asked, indent=1, ensure_ascii=False))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := sorted(name for name in before.keys() | asked.keys() if before.get(name) != asked.get(name)):
        was = ", ".join(f"{name} was {before.get(name)!r:.60}" for name in changed)
        remedy = f"repeat it with the same settings, or delete {path.parent} to start afresh and pay again"
        raise UserError(f"{path.parent} holds the calls of an unfinished synthesis with other settings: {was}", remedy=remedy)


def _whole_lines(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The records of a log. What a kill left of a last line is cut off, so that the next record has a line of its own; a line that a full
    disk spoilt is skipped.
    """
    file.seek(0)
    data = file.read()
    if not data.endswith(b"\n"):
        os.ftruncate(file.fileno(), data.rfind(b"\n") + 1)
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError):
            yield json.loads(line)
