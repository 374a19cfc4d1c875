"""A dataset on disk, whatever its form, as a stream of canonical rows and the faults met on the way.

JSON Lines, CSV and Parquet are streamed: memory is bounded by the longest line (16 Mi characters) or a batch of rows, not by the file.
A `.json` file is one list or values one after another; its text is held in memory (256 MB at most), its rows are not. `.txt` and `.md` are
one row of plain text. A directory is a dataset artifact (one of its splits) or a corpus artifact (its documents as plain text).
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from garage.core.artifact import read_manifest
from garage.core.errors import UserError, needs_extra
from garage.core.strict_json import parse_json, parse_json_at
from garage.core.types import Row
from garage.data.clean import decode, encoding_of, wrong_byte
from garage.data.formats import Format, Object, RowError, detect, mapped, to_rows
from garage.store.corpus import read_documents
from garage.store.dataset import read_rows

MAX_LINE, MAX_JSON, KEPT_FAULTS, LOOKED_AT, BATCH = 16 << 20, 256 << 20, 1000, 50, 256
_NO_GAP = re.compile(r"[^\s,]")


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used. `kind` is "unparsable", "empty", "missing" or "blank" (a line); lines count from 1."""

    line: int
    kind: str
    message: str


Item = tuple[int, Object | str]  # a line number and an object, or why there is none ("" = a blank line)


