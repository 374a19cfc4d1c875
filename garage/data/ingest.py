"""Files, folders, zip archives, web pages and git repositories to a corpus: the text of every document, cut into chunks, and a reason
for every file that gave none.

Every file, text or not, is parsed by the program in the jail (`data.extract`), one at a time; here it is only found, measured and cut.
The members of a zip archive are files of their own, called `archive.zip/inner.docx`; those of a repository `URL@commit:path`.

Limits: 100 MB a file; hidden files are not looked at, links that lead out of a given folder are refused, the same bytes are read once.
"""

import importlib.util
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from garage.core.artifact import hash_file
from garage.core.errors import UserError, needs_extra
from garage.data import archive, fetch
from garage.data.chunk import Budget, chunks_of
from garage.data.clean import drop_running_lines, printable
from garage.data.extract import MIMES, RECORDS, TEXTS
from garage.data.jail import Jail, Limits
from garage.specs.data import IngestSpec
from garage.store.corpus import Chunk, Document, Failure, write_corpus

MAX_BYTES = 100 << 20
OLD = {".doc": ".docx", ".rtf": ".docx", ".ppt": ".pptx", ".odp": ".pptx", ".ods": ".xlsx", ".mobi": ".epub"}
PACKED = dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz"), "unpack it and give the folder")
REMEDIES = PACKED | {old: f"open it in LibreOffice or its own program and save it as {new}" for old, new in OLD.items()}
SUPPORTED = f"supported are {', '.join(sorted({*TEXTS, *RECORDS, *MIMES, '.zip'}))}"
_NOT_IN_NAME, _REPOSITORY = re.compile(r"[^\w-]+"), re.compile(r"git\+|.*\.git/?$")

Progress = Callable[[int, int, Path], None]
Made = TypeVar("Made")


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
    with tempfile.TemporaryDirectory(prefix="garage-") as folder:
        work = _Work(spec, count_tokens, Path(folder))
        files = [found for source in spec.paths for found in work.files(str(source))]
        write_corpus(spec.out, work.documents(files, progress), work.chunks, work.failed, spec=spec.resolved())
    tokens = sum(chunk.tokens for chunk in work.chunks)
    return Ingested(len(work.seen), len(work.chunks), tokens, tuple(work.failed), tuple(work.duplicates), work.is_weak)


@dataclass(frozen=True)
class _Found:
    """A file: where its bytes are, the folder they must lie in, its name in reports, and which member of an archive it is."""

    path: Path
    inside: Path
    name: str
    member: zipfile.ZipInfo | None = None

    @property
    def title(self) -> Path:
        return Path(self.member.filename) if self.member else self.path


