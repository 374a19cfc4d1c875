"""`garage ingest`: documents -> corpus."""

from dataclasses import dataclass
from pathlib import Path

from garage.core.events import EventLog, Listener
from garage.data.ingest import ingest as read_files
from garage.specs.data import IngestSpec
from garage.store.corpus import Failure
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ingested:
    """What `garage ingest` returns."""

    corpus: Path
    documents: int
    failed: tuple[Failure, ...]
    chunks: int
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


def _tell(events: EventLog, n: int, total: int, path: Path) -> None:
    events.emit("stage", name="reading", step=n, total=total, detail=path.name)
