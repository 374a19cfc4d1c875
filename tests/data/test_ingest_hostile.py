"""A selection of the hostile files of bench/samples: one run over all of them, in which each costs only itself."""

import importlib.util
import resource
import sys
import time
from pathlib import Path

import psutil
import pytest

from garage.core.errors import UserError
from garage.data.extract import extract
from garage.data.ingest import ingest
from garage.specs.data import IngestSpec
from garage.store.corpus import read_documents

MAKER = Path(__file__).parents[2] / "bench" / "samples" / "make_hostile.py"
CHOSEN = [
    "zip-overlap.zip", "zip-quine.zip", "zip-symlink.zip", "zip-traversal.zip", "zip-odd-names.zip", "docx-xxe-file.docx",
    "docx-deep.docx", "docx-picture-50k.docx", "xlsx-laughs.xlsx", "odt-xxe-http.odt", "epub-quadratic.epub", "pdf-flate-twice.pdf",
    "pdf-pages-self.pdf", "pdf-prev-loop.pdf", "pdf-deep-array.pdf", "json-deep-table.json", "json-empty-lists.json",
    "yaml-laughs.yaml", "html-deep.html", "txt-marks.txt", "md-spaces.md", "polyglot.pdf",
]  # fmt: skip


@pytest.fixture(scope="module")
def files():
    spec = importlib.util.spec_from_file_location("make_hostile", MAKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FILES


def test_there_are_many_and_they_are_the_same_at_every_run(files):
    assert len(files) >= 100
    assert all(files[name]() == files[name]() for name in ("zip-quine.zip", "pdf-lzw.pdf", "docx-large.docx", "xls-cycle.xls"))


def test_each_costs_only_itself(files, tmp_path):
    (tmp_path / "in").mkdir()
    for name in CHOSEN:
        (tmp_path / "in" / name).write_bytes(files[name]())
    (tmp_path / "in" / "zz.txt").write_text("fine")
    before, start = set(tmp_path.rglob("*")), time.monotonic()
    spec = IngestSpec(paths=(tmp_path / "in",), out=tmp_path / "corpus", seconds_per_file=4)
    made = ingest(spec, count_tokens=lambda text: len(text) // 4)
    found = {document.path: text for document, text in read_documents(spec.out)}
    assert time.monotonic() - start < 60 and found[str(tmp_path / "in" / "zz.txt")] == "fine"
    named = {Path(path).relative_to(tmp_path / "in").parts[0] for path in [*found, *(failure.path for failure in made.failed)]}
    assert set(CHOSEN) <= named, "each is a document or a failure"
    assert all(failure.error and failure.remedy for failure in made.failed)
    assert not any("root:" in text for text in found.values()), "no entity was fetched"
    assert {path for path in tmp_path.rglob("*") if spec.out not in path.parents} - before == {spec.out}
    own = psutil.Process().memory_info().rss >> 10  # what a fork of this process, with all tests imported, begins with
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < own + (1 << 20)  # KiB


def test_the_twin_without_the_jail_is_hurt(files, tmp_path):
    """The same parser in this process: what the jail takes for one file's failure is ours."""
    path = tmp_path / "cycle.yaml"
    path.write_bytes(files["yaml-cycle.yaml"]())
    with pytest.raises(RecursionError):
        extract(path)
    spec = IngestSpec(paths=(path,), out=tmp_path / "corpus")
    with pytest.raises(UserError, match="nested too deeply"):
        ingest(spec, count_tokens=len)
    assert sys.getrecursionlimit() == 1000
