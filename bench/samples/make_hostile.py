"""Writes files that are meant to break a reader of documents: bombs, lies, cycles, depth, wrong encodings, names that escape.

    python bench/samples/make_hostile.py DIRECTORY

`FILES` maps a file's name to what makes its bytes; the same bytes at every run. Nothing here is dangerous to keep or copy: bombs are bombs
only to a program that unpacks them without measuring. No file is of a real program but those that name Office parts, written by hand.
"""

# ruff: noqa: E501  (the tables of attacks: a line for each)

import hashlib
import io
import json
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

MIB, WHEN = 1 << 20, (2026, 1, 5, 9, 0, 0)
Bytes = bytes | str
Maker = Callable[[], bytes]
FILES: dict[str, Maker] = {}


def add(name: str, make: Callable[[], Bytes] | Bytes) -> None:
    assert name not in FILES, name
    FILES[name] = lambda: raw(make() if callable(make) else make)


def raw(data: Bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data


# --- zip -------------------------------------------------------------------------------------------------------------------------


def zipped(*members: tuple[str, Bytes], method: int = zipfile.ZIP_DEFLATED, mode: int = 0) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name, WHEN)
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, raw(content))
    return data.getvalue()


def patched(data: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new, count)


def shared(copies: int) -> bytes:
    """One member, listed many times under many names: all of them share its bytes."""
    data = zipped(("a.txt", b"0" * MIB))
    start = data.index(b"PK\x01\x02")
    record, end = data[start:-22], data[-22:]
    records = b"".join(record.replace(b"a.txt", b"%05d" % n) for n in range(copies))
    return data[:start] + records + end[:8] + struct.pack("<HHLL", copies, copies, len(records), start) + end[20:]


def lying(data: bytes, size: int) -> bytes:
    """The central directory says another unpacked size."""
    at = data.index(b"PK\x01\x02") + 24
    return data[:at] + struct.pack("<L", size) + data[at + 4 :]


def locked(data: bytes) -> bytes:
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(mark) + offset
        data = data[:at] + b"\x01\x00" + data[at + 2 :]
    return data


def nested(levels: int) -> bytes:
    data = zipped(("deep.txt", "here"))
    for _ in range(levels):
        data = zipped(("again.zip", data))
    return data


GOOD = zipped(("a.txt", "Alpha.\n"), ("b.md", "# Beta\n\nText.\n"))
ZIP64_END = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 50, 0)
ZIPS: dict[str, Callable[[], Bytes] | Bytes] = {
    "ratio": lambda: zipped(("a.txt", b"0" * (150 * MIB))), "total": lambda: zipped(*((f"{n}.txt", b"0" * (50 * MIB)) for n in range(5))),
    "bzip2-bomb": lambda: zipped(("a.txt", b"0" * (120 * MIB)), method=zipfile.ZIP_BZIP2), "count": lambda: zipped(*((f"{n}.txt", "") for n in range(2001))),
    "record-flood": lambda: GOOD[: GOOD.index(b"PK\x01\x02")] + b"PK\x01\x02" * 200_000 + GOOD[GOOD.index(b"PK\x01\x02") :],
    "overlap": lambda: shared(150), "lying-small": lambda: lying(zipped(("a.txt", b"01" * MIB)), 10), "lying-large": lambda: lying(GOOD, 1 << 31),
    "traversal": zipped(("../../escaped.txt", "out")), "absolute": zipped(("/tmp/escaped.txt", "out")), "drive": zipped(("C:/escaped.txt", "out")),
    "backslash": zipped(("..\\..\\escaped.txt", "out")), "symlink": zipped(("link.txt", "/etc/passwd"), mode=0o120777),
    "device": zipped(("null.txt", ""), mode=0o020666), "nested": lambda: nested(1), "nested-10": lambda: nested(10),
    "quine": lambda: zipped(("quine.zip", zipped(("quine.zip", GOOD), method=zipfile.ZIP_STORED)), method=zipfile.ZIP_STORED),
    "nested-bombs": lambda: zipped(*((f"{n}.zip", zipped(("a.txt", b"0" * MIB))) for n in range(16))),
    "password": lambda: locked(GOOD), "crc": lambda: patched(zipped(("a.txt", "Alpha.\n" * 9), method=zipfile.ZIP_STORED), b"Alpha", b"Aleph", 1),
    "method": lambda: patched(GOOD, b"\x14\x00\x00\x00\x08\x00", b"\x14\x00\x00\x00\x63\x00"), "no-members": zipped(), "zero-bytes": b"",
    "twice": lambda: zipped(("a.txt", "one"), ("A.txt", "two"), ("./a.txt", "three")), "prefix": b"MZ" + b"\0" * 99 + GOOD,
    "zip64": lambda: GOOD[:-22] + ZIP64_END + b"PK\x06\x07" + struct.pack("<LQL", 0, len(GOOD) - 22, 1) + GOOD[-22:],
    "two-ends": GOOD[:-2] + struct.pack("<H", 22) + zipped(), "bomb-docx-inside": lambda: zipped(("a.docx", office("docx", b"0" * (30 * MIB)))),
    "odd-names": lambda: zipped(("a\nb.txt", "x"), ("\u202etxt.exe.txt", "y"), ("\x1b[2J.txt", "z"), ("l" * 60_000 + ".txt", "w"), ("CON.txt", "v")),
    "negative-offset": lambda: GOOD[:-6] + struct.pack("<L", 0xFFFFFFF0) + GOOD[-2:],
}  # fmt: skip
for name, make in ZIPS.items():
    add(f"zip-{name}.zip", make)
