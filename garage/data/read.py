"""A dataset on disk, whatever its form, as a stream of canonical rows and the faults met on the way.

JSON Lines and CSV are streamed: memory is bounded by the longest line (16 Mi characters), not by the file. A `.json` file is one list
or values one after another; its text is held in memory (256 MB at most), its rows are not. `.txt` and `.md` are one row of plain text. A
directory is a dataset artifact (one of its splits) or a corpus artifact (its documents as plain text).
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.core.types import Row
from garage.data.clean import decode, encoding_of, parse_json, parse_json_at, wrong_byte
from garage.data.formats import Fault, Format, Object, RowError, detect, mapped, to_rows
from garage.store.corpus import read_documents
from garage.store.dataset import read_rows

MAX_LINE = 16 << 20
MAX_JSON = 256 << 20
KEPT_FAULTS = 1000
LOOKED_AT = 50

Item = tuple[int, Object | Fault]


class Reading:
    """Rows of one dataset; may be iterated more than once, and reads the file anew each time.

    `faults` (the first 1,000) and `counts` ("rows", "blank" lines, and faults by kind) are of the latest iteration and complete when it is.
    """

    def __init__(self, path: Path, format: str, open_rows: Callable[["Reading"], Iterator[Row]]) -> None:
        self.path, self.format, self._open_rows = path, format, open_rows
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        self.faults, self.counts = [], Counter()
        for row in self._open_rows(self):
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
    if path.is_dir():
        return _artifact(path, split)
    if not path.is_file():
        raise UserError(f"there is no dataset {path}", remedy="check the path")
    if path.suffix.lower() in (".txt", ".md"):
        text = decode(path.read_bytes(), str(path))
        return Reading(path, "text", lambda _: iter([Row(path.stem, text=text, source=path.name)]))
    items = _ITEMS.get(path.suffix.lower())
    if items is None:
        raise UserError(f"{path.name} is of no known dataset type", remedy=f"give {', '.join(_ITEMS)}, .txt, .md or an artifact directory")
    first = list(islice((item for _, item in items(path) if not _is_blank(item)), LOOKED_AT))
    objects = [item for item in first if not isinstance(item, Fault)]
    if not objects:
        why = f"line {first[0].line}: {first[0].message}" if first and isinstance(first[0], Fault) else "it is empty"
        raise UserError(f"{path} has no usable row; {why}", remedy="write one JSON object a line, a JSON list, or CSV with a header")
    fmt = mapped(columns, objects, str(path)) if columns else detect(objects, str(path))
    return Reading(path, fmt.name, lambda reading: _rows(items(path), fmt, reading))


def _rows(items: Iterator[Item], fmt: Format, reading: Reading) -> Iterator[Row]:
    for line, item in items:
        if isinstance(item, Fault):
            reading.note(item)
            continue
        try:
            yield from to_rows(fmt, item, id=f"{reading.path.stem}-{line}", source=f"{reading.path.name}:{line}")
        except RowError as error:
            reading.note(Fault(line, error.kind, str(error)))
        except ValueError as error:
            reading.note(Fault(line, "unparsable", str(error)))


def _artifact(path: Path, split: str) -> Reading:
    kind = read_manifest(path).kind
    if kind == "corpus":
        documents = lambda _: (Row(doc.id, text=text, source=doc.id, meta={"path": doc.path}) for doc, text in read_documents(path))  # noqa: E731
        return Reading(path, "corpus", documents)
    read_manifest(path, "dataset")
    return Reading(path, "dataset", lambda _: read_rows(path, split))


def _is_blank(item: Object | Fault) -> bool:
    return isinstance(item, Fault) and item.kind == "blank"


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(65536)


def _lines(path: Path) -> Iterator[Item]:
    """JSON Lines."""
    with open(path, encoding=encoding_of(_head(path), str(path)), errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE and not line.endswith("\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith("\n"):
                    pass
                yield number, Fault(number, "unparsable", f"longer than {MAX_LINE} characters")
            else:
                yield number, _parsed(line, number)


def _parsed(line: str, number: int) -> Object | Fault:
    if not line.strip():
        return Fault(number, "blank", "blank line")
    if wrong := wrong_byte(line):
        return Fault(number, "unparsable", wrong)
    try:
        return _as_object(parse_json(line), number)
    except ValueError as error:
        return Fault(number, "unparsable", str(error))


def _as_object(value: object, number: int) -> Object | Fault:
    return value if isinstance(value, dict) else Fault(number, "unparsable", f"a JSON {type(value).__name__}, not an object")


def _values(path: Path) -> Iterator[Item]:
    """A JSON list, or JSON values one after another. After a damaged value nothing can be found again: the fault is the last item."""
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} is larger than {MAX_JSON >> 20} MB", remedy="write JSON Lines (.jsonl), one object a line: it is streamed")
    text = decode(path.read_bytes(), str(path))
    place, line, seen = _after_gap(text, 0), 1, 0
    place = _after_gap(text, place + 1) if text[place] == "[" else place
    while place < len(text) and text[place] != "]":
        line, seen = line + text.count("\n", seen, place), place
        try:
            value, place = parse_json_at(text, place)
        except ValueError as error:
            yield line, Fault(line, "unparsable", f"{error}; what follows in this file is lost")
            return
        yield line, _as_object(value, line)
        place = _after_gap(text, place)


def _after_gap(text: str, place: int) -> int:
    found = _GAP.match(text, place)
    return found.end() if found else place


def _cells(path: Path) -> Iterator[Item]:
    """CSV with a header line; the separator is the commonest of comma, semicolon and tab in the header."""
    csv.field_size_limit(MAX_LINE)
    with open(path, encoding=encoding_of(_head(path), str(path)), errors="surrogateescape", newline="") as file:
        first = file.readline(MAX_LINE)
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                yield line, Fault(line, "unparsable", str(error))
                continue
            if record is None:
                return
            if header:
                yield line, _as_cells(header, record, line)
            header = header or [name.strip() for name in record]


def _as_cells(header: list[str], record: list[str], line: int) -> Object | Fault:
    if not record:
        return Fault(line, "blank", "blank line")
    if wrong := wrong_byte("\n".join(record)):
        return Fault(line, "unparsable", wrong)
    if len(record) != len(header):
        return Fault(line, "unparsable", f"{len(record)} cells under a header of {len(header)}")
    return dict(zip(header, record, strict=True))


_GAP = re.compile(r"[\s,]*")
_ITEMS: Mapping[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _lines, ".ndjson": _lines, ".json": _values, ".csv": _cells, ".tsv": _cells,
}  # fmt: skip
