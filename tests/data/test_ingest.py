"""Files to a corpus: every type against what it says, and every hostile file costs only itself."""

import io
import json
import os
import tempfile
import zipfile

import pytest

from garage.core.errors import UserError
from garage.data.extract import MIMES, RECORDS, TEXTS
from garage.data.ingest import REMEDIES, SUPPORTED, ingest
from garage.specs.data import IngestSpec
from garage.store.corpus import read_chunks, read_documents

DOCX, MIB = "word/document.xml", 1 << 20


def count(text):
    return len(text.split())


def run(tmp_path, *paths, **settings):
    spec = IngestSpec(paths=paths, out=tmp_path / "corpus", **settings)
    made = ingest(spec, count_tokens=count)
    return made, {document.path.rpartition("/")[2]: text for document, text in read_documents(spec.out)}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def docx():
    import docx

    document, data = docx.Document(), io.BytesIO()
    document.add_heading("Manual", 1)
    document.add_paragraph("The café opens at 8.")
    table = document.add_table(2, 2)
    for cell, text in zip([c for row in table.rows for c in row.cells], ["Part", "Price", "Bolt & nut", "$3"], strict=True):
        cell.text = text
    document.save(data)
    return data.getvalue()


def pptx():
    import pptx

    deck, data = pptx.Presentation(), io.BytesIO()
    for number in (1, 2):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = f"Slide {number}", "A point"
        slide.notes_slide.notes_text_frame.text = f"Say this on {number}."
    deck.save(data)
    return data.getvalue()


def pdf(pages):
    from reportlab.pdfgen.canvas import Canvas

    data = io.BytesIO()
    canvas = Canvas(data)
    for number, lines in enumerate(pages, start=1):
        canvas.drawString(72, 800, "ACME Handbook")
        for at, line in enumerate(lines):
            canvas.drawString(72, 700 - 20 * at, line)
        canvas.drawString(300, 30, f"Page {number} of {len(pages)}")
        canvas.showPage()
    canvas.save()
    return data.getvalue()


HTML = b"""<html><head><title>T</title><script>alert(1)</script></head><body><h1>Shop &amp; co</h1><p>Opens <b>daily</b> at 9.</p>
<table><tr><th>Item</th><th>Price</th></tr><tr><td>Tea</td><td>$2</td></tr></table></body></html>"""


def test_text_types_say_what_they_hold(tmp_path):
    folder = tmp_path / "in"
    write(folder / "a.txt", "\ufeffPlain  \r\n# no heading\r\n")
    write(folder / "b.md", "# Title\n\nBody.\n")
    write(folder / "c.csv", 'Item,Unit price\n"Tea, black",$2\nMilk | cold,"1\n2"\n')
    products = {"Products": [{"name": "Pump", "Unit price": 5, "tags": ["a", "b"]}, {"name": "Valve", "ok": True, "none": None}]}
    write(folder / "d.json", json.dumps(products))
    write(folder / "e.jsonl", '{"name": "x"}\n\n{"name": "y"}\n'.encode("utf-16"))
    write(folder / "sub" / "f.txt", "deep")
    write(folder / ".hidden" / "g.txt", "unseen")
    made, texts = run(tmp_path, folder)
    assert texts == {
        "a.txt": "Plain\n# no heading",
        "b.md": "# Title\n\nBody.",
        "c.csv": "# c\n\n| Item | Unit price |\n| --- | --- |\n| Tea, black | $2 |\n| Milk / cold | 1 2 |",
        "d.json": "# d\n\nProducts[0].name: Pump\nProducts[0].Unit_price: 5\nProducts[0].tags: a, b\n\n"
        "Products[1].name: Valve\nProducts[1].ok: true\nProducts[1].none: none",
        "e.jsonl": "# e\n\ne[0].name: x\n\ne[1].name: y",
        "f.txt": "deep",
    }
    assert (made.documents, made.failed, made.duplicates) == (6, (), ())


