"""The program that runs in the jail: one document in, the markdown of its pages out. The one module that imports xberg and yaml.

Structured data is written so that facts stay beside their names: CSV and sheets as markdown tables of a few rows, each under the header;
JSON, YAML and Parquet as `path.to.key: value` lines, an empty line between records. YAML values are kept as they are written.

Every setting of xberg that could write, fetch or look elsewhere is off: no cache of the extracted text, no OCR (it downloads its data),
bytes and never a URI. Archives are measured before they are opened (`data.archive`).
"""

import asyncio
import contextlib
import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from garage.core.errors import UserError
from garage.data.archive import measured
from garage.data.clean import clean_text, decode
from garage.data.jail import Reply, serve
from garage.data.read import json_objects

_OFFICE, _OPEN = "application/vnd.openxmlformats-officedocument.", "application/vnd.oasis.opendocument."
ZIPPED = {".docx": f"{_OFFICE}wordprocessingml.document", ".pptx": f"{_OFFICE}presentationml.presentation", ".odt": f"{_OPEN}text",
          ".xlsx": f"{_OFFICE}spreadsheetml.sheet", ".epub": "application/epub+zip"}  # fmt: skip
MIMES = {".pdf": "application/pdf", ".html": "text/html", ".htm": "text/html", ".xls": "application/vnd.ms-excel"} | ZIPPED
RECORDS, TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".parquet"), (".txt", ".md", ".csv", ".tsv")
MAX_PAGES, MAX_HTML, MAX_CELLS, MAX_TEXT = 2000, 10 << 20, 1_000_000, 10_000_000
TABLE_CHARACTERS, LONG_VALUE = 400, 300
_ESCAPED, _NOT_IN_KEY = re.compile(r"\\([.&#$%~<>+!()-])"), re.compile(r"[^\w-]+")
_PICTURE = re.compile(r"\]\(data:[^)\s]*\)")
_TABLE = re.compile(r"^(\|.*\|\n\|(?: --- \|)+\n)((?:\|.*\|(?:\n|\Z))+)", re.MULTILINE)


