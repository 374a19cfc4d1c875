"""A parser in a process that can be lost: one file at a time, with limits, without network.

The child (`core.worker`) answers with one line of JSON for each file. A fork of it reads the file and ends: what a document takes over
there does not reach the next, and the child itself never reads one. Each file has a wall-clock limit (the parent kills), a CPU limit and a
memory limit beyond what the child needs to start (the kernel refuses), and an output limit; no file is written and no environment variable
of ours is known there. Whatever happens costs that file: a lost child is replaced and the next file goes on.

Honest limits: on Linux the child leaves the network by a namespace of its own where the kernel permits it; elsewhere only Python's
sockets are closed, and `is_weak` says so. Memory is not limited on macOS. The child can read the files that we can read.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from garage.core.errors import UserError
from garage.core.worker import Worker

_NEW_USER, _NEW_NETWORK, _DIE_WITH_PARENT = 0x10000000, 0x40000000, 1


@dataclass(frozen=True)
class Limits:
    """What one file may cost."""

    seconds: float = 60.0
    memory: int = 1 << 30


@dataclass(frozen=True)
class Reply:
    """What the child says about one file: its pages, or an error with its remedy; and whether it has a network after all."""

    pages: tuple[str, ...] = ()
    error: str = ""
    remedy: str = "open and save it again, or convert it to .txt or .md"
    is_weak: bool = False


class Jail:
    """Runs a program that calls `serve`; the child is kept from file to file and ends with this object."""

    def __init__(self, program: Path, limits: Limits) -> None:
        self._limits, self._worker = limits, Worker(program, first=asdict(limits), seconds=limits.seconds, start_seconds=60.0)

    def read(self, path: Path) -> Reply:
        """The child's reply about the file; a lost child is a reply with an error."""
        try:
            answer = self._worker.ask({"path": str(path.resolve())})
        except TimeoutError as error:
            return Reply(error=f"reading it fails: {error}; it may cost {self._limits.seconds:g} s and {self._limits.memory >> 20} MB")
        return Reply(**{**answer, "pages": tuple(answer["pages"])})


def serve(read: Callable[[Path], Reply]) -> None:
    """The child's side: shut the doors, then answer each line of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    is_weak = not _leave_network()
    print(json.dumps({"is_ready": True}), file=answers, flush=True)
    limits = Limits(**json.loads(sys.stdin.readline()))
    _limit_once(limits.memory)
    print(json.dumps(asdict(limits)), file=answers, flush=True)
    for line in sys.stdin:
        if (reader := os.fork()) == 0:
            _die_with_parent()
            _limit_computing(limits.seconds)
            reply = replace(_reply(read, Path(json.loads(line)["path"]), limits), is_weak=is_weak)
            print(json.dumps(asdict(reply), ensure_ascii=False), file=answers, flush=True)
            os._exit(0)
        if os.waitpid(reader, 0)[1]:
            os._exit(1)  # nobody knows how much of an answer was written: whoever asked starts another child


def _reply(read: Callable[[Path], Reply], path: Path, limits: Limits) -> Reply:
    try:
        return read(path)
    except UserError as error:
        return Reply(error=error.args[0], remedy=error.remedy)
    except MemoryError:
        return Reply(error=f"reading it needs more than {limits.memory >> 20} MB")
    except RecursionError:
        return Reply(error="it is nested too deeply", remedy="flatten it, or leave it out")
    except Exception as error:  # the edge of the process: whatever the parser raises is this file's failure
        return Reply(error=str(error)[:500] or type(error).__name__)


def _limit_once(memory: int) -> None:
    if (statm := Path("/proc/self/statm")).exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_computing(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 2 * seconds) + 2, resource.RLIM_INFINITY))


def _leave_network() -> bool:
    """Into an empty network namespace, to die with the parent; False if only Python's sockets could be closed."""
    for call in ("connect", "connect_ex", "sendto", "bind"):  # a pair of sockets inside the process remains possible: asyncio needs one
        setattr(socket.socket, call, _no_network)
    if sys.platform != "linux":
        return False
    _die_with_parent()
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.unshare(_NEW_NETWORK) == 0 or libc.unshare(_NEW_USER | _NEW_NETWORK) == 0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _no_network(*arguments: object) -> None:
    raise PermissionError("the document reader has no network")
