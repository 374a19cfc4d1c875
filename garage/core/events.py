"""`events.jsonl`: what a run says while it runs, one JSON object a line, append-only.

The terminal's progress bar, the platform and a notebook all read the same events. Each has `time` (seconds since the epoch),
`kind` and the fields of that kind:

    stage     name, step?, total?                a part of the run began or moved on
    metric    step, and numbers by name          one training or evaluation record
    sample    question, answer, ...              a text worth looking at
    warning   message, remedy?
    artifact  path, kind_of
    state     state: running | complete | failed | cancelled, detail?

A line is written with one `write` call, so that a reader never sees two lines mixed; the last line may be cut by a crash and is
skipped by `read_events`. Non-finite numbers are written as null and announced by a warning, never as the invalid JSON `NaN`.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Event = Mapping[str, object]
Listener = Callable[[Event], None]


class EventLog:
    """Appends events to a file and hands each to the listeners. With `path` None it only tells the listeners."""

    def __init__(self, path: Path | None, *listeners: Listener) -> None:
        self._listeners = listeners
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (lives as long as the run)

    def emit(self, kind: str, **fields: object) -> None:
        """Record one event."""
        lost = [name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)]
        event = {"time": round(time.time(), 3), "kind": kind, **{k: None if k in lost else v for k, v in fields.items()}}
        if self._file is not None:
            self._file.write((json.dumps(event, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace"))
        for listener in self._listeners:
            listener(event)
        if lost and kind != "warning":
            self.emit("warning", message=f"{', '.join(lost)} is not a finite number in this {kind}", step=fields.get("step"))

    def listen(self, listener: Listener) -> None:
        """Tell one more listener from now on."""
        self._listeners = (*self._listeners, listener)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(path: Path) -> Iterator[Event]:
    """The whole lines of an event file, in order; a line cut by a crash is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event
