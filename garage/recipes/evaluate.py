"""`garage evaluate` and `garage compare`: one model on one task, or two on the same items with an exact test of the difference."""

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.types import Row
from garage.data.read import read_dataset
from garage.data.worksheets import problems, row_of
from garage.engine.engine import Engine
from garage.evals.compare import Comparison
from garage.evals.compare import compare as compare_reports
from garage.evals.harness import Subject
from garage.evals.harness import evaluate as ask
from garage.evals.tasks.catalogue import TASKS
from garage.specs.evals import CompareSpec, EvaluateSpec, TaskSpec
from garage.specs.serve import EngineSpec
from garage.store.locate import Located, locate
from garage.store.report import Report

WORKSHEETS = 200


@dataclass(frozen=True)
class Measured:
    """What `garage evaluate` returns: shares of `n`, the strict score with its 95 % interval, and where the items are."""

    model: str
    task: str
    n: int
    accuracy: float
    ci95: tuple[float, float]
    lenient: float
    lenient_ci95: tuple[float, float]
    format_rate: float | None
    failed: int
    mean_tokens: float
    items: Path


def evaluate(spec: EvaluateSpec, *listeners: Listener) -> Measured:
    """Measure one model and write the report; prints one line.

    Raises:
        UserError: there is no such model, or the items cannot be asked.
    """
    place = spec.out or Path("reports") / f"{_slug(spec.model)}-{spec.task}"
    report = measure(spec.model, spec, place, EventLog(None, *listeners), dtype=spec.dtype)
    print(line_of(report))
    return measured(report, place)


def compare(spec: CompareSpec, *listeners: Listener) -> Comparison:
    """Measure both models on the same items and test the difference; prints what was found."""
    events, place = EventLog(None, *listeners), spec.out or Path("reports") / f"{_slug(spec.base)}-{_slug(spec.tuned)}-{spec.task}"
    base = measure(spec.base, spec, place / "base", events, dtype=spec.dtype)
    tuned = measure(spec.tuned, spec, place / "tuned", events, dtype=spec.dtype)
    found = compare_reports(base, tuned)
    print(f"{line_of(base)}\n{line_of(tuned)}\n{verdict_of(found)}")
    return found


def measure(model: str, spec: TaskSpec, place: Path, events: EventLog, *, dtype: str = "auto", engine: Engine | None = None) -> Report:
    """Ask one model every item. An engine that is already open is used as it is."""
    source = locate(model)
    rows = rows_of(spec)
    engine = engine or Engine.open(source.base, source.adapter, EngineSpec.parse({"dtype": dtype}))
    def tell(done: int, total: int) -> None:
        events.emit("stage", name=f"asking {source.name}", step=done, total=total)

    return ask(engine, TASKS[spec.task], rows, spec, subject=_subject(source, engine), place=place, progress=tell)


def measured(report: Report, place: Path) -> Measured:
    """The part of a report that scripts rely on."""
    shared = {name: getattr(report, name) for name in Measured.__dataclass_fields__ if name != "items"}
    return Measured(**shared, items=place / "items.jsonl")


def line_of(report: Report) -> str:
    """A report in one line."""
    low, high = report.ci95
    formats = "" if report.format_rate is None else f", format {report.format_rate:.1%}"
    head = f"{report.model} on {report.task}: {report.accuracy:.1%} right of {report.n} [95 % interval {low:.1%} to {high:.1%}]"
    return f"{head}, lenient {report.lenient:.1%}{formats}"


def verdict_of(found: Comparison) -> str:
    """A comparison in one line."""
    low, high = found.ci95
    changed = f"{len(found.gained)} items gained, {len(found.lost)} lost"
    return f"{found.verdict}: {found.delta:+.1%} [95 % interval {low:+.1%} to {high:+.1%}], {changed}, exact McNemar p = {found.p:.2g}"


def rows_of(spec: TaskSpec) -> list[Row]:
    """What is asked: fresh worksheets from templates that no training split uses, or every row of the spec's data.

    Raises:
        UserError: a row cannot be read: a score over what is left of a damaged file would not be the score of the file.
    """
    if spec.data is None:
        return [row_of(problem) for problem in islice(problems(spec.seed, (1, 2, 3), split="test"), spec.limit or WORKSHEETS)]
    reading = read_dataset(spec.data, split="test" if spec.task == "gsm8k" else spec.split)
    rows = list(reading)
    if reading.faults:
        lines = "; ".join(f"line {fault.line}: {fault.message}" for fault in reading.faults[:5])
        raise UserError(f"{spec.data} has rows that cannot be asked: {lines}", remedy="repair or remove them")
    if not rows:
        raise UserError(f"{spec.data} has no split '{spec.split}'", remedy="give --split train, eval or test, whichever the dataset has")
    return rows


def _subject(source: Located, engine: Engine) -> Subject:
    return Subject(source.name, _fingerprint(source), engine.chat.hash if engine.chat else "", (source.id,))


def _fingerprint(source: Located) -> str:
    """Changes when a weight file does: names, sizes and times of all of them."""
    places = [place for place in (source.base, source.adapter) if place is not None]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for place in places for path in sorted(place.glob("*.safetensors"))]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()


def _slug(model: str) -> str:
    return Path(model).name or model
