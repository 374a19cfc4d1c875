"""`garage generate`: every row of a file answered, in its order, through any number of interruptions.

Answers are appended as they come, one line in one write, so a killed run loses only those under way. A line is called after its row, the
settings and where it stands: the same command again finds what it has, and a file of other settings or another input is refused instead
of mixed. A line cut by a crash is cut off, a failed row is asked again. When all are there the file is put in place anew in the order of
the rows; damaged rows have a line in it like all others, which says what is wrong.

A line of OpenAI's batch format is answered in that format. Any other row becomes one that `sft` can read: its conversation with the
answer as the last turn, or its text as `prompt` and `completion`; with n > 1, `choices`. An answer that the row had is its `reference`.
"""

import fcntl
import hashlib
import json
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from garage.core.artifact import disk_error
from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.seeds import derive
from garage.core.strict_json import parse_json
from garage.data.formats import FORMATS, from_rows, to_rows
from garage.data.read import json_objects, read_dataset
from garage.recipes.endpoint import Endpoint, address, open_endpoint, words_of
from garage.specs.generate import GenerateSpec

CHATS, TEXTS, OTHERS = "/v1/chat/completions", "/v1/completions", ("/v1/responses", "/v1/embeddings")
SHOWN, BATCH_ID = 5, "batch_req_"
Json = dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """What `garage generate` returns. `rows` have a line in `out`, `failed` of them without an answer; `asked`, tokens and times are of
    this run alone."""

    out: Path
    rows: int
    failed: int
    asked: int
    prompt_tokens: int
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class _Row:
    """One thing to ask, or why it cannot be: its name, and what its line begins with."""

    key: str
    route: str = ""
    body: Mapping[str, object] = field(default_factory=dict)
    kept: Mapping[str, object] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class _Answered:
    """A row and what came back."""

    row: _Row
    status: int
    answer: Json


def generate(spec: GenerateSpec, *listeners: Listener) -> Generated:
    """Answer the rows that have no answer yet.

    Raises:
        UserError: there is no such input or model, the endpoint refuses the key, or `out` holds answers to something else.
    """
    events, form = EventLog(None, *listeners), _form(spec)
    keys = [row.key for row in _rows(spec, form)]
    if not keys:
        raise UserError(f"{spec.input} has no row", remedy="write one JSON object a line, with prompt or messages")
    with _open_answers(spec.out) as answers:
        if foreign := answers.spans.keys() - set(keys):
            message = f"{spec.out} holds {len(foreign)} answers to other rows, or given with other settings"
            raise UserError(message, remedy="choose another --out, or remove it")
        done = answers.spans.keys() - answers.failed
        job = _Job(answers, events, total=len(keys), first=len(done))
        if len(done) < len(keys):
            job.run(spec, (row for row in _rows(spec, form) if row.key not in done))
        answers.put_in_order(keys)
    if job.failures:
        events.emit("warning", message=f"{len(job.failures)} rows have no answer ({'; '.join(job.failures[:SHOWN])})",
                    remedy="repair these rows, or run the same command again: it asks them alone")  # fmt: skip
    events.emit("artifact", path=str(spec.out), kind_of="answers", detail=f"{len(keys)} rows, {len(job.failures)} failed")
    counts = {"rows": len(keys), "failed": len(job.failures), "asked": len(keys) - len(done)}
    return Generated(spec.out, **counts, prompt_tokens=job.tokens["in"], tokens=job.tokens["out"], tokens_per_second=round(job.rate, 1),
                     seconds=round(job.seconds, 3))  # fmt: skip


