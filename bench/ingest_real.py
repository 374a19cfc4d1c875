"""Whether files of real programs come through `garage ingest` whole and in order.

    python bench/ingest_real.py [HTML PAGE...]

HTML pages of installed documentation (or those given), the sample documents and a table are converted by LibreOffice to DOCX, ODT, EPUB,
PDF, XLSX and XLS; all of these and the technical report in ../shared are ingested one by one. Of each converted file every paragraph,
heading, list item and cell of its source is looked for in the text that came out: letters and digits alone, links without their targets.
Skips, with a reason, where there is no LibreOffice.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path

from record import record, typed

from garage.data.ingest import ingest
from garage.specs.data import IngestSpec
from garage.store.corpus import read_chunks, read_documents
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer

REPO = Path(__file__).parents[1]
SAMPLES, REPORT = REPO / "garage" / "assets" / "examples" / "documents", REPO.parent / "shared" / "data" / "documents" / "gemma3-report.pdf"
PAGES = ("/usr/share/doc/valgrind/html/quick-start.html", "/usr/share/doc/valgrind/html/mc-manual.html",
         "/usr/share/doc/python3-pip/html/user_guide.html", "/usr/share/doc/libxslt1-dev/html/tutorial/libxslttutorial.html")  # fmt: skip
BLOCKS, LEAST = {"p", "li", "td", "th", "h1", "h2", "h3", "h4", "h5", "dt", "dd"}, 12
WRITER, LINK = "HTML (StarWriter)", re.compile(r'\]\([^)\s]*(?:\s+"[^"]*")?\)')


class Paragraphs(HTMLParser):
    """The text of the blocks of a page, in order, scripts and styles left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = [""]
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in ("script", "style", "title")
        if tag in BLOCKS | {"br", "pre", "div", "table"}:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style", "title")
        if tag in BLOCKS | {"pre", "div", "table"}:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        self.found[-1] += "" if self._silent else data


def bare(text: str) -> str:
    """Letters and digits alone: line ends, hyphens and marks of the format make no difference."""
    return re.sub(r"[\W_]+", "", text).lower()


def wanted(source: Path) -> list[str]:
    """The pieces of a source that must come out, long enough to be told apart."""
    text = source.read_text(encoding="utf-8", errors="replace")
    if source.suffix == ".csv":
        return [bare(line) for line in text.splitlines()]
    page = Paragraphs()
    page.feed(text)
    return [piece for piece in map(bare, page.found) if len(piece) >= LEAST]


def compared(pieces: Sequence[str], text: str) -> dict[str, object]:
    """Which share of the pieces is there; and of those that stand once in both, which share is in the longest ascending row."""
    whole = bare(LINK.sub("]", text))
    lost = [piece[:60] for piece in pieces if piece not in whole]
    places = [whole.index(piece) for piece in pieces if pieces.count(piece) == 1 == whole.count(piece)]
    row: list[int] = []
    for place in places:
        at = bisect_left(row, place)
        row[at : at + 1] = [place]
    return {"pieces": len(pieces), "found": round(1 - len(lost) / len(pieces), 4), "in_order": round(len(row) / max(1, len(places)), 4),
            "lost": lost[:5]}  # fmt: skip


def converted(source: Path, kind: str, place: Path, *options: str) -> Path | None:
    """The source as LibreOffice writes it in another format; None if it cannot."""
    profile = f"-env:UserInstallation=file://{place}/.profile"
    command = ["soffice", "--headless", profile, *options, "--convert-to", kind, "--outdir", str(place), str(source)]
    subprocess.run(command, capture_output=True, timeout=300, check=False)
    made = place / f"{source.stem}.{kind}"
    return made.rename(place / f"{source.stem}-{source.suffix[1:]}.{kind}") if made.exists() else None


def table(place: Path) -> Path:
    rows = [f"Part {n:03d},Shelf {n % 17},{n * 1.25:.2f} EUR" for n in range(400)]
    place.write_text("Part,Place,Price\n" + "\n".join(rows) + "\n")
    return place


def made_files(place: Path, pages: Iterable[Path]) -> dict[Path, Path | None]:
    """Every file to read, and the source whose words it must hold, if there is one."""
    files: dict[Path, Path | None] = dict.fromkeys(sorted(SAMPLES.iterdir())) | ({REPORT: None} if REPORT.exists() else {})
    for page in [*pages, SAMPLES / "prices.html"]:
        files[page] = page
        for kind in ("docx", "odt", "epub", "pdf"):
            if made := converted(page, kind, place, f"--infilter={WRITER}"):
                files[made] = page
    sheet = table(place / "parts.csv")
    for made in (sheet, *(converted(sheet, kind, place) for kind in ("xlsx", "xls", "pdf"))):
        files |= {made: sheet} if made else {}
    for made in (converted(SAMPLES / "onboarding.pptx", "pdf", place), converted(SAMPLES / "handbook.docx", "odt", place)):
        files |= {made: None} if made else {}
    return files


def read(path: Path, source: Path | None, tokenizer: Tokenizer, out: Path) -> dict[str, object]:
    """One file through `ingest`, with what it took and what came out."""
    spec, start = IngestSpec(paths=(path,), out=out), time.perf_counter()
    made = ingest(spec, count_tokens=lambda text: len(tokenizer.encode(text)))
    seconds = time.perf_counter() - start
    ((document, text),), chunks = read_documents(out), list(read_chunks(out))
    exact = all(chunk.text == text[chunk.start : chunk.end] for chunk in chunks)
    row: dict[str, object] = {"file": path.name, "bytes": path.stat().st_size, "seconds": round(seconds, 3), "pages": document.pages,
                              "characters": len(text), "chunks": made.chunks, "offsets_exact": exact}  # fmt: skip
    return row | (compared(wanted(source), text) if source else {})


def main() -> None:
    if shutil.which("soffice") is None:
        print("skipped: LibreOffice (soffice) is not installed; apt-get install libreoffice-writer libreoffice-calc libreoffice-impress")
        return
    tokenizer, rows, failures = Tokenizer.load(locate("nano").newest), list[dict[str, object]](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        pages = [Path(page) for page in sys.argv[1:] or PAGES if Path(page).exists()]
        for path, source in made_files(Path(folder), pages).items():
            try:
                rows.append(read(path, source, tokenizer, Path(folder) / "corpus"))
                print(rows[-1])
            except Exception as error:  # a failure is a row of the table
                failures.append(f"{path.name}: {error}")
    checked = [row for row in rows if "found" in row]
    figures = {"files": len(rows), "failures": failures, "checked_against_source": len(checked),
               "least_found": min((float(str(row["found"])) for row in checked), default=None),
               "least_in_order": min((float(str(row["in_order"])) for row in checked), default=None), "table": rows}  # fmt: skip
    version = subprocess.run(["soffice", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    print(len(rows), "files,", len(failures), "failures ->", record("ingest_real", typed(), figures | {"converter": version}))


if __name__ == "__main__":
    main()
