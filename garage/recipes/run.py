"""A run: a directory that tells everything about one piece of training while it happens and after.

    spec.json       the resolved spec
    events.jsonl    what happened, append-only
    log.txt         the same for people, with the traceback of a failure
    checkpoints/    what is needed to go on
    artifacts/      what came out

One process at a time writes to a run; the lock vanishes with the process that held it. Of several that train together (`train.parallel`)
it is the first.
"""

import fcntl
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from garage.core.artifact import write_file
from garage.core.errors import UserError
from garage.core.events import Event, EventLog, Listener
from garage.specs.train import TrainSpec
from garage.train.parallel import explained, joined, leave, rank, size

__all__ = ["Run", "joined", "leave", "lock", "open_run"]


@dataclass(frozen=True)
class Run:
    """An open run directory."""

    path: Path
    events: EventLog


@contextmanager
def open_run(verb: str, spec: TrainSpec, *listeners: Listener) -> Iterator[Run]:
    """Start a run in `spec.out`, or go on with it if `spec.resume` says so; record how it ended.

    Raises:
        UserError: the directory holds another run, or another process is writing to it.
    """
    with joined(), nullcontext(Run(spec.out, EventLog(None))) if rank() else _kept(verb, spec, *listeners) as run:
        yield run


@contextmanager
def _kept(verb: str, spec: TrainSpec, *listeners: Listener) -> Iterator[Run]:
    """The run as the process has it that writes."""
    place = spec.out
    started = (place / "spec.json").exists()
    if started and spec.resume is None:
        raise UserError(f"{place} already holds a run", remedy=f"go on with it: garage {verb} --resume {place}; or choose another --out")
    if not started and place.exists() and any(place.iterdir()):
        raise UserError(f"{place} is not empty and holds no run", remedy="choose another --out")
    place.mkdir(parents=True, exist_ok=True)
    with lock(place), open(place / "log.txt", "a", encoding="utf-8") as log:
        write_file(place / "spec.json", json.dumps(spec.resolved() | {"resume": None}, indent=1, ensure_ascii=False) + "\n")
        events = EventLog(place / "events.jsonl", *listeners, _LogLine(log.write))
        try:
            events.emit("state", state="running", verb=verb, resumed=started, pid=os.getpid(), processes=size())
            yield Run(place, events)
            events.emit("state", state="complete")
        except KeyboardInterrupt:
            events.emit("state", state="cancelled", detail=f"go on with: garage {verb} --resume {place}")
            raise
        except BaseException as error:
            log.write(traceback.format_exc())
            events.emit("state", state="failed", detail=str(explained(error)))
            raise
        finally:
            events.close()


@contextmanager
def lock(place: Path) -> Iterator[None]:
    """Hold a run for this process; a UserError if another one does."""
    with open(place / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing to the run {place}", remedy="wait for it or stop it") from error
        yield


@dataclass(frozen=True)
class _LogLine:
    """A listener that writes one readable line an event."""

    write: Callable[[str], object]

    def __call__(self, event: Event) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(float(str(event["time"]))))
        fields = "  ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in event.items() if k not in ("time", "kind"))
        self.write(f"{clock} {event['kind']:<8} {fields}\n")
