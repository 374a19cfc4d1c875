"""How long a technical report takes from PDF to a corpus of chunks, and whether it comes out in reading order.

    python bench/ingest_report.py [PDF]

Reads the report three times, each with a fresh reader process, counting tokens with the embedded model's tokenizer, and stores the
seconds of each time, the shares of the text under headings and with page numbers, and whether the section headings ascend.
"""

import re
import sys
import tempfile
import time
from pathlib import Path

from record import record, typed

from garage.data.ingest import ingest
from garage.specs.data import IngestSpec
from garage.store.corpus import read_chunks, read_documents
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer

REPORT = Path(__file__).parents[2] / "shared" / "data" / "documents" / "gemma3-report.pdf"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else REPORT
    tokenizer = Tokenizer.load(locate("nano").newest)
    with tempfile.TemporaryDirectory() as folder:
        spec, seconds = IngestSpec(paths=(path,), out=Path(folder) / "corpus"), []
        for _ in range(3):
            start = time.perf_counter()
            made = ingest(spec, count_tokens=lambda text: len(tokenizer.encode(text)))
            seconds.append(round(time.perf_counter() - start, 3))
        ((document, text),) = read_documents(spec.out)
        chunks = list(read_chunks(spec.out))
    sections = [int(number) for number in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
    figures = {
        "file": path.name, "bytes": path.stat().st_size, "pages": document.pages, "characters": document.characters,
        "chunks": made.chunks, "tokens": made.tokens, "seconds": seconds, "longest_chunk": max(chunk.tokens for chunk in chunks),
        "offsets_exact": all(chunk.text == text[chunk.start : chunk.end] for chunk in chunks),
        "chunks_under_a_heading": round(sum(bool(chunk.headings) for chunk in chunks) / len(chunks), 3),
        "sections_in_order": sections == sorted(sections), "sections": sections, "reader_has_network": made.is_weak,
    }  # fmt: skip
    print(figures, "->", record("ingest_report", typed(), figures))


if __name__ == "__main__":
    main()