for share in (25, 50, 75, 99):
    add(f"zip-cut-{share}.zip", lambda share=share: GOOD[: len(GOOD) * share // 100])

# --- office ----------------------------------------------------------------------------------------------------------------------

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
A, P = "http://schemas.openxmlformats.org/drawingml/2006/main", "http://schemas.openxmlformats.org/presentationml/2006/main"
R, S = "http://schemas.openxmlformats.org/officeDocument/2006/relationships", "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS, ODF = "http://schemas.openxmlformats.org/package/2006/relationships", "urn:oasis:names:tc:opendocument:xmlns"
BODIES = {
    "docx": (f'<w:document xmlns:w="{W}"><w:body>', "<w:p><w:r><w:t>{}</w:t></w:r></w:p>", "</w:body></w:document>", "w:p"),
    "pptx": (f'<p:sld xmlns:p="{P}" xmlns:a="{A}"><p:cSld><p:spTree>', "<p:sp><p:txBody><a:p><a:r><a:t>{}</a:t></a:r></a:p></p:txBody></p:sp>",
             "</p:spTree></p:cSld></p:sld>", "p:grpSp"),
    "xlsx": (f'<worksheet xmlns="{S}"><sheetData>', '<row r="1"><c r="A1" t="inlineStr"><is><t>{}</t></is></c></row>', "</sheetData></worksheet>", "is"),
    "odt": (f'<office:document-content xmlns:office="{ODF}:office:1.0" xmlns:text="{ODF}:text:1.0"><office:body><office:text>', "<text:p>{}</text:p>",
            "</office:text></office:body></office:document-content>", "text:span"),
    "epub": ('<html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title></head><body>', "<p>{}</p>", "</body></html>", "div"),
}  # fmt: skip
PARTS = {"docx": "word/document.xml", "pptx": "ppt/slides/slide1.xml", "xlsx": "xl/worksheets/sheet1.xml", "odt": "content.xml", "epub": "c.xhtml"}


def relations(kind: str, target: str) -> str:
    return f'<Relationships xmlns="{RELATIONS}"><Relationship Id="rId1" Type="{R}/{kind}" Target="{target}"/></Relationships>'


REST: dict[str, Sequence[tuple[str, str]]] = {
    "docx": [("[Content_Types].xml", "<Types/>"), ("_rels/.rels", relations("officeDocument", "word/document.xml"))],
    "pptx": [("[Content_Types].xml", "<Types/>"), ("_rels/.rels", relations("officeDocument", "ppt/presentation.xml")),
             ("ppt/presentation.xml", f'<p:presentation xmlns:p="{P}" xmlns:r="{R}"><p:sldIdLst><p:sldId id="256" r:id="rId1"/></p:sldIdLst></p:presentation>'),
             ("ppt/_rels/presentation.xml.rels", relations("slide", "slides/slide1.xml"))],
    "xlsx": [("[Content_Types].xml", "<Types/>"), ("_rels/.rels", relations("officeDocument", "xl/workbook.xml")),
             ("xl/workbook.xml", f'<workbook xmlns="{S}" xmlns:r="{R}"><sheets><sheet name="S" sheetId="1" r:id="rId1"/></sheets></workbook>'),
             ("xl/_rels/workbook.xml.rels", relations("worksheet", "worksheets/sheet1.xml"))],
    "odt": [("mimetype", "application/vnd.oasis.opendocument.text")],
    "epub": [("mimetype", "application/epub+zip"),
             ("META-INF/container.xml", '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles><rootfile '
              'full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'),
             ("c.opf", '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/><manifest><item id="a" href="c.xhtml" '
              'media-type="application/xhtml+xml"/></manifest><spine><itemref idref="a"/></spine></package>')],
}  # fmt: skip


PADDING = ("padding.bin", hashlib.shake_256(b"padding").digest(MIB))  # incompressible: what is beside it unpacks to less than a hundred times


def office(kind: str, main: Bytes, *more: tuple[str, Bytes]) -> bytes:
    return zipped(*REST[kind], (PARTS[kind], main), *more)


def page(kind: str, text: str, doctype: str = "") -> str:
    head, paragraph, tail, _ = BODIES[kind]
    return f'<?xml version="1.0"?>{doctype}{head}{paragraph.format(text)}{tail}'


def deep(kind: str, levels: int) -> str:
    head, paragraph, tail, inner = BODIES[kind]
    return f'<?xml version="1.0"?>{head}{f"<{inner}>" * levels}{paragraph.format("deep")}{f"</{inner}>" * levels}{tail}'


ENTITY = f'<!DOCTYPE l [<!ENTITY a "{"ha" * 50_000}">]>'
LAUGHS = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 20}">' for n in range(9))
DOCTYPES = {
    "laughs": (f'<!DOCTYPE l [<!ENTITY a "ha">{LAUGHS}]>', "&j;"),
    "xxe-file": ('<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]>', "seen &x; seen"),
    "xxe-http": ('<!DOCTYPE l [<!ENTITY x SYSTEM "http://127.0.0.1:9/x">]>', "seen &x; seen"),
    "dtd-http": ('<!DOCTYPE l SYSTEM "http://127.0.0.1:9/x.dtd">', "seen"),
}  # fmt: skip
for kind in BODIES:
    for name, (doctype, text) in DOCTYPES.items():
        add(f"{kind}-{name}.{kind}", lambda kind=kind, text=text, doctype=doctype: office(kind, page(kind, text, doctype)))
    add(f"{kind}-deep.{kind}", lambda kind=kind: office(kind, deep(kind, 100_000), PADDING))
    add(f"{kind}-bomb.{kind}", lambda kind=kind: office(kind, page(kind, "0" * (60 * MIB))))
    add(f"{kind}-quadratic.{kind}", lambda kind=kind: office(kind, page(kind, "&a;" * 20_000, ENTITY), PADDING))
    add(f"{kind}-large.{kind}", lambda kind=kind: office(kind, page(kind, "0" * (60 * MIB)), PADDING))
    add(f"{kind}-repeats.{kind}", lambda kind=kind: office(kind, page(kind, "the same words again " * 400_000), PADDING))
    add(f"{kind}-garbage.{kind}", lambda kind=kind: office(kind, "<not <xml"))
    add(f"{kind}-cut.{kind}", lambda kind=kind: office(kind, page(kind, "whole " * 999))[:-200])


def png(side: int) -> bytes:
    """A picture that says it is `side` x `side`; a tenth of its rows are there."""
    rows = zlib.compress((b"\0" + b"\0" * (side // 8)) * (side // 10), 9)
    parts = ((b"IHDR", struct.pack(">LLBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">L", len(d)) + t + d + struct.pack(">L", zlib.crc32(t + d)) for t, d in parts)


def pictured() -> bytes:
    link = f'<w:drawing><a:blip xmlns:a="{A}" xmlns:r="{R}" r:embed="rId1"/></w:drawing>'
    body = page("docx", "a picture").replace("</w:r>", f"{link}</w:r>")
    return office("docx", body, ("word/_rels/document.xml.rels", relations("image", "media/i.png")), ("word/media/i.png", png(50_000)))


def tables(levels: int) -> str:
    head, paragraph, tail, _ = BODIES["docx"]
    return head + "<w:tbl><w:tr><w:tc>" * levels + paragraph.format("deep") + "</w:tc></w:tr></w:tbl>" * levels + tail


CORNERS = '<row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>2</v></c></row>'
GRID = "".join(f'<row r="{n}">{"".join(f"<c><v>{n * c}</v></c>" for c in range(400))}</row>' for n in range(1, 2601))
REMOTE = relations("image", "http://127.0.0.1:9/x.png").replace("/>", ' TargetMode="External"/>', 1)
add("docx-picture-50k.docx", pictured)
add("docx-nested-tables.docx", lambda: office("docx", tables(3000), PADDING))
add("docx-remote-parts.docx", lambda: office("docx", page("docx", "remote"), ("word/_rels/document.xml.rels", REMOTE)))
add("docx-traversal.docx", lambda: office("docx", page("docx", "x"), ("../../escaped.xml", "out")))
add("docx-attribute.docx", lambda: office("docx", page("docx", "x").replace("<w:p>", f'<w:p w:x="{"0123456789abcdef" * 500_000}">'), PADDING))
add("docx-encrypted.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 4096)
add("xlsx-corners.xlsx", lambda: office("xlsx", page("xlsx", "x").replace(BODIES["xlsx"][1].format("x"), CORNERS), PADDING))
add("xlsx-million-cells.xlsx", lambda: office("xlsx", page("xlsx", "x").replace(BODIES["xlsx"][1].format("x"), GRID)))
add("xls-garbage.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(range(256)) * 64)
add("xls-cycle.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 16 + struct.pack("<HHHHH", 62, 3, 0xFFFE, 9, 6) + b"\0" * 478 + b"\0" * 8192)
add("epub-traversal.epub", lambda: zipped(*((n, c.replace("c.xhtml", "../../../../etc/passwd")) for n, c in REST["epub"])))
add("pptx-thousands.pptx", lambda: office("pptx", page("pptx", "x"), *((f"ppt/slides/slide{n}.xml", page("pptx", str(n))) for n in range(2, 1900))))

# --- PDF -------------------------------------------------------------------------------------------------------------------------


def pdf(*objects: Bytes, trailer: Bytes = "/Root 1 0 R", version: str = "1.7") -> bytes:
    """A PDF of these objects, numbered from 1, with a right table of places."""
    out, places = bytearray(f"%PDF-{version}\n".encode()), []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + raw(content) + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size, start = len(objects) + 1, len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size + table + b"trailer\n<< /Size %d " % size + raw(trailer) + b" >>\nstartxref\n%d\n%%%%EOF\n" % start
    return bytes(out)


def stream(data: Bytes, keys: str = "") -> bytes:
    return f"<< /Length {len(raw(data))} {keys} >>\nstream\n".encode() + raw(data) + b"\nendstream"


def paper(contents: Bytes, page_keys: str = "", *more: Bytes, catalog: str = "") -> bytes:
    """One page with these contents, in object 4; `more` are the objects from 6 on."""
    keys = f"/MediaBox [0 0 600 800] /Resources << /Font << /F 5 0 R >> >> {page_keys}"
    return pdf(f"<< /Type /Catalog /Pages 2 0 R {catalog} >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
               f"<< /Type /Page /Parent 2 0 R /Contents 4 0 R {keys} >>", contents, "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", *more)  # fmt: skip


def squeezed(data: bytes, times: int) -> bytes:
    for _ in range(times):
        data = zlib.compress(data, 9)
    return stream(data, f"/Filter [{'/FlateDecode ' * times}]")


def lzw(count: int) -> bytes:
    """LZW of a run of one byte: each code stands for one byte more than the code before; cleared when the table is full."""
    bits, runs = [], 0
    while runs < count:
        bits.append(f"{256:09b}{0x20:09b}")
        for code in range(258, 4093):
            bits.append(format(code, f"0{9 + (code > 511) + (code > 1023) + (code > 2047)}b"))
        runs += 3835 * 3837 // 2
    text = "".join(bits)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def many_pages(count: int, own: bool) -> bytes:
    kids = " ".join(f"{n + 4 if own else 3} 0 R" for n in range(count))
    leaf = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] >>"
    return pdf("<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>", leaf, *([leaf] * (count if own else 0)))


def locked_pdf() -> bytes:
    key = "<28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A>"
    whole = paper(stream("BT (x) Tj ET"))
    return whole.replace(b"/Root 1 0 R", f"/Root 1 0 R /ID [<00> <00>] /Encrypt << /Filter /Standard /V 2 /R 3 /Length 128 /P -4 /O {key} /U {key} >>".encode())


HELLO, BOMB = stream("BT /F 12 Tf 50 700 Td (Hello there) Tj ET"), b" " * (200 * MIB)
RANGES = "begincmap 1 begincodespacerange <0000> <FFFF> endcodespacerange " + "1 beginbfrange <0000> <FFFF> <0000> endbfrange " * 20_000 + "endcmap"
PDFS: dict[str, Callable[[], Bytes] | Bytes] = {
    "flate": lambda: paper(squeezed(BOMB, 1)), "flate-twice": lambda: paper(squeezed(BOMB, 2)), "flate-thrice": lambda: paper(squeezed(BOMB, 3)),
    "lzw": lambda: paper(stream(lzw(100 * MIB), "/Filter /LZWDecode")),
    "runs": lambda: paper(squeezed(b"\x81 " * (40 * MIB) + b"\x80", 1).replace(b"/FlateDecode ", b"/FlateDecode /RunLengthDecode ")),
    "operators": lambda: paper(squeezed(b"BT /F 1 Tf (a) Tj ET\n" * 3_000_000, 1)), "pages-self": lambda: pdf(
        "<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2 >>"),
    "pages-1e6": lambda: many_pages(1_000_000, own=False), "pages-3000": lambda: many_pages(3000, own=True),
    "count-lies": lambda: paper(HELLO).replace(b"/Count 1", b"/Count 2000000000"), "size-lies": lambda: paper(HELLO).replace(b"/Size 6", b"/Size 2147483647"),
    "length-lies": lambda: paper(HELLO.replace(b"/Length", b"/Length 999999999999 /Was")), "length-self": lambda: paper(HELLO.replace(b"/Length 41", b"/Length 4 0 R")),
    "prev-loop": lambda: paper(HELLO).replace(b"/Root", b"/Prev 9 /Root"), "xref-gone": lambda: paper(HELLO).replace(b"xref", b"feed"),
    "xref-wild": lambda: paper(HELLO).replace(b"0000000", b"9999999"), "start-wild": lambda: paper(HELLO).replace(b"startxref\n", b"startxref\n99999999"),
    "form-self": lambda: paper(stream("/X Do"), "/Resources << /XObject << /X 6 0 R >> >>",
                               stream("/X Do /X Do", "/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /X 6 0 R >> >>")),
    "deep-array": lambda: paper(HELLO, "/Deep " + "[" * 100_000 + "]" * 100_000), "deep-operands": lambda: paper(stream("[" * 100_000)),
    "deep-dictionary": lambda: paper(HELLO, "/Deep " + "<< /A " * 100_000 + "1" + " >>" * 100_000),
    "deep-state": lambda: paper(stream("q " * 1_000_000)), "outline-loop": lambda: paper(
        HELLO, "", "<< /First 7 0 R /Last 7 0 R >>", "<< /Title (x) /Next 7 0 R /First 7 0 R /Parent 6 0 R >>", catalog="/Outlines 6 0 R"),
    "picture-50k": lambda: paper(stream("/I Do"), "/Resources << /XObject << /I 6 0 R >> >>", squeezed(b"\0" * (20 * MIB), 1).replace(
        b"<<", b"<< /Type /XObject /Subtype /Image /Width 50000 /Height 50000 /BitsPerComponent 8 /ColorSpace /DeviceGray", 1)),
    "inline-image": lambda: paper(stream(b"BI /W 50000 /H 50000 /BPC 8 /CS /G ID " + b"\0" * MIB)), "cmap": lambda: paper(
        stream("BT /F 9 Tf <0041> Tj ET"), "/Resources << /Font << /F 6 0 R >> >>", "<< /Type /Font /Subtype /Type0 /BaseFont /X /ToUnicode 7 0 R >>", stream(RANGES)),
    "script": lambda: paper(HELLO, catalog="/OpenAction << /S /JavaScript /JS (while\\(1\\){}) >>"),
    "launch": lambda: paper(HELLO, catalog="/OpenAction << /S /URI /URI (http://127.0.0.1:9/) >> /AA << /WC << /S /Launch /F (/bin/sh) >> >>"),
    "attachment": lambda: paper(HELLO, "", "<< /Names [(a) << /EF << /F 7 0 R >> >>] >>", squeezed(BOMB, 1), catalog="/Names << /EmbeddedFiles 6 0 R >>"),
    "box-wild": lambda: paper(HELLO, "/MediaBox [-1e38 -1e38 1e38 1e38] /UserUnit 1e30"), "password": locked_pdf,
    "header-only": b"%PDF-1.7\n", "garbage": b"%PDF-1.7\n" + bytes(range(256)) * 4000, "nul": b"%PDF-1.7\n" + b"\0" * MIB,
    "objects-flood": lambda: b"%PDF-1.7\n" + b"1 0 obj\n" * 1_000_000,
}  # fmt: skip
for name, make in PDFS.items():
    add(f"pdf-{name}.pdf", make)
for share in (10, 50, 90):
    add(f"pdf-cut-{share}.pdf", lambda share=share: (whole := paper(HELLO))[: len(whole) * share // 100])

# --- text and structured text ----------------------------------------------------------------------------------------------------

JSONS: dict[str, Callable[[], Bytes] | Bytes] = {
    "deep-list": "[" * 100_000, "deep-table": '{"a":' * 100_000, "deep-closed": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"a": ' + "9" * MIB + "}", "nan": '{"a": NaN}', "infinite": '{"a": 1e999}', "twice": '{"a": 1, "a": 2}', "half-pair": '{"a": "\\ud800"}',
    "open-text": lambda: '{"a": "' + "x" * (10 * MIB), "empty-lists": lambda: '{"a": [' + "[]," * 7_000_000 + "[]]}", "bom-twice": "\ufeff\ufeff{}",
    "many-keys": lambda: json.dumps({f"k{n}": n for n in range(100_000)}), "page": "<html><script>fetch('http://127.0.0.1:9')</script>", "zero": b"{\0}",
}  # fmt: skip
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9))
YAMLS: dict[str, Callable[[], Bytes] | Bytes] = {
    "laughs": ALIASES, "cycle": "a: &a [*a, *a]\n", "cycle-merge": "a: &a\n  <<: *a\n  b: 1\n", "deep-flow": "[" * 100_000, "deep-table": "{a: " * 100_000,
    "deep-block": "".join(" " * n + "a:\n" for n in range(2000)), "object": "!!python/object/apply:os.system ['touch /tmp/escaped']", "open": 'a: "x',
    "tabs": "a:\n\t- b", "unknown": "a: *nowhere", "anchors": lambda: "".join(f"k{n}: &a{n} x\n" for n in range(100_000)), "binary": "a: !!binary ////\n",
}  # fmt: skip
HTMLS: dict[str, Callable[[], Bytes] | Bytes] = {
    "deep": "<div>" * 100_000 + "deep", "deep-tables": "<table><tr><td>" * 3000 + "deep", "deep-lists": "<ul><li>" * 20_000 + "deep",
    "deep-bold": "<b><i>" * 50_000 + "deep", "attributes": lambda: "<p " + " ".join(f"a{n}=1" for n in range(300_000)) + ">x</p>",
    "attribute": "<p title='" + "x" * (5 * MIB) + "'>x</p>", "script": "<script>while(1){}</script>", "open-comment": "<p>seen</p><!--" + "-" * MIB,
    "remote": "<base href='file:///etc/'><iframe src='passwd'></iframe><img src='http://127.0.0.1:9/x.png'><link rel=stylesheet href=//127.0.0.1:9/x>text",
    "charset": "<meta charset=utf-16><p>caf\u00e9</p>", "latin": "<meta charset=iso-8859-1><p>caf\xe9</p>".encode("latin-1"),
    "bom-16": "<p>sixteen</p>".encode("utf-16"), "large": lambda: "<p>large</p>" * MIB, "polyglot": "/*<html>*/=1;alert(1)/*<p>text</p></html>*/",
    "spans": "<table><tr><td colspan=1000000 rowspan=1000000>x</td></tr></table>", "entities": "<p>" + "&amp;lt;&#x110000;&#0;" * 50_000 + "</p>",
    "open-tags": "<" * MIB, "data": "<img src='data:image/png;base64," + "A" * (5 * MIB) + "'>x", "nul": "<p>a\0b</p>",
}  # fmt: skip
CSVS: dict[str, Callable[[], Bytes] | Bytes] = {
    "open-quote": 'a,b\n"x,y\n', "wide": lambda: ",".join(["x"] * 500_000) + "\n" + ",".join(["y"] * 500_000), "long-cell": "a\n" + "x" * (5 * MIB),
    "zero": b"a,b\n\0,1\n", "formula": "a,b\n=cmd|' /C calc'!A0,1\n", "separators": "," * MIB, "newlines": 'a\n"' + "\n" * MIB + '"\n',
}  # fmt: skip
TEXTS: dict[str, Callable[[], Bytes] | Bytes] = {
    "empty": b"", "blank": b" \n\t\n", "zero": b"a\0b", "utf-16-bare": "sixteen".encode("utf-16-le"), "utf-32": "thirty-two".encode("utf-32"),
    "latin": "caf\xe9".encode("latin-1"), "late-byte": b"a" * MIB + b"\xff", "overlong": b"a\xc0\xafb", "surrogate": b"a\xed\xa0\x80b", "bom-only": b"\xef\xbb\xbf",
    "bom-lies": b"\xff\xfeodd", "one-line": lambda: "word " * (4 * MIB), "one-word": lambda: "x" * (4 * MIB), "line-ends": lambda: "\n" * (10 * MIB) + "end",
    "marks": lambda: "a" + "\u0301\u0316" * 300_000, "direction": "\u202eevil\u202c \u2066x\u2069", "escapes": "\x1b]0;title\x07\x1b[2J text", "too-long": lambda: "words " * (8 * MIB),
}  # fmt: skip
MARKDOWN = {"spaces": "# a" + " " * 300_000 + "x\n", "hashes": "# a" + "#" * 300_000 + "x\n", "headings": "# h\n" * 200_000, "fences": "```\n" * 200_000,
            "bars": "|" * MIB, "quotes": "x" + '."' * MIB}  # fmt: skip
for kind, table in (("json", JSONS), ("yaml", YAMLS), ("html", HTMLS), ("csv", CSVS), ("txt", TEXTS), ("md", MARKDOWN)):
    for name, make in table.items():  # type: ignore[attr-defined]
        add(f"{kind}-{name}.{kind}", make)
add("jsonl-long-line.jsonl", lambda: '{"a": "' + "x" * (20 * MIB) + '"}\n')
add("jsonl-half.jsonl", '{"a": 1}\n{"a": ')
add("parquet-garbage.parquet", b"PAR1" + bytes(range(256)) * 9 + b"PAR1")
add("parquet-footer.parquet", b"PAR1" + b"\0" * 99 + struct.pack("<L", 0x7FFFFFFF) + b"PAR1")
add("parquet-deep.parquet", b"PAR1" + b"\x1c" * 60_000 + struct.pack("<L", 60_000) + b"PAR1")

# --- not what the name says; names -----------------------------------------------------------------------------------------------

add("lies-png.pdf", lambda: png(16))
add("lies-pdf.docx", lambda: paper(HELLO))
add("lies-docx.pdf", lambda: office("docx", page("docx", "x")))
add("lies-zip.docx", GOOD)
add("lies-xlsx.docx", lambda: office("xlsx", page("xlsx", "x")))
add("lies-program.txt", b"\x7fELF\x02\x01\x01" + b"\0" * 64)
add("old.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 512)
add("old.ppt", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 512)
add("program.exe", b"MZ")
add("polyglot.pdf", lambda: paper(HELLO) + GOOD)
add("polyglot.zip", lambda: paper(HELLO) + GOOD)
add("name\nwith line end.txt", "a name of two lines")
add("\u202etxt.fdp.txt", "a name that turns round")
add("\x1b[31mred.txt", "a name with an escape")
add("n" * 251 + ".txt", "the longest name")
add("--out.txt", "a name like an option")
add(os.fsdecode(b"caf\xe9.txt"), "a name that is not UTF-8")


def main() -> None:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        (place / name).write_bytes(make())
    print(f"{len(FILES)} files in {place}")


if __name__ == "__main__":
    main()
