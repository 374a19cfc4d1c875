"""`garage runs`: what run directories say, whoever writes to them."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garage.core.errors import UserError
from garage.core.events import Listener, read_events
from garage.recipes.run import lock
from garage.specs.runs import RunsSpec


@dataclass(frozen=True)
class RunLine:
    """One run at a glance."""

    run: str
    state: str
    step: int | None
    total: int | None
    loss: float | None
    detail: str


@dataclass(frozen=True)
class RunList:
    """What `garage runs` says."""

    runs: tuple[RunLine, ...]


def runs(spec: RunsSpec, *listeners: Listener) -> RunList:
    """List, show or follow runs; prints a table, or the events of one run."""
    if spec.action == "list":
        places = sorted(path.parent for path in spec.place.glob("*/spec.json"))
    else:
        if not (spec.place / "spec.json").exists():
            raise UserError(f"{spec.place} is not a run", remedy="give the directory that a training verb wrote with --out")
        places = [spec.place]
    if spec.action == "follow":
        _follow(spec.place, *listeners)
    lines = tuple(_line(place) for place in places)
    for line in lines:
        print(f"{line.run}  {line.state}  step {line.step}/{line.total}  loss {line.loss}  {line.detail}")
    return RunList(lines)


def _line(place: Path) -> RunLine:
    state, detail = "never started", ""
    last: dict[str, Any] = {}
    for event in read_events(place / "events.jsonl"):
        if event["kind"] == "state":
            state, detail = str(event["state"]), str(event.get("detail") or "")
        elif event["kind"] == "metric" and "loss" in event:
            last = dict(event)
    if state == "running" and not _is_held(place):
        state, detail = "failed", "its process is gone"
    return RunLine(str(place), state, last.get("step"), last.get("total"), last.get("loss"), detail)


def _is_held(place: Path) -> bool:
    try:
        with lock(place):
            return False
    except UserError:
        return True


def _follow(place: Path, *listeners: Listener) -> None:
    """Hand the events of a run to the listeners, old ones first, until it ends."""
    seen = 0
    while True:
        events = list(read_events(place / "events.jsonl"))
        for event in events[seen:]:
            for listener in listeners:
                listener(event)
        seen = len(events)
        if not _is_held(place):
            return
        time.sleep(0.5)
