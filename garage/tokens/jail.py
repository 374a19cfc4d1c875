"""A chat template ready to render: ours in this process, a foreign one in a process that can be killed.

Why so: two nested loops or a doubling string in a template from the Hub would hang or fill the server that reads it (see `sandbox`).
Limits: 2 s wall per answer, 20 s for the start of the process, output of at most 1 MB beyond four times what was put in.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from jinja2 import TemplateError

from garage.core.errors import UserError
from garage.tokens import sandbox

ANSWER_SECONDS, START_SECONDS = 2.0, 20.0


class Renderer(Protocol):
    """A template that turns values into text; `facts` is what its source says about it."""

    facts: Mapping[str, list[str]]

    def render(self, values: Mapping[str, Any]) -> str: ...


class Trusted:
    """One of our own templates."""

    def __init__(self, text: str) -> None:
        self._program = sandbox.Program(text)
        self.facts = self._program.facts

    def render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._program.render(values, _limit(json.dumps(values)))
        except TemplateError as error:
            raise refused(error) from error


class Jailed:
    """A foreign template in its own process. Safe to share between threads; a killed or forked-away process is started again."""

    def __init__(self, text: str) -> None:
        self._text, self._lock = text, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        with self._lock:
            self.facts: Mapping[str, list[str]] = self._start()

    def render(self, values: Mapping[str, Any]) -> str:
        size = json.dumps(values)
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            return str(self._ask({"values": values, "limit": _limit(size)})["text"])

    def _start(self) -> Mapping[str, list[str]]:
        clean = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
        self._process = subprocess.Popen([sys.executable, str(Path(sandbox.__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, env=clean, start_new_session=True)
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._process, self._owner)
        self._read(START_SECONDS)
        facts: Mapping[str, list[str]] = self._ask({"template": self._text})["facts"]
        return facts

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead process is noticed when its answer is read
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._read(ANSWER_SECONDS)
        if "error" in answer:
            raise refused(answer["error"])
        return answer

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = _line(self._process.stdout, time.monotonic() + seconds)
        if line is None:
            _end(self._process, self._owner)
            self._process = None
            raise refused(f"it needs more than {seconds:g} s or {sandbox.MEMORY_BYTES >> 20} MB")
        answer: dict[str, Any] = json.loads(line)
        return answer


def refused(why: object) -> UserError:
    """A template said no, or broke a limit."""
    return UserError(f"the chat template refuses this conversation: {str(why)[:300]}",
                     remedy="change the messages as it says, or choose another template (chatml, qwen3, gemma3)")


def _limit(values: str) -> int:
    return sandbox.OUTPUT_CHARS + 4 * len(values)


def _line(pipe: IO[bytes], deadline: float) -> bytes | None:
    """The one line a process answers with; None when it dies or the time is over."""
    poll, data = select.poll(), b""
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        piece = os.read(pipe.fileno(), 1 << 20)
        if not piece:
            return None
        data += piece
    return data


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill the process of a renderer, unless we are a fork of the one who started it."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # closing flushes what a dead process never read
            pipe.close() if pipe else None
    process.wait()