def test_binary_types_say_what_they_hold(tmp_path):
    pages = [[f"Section {n} says that valve {n} opens at {n} bar."] for n in range(1, 6)]
    folder = tmp_path / "in"
    for name, data in {"a.docx": docx(), "b.pptx": pptx(), "c.pdf": pdf(pages), "d.html": HTML}.items():
        write(folder / name, data)
    made, texts = run(tmp_path, folder, chunk_tokens=16)
    assert made.failed == () and made.documents == 4
    assert texts["a.docx"] == "# Manual\n\nThe café opens at 8.\n\n| Part | Price |\n| --- | --- |\n| Bolt & nut | $3 |"
    assert texts["b.pptx"] == "## Slide 1\n\nA point\n\nNotes: Say this on 1.\n\n## Slide 2\n\nA point\n\nNotes: Say this on 2."
    assert "# Shop & co\n\nOpens **daily** at 9." in texts["d.html"] and "| Tea" in texts["d.html"] and "alert" not in texts["d.html"]
    chunks = list(read_chunks(tmp_path / "corpus"))
    (paged,) = {chunk.document for chunk in chunks if "valve 1" in chunk.text}
    for chunk in chunks:
        if chunk.document == paged:
            assert chunk.page == texts["c.pdf"].count("Section", 0, chunk.start + len("Section")), "the page on which the chunk starts"
    assert "ACME" not in texts["c.pdf"] and "Page 1 of" not in texts["c.pdf"], "headers and footers are gone"
    assert {chunk.page for chunk in chunks if "Say this on 2" in chunk.text} == {2}
    assert all(chunk.page is None for chunk in chunks if chunk.text.startswith("# Manual"))


def test_chunks_point_into_the_documents_and_the_books_agree(tmp_path):
    write(tmp_path / "in" / "a.md", "# One\n\n" + "Many words are here. " * 200)
    made, _ = run(tmp_path, tmp_path / "in", chunk_tokens=30, overlap_tokens=6)
    (document, text), = read_documents(tmp_path / "corpus")
    chunks = list(read_chunks(tmp_path / "corpus"))
    assert all(chunk.text == text[chunk.start : chunk.end] and chunk.document == document.id for chunk in chunks)
    assert {chunk.headings for chunk in chunks} == {("One",)}
    assert made.chunks == len(chunks) > 25 and made.tokens == sum(chunk.tokens for chunk in chunks) and document.characters == len(text)


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return data.getvalue()


def body(paragraphs):
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    return f'<w:document xmlns:w="{space}"><w:body>{paragraphs}</w:body></w:document>'


LEVELS = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 20}">' for n in range(9))
LAUGHS = f'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">{LEVELS}]>' + body("<w:p><w:r><w:t>&j;</w:t></w:r></w:p>")
XXE = '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + body("<w:p><w:r><w:t>&x;root</w:t></w:r></w:p>")

HOSTILE = {
    "empty.txt": (b"", "empty"),
    "blank.md": (b" \n \n", "empty"),
    "binary.txt": (b"\x7fELF\x00\x00", "zero byte"),
    "latin.csv": ("Preis,Käse\n".encode("cp1252"), "byte 0xe4 at position 7"),
    "open.csv": (b'a,b\n"x,y\n', "not valid CSV|unexpected end"),
    "broken.json": (b'{"a": [1, 2', "line 1 column"),
    "deep.json": (b"[" * 100_000, "deeply"),
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "line 2"),
    "old.doc": (b"\xd0\xcf\x11\xe0", ".doc are not supported"),
    "archive.zip": (b"PK\x03\x04", "not a whole archive"),
    "laughs.yaml": ("k0: &a0 [x, x]\n" + "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)), "more than"),
    "cycle.yaml": ("a: &a [*a]", "nested too deeply"),
    "open.yaml": ('a: "x', "not valid YAML"),
    "garbage.parquet": (b"PAR1garbagePAR1", "no whole Parquet file"),
    "lies.xlsx": (b"hello", "not a whole Office file"),
    "garbage.xls": (b"\xd0\xcf\x11\xe0" + b"x" * 600, "XLS|arsing|alid"),
    "noending": (b"x", "without an ending"),
    "truncated.pdf": (lambda: pdf([["x"]] * 30)[:3000], "no text|crashes|arsing|load"),
    "lies.pdf": (b"hello", "not a PDF"),
    "garbage.pdf": (b"%PDF-1.7 nothing", "arsing|load"),
    "lies.docx": (b"hello", "not a whole Office file"),
    "cut.docx": (lambda: docx()[:500], "not a whole Office file"),
    "empty.docx": (lambda: zipped([]), "arsing|missing|not|no text"),
    "bomb.docx": (lambda: zipped([(DOCX, b"\0" * (50 * MIB))]), "unpacks"),
    "many.docx": (lambda: zipped([(f"w/{n}.xml", "") for n in range(2001)]), "in 2001 files"),
    "laughs.docx": (lambda: zipped([(DOCX, LAUGHS)]), "."),
    "xxe.docx": (lambda: zipped([(DOCX, XXE)]), "."),
    "scan.pdf": (lambda: scan(), "no text"),
}


