"""`garage ingest` and `garage synthesize`: documents -> corpus -> dataset."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.types import Row
from garage.data import synthesize as extractive
from garage.data.encode import write_dataset
from garage.data.ingest import ingest as read_files
from garage.data.worksheets import problems, row_of
from garage.specs.data import IngestSpec, SynthesizeSpec
from garage.store.corpus import Failure, read_chunks
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer

WORKSHEETS, TEST_WORKSHEETS = 1000, 200


@dataclass(frozen=True)
class Ingested:
    """What `garage ingest` returns."""

    corpus: Path
    documents: int
    failed: tuple[Failure, ...]
    chunks: int
    tokens: int


@dataclass(frozen=True)
class Synthesized:
    """What `garage synthesize` returns. `missing` rows were asked for and not supported; no call was made to any model."""

    dataset: Path
    rows: int
    eval_rows: int
    test_rows: int
    rejected: dict[str, int]
    missing: int
    calls: int
    tokens: int


def ingest(spec: IngestSpec, *listeners: Listener) -> Ingested:
    """Read files and folders into a corpus; a file that cannot be read is reported and the others are kept.

    Raises:
        UserError: a path does not exist, or no file could be read.
    """
    events, tokenizer = EventLog(None, *listeners), Tokenizer.load(locate(spec.tokenizer).newest)
    found = read_files(
        spec, count_tokens=lambda text: len(tokenizer.encode(text)), progress=lambda n, total, path: _tell(events, n, total, path)
    )
    for failure in found.failed:
        events.emit("warning", message=f"{failure.path}: {failure.error}", remedy=failure.remedy)
    for path in found.duplicates:
        events.emit("warning", message=f"{path} has the bytes of an earlier file and is read once")
    if found.is_weak:
        events.emit("warning", message="this system does not let the reader of documents be cut off from the network")
    detail = f"{found.documents} documents, {found.chunks} chunks, {found.tokens:,} tokens"
    events.emit("artifact", path=str(spec.out), kind_of="corpus", detail=detail)
    return Ingested(spec.out, found.documents, tuple(found.failed), found.chunks, found.tokens)


def synthesize(spec: SynthesizeSpec, *listeners: Listener) -> Synthesized:
    """Write the dataset that a teacher makes; test rows never share words (extractive) or templates (worksheets) with training.

    Raises:
        UserError: there is no such corpus, or nothing in it can be asked.
    """
    made = _extractive(spec) if spec.teacher == "extractive" else _worksheets(spec)
    detail = f"{made.rows} rows, {made.eval_rows} held out, {made.test_rows} for testing"
    EventLog(None, *listeners).emit("artifact", path=str(spec.out), kind_of="dataset", detail=detail)
    if made.missing:
        lost = ", ".join(f"{reason}: {count}" for reason, count in made.rejected.items())
        EventLog(None, *listeners).emit("warning", message=f"{made.missing} rows fewer than asked for; not asked: {lost}")
    return made


def _extractive(spec: SynthesizeSpec) -> Synthesized:
    assert spec.corpus is not None
    parent = read_manifest(spec.corpus, "corpus").id
    made = extractive.synthesize(read_chunks(spec.corpus), rows=spec.rows, test_rows=spec.test_rows, seed=spec.seed)
    if not made.train:
        remedy = "add documents with tables, lists of key: value, or plain sentences"
        raise UserError(f"{spec.corpus} states no fact that can be asked", remedy=remedy)
    return _write(spec, made.train, made.eval, made.test, parents=(parent,), rejected=dict(made.rejected), missing=made.missing)


def _worksheets(spec: SynthesizeSpec) -> Synthesized:
    count, test_count = spec.rows or WORKSHEETS, TEST_WORKSHEETS if spec.test_rows is None else spec.test_rows
    train = map(row_of, islice(problems(spec.seed, spec.levels, split="train"), count))
    test = map(row_of, islice(problems(spec.seed, spec.levels, split="test"), test_count))
    return _write(spec, train, (), test)


def _write(
    spec: SynthesizeSpec, train: Iterable[Row], held: Iterable[Row], test: Iterable[Row], *, parents: tuple[str, ...] = (),
    rejected: dict[str, int] | None = None, missing: int = 0,
) -> Synthesized:  # fmt: skip
    splits = {"train": train, "eval": held, "test": test}
    write_dataset(spec.out, {name: rows for name, rows in splits.items() if rows}, None, parents=parents, spec=spec.resolved())
    facts = read_manifest(spec.out, "dataset").facts
    rows, eval_rows, test_rows = (int(str(facts.get(f"{name}_rows", 0))) for name in splits)
    return Synthesized(spec.out, rows, eval_rows, test_rows, rejected or {}, missing, calls=0, tokens=0)


def _tell(events: EventLog, n: int, total: int, path: Path) -> None:
    events.emit("stage", name="reading", step=n, total=total, detail=path.name)
