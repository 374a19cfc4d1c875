"""Files and folders to a corpus: the text of every document, cut into chunks, and a reason for every file that gave none.

Text formats are read here by the standard library; PDF, HTML, DOCX and PPTX by the program in the jail (extra `docs`). Structured data
is written so that facts stay beside their names: CSV as markdown tables of a few rows, each under the header; JSON as
`path.to.key: value` lines, an empty line between records.

Limits: 100 MB a file; hidden files are not looked at, links that lead out of a given folder are refused, the same bytes are read once.
"""

import csv
import importlib.util
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from garage.core.artifact import hash_file
from garage.core.errors import UserError, needs_extra
from garage.data.chunk import Budget, chunks_of
from garage.data.clean import clean_text, decode, drop_running_lines
from garage.data.jail import Jail, Limits
from garage.data.read import json_objects
from garage.specs.data import IngestSpec
from garage.store.corpus import Chunk, Document, Failure, write_corpus

MAX_BYTES, TABLE_CHARACTERS, LONG_VALUE = 100 << 20, 400, 300
TEXTS, BINARIES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv"), (".pdf", ".html", ".htm", ".docx", ".pptx")
SUPPORTED = f"supported are {', '.join(TEXTS + BINARIES)}; save older Office files in one of these"
_NOT_IN_KEY = re.compile(r"[^\w-]+")

Progress = Callable[[int, int, Path], None]


@dataclass(frozen=True)
class Ingested:
    """What was written. `duplicates` have the bytes of an earlier file; `is_weak` says that the jail could not cut the network."""

    documents: int
    chunks: int
    tokens: int
    failed: tuple[Failure, ...]
    duplicates: tuple[str, ...]
    is_weak: bool


def ingest(spec: IngestSpec, *, count_tokens: Callable[[str], int], progress: Progress = lambda done, total, path: None) -> Ingested:
    """Read `spec.paths` into a corpus artifact at `spec.out`; `progress` is told the number, the total and the path of each file.

    Raises:
        UserError: a path does not exist, or no file could be read; nothing is written then.
    """
    files, work = [found for path in spec.paths for found in _files(path)], _Work(spec, count_tokens)
    write_corpus(spec.out, work.documents(files, progress), work.chunks, work.failed, spec=spec.resolved())
    tokens = sum(chunk.tokens for chunk in work.chunks)
    return Ingested(len(work.seen), len(work.chunks), tokens, tuple(work.failed), tuple(work.duplicates), work.is_weak)