def scan():
    from reportlab.pdfgen.canvas import Canvas

    data = io.BytesIO()
    canvas = Canvas(data)
    canvas.rect(10, 10, 100, 100, fill=1)
    canvas.save()
    return data.getvalue()


def test_hostile_files_cost_only_themselves(tmp_path):
    folder = tmp_path / "in"
    for name, (data, _) in HOSTILE.items():
        write(folder / name, data() if callable(data) else data)
    write(folder / "z.docx", docx())
    made, texts = run(tmp_path, folder, seconds_per_file=20)
    errors = {failure.path.rpartition("/")[2]: failure for failure in made.failed}
    assert "The café" in texts.pop("z.docx")
    for name, (_, says) in HOSTILE.items():
        if name in ("laughs.docx", "xxe.docx") and name in texts:
            assert len(texts[name]) < 10_000 and "root:" not in texts[name], "entities are neither expanded nor fetched"
            continue
        assert any(part in errors[name].error for part in says.split("|")), (name, errors[name])
        assert errors[name].remedy
    assert set(texts) <= {"laughs.docx", "xxe.docx"} and made.documents == 1 + len(texts)


def test_old_office_files_are_refused_with_the_program_that_converts_them(tmp_path):
    for name, wanted in (("a.doc", ".docx"), ("b.ppt", ".pptx"), ("c.tar", "unpack it")):
        write(tmp_path / "in" / name, b"x")
        with pytest.raises(UserError) as caught:
            run(tmp_path, tmp_path / "in" / name)
        assert wanted in caught.value.remedy


def test_what_is_listed_as_supported_is_what_is_parsed():
    listed = set(SUPPORTED.removeprefix("supported are ").split(", "))
    assert listed == {*MIMES, *RECORDS, *TEXTS, ".zip"} and not listed & set(REMEDIES) - {".zip"}