def _files(path: Path, name: Callable[[Path], str] = str) -> list[_Found]:
    """The files below a path in the order of their names."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}", remedy="check the path")
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names] or [path] * path.is_file()
    seen = [file for file in sorted(files) if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return [_Found(file, path.resolve(), printable(name(file))) for file in seen]


class _Work:
    """One ingestion; `documents` yields each document with its text and notes its chunks."""

    def __init__(self, spec: IngestSpec, count_tokens: Callable[[str], int], folder: Path) -> None:
        self._budget, self._folder = Budget(count_tokens, spec.chunk_tokens, spec.overlap_tokens), folder
        self._jail = Jail(Path(__file__).with_name("extract.py"), Limits(spec.seconds_per_file, spec.memory_per_file))
        self.chunks, self.failed, self.duplicates = list[Chunk](), list[Failure](), list[str]()
        self.seen, self.is_weak = set[str](), False

    def files(self, source: str) -> list[_Found]:
        """What a path or an address holds."""
        is_remote = "://" in source
        return list(self._attempt(_Found(Path(source), Path(), printable(source)), self._fetched)) if is_remote else _files(Path(source))

    def _fetched(self, found: _Found) -> list[_Found]:
        place = Path(tempfile.mkdtemp(dir=self._folder))
        if not _REPOSITORY.match(found.name):
            path, url = fetch.fetch(found.name, place)
            return [_Found(path, place.resolve(), printable(url))]
        path, commit = fetch.clone(found.name, place)
        return _files(path, lambda file: f"{commit}:{file.relative_to(path)}")

    def documents(self, files: Sequence[_Found], progress: Progress) -> Iterator[tuple[Document, str]]:
        for done, found in enumerate(files, start=1):
            progress(done, len(files), Path(found.name))
            for part in self._attempt(found, self._parts):
                yield from self._attempt(part, self._document)
        if not self.seen:
            first = self.failed[0] if self.failed else Failure("", "there is none", SUPPORTED)
            count = max(len(files), len(self.failed))
            raise UserError(f"none of the {count} files could be read; the first: {first.error}", remedy=first.remedy)

    def _attempt(self, found: _Found, step: Callable[[_Found], Iterable[Made]]) -> Iterator[Made]:
        """What the step makes of a file; if it fails, that is noted and costs this file alone."""
        try:
            yield from step(found)
        except UserError as error:
            self.failed.append(Failure(found.name, f"{Path(found.name).name}: {printable(error.args[0])}", error.remedy))
        except OSError as error:
            self.failed.append(Failure(found.name, f"{Path(found.name).name} cannot be read: {error.strerror}", "check its permissions"))

    def _parts(self, found: _Found) -> list[_Found]:
        """The file itself, or the members of the archive that it is."""
        if not found.path.is_file() or not found.path.resolve().is_relative_to(found.inside):
            raise UserError("no ordinary file of this folder", remedy="if it is a link that leads out of it, give the file itself")
        if found.path.stat().st_size > MAX_BYTES:
            raise UserError(f"larger than {MAX_BYTES >> 20} MB", remedy="split it, or leave it out")
        if found.path.suffix.lower() != ".zip":
            return [found]
        return [replace(found, name=printable(f"{found.name}/{member.filename}"), member=member) for member in archive.members(found.path)]

    def _document(self, found: _Found) -> list[tuple[Document, str]]:
        """The document with its text, its chunks noted; nothing if the same bytes were read before."""
        suffix = found.title.suffix.lower()
        if suffix not in MIMES and suffix not in RECORDS + TEXTS:
            kind = (printable(suffix)[:20] or "files without an ending") + " inside an archive" * (found.member is not None)
            raise UserError(f"{kind} are not supported", remedy=REMEDIES.get(suffix, SUPPORTED))
        if (id := hash_file(path := self._on_disk(found))[:16]) in self.seen:
            self.duplicates.append(found.name)
            return []
        pages = self._pages(path, suffix)
        pages = drop_running_lines(pages) if suffix == ".pdf" else pages
        if not (text := "\n\n".join(page for page in pages if page)):
            raise UserError("it has no text", remedy="if it is a scan, run text recognition (OCR) on it first")
        if suffix in (*RECORDS, ".csv", ".tsv"):
            pages = [text := f"# {printable(found.title.stem)}\n\n{text}"]
        starts = [sum(len(page) + 2 for page in pages[:n] if page) for n in range(len(pages))] if suffix in (".pdf", ".pptx") else []
        document = Document(id, found.name, suffix[1:], len(text), len(starts) or None)
        self.chunks += chunks_of(document, text, self._budget, has_headings=suffix != ".txt", pages=starts)
        self.seen.add(id)
        return [(document, text)]

    def _on_disk(self, found: _Found) -> Path:
        """The file itself; a member of an archive under a name of ours, in place of the one before it."""
        if found.member is None:
            return found.path
        shutil.rmtree(place := self._folder / "member", ignore_errors=True)
        place.mkdir()
        place /= f"{_NOT_IN_NAME.sub('_', found.title.stem)[:50]}{found.title.suffix.lower()}"
        archive.unpack(found.path, found.member, place)
        return place

    def _pages(self, path: Path, suffix: str) -> list[str]:
        if suffix in MIMES and importlib.util.find_spec("xberg") is None:
            raise needs_extra("xberg", "docs")
        reply = self._jail.read(path)
        self.is_weak |= reply.is_weak
        if reply.error:
            raise UserError(reply.error, remedy=reply.remedy)
        return list(reply.pages)
