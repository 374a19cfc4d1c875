"""A process that runs a hostile program for us: it answers each JSON line with one, or is killed.

Why so: a sandbox in this process stops neither an endless loop nor a memory bomb. The script limits its own memory; the clock is here.
Limits: an answer has at most 50 MB. The script starts without our environment and finds our packages; its first line says that it is
ready. Threads may share a worker, they take turns. A process that was killed, or belongs to the parent of a fork, is replaced at the
next question.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_ANSWER = 50 << 20


class Worker:
    """Runs `script`; asks it `first` whenever it starts."""

    def __init__(self, script: Path, *, first: Mapping[str, Any], seconds: float, start_seconds: float = 20.0) -> None:
        self._script, self._first, self._seconds, self._start_seconds = script, first, seconds, start_seconds
        self._lock, self._owner = threading.Lock(), 0

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            TimeoutError: there was none in time, it was too large, or the process died; it is gone.
        """
        with self._lock:
            if self._owner != os.getpid():
                self._start()
            return self._exchange(question)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._owner == os.getpid() else None

    def _start(self) -> None:
        clean = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PATH": os.defpath, "PYTHONUTF8": "1"}
        self._process = subprocess.Popen([sys.executable, "-P", str(self._script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, env=clean, start_new_session=True)
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._process, self._owner)
        self._answer(self._start_seconds)
        self._exchange(self._first)

    def _exchange(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead process is noticed when its answer is read
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(self._seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe, deadline, data = self._process.stdout.fileno(), time.monotonic() + seconds, bytearray()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while not data.endswith(b"\n"):
            is_late = not poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            piece = b"" if is_late else os.read(pipe, 1 << 20)
            if not piece or len(data) > MAX_ANSWER:
                _end(self._process, self._owner)
                self._owner = 0
                why = f"no answer within {seconds:g} s" if is_late else "an answer too large" if piece else "the process died"
                raise TimeoutError(why)
            data += piece
        answer: dict[str, Any] = json.loads(data)
        return answer


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Kill a process, unless we are a fork of the one who started it."""
    if os.getpid() == owner:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError):  # closing flushes what a dead process never read
            process.communicate()