def test_structured_types_say_what_they_hold(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    folder = tmp_path / "in"
    write(folder / "a.yaml", "version: 1.10\non: no\nbase: &b {x: 1}\nuse:\n  <<: *b\n  list: [a, b]\n---\nmore: \"two\"\n")
    parquet.write_table(pyarrow.table({"name": ["Pump", "Valve"], "price": [5, None]}), folder / "b.parquet")
    made, texts = run(tmp_path, folder)
    assert made.failed == ()
    assert texts["a.yaml"] == (
        "# a\n\na[0].version: 1.10\na[0].on: no\na[0].base.x: 1\na[0].use.x: 1\na[0].use.list: a, b\n\n"
        "a[1].more: two"
    )
    assert texts["b.parquet"] == "# b\n\nb[0].name: Pump\nb[0].price: 5\n\nb[1].name: Valve\nb[1].price: none"


def sheet(rows):
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    lines = ["".join(f"<c t='inlineStr'><is><t>{cell}</t></is></c>" for cell in row) for row in rows]
    cells = "".join(f"<row>{line}</row>" for line in lines)
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006/relationships"
    book = f'<workbook xmlns="{space}" xmlns:r="{relation}"><sheets><sheet name="Prices" sheetId="1" r:id="rId1"/></sheets></workbook>'
    link = f'<Relationship Id="rId1" Type="{relation}/worksheet" Target="worksheets/sheet1.xml"/>'
    links = f'<Relationships xmlns="{package}">{link}</Relationships>'
    root = links.replace("worksheet", "officeDocument").replace("officeDocuments/sheet1", "xl/workbook")
    return zipped([("_rels/.rels", root), ("xl/workbook.xml", book), ("xl/_rels/workbook.xml.rels", links),
                   ("xl/worksheets/sheet1.xml", f'<worksheet xmlns="{space}"><sheetData>{cells}</sheetData></worksheet>')])  # fmt: skip


def test_sheets_keep_their_name_and_their_header_in_every_chunk(tmp_path):
    write(tmp_path / "in" / "a.xlsx", sheet([["Part", "Price"], *([f"Part {n}", f"{n} EUR"] for n in range(100))]))
    _, texts = run(tmp_path, tmp_path / "in", chunk_tokens=256)
    assert all(f"| Part {n} | {n} EUR |" in texts["a.xlsx"] for n in range(100))
    chunks = list(read_chunks(tmp_path / "corpus"))
    assert len(chunks) > 3 and {chunk.headings for chunk in chunks} == {("Prices",)}
    assert all("| Part | Price |\n| --- | --- |\n| Part" in chunk.text for chunk in chunks)


def test_members_of_an_archive_are_files_of_their_own(tmp_path):
    members = [("a.docx", docx()),
               ("sub/b.md", "# Beta\n\nText."), ("c.csv", "k,v\nx,1\n"), ("d.zip", zipped([("x.txt", "x")])), (".hidden/e.txt", "unseen"),
               ("odd\nname\u202e.txt", "odd")]  # fmt: skip
    path = write(tmp_path / "in" / "all.zip", zipped(members))
    made, _ = run(tmp_path, path)
    found = {document.path.removeprefix(str(path)): text for document, text in read_documents(tmp_path / "corpus")}
    assert list(found) == ["/a.docx", "/c.csv", "/odd?name?.txt", "/sub/b.md"]
    assert found["/c.csv"].startswith("# c\n\n| k | v |") and "The café" in found["/a.docx"]
    assert [(failure.path, failure.remedy) for failure in made.failed] == [(f"{path}/d.zip", "unpack it and give the folder")]
    chunks = list(read_chunks(tmp_path / "corpus"))
    assert {chunk.headings for chunk in chunks if "Text." in chunk.text} == {("Beta",)}


def test_nothing_of_an_archive_lands_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "temporary").mkdir()
    write(tmp_path / "in" / "a.zip", zipped([("../up.txt", "x")]))
    write(tmp_path / "in" / "b.zip", zipped([("b.txt", "fine")]))
    made, texts = run(tmp_path, tmp_path / "in")
    assert texts == {"b.txt": "fine"} and "leads elsewhere" in made.failed[0].error
    assert not list((tmp_path / "temporary").iterdir()) and not list(tmp_path.rglob("up.txt"))


def test_deep_html_is_read_or_refused_in_time(tmp_path):
    write(tmp_path / "in" / "deep.html", b"<div>" * 100_000 + b"text")
    write(tmp_path / "in" / "z.txt", "fine")
    made, texts = run(tmp_path, tmp_path / "in", seconds_per_file=10)
    assert texts["z.txt"] == "fine" and made.documents + len(made.failed) == 2


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    secret = write(tmp_path / "secret" / "s.txt", "secret")
    write(tmp_path / "in" / "a.txt", "open")
    (tmp_path / "in" / "link.txt").symlink_to(secret)
    (tmp_path / "in" / "folder").symlink_to(secret.parent)
    (tmp_path / "in" / "inner.txt").symlink_to(tmp_path / "in" / "a.txt")
    made, texts = run(tmp_path, tmp_path / "in")
    assert texts == {"a.txt": "open"} and [failure.path.rpartition("/")[2] for failure in made.failed] == ["link.txt"]
    assert [path.rpartition("/")[2] for path in made.duplicates] == ["inner.txt"]
    (tmp_path / "named.txt").symlink_to(secret)
    assert run(tmp_path, tmp_path / "named.txt")[1] == {"named.txt": "secret"}, "a link that is named is meant"