def _files(path: Path) -> list[tuple[Path, Path]]:
    """The files below a path in the order of their names, each with the path that it must lie in."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}", remedy="check the path")
    names = [Path(folder) / name for folder, _, names in os.walk(path) for name in names] or [path] * path.is_file()
    return [(name, path.resolve()) for name in sorted(names) if not any(part.startswith(".") for part in name.relative_to(path).parts)]


class _Work:
    """One ingestion; `documents` yields each document with its text and notes its chunks."""

    def __init__(self, spec: IngestSpec, count_tokens: Callable[[str], int]) -> None:
        self._budget = Budget(count_tokens, spec.chunk_tokens, spec.overlap_tokens)
        self._jail = Jail(Path(__file__).with_name("extract.py"), Limits(spec.seconds_per_file, spec.memory_per_file))
        self.chunks, self.failed, self.duplicates = list[Chunk](), list[Failure](), list[str]()
        self.seen, self.is_weak = set[str](), False

    def documents(self, files: Sequence[tuple[Path, Path]], progress: Progress) -> Iterator[tuple[Document, str]]:
        for done, (path, inside) in enumerate(files, start=1):
            progress(done, len(files), path)
            try:
                yield from self._document(path, inside)
            except UserError as error:
                self.failed.append(Failure(str(path), f"{path.name}: {error.args[0]}", error.remedy))
            except OSError as error:
                self.failed.append(Failure(str(path), f"{path.name} cannot be read: {error.strerror}", "check its permissions"))
        if not self.seen:
            reason = f"; the first: {self.failed[0].error}" if self.failed else ""
            raise UserError(f"none of the {len(files)} files could be read{reason}", remedy=SUPPORTED)

    def _document(self, path: Path, inside: Path) -> list[tuple[Document, str]]:
        """The document with its text, its chunks noted; nothing if the same bytes were read before."""
        suffix = path.suffix.lower()
        if suffix not in TEXTS + BINARIES:
            raise UserError(f"{suffix or 'files without an ending'} are not supported", remedy=SUPPORTED)
        if not path.is_file() or not path.resolve().is_relative_to(inside):
            raise UserError("no ordinary file of this folder", remedy="if it is a link that leads out of it, give the file itself")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"larger than {MAX_BYTES >> 20} MB", remedy="split it, or leave it out")
        if (id := hash_file(path)[:16]) in self.seen:
            self.duplicates.append(str(path))
            return []
        pages = [clean_text(page) for page in (self._pages(path) if suffix in BINARIES else [_plain(path, suffix)])]
        pages = drop_running_lines(pages) if suffix == ".pdf" else pages
        if not (text := "\n\n".join(page for page in pages if page)):
            raise UserError("it has no text", remedy="if it is a scan, run text recognition (OCR) on it first")
        starts = [sum(len(page) + 2 for page in pages[:n] if page) for n in range(len(pages))] if suffix in (".pdf", ".pptx") else []
        document = Document(id, str(path), suffix[1:], len(text), len(starts) or None)
        self.chunks += chunks_of(document, text, self._budget, has_headings=suffix != ".txt", pages=starts)
        self.seen.add(id)
        return [(document, text)]

    def _pages(self, path: Path) -> Sequence[str]:
        if importlib.util.find_spec("xberg") is None:
            raise needs_extra("xberg", "docs")
        reply = self._jail.read(path)
        self.is_weak |= reply.is_weak
        if reply.error:
            raise UserError(reply.error, remedy="open and save it again, or convert it to .txt or .md")
        return reply.pages


def _plain(path: Path, suffix: str) -> str:
    if suffix in (".json", ".jsonl"):
        return f"# {path.stem}\n\n" + "\n".join(_records(path))
    text = decode(path.read_bytes(), path.name)
    return text if suffix in (".txt", ".md") else f"# {path.stem}\n\n{_tables(text)}"


def _tables(text: str) -> str:
    """CSV as markdown tables of as many rows as stay readable in one chunk, each with the header."""
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=max(",;\t", key=text.split("\n", 1)[0].count), strict=True))
    except csv.Error as error:
        raise UserError(f"it is not valid CSV: {error}", remedy="look for a quotation mark that is not closed") from error
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in row) + " |" for row in rows if any(row)]
    head = f"{lines[0]}\n|{' --- |' * len(rows[0])}\n"
    height = max(1, TABLE_CHARACTERS * len(lines) // len(text))
    return "\n\n".join(head + "\n".join(lines[at : at + height]) for at in range(1, max(2, len(lines)), height))


def _records(path: Path) -> Iterator[str]:
    """JSON as `path.to.key: value` lines; one object alone needs no name."""
    items = [(line, item) for line, item in json_objects(path) if item]
    for number, (line, item) in enumerate(items):
        if isinstance(item, str):
            raise UserError(f"line {line}: {item}", remedy="repair it: JSON objects are needed")
        yield from [*_paths(item, f"{_NOT_IN_KEY.sub('_', path.stem)}[{number}]" if len(items) > 1 else ""), ""]


def _paths(value: object, path: str) -> Iterator[str]:
    """A JSON value as lines; an empty line ends each record of a list, and a long text stands alone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{_NOT_IN_KEY.sub('_', key)}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value):
            yield from [*_paths(item, f"{path}[{number}]"), ""]
    else:
        text = ", ".join(map(_scalar, value)) if isinstance(value, list) else _scalar(value)
        yield f"\n{path}:\n\n{text}\n" if "\n" in text or len(text) > LONG_VALUE else f"{path}: {text}"


def _scalar(value: object) -> str:
    return value.strip() if isinstance(value, str) else "none" if value is None else str(value).lower()