class _Job:
    """The asking: workers that wait for answers, and one thread that reads rows and writes lines."""

    def __init__(self, answers: "_Answers", events: EventLog, *, total: int, first: int) -> None:
        self.answers, self.events, self.total, self.done = answers, events, total, first
        self.tokens: Counter[str] = Counter()
        self.failures: list[str] = []
        self.started, self.seconds, self._first = time.monotonic(), 0.0, first
        self._inbox: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[_Answered | UserError] = queue.SimpleQueue()

    @property
    def rate(self) -> float:
        """Tokens written a second."""
        return self.tokens["out"] / max(self.seconds, 1e-9)

    def run(self, spec: GenerateSpec, rows: Iterator[_Row]) -> None:
        """Ask all rows; a local engine gets some more than it runs at once, so that none of its places is ever empty."""
        with open_endpoint(spec) as endpoint:
            most = spec.concurrency or (1 + 5 * spec.engine.max_num_seqs // (4 * spec.n) if endpoint.engine else 8)
            for _ in range(most):
                threading.Thread(target=self._work, args=(endpoint, spec), daemon=True).start()
            self.started, under_way = time.monotonic(), 0
            for row in rows:
                if row.error:
                    self._note(row, 0, {"error": {"message": row.error}})
                    continue
                if under_way == most:
                    self._take()
                    under_way -= 1
                self._inbox.put(row)
                under_way += 1
            for _ in range(under_way):
                self._take()
            for _ in range(most):
                self._inbox.put(None)

    def _work(self, endpoint: Endpoint, spec: GenerateSpec) -> None:
        while (row := self._inbox.get()) is not None:
            model = row.body.get("model") if row.body.get("model") in endpoint.adapters else spec.adapter or endpoint.model
            try:
                self._outbox.put(_Answered(row, *endpoint.post(row.route, {**row.body, "model": model})))
            except UserError as error:
                self._outbox.put(error)

    def _take(self) -> None:
        found = self._outbox.get()
        if isinstance(found, UserError):
            raise found
        self._note(found.row, found.status, found.answer)

    def _note(self, row: _Row, status: int, answer: Json) -> None:
        """Write a row's line, count it, and say how far it is."""
        record = _line(row, status, answer)
        if _is_failure(record):
            self.failures.append(f"line {row.key.partition('-')[0]}: {words_of(answer)}")
        self.answers.add(row.key, record)
        usage = answer.get("usage") or {}
        self.tokens["in"] += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.tokens["out"] += usage.get("completion_tokens", usage.get("output_tokens", 0))
        self.done, self.seconds = self.done + 1, time.monotonic() - self.started
        left = self.seconds / (self.done - self._first) * (self.total - self.done)
        detail = f"{self.rate:,.0f} tok/s, {timedelta(seconds=round(left))} left"
        self.events.emit("stage", name="answering", step=self.done, total=self.total, detail=detail)


class _Answers:
    """The file of answers: where each line lies, and which say that there is no answer."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path, self._end = file, path, 0
        self.spans: dict[str, tuple[int, int]] = {}
        self.failed: set[str] = set()
        with open(path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._found(line)
        file.truncate(self._end)

    def add(self, key: str, record: Json) -> None:
        """Append one line in one write."""
        data = (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        if self._file.write(data) != len(data):
            raise UserError(f"{self._path}: the disk took only a part of a line", remedy="free space there and run the same command again")
        self._place(key, len(data), record)

    def put_in_order(self, keys: Sequence[str]) -> None:
        """Write the file anew, one line a row in their order, and put it in place at once."""
        new = self._path.with_name(f".{self._path.name}.new")
        with open(self._path, "rb") as lines, open(new, "wb") as file:
            for key in keys:
                start, length = self.spans[key]
                lines.seek(start)
                file.write(lines.read(length))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)

    def _found(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            self._place(str(record.get("_row") or record["id"].removeprefix(BATCH_ID)), len(line), record)
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{self._path} is not a file of answers", remedy="choose another --out, or remove it") from error

    def _place(self, key: str, length: int, record: Json) -> None:
        self.spans[key] = (self._end, length)
        self._end += length
        (self.failed.add if _is_failure(record) else self.failed.discard)(key)


@contextmanager
def _open_answers(path: Path) -> Iterator[_Answers]:
    """The answers, for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield _Answers(file, path)
    except BlockingIOError as error:
        raise UserError(f"another process is writing to {path}", remedy="wait for it or stop it") from error
    except OSError as error:
        raise disk_error(error, path) from error


def _line(row: _Row, status: int, answer: Json) -> Json:
    """A row's line in the answers."""
    failed = status != 200 and words_of(answer)
    if "custom_id" in row.kept:
        error = {"code": "no_answer", "message": failed} if failed and not status else None
        response = {"status_code": status, "request_id": str(answer.get("id", "")), "body": answer} if status else None
        return {"id": f"{BATCH_ID}{row.key}", **row.kept, "response": response, "error": error}
    head = {**row.kept, "_row": row.key}
    if failed:
        return {**head, "error": failed}
    choices = answer.get("choices") or []
    said = [{"finish_reason": choice.get("finish_reason"), **_said(choice)} for choice in choices]
    asked: Json = {name: row.body[name] for name in ("messages", "prompt", "tools") if name in row.body}
    if len(said) != 1:
        return {**asked, "choices": said, **head, "usage": answer.get("usage")}
    if "messages" in asked:
        asked["messages"] = [*asked["messages"], said[0].pop("message")]
    return {**asked, **said[0], **head, "usage": answer.get("usage")}


def _said(choice: Json) -> Json:
    if "message" in choice:
        return {"message": {name: value for name, value in choice["message"].items() if value or name == "content"}}
    return {"completion": choice.get("text")}


def _is_failure(record: Json) -> bool:
    """Whether a line says that there is no answer."""
    return record.get("error") is not None or (record.get("response") or {}).get("status_code", 200) != 200


def _form(spec: GenerateSpec) -> Json:
    """The form of the answers, as a request says it; a JSON schema to a foreign endpoint in OpenAI's own way."""
    for name, path in (("json", spec.json_schema), ("grammar", spec.grammar)):
        if path is None:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            form = {name: parse_json(text) if name == "json" else text}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be used as {name}: {error}", remedy="give a UTF-8 file of that form") from error
        if name == "json" and address(spec.model):
            return {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": form["json"], "strict": True}}}
        return {"structured_outputs": form}
    form = {"regex": spec.regex} if spec.regex else {"choice": [*spec.choice]} if spec.choice else {}
    return {"structured_outputs": form} if form else {}


def _rows(spec: GenerateSpec, form: Json) -> Iterator[_Row]:
    """What is asked, in order; the same at every call."""
    given = spec.asked() | form
    given |= {name: value for name, value in (("n", spec.n), ("min_tokens", spec.min_tokens), ("ignore_eos", spec.ignore_eos)) if value}
    seen: set[str] = set()
    for place, raw in _objects(spec.input, spec.split):
        row = _Row("", error=raw) if isinstance(raw, str) else _row(raw, spec)
        name = row.kept.get("custom_id")
        if isinstance(name, str) and name in seen:
            row = replace(row, error=f"custom_id {name[:100]!r} occurs twice")
        seen.update([name] if isinstance(name, str) else ())
        if row.route in (CHATS, TEXTS):
            row = replace(row, body={"seed": derive(spec.seed, str(name or place)), **given, **_with_system(row.body, spec.system)})
        text = json.dumps([row.route, row.body, row.error, spec.model, spec.adapter], sort_keys=True)
        yield replace(row, route=row.route.removeprefix("/v1"), key=f"{place}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}")


def _objects(path: Path, split: str) -> Iterator[tuple[str, Json | str]]:
    """The objects of the input, each with its line, and of damaged ones what is wrong with them."""
    if path.is_dir() or path.suffix.lower() in (".txt", ".md"):
        for number, row in enumerate(read_dataset(path, split=split), start=1):
            yield str(number), next(from_rows([replace(row, rejected="")], "messages" if row.messages else "text"))
        return
    if not path.is_file():
        raise UserError(f"there is no file {path}", remedy="check the path")
    for line, item in json_objects(path):
        if isinstance(item, str):
            yield from [(str(line), item)] if item else []
            continue
        fmt = None if {"custom_id", "messages"} & set(item) else next((f for f in FORMATS if f.fits(item)), None)
        if fmt is None:
            yield str(line), dict(item)
            continue
        try:
            rows = [replace(row, rejected="") for row in to_rows(fmt, item, id=str(line), source=str(line))]
            names = [str(line)] if len(rows) == 1 else [f"{line}.{number}" for number in range(1, len(rows) + 1)]
            yield from zip(names, from_rows(rows, "messages" if rows[0].messages else "text"), strict=True)
        except ValueError as error:
            yield str(line), str(error.args[-1])


def _row(raw: Json, spec: GenerateSpec) -> _Row:
    """How one object is asked."""
    if "custom_id" in raw:
        return _batch_row(raw)
    kept = {key: value for key, value in raw.items() if key not in ("messages", "prompt", "text", "tools")}
    prompt = raw.get("prompt", raw.get("text"))
    if isinstance(prompt, str) and "messages" not in raw and (spec.prompts == "text" or "prompt" not in raw):
        return _Row("", TEXTS, {"prompt": prompt}, kept)
    turns = raw.get("messages", [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        columns = f"the columns {', '.join(raw)} hold no prompt, messages or text"
        return _Row("", kept=kept, error=columns if turns is None else "asks nothing")
    if turns[-1].get("role") == "assistant":
        *turns, answer = turns
        kept["reference"] = answer.get("content")
    tools = {"tools": raw["tools"]} if raw.get("tools") else {}
    return _Row("", CHATS, {"messages": turns, **tools}, kept, error="" if turns else "asks nothing")


def _batch_row(raw: Json) -> _Row:
    """A line of OpenAI's batch format."""
    kept, body, route = {"custom_id": raw["custom_id"]}, raw.get("body"), raw.get("url")
    if not isinstance(raw["custom_id"], str) or not isinstance(body, dict) or raw.get("method", "POST") != "POST":
        return _Row("", kept=kept, error="custom_id is no text, body no object, or method not POST")
    if route not in (CHATS, TEXTS, *OTHERS):
        return _Row("", kept=kept, error=f"url is {str(route)[:100]!r}, not one of {', '.join((CHATS, TEXTS, *OTHERS))}")
    return _Row("", route, body, kept, error="stream cannot be used in a batch" if body.get("stream") else "")


def _with_system(body: Mapping[str, object], system: str) -> Mapping[str, object]:
    turns = body.get("messages")
    if not system or not isinstance(turns, list) or any(isinstance(t, dict) and t.get("role") in ("system", "developer") for t in turns):
        return body
    return {**body, "messages": [{"role": "system", "content": system}, *turns]}
