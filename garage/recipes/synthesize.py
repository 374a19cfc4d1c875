"""`garage synthesize`: a corpus or a dataset -> a dataset, by rules or by a teacher model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from shutil import rmtree

from garage.core.artifact import hash_file, read_manifest
from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.types import Row
from garage.data import synthesize as extractive
from garage.data.calls import open_calls
from garage.data.encode import write_dataset
from garage.data.plan import sources_of
from garage.data.read import read_dataset
from garage.data.teach import Models, teach
from garage.data.worksheets import problems, row_of
from garage.specs.data import SynthesizeSpec
from garage.store.corpus import Chunk, read_chunks

WORKSHEETS, TEST_WORKSHEETS = 1000, 200


@dataclass(frozen=True)
class Synthesized:
    """What `garage synthesize` returns. `missing` rows were asked for and not made, `shortfall` says why; calls, tokens and cost are of all
    runs that led to it, and `parse_rate` is the share of replies that were whole JSON."""

    dataset: Path
    rows: int
    eval_rows: int
    test_rows: int
    rejected: dict[str, int]
    missing: int
    calls: int
    tokens: int
    cost: float = 0.0
    parse_rate: float | None = None
    shortfall: str = ""


def synthesize(spec: SynthesizeSpec, *listeners: Listener) -> Synthesized:
    """Write the dataset that a teacher makes.

    Test rows never share words (extractive), templates (worksheets) or documents (a model) with training.

    Raises:
        UserError: there is no such corpus, dataset or model, nothing in it can be asked, or the teacher cannot go on.
    """
    events = EventLog(None, *listeners)
    built_in = {"extractive": _extractive, "worksheets": _worksheets}.get(spec.teacher)
    made = built_in(spec) if built_in else _taught(spec, events)
    detail = f"{made.rows} rows, {made.eval_rows} held out, {made.test_rows} for testing"
    events.emit("artifact", path=str(spec.out), kind_of="dataset", detail=detail)
    if made.missing:
        lost = ", ".join(f"{reason}: {count}" for reason, count in made.rejected.items())
        events.emit("warning", message=f"{made.missing} rows fewer than asked for; {made.shortfall}; rejected: {lost or 'none'}")
    return made


def _extractive(spec: SynthesizeSpec) -> Synthesized:
    assert spec.corpus is not None
    parent = read_manifest(spec.corpus, "corpus").id
    made = extractive.synthesize(read_chunks(spec.corpus), rows=spec.rows, test_rows=spec.test_rows, seed=spec.seed)
    if not made.train:
        remedy = "add documents with tables, lists of key: value, or plain sentences"
        raise UserError(f"{spec.corpus} states no fact that can be asked", remedy=remedy)
    written = _write(spec, {"train": made.train, "eval": made.eval, "test": made.test}, parents=(parent,))
    return replace(written, rejected=dict(made.rejected), missing=made.missing, shortfall="the corpus states no more" * bool(made.missing))


def _worksheets(spec: SynthesizeSpec) -> Synthesized:
    count, test_count = spec.rows or WORKSHEETS, TEST_WORKSHEETS if spec.test_rows is None else spec.test_rows
    train = map(row_of, islice(problems(spec.seed, spec.levels, split="train"), count))
    test = map(row_of, islice(problems(spec.seed, spec.levels, split="test"), test_count))
    return _write(spec, {"train": train, "test": test})


def _taught(spec: SynthesizeSpec, events: EventLog) -> Synthesized:
    """Ask a model, or go on where an interrupted run stopped; calls wait beside the dataset until it is written."""
    items, parent = _to_ask(spec, events)
    work = spec.out.absolute().with_name(f".{spec.out.name}.calls")
    if not work.exists() and spec.out.exists() and (not spec.out.is_dir() or any(spec.out.iterdir())):
        raise UserError(f"{spec.out} exists, and what a teacher writes replaces nothing", remedy="choose another --out, or remove it")
    from garage.recipes.teachers import open_generator  # torch is loaded only when a model is asked

    teacher = open_generator(spec.teacher, concurrency=spec.concurrency)
    judge = open_generator(spec.judge, concurrency=spec.concurrency) if spec.judge else teacher
    models = Models(teacher, judge, (spec.teacher, spec.judge or spec.teacher))

    def tell(accepted: int, wanted: int, words: str) -> None:
        events.emit("stage", name="asking the teacher", step=accepted or None, total=wanted, detail=words)

    with open_calls(work, spec, parent=parent) as calls:
        made = teach(sources_of(items), models, calls, spec, tell)
        splits = {"train": made.train, "test": made.test, "rejected": made.rejected}
        written = _write(spec, splits, parents=() if ":" in parent else (parent,))
    if made.skipped:
        events.emit("warning", message=f"{made.skipped} chunks or rows say too little to be asked about")
    if made.is_capped and calls.num_calls:
        events.emit("warning", message=f"the calls stay in {work}: with a higher cap the same command goes on and pays for nothing again")
    else:
        rmtree(work, ignore_errors=True)
    tokens, rate = calls.tokens_in + calls.tokens_out, made.parsed / made.replies if made.replies else None
    return replace(
        written, rejected=dict(made.reasons.most_common()), missing=made.missing, calls=calls.num_calls, tokens=tokens,
        cost=round(calls.cost, 6), parse_rate=rate, shortfall=made.shortfall,
    )  # fmt: skip


def _to_ask(spec: SynthesizeSpec, events: EventLog) -> tuple[list[Chunk | Row], str]:
    """What the teacher is asked about, and the id or name of where it comes from."""
    if spec.corpus is not None:
        return [*read_chunks(spec.corpus)], read_manifest(spec.corpus, "corpus").id
    assert spec.data is not None
    reading = read_dataset(spec.data)
    rows: list[Chunk | Row] = [*reading]
    if reading.faults:
        lines = "; ".join(f"line {fault.line}: {fault.message}" for fault in reading.faults[:5])
        events.emit("warning", message=f"{spec.data}: rows that cannot be used are left out ({lines})")
    return rows, read_manifest(spec.data).id if spec.data.is_dir() else f"{spec.data.name}:{hash_file(spec.data)[:12]}"


def _write(spec: SynthesizeSpec, splits: Mapping[str, Iterable[Row]], *, parents: tuple[str, ...] = ()) -> Synthesized:
    write_dataset(spec.out, {name: rows for name, rows in splits.items() if rows}, None, parents=parents, spec=spec.resolved())
    facts = read_manifest(spec.out, "dataset").facts
    rows, eval_rows, test_rows = (int(str(facts.get(f"{name}_rows", 0))) for name in ("train", "eval", "test"))
    return Synthesized(spec.out, rows, eval_rows, test_rows, {}, missing=0, calls=0, tokens=0)
