"""The program that runs in the jail: one binary document in, the markdown of its pages out. The one module that imports xberg.

Every setting that could write, fetch or look elsewhere is off: no cache of the extracted text, no OCR (it downloads its data), bytes
and never a URI. Archives are measured before they are opened: a .docx or .pptx that unpacks to more than 200 MB, a hundred times its size,
or more than 2,000 files is refused by its central directory.
"""

import asyncio
import io
import re
import zipfile
from pathlib import Path

import xberg

from garage.data.jail import Reply, serve

_OFFICE = "application/vnd.openxmlformats-officedocument."
MIMES = {".pdf": "application/pdf", ".html": "text/html", ".htm": "text/html", ".docx": f"{_OFFICE}wordprocessingml.document",
         ".pptx": f"{_OFFICE}presentationml.presentation"}  # fmt: skip
MAX_UNPACKED, MAX_RATIO, MAX_MEMBERS, MAX_PAGES, MAX_HTML = 200 << 20, 100, 2000, 2000, 10 << 20
_ESCAPED = re.compile(r"\\([.&#$%~<>+!()-])")


def extract(path: Path) -> Reply:
    """The pages of a document as markdown, or why there are none."""
    suffix, data = path.suffix.lower(), path.read_bytes()
    if wrong := _wrong(suffix, data):
        return Reply(error=wrong)
    limits = xberg.SecurityLimits(max_pages=MAX_PAGES, max_compression_ratio=MAX_RATIO, max_nesting_depth=200, max_xml_depth=200)
    config = xberg.ExtractionConfig(
        use_cache=False, disable_ocr=True, output_format="markdown", escape_markdown=False, pages=xberg.PageConfig(extract_pages=True),
        security_limits=limits, html_options=xberg.ConversionOptions(extract_metadata=False), max_archive_depth=0,
        concurrency=xberg.ConcurrencyConfig(max_threads=2),
    )  # fmt: skip
    source = xberg.ExtractInput(kind="bytes", bytes=data, mime_type=MIMES[suffix], filename=f"document{suffix}")
    document = asyncio.run(xberg.extract(source, config)).results[0]
    is_paged = suffix in (".pdf", ".pptx")
    pages = [_page(page.content, page.speaker_notes) for page in document.pages or ()] if is_paged else [document.content]
    return Reply(pages=tuple(_ESCAPED.sub(r"\1", page) for page in pages))


def _page(content: str, notes: str | None) -> str:
    """Speaker notes are kept: a slide often says little without them."""
    return f"{content.strip()}\n\nNotes: {notes}" if notes else content


def _wrong(suffix: str, data: bytes) -> str:
    """What is wrong with the file before any parser sees it."""
    if suffix == ".pdf" and b"%PDF-" not in data[:1024]:
        return "it is not a PDF: the first bytes are not %PDF-"
    if suffix in (".html", ".htm"):
        return f"HTML larger than {MAX_HTML >> 20} MB" if len(data) > MAX_HTML else ""
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist() if suffix != ".pdf" else []
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return f"it is not a whole Office file: {error}"
    unpacked = sum(member.file_size for member in members)
    is_bomb = len(members) > MAX_MEMBERS or unpacked > min(MAX_UNPACKED, MAX_RATIO * len(data))
    return f"it unpacks {len(data)} bytes to {unpacked} bytes in {len(members)} files, more than is allowed" if is_bomb else ""


if __name__ == "__main__":
    serve(extract)