class _Written(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Builds text, lists and tables alone, and guesses no types: 1.10 stays 1.10, and no stays no."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012


def extract(path: Path) -> Reply:
    """The pages of a document as markdown.

    Raises:
        UserError: there are none, and why.
    """
    suffix = path.suffix.lower()
    pages = _parsed(path, suffix) if suffix in MIMES else [_joined(_records(path)) if suffix in RECORDS else _text(path, suffix)]
    if sum(map(len, pages)) > MAX_TEXT:
        raise UserError(f"it holds more than {MAX_TEXT:,} characters of text", remedy="split it, or leave it out")
    return Reply(pages=tuple(map(clean_text, pages)))


def _parsed(path: Path, suffix: str) -> list[str]:
    if suffix in ZIPPED:
        measured(path, "Office file")
    if (data := path.read_bytes()) and suffix == ".pdf" and b"%PDF-" not in data[:1024]:
        raise UserError("it is not a PDF: the first bytes are not %PDF-", remedy="give it the ending of what it is")
    if suffix in (".html", ".htm") and len(data) > MAX_HTML:
        raise UserError(f"HTML larger than {MAX_HTML >> 20} MB", remedy="split it, or leave it out")
    import xberg  # 160 MB, and not needed for text

    limits = xberg.SecurityLimits(max_pages=MAX_PAGES, max_nesting_depth=200, max_xml_depth=200, max_table_cells=MAX_CELLS)
    config = xberg.ExtractionConfig(
        use_cache=False, disable_ocr=True, output_format="markdown", escape_markdown=False, pages=xberg.PageConfig(extract_pages=True),
        security_limits=limits, html_options=xberg.ConversionOptions(extract_metadata=False), max_archive_depth=0,
        concurrency=xberg.ConcurrencyConfig(max_threads=2),
    )  # fmt: skip
    source = xberg.ExtractInput(kind="bytes", bytes=data, mime_type=MIMES[suffix], filename=f"document{suffix}")
    document = asyncio.run(xberg.extract(source, config)).results[0]
    is_paged = suffix in (".pdf", ".pptx")
    pages = [_page(page.content, page.speaker_notes) for page in document.pages or ()] if is_paged else [document.content]
    pages = [_PICTURE.sub("](picture)", page) for page in pages]
    return [_short_tables(page) if suffix in (".xls", ".xlsx") else _ESCAPED.sub(r"\1", page) for page in pages]


def _page(content: str, notes: str | None) -> str:
    """Speaker notes are kept: a slide often says little without them."""
    return f"{content.strip()}\n\nNotes: {notes}" if notes else content


def _text(path: Path, suffix: str) -> str:
    text = decode(path.read_bytes(), "it")
    if suffix in (".txt", ".md"):
        return text
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=max(",;\t", key=text.split("\n", 1)[0].count), strict=True))
    except csv.Error as error:
        raise UserError(f"it is not valid CSV: {error}", remedy="look for a quotation mark that is not closed") from error
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in row) + " |" for row in rows if any(row)]
    return _short_tables("\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]) + "\n") if lines else ""


def _short_tables(text: str) -> str:
    """Tables as several of as many rows as stay readable in one chunk, each with the header."""
    return _TABLE.sub(lambda table: "\n\n".join(_slices(table[1], table[2].splitlines())) + "\n", text)


def _slices(head: str, lines: list[str]) -> Iterator[str]:
    height = max(1, TABLE_CHARACTERS * len(lines) // sum(map(len, lines)))
    return (head + "\n".join(lines[at : at + height]) for at in range(0, len(lines), height))


def _joined(lines: Iterable[str]) -> str:
    """All lines, or a few more than are allowed: a few bytes of YAML can name the same list a million times."""
    kept, size = list[str](), 0
    for line in lines:
        kept.append(line)
        size += len(line) + 1
        if size > MAX_TEXT:
            break
    return "\n".join(kept)


def _records(path: Path) -> Iterator[str]:
    """Records as `path.to.key: value` lines; one table alone needs no name."""
    values = _yaml_values(path) if path.suffix.lower() in (".yaml", ".yml") else _json_values(path)
    for number, value in enumerate(values):
        is_named = len(values) > 1 or not isinstance(value, dict)
        yield from _paths(value, f"{_NOT_IN_KEY.sub('_', path.stem)}[{number}]" if is_named else "")
        yield ""


def _json_values(path: Path) -> list[object]:
    items = [(line, item) for line, item in json_objects(path) if item]
    for line, item in items:
        if isinstance(item, str):
            raise UserError(f"line {line}: {item}", remedy="repair it: JSON objects are needed")
    return [item for _, item in items]


def _yaml_values(path: Path) -> list[object]:
    """The documents of the file, or the items of the list that its one document is."""
    try:
        values = list(yaml.load_all(decode(path.read_bytes(), "it"), Loader=_Written))
    except yaml.YAMLError as error:
        raise UserError(f"it is not valid YAML: {' '.join(str(error).split())[:300]}", remedy="repair it there") from error
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _paths(value: object, path: str) -> Iterator[str]:
    """A value as lines; an empty line ends each record of a list, and a long text stands alone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{_NOT_IN_KEY.sub('_', str(key))}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, item in enumerate(value):
            yield from _paths(item, f"{path}[{number}]")
            yield ""
    else:
        text = ", ".join(map(_scalar, value)) if isinstance(value, list) else _scalar(value)
        yield f"\n{path}:\n\n{text}\n" if "\n" in text or len(text) > LONG_VALUE else f"{path}: {text}"


def _scalar(value: object) -> str:
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    return value.strip() if isinstance(value, str) else "none" if value is None else str(value).lower()


if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # loaded before memory counts; `ingest` asks for the extra before it sends such a file
        import xberg  # noqa: F401
    serve(extract)
