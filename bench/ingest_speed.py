"""Pages and chunks a second and the peak memory of `garage ingest`, beside markitdown and synthetic-data-kit on the same files in one run.

    python bench/ingest_speed.py [FILE...]

Each reads the same files in a process of its own, three times; the best time counts, start-up apart. The others are installed by pip into
a throw-away environment outside the repository, and are left out with a reason where that fails. Pages are those of the PDFs.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

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


def main() -> None:
    given = [Path(name).resolve() for name in sys.argv[1:]]
    files = given or [*sorted(SAMPLES.iterdir()), *([REPORT] if REPORT.exists() else [])]
    results = {"garage": measured(sys.executable, OURS, files)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (package, program) in OTHERS.items():
            try:
                results[name] = measured(installed(package, Path(folder) / name), program, files)
            except (subprocess.SubprocessError, OSError) as error:
                results[name] = {"left_out": f"pip cannot install it: {str(error)[:200]}"}
    ours = results["garage"]
    pages, chunks = int(str(ours.get("pages", 0))), int(str(ours.get("chunks", 0)))
    for result in results.values():
        if "seconds" in result:
            result["pages_per_second"] = round(pages / float(str(result["seconds"])), 1)
    ours["chunks_per_second"] = round(chunks / float(str(ours["seconds"])), 1)
    figures = {"files": [file.name for file in files], "pages": pages, "times": TIMES, "readers": results}
    print(json.dumps(figures, indent=1))
    from record import record, typed  # torch comes with it: not before all is measured

    print("->", record("ingest_speed", typed(), figures))


if __name__ == "__main__":
    main()