class Reading:
    """Rows of one dataset; may be iterated more than once, and reads the file anew each time.

    `confidence` is the share of the first objects that fit the format, `limit` how many rows are read at most. `faults` (the first 1,000)
    and `counts` ("rows", "blank" lines, and faults by kind) are of the latest iteration, complete when it is.
    """

    def __init__(self, path: Path, format: str, open_rows: Callable[["Reading"], Iterator[Row]], *, confidence: float = 1.0) -> None:
        self.path, self.format, self._open_rows, self.confidence = path, format, open_rows, confidence
        self.limit: int | None = None
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        self.faults, self.counts = [], Counter()
        for row in islice(self._open_rows(self), self.limit):
            self.counts["rows"] += 1
            yield row

    def note(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        if len(self.faults) < KEPT_FAULTS and fault.kind != "blank":
            self.faults.append(fault)


def read_dataset(path: Path, *, columns: Mapping[str, str] | None = None, split: str = "train") -> Reading:
    """Open a dataset file or artifact; `columns` maps parts (prompt, answer, ...) to columns when the format is none of ours.

    Raises:
        UserError: there is no such file, it is not text, nothing in it can be parsed, or its columns fit no format.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _artifact(path, split)
    if not path.is_file():
        raise UserError(f"there is no dataset {path}", remedy="check the path")
    if suffix in (".txt", ".md"):
        text = decode(path.read_bytes(), str(path))
        return Reading(path, "text", lambda _: iter([Row(path.stem, text=text, source=path.name)]))
    if (items := _ITEMS.get(suffix)) is None:
        raise UserError(f"{path.name} is of no known dataset type", remedy=f"give {', '.join(_ITEMS)}, .txt, .md or an artifact directory")
    return read_items(lambda: items(path), path, columns=columns)


def read_items(open_items: Callable[[], Iterator[Item]], path: Path, *, columns: Mapping[str, str] | None = None) -> Reading:
    """Rows of a stream of objects that can be opened again and again; `path` is what they are called.

    Raises:
        UserError: there is no object among the first, or their columns fit no format.
    """
    first = list(islice(open_items(), LOOKED_AT))
    objects = [item for _, item in first if not isinstance(item, str)]
    if not objects:
        why = next((f"line {line}: {item}" for line, item in first if item), "it is empty")
        remedy = "write one JSON object a line, a JSON list, CSV with a header, or Parquet"
        raise UserError(f"{path} has no usable row; {why}", remedy=remedy)
    fmt = mapped(columns, objects, str(path)) if columns else detect(objects, str(path))
    fitting = sum(set(fmt.required) <= set(item) for item in objects) / len(first)
    return Reading(path, fmt.name, lambda reading: _rows(open_items(), fmt, reading), confidence=fitting)


def _rows(items: Iterator[Item], fmt: Format, reading: Reading) -> Iterator[Row]:
    for line, item in items:
        try:
            if isinstance(item, str):
                raise RowError("unparsable" if item else "blank", item)
            yield from to_rows(fmt, item, id=f"{reading.path.stem}-{line}", source=f"{reading.path.name}:{line}")
        except ValueError as error:
            kind, message = error.args if isinstance(error, RowError) else ("unparsable", str(error))
            reading.note(Fault(line, kind, message))


def _artifact(path: Path, split: str) -> Reading:
    if read_manifest(path).kind == "corpus":
        return Reading(path, "corpus", lambda _: (Row(d.id, text=t, source=d.id, meta={"path": d.path}) for d, t in read_documents(path)))
    read_manifest(path, "dataset")
    return Reading(path, "dataset", lambda _: read_rows(path, split))


def _codec(path: Path) -> str:
    with open(path, "rb") as file:
        return encoding_of(file.read(65536), str(path))


def _lines(path: Path) -> Iterator[Item]:
    """JSON Lines."""
    with open(path, encoding=_codec(path), errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            is_long = len(line) > MAX_LINE and not line.endswith("\n")
            while is_long and not line.endswith("\n"):
                line = file.readline(MAX_LINE) or "\n"
            yield number, f"longer than {MAX_LINE} characters" if is_long else _parsed(line)


def _parsed(line: str) -> Object | str:
    try:
        return wrong_byte(line) or (_as_object(parse_json(line)) if line.strip() else "")
    except ValueError as error:
        return str(error)


def json_objects(path: Path) -> Iterator[Item]:
    """The objects of a file with their lines, and what is wrong with the others; what has no known ending is read as JSON Lines."""
    return _ITEMS.get(path.suffix.lower(), _lines)(path)


def _as_object(value: object) -> Object | str:
    return value if isinstance(value, dict) else f"a JSON {type(value).__name__}, not an object"


def _values(path: Path) -> Iterator[Item]:
    """A JSON list, or JSON values one after another. After a damaged value nothing can be found again: the fault is the last item."""
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} is larger than {MAX_JSON >> 20} MB", remedy="write JSON Lines (.jsonl), one object a line: it is streamed")
    text, line, seen = decode(path.read_bytes(), str(path)), 1, 0
    place = _after_gap(text, 0)
    place = _after_gap(text, place + 1) if text[place] == "[" else place
    while place < len(text) and text[place] != "]":
        line, seen = line + text.count("\n", seen, place), place
        try:
            value, place = parse_json_at(text, place)
        except ValueError as error:
            yield line, f"{error}; what follows in this file is lost"
            return
        yield line, _as_object(value)
        place = _after_gap(text, place)


def _after_gap(text: str, place: int) -> int:
    found = _NO_GAP.search(text, place)
    return found.start() if found else len(text)


def _cells(path: Path) -> Iterator[Item]:
    """CSV with a header line; the separator is the commonest of comma, semicolon and tab in the header."""
    csv.field_size_limit(MAX_LINE)
    with open(path, encoding=_codec(path), errors="surrogateescape", newline="") as file:
        first = file.readline(MAX_LINE)
        file.seek(0)
        reader, header = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True), list[str]()
        record: list[str] | None = []
        while record is not None:
            line = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                yield line, str(error)
                continue
            if header and record is not None:
                yield line, _as_cells(header, record)
            header = header or [name.strip() for name in record or ()]


def _as_cells(header: list[str], record: list[str]) -> Object | str:
    if len(record) not in (0, len(header)):
        return f"{len(record)} cells under a header of {len(header)}"
    return wrong_byte("\n".join(record)) or (dict(zip(header, record, strict=True)) if record else "")


def _batches(path: Path) -> Iterator[Item]:
    """Parquet, as much of it in memory as `BATCH` rows take; its lines are its rows."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise needs_extra("pyarrow", "data") from error
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=BATCH, use_threads=False)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (ArrowException, OSError) as error:
        message = f"{path.name} is no whole Parquet file: {str(error)[:200]}"
        raise UserError(message, remedy="make or download it again") from error


_ITEMS = {".jsonl": _lines, ".ndjson": _lines, ".json": _values, ".csv": _cells, ".tsv": _cells, ".parquet": _batches}
SUFFIXES = (*_ITEMS, ".txt", ".md")
