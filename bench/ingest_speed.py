"""Pages and chunks a second and the peak memory of `garage ingest`, beside markitdown and synthetic-data-kit on the same files in one run.

    python bench/ingest_speed.py [FILE...]

Each reads the same files in a process of its own, three times; the best time counts, start-up apart. The others are installed by pip into
a throw-away environment outside the repository, and are left out where that fails. Pages are those of the PDFs.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from random import Random

REPO = Path(__file__).parents[1]
SAMPLES, REPORT = REPO / "garage" / "assets" / "examples" / "documents", REPO.parent / "shared" / "data" / "documents" / "gemma3-report.pdf"
TIMES = 3
HEAD = """
import json, sys, time
from pathlib import Path
files, best = [Path(name) for name in sys.argv[1:]], None
"""
TAIL = """
for _ in range(3):
    start = time.perf_counter()
    made = read(files)
    seconds = time.perf_counter() - start
    best = seconds if best is None else min(best, seconds)
print(json.dumps({"seconds": best, **made}))
"""
OURS = """
import tempfile
from garage.data.ingest import ingest
from garage.specs.data import IngestSpec
from garage.store.corpus import read_documents
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer
tokenizer = Tokenizer.load(locate("nano").newest)
def read(files):
    with tempfile.TemporaryDirectory() as folder:
        spec = IngestSpec(paths=tuple(files), out=Path(folder) / "corpus")
        made = ingest(spec, count_tokens=lambda text: len(tokenizer.encode(text)))
        found = [document for document, _ in read_documents(spec.out)]
        return {"characters": sum(d.characters for d in found), "pages": sum(d.pages or 0 for d in found if d.format == "pdf"),
                "chunks": made.chunks, "failed": [failure.path for failure in made.failed]}
"""
MARKITDOWN = """
from markitdown import MarkItDown
reader = MarkItDown()
def read(files):
    texts, failed = [], []
    for file in files:
        try: texts.append(reader.convert(str(file)).text_content)
        except Exception as error: failed.append(f"{file.name}: {type(error).__name__}")
    return {"characters": sum(map(len, texts)), "failed": failed}
"""
KIT = """
from importlib import import_module
KINDS = {".pdf": ("pdf_parser", "PDFParser"), ".docx": ("docx_parser", "DOCXParser"), ".pptx": ("ppt_parser", "PPTParser"),
         ".html": ("html_parser", "HTMLParser"), ".txt": ("txt_parser", "TXTParser"), ".md": ("txt_parser", "TXTParser")}
def read(files):
    texts, failed = [], []
    for file in files:
        try:
            module, name = KINDS[file.suffix]
            parsed = getattr(import_module(f"synthetic_data_kit.parsers.{module}"), name)().parse(str(file))
            texts.append(parsed if isinstance(parsed, str) else "".join(str(part.get("text", "")) for part in parsed))
        except Exception as error: failed.append(f"{file.name}: {type(error).__name__}")
    return {"characters": sum(map(len, texts)), "failed": failed}
"""
OTHERS = {"markitdown": ("markitdown[pdf,docx,pptx]", MARKITDOWN), "synthetic-data-kit": ("synthetic-data-kit", KIT)}


def measured(python: str, program: str, files: list[Path]) -> dict[str, object]:
    """What one reader says of the files, with the peak memory of its process and of those it started."""
    command = [python, "-c", HEAD + program + TAIL, *map(str, files)]
    env = {**os.environ, "PYTHONPATH": str(REPO) if program is OURS else ""}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
    if status:
        return {"left_out": text[-300:]}
    return {**json.loads(text.splitlines()[-1]), "peak_mebibytes": usage.ru_maxrss >> 10}


def installed(package: str, place: Path) -> str:
    """The Python of a new environment that holds the package.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", package], check=True, capture_output=True, timeout=1800)
    return python


def text_pdf(path: Path, pages: int) -> Path:
    """A plain report of so many pages: headings and paragraphs of sentences, no picture."""
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import PageBreak, Paragraph, SimpleDocTemplate

    style, draw = getSampleStyleSheet(), Random(0)
    words = ("the", "road", "of", "a", "small", "town", "leads", "over", "hills", "and", "along", "rivers", "to", "fields", "where")
    parts = []
    for page in range(pages):
        parts.append(Paragraph(f"Chapter {page + 1}", style["Heading1"]))
        for _ in range(6):
            sentences = [" ".join(draw.choices(words, k=12)).capitalize() + f" in {draw.randint(1000, 2000)}." for _ in range(6)]
            parts.append(Paragraph(" ".join(sentences), style["BodyText"]))
        parts.append(PageBreak())
    SimpleDocTemplate(str(path)).build(parts)
    return path


def main() -> None:
    given = [Path(name).resolve() for name in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        sets = {"documents": given or [*sorted(SAMPLES.iterdir()), *([REPORT] if REPORT.exists() else [])]}
        sets |= {} if given else {"a text PDF of 200 pages": [text_pdf(Path(folder) / "report.pdf", 200)]}
        pythons = {"garage": (sys.executable, OURS)}
        for name, (package, program) in OTHERS.items():
            with contextlib.suppress(subprocess.SubprocessError, OSError):  # what pip cannot install is left out
                pythons[name] = (installed(package, Path(folder) / name), program)
        figures = {name: compared(files, pythons) for name, files in sets.items()}
    print(json.dumps(figures, indent=1))
    from record import record, typed  # torch comes with it: not before all is measured

    if not given:
        print("->", record("ingest_speed", typed(), figures))


def compared(files: list[Path], pythons: dict[str, tuple[str, str]]) -> dict[str, object]:
    """All readers on the same files."""
    results = {name: measured(python, program, files) for name, (python, program) in pythons.items()}
    ours = results["garage"]
    pages, chunks = int(str(ours.get("pages", 0))), int(str(ours.get("chunks", 0)))
    for result in results.values():
        result["pages_per_second"] = round(pages / float(str(result["seconds"])), 1)
    ours["chunks_per_second"] = round(chunks / float(str(ours["seconds"])), 1)
    return {"files": [file.name for file in files], "pages": pages, "times": TIMES, "readers": results}


if __name__ == "__main__":
    main()
