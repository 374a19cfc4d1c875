"""The corpus artifact: documents as chunks that know where they came from.

    documents.jsonl   one Document a line (its whole text is in texts/<id>.txt)
    chunks.jsonl      one Chunk a line
    failed.jsonl      path and error of every file that could not be read

A chunk's `start` and `end` are character offsets into its document's text: `text[start:end]` is the chunk, always.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from garage.core.artifact import writing
from garage.core.errors import UserError


@dataclass(frozen=True)
class Document:
    """One file that was read. `id` derives from its bytes, so that the same file has the same id everywhere."""

    id: str
    path: str
    format: str
    characters: int
    pages: int | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of a document. `headings` is the path of headings above it, `page` counts from 1 where the format has pages."""

    id: str
    document: str
    text: str
    start: int
    end: int
    tokens: int
    headings: tuple[str, ...] = ()
    page: int | None = None


@dataclass(frozen=True)
class Failure:
    """A file that could not be read, and why."""

    path: str
    error: str
    remedy: str


def write_corpus(
    place: Path, documents: Iterable[tuple[Document, str]], chunks: Sequence[Chunk], failed: Sequence[Failure], *, spec: dict[str, object]
) -> None:
    """Write a corpus artifact; `documents` are pairs of a document and its text."""
    with writing(place, kind="corpus", spec=spec) as draft:
        (draft.path / "texts").mkdir()
        count = 0
        with open(draft.path / "documents.jsonl", "w", encoding="utf-8") as file:
            for document, text in documents:
                (draft.path / "texts" / f"{document.id}.txt").write_text(text, encoding="utf-8", newline="")
                file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
                count += 1
        _write_lines(draft.path / "chunks.jsonl", chunks)
        _write_lines(draft.path / "failed.jsonl", failed)
        draft.facts.update(documents=count, chunks=len(chunks), failed=len(failed), tokens=sum(chunk.tokens for chunk in chunks))


def read_documents(place: Path) -> Iterator[tuple[Document, str]]:
    """The documents of a corpus with their texts."""
    for raw in _lines(place / "documents.jsonl"):
        document = Document(**raw)
        with open(place / "texts" / f"{document.id}.txt", encoding="utf-8", newline="") as file:
            yield document, file.read()


def read_chunks(place: Path) -> Iterator[Chunk]:
    """The chunks of a corpus, in document order."""
    for raw in _lines(place / "chunks.jsonl"):
        yield Chunk(**{**raw, "headings": tuple(raw["headings"])})


def _write_lines(path: Path, items: Sequence[Chunk] | Sequence[Failure]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[dict]:  # type: ignore[type-arg]
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy="ingest the documents again") from error