def test_nothing_is_written_when_nothing_can_be_read(tmp_path):
    bad = write(tmp_path / "in" / "a.bin", b"x")
    for path, says in ((bad.parent, "none of the 1 files"), (tmp_path / "none", "no file or folder")):
        with pytest.raises(UserError, match=says):
            run(tmp_path, path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="none of the 0 files"):
        run(tmp_path, tmp_path / "bare")
    assert not (tmp_path / "corpus").exists()


def test_a_file_that_must_not_be_read_is_a_failure(tmp_path):
    if os.getuid() == 0:
        (tmp_path / "in").mkdir()
        os.mkfifo(tmp_path / "in" / "pipe.txt")
        says = "no ordinary file"
    else:
        write(tmp_path / "in" / "shut.txt", "x").chmod(0)
        says = "cannot be read"
    write(tmp_path / "in" / "z.txt", "fine")
    made, texts = run(tmp_path, tmp_path / "in")
    assert list(texts) == ["z.txt"] and says in made.failed[0].error


def test_progress_names_every_file(tmp_path):
    write(tmp_path / "in" / "a.txt", "a")
    write(tmp_path / "in" / "b.xyz", "b")
    told = []
    spec = IngestSpec(paths=(tmp_path / "in",), out=tmp_path / "c")
    ingest(spec, count_tokens=count, progress=lambda n, total, path: told.append((n, total, path.name)))
    assert told == [(1, 2, "a.txt"), (2, 2, "b.xyz")]


def test_no_text_of_a_document_is_kept_in_a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    write(tmp_path / "in" / "a.docx", docx())
    run(tmp_path, tmp_path / "in")
    assert not (tmp_path / "home").exists()


def test_a_real_report_is_read_in_order(tmp_path, shared):
    made, texts = run(tmp_path, shared / "documents" / "gemma3-report.pdf")
    (text,) = texts.values()
    wanted = ["# Gemma 3 Technical Report", "## 1. Introduction", "Model Architecture", "2.1. Vision modality", "## 3. Instruction-Tuning",
              "## 4. Evaluation of final models", "## 5. Ablations", "## 6. Memorization and Privacy", "## 8. Discussion and Conclusion",
              "## References"]  # fmt: skip
    places = [text.index(heading) for heading in wanted]
    assert places == sorted(places) and made.failed == ()
    assert "| 27B | 417M |  | 1,416M |  | 25,600M |" in text
    chunks = list(read_chunks(tmp_path / "corpus"))
    assert all(chunk.text == text[chunk.start : chunk.end] and 1 <= chunk.page <= 25 and chunk.tokens <= 256 for chunk in chunks)
    assert next(chunk for chunk in chunks if "Long context." in chunk.text).page == 2


def test_without_the_extra_text_is_read_and_the_rest_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write(tmp_path / "in" / "a.pdf", pdf([["x"]]))
    write(tmp_path / "in" / "b.md", "# Fine")
    made, texts = run(tmp_path, tmp_path / "in")
    assert texts == {"b.md": "# Fine"} and "pip install 'llm-garage[docs]'" in made.failed[0].remedy


def test_long_tables_keep_their_header_in_every_chunk(tmp_path):
    rows = "\n".join(f"Part {n},{n} kg,${n}" for n in range(200))
    write(tmp_path / "in" / "parts.csv", f"Part,Weight,Price\n{rows}\n")
    run(tmp_path, tmp_path / "in", chunk_tokens=256)
    chunks = list(read_chunks(tmp_path / "corpus"))
    assert len(chunks) > 5 and all("| Part | Weight | Price |\n| --- | --- | --- |\n| Part" in chunk.text for chunk in chunks)
