"""From bytes to clean text: encodings, and the few normalisations that never change what a text says.

Bytes are UTF-8 (with or without byte order mark) or UTF-16 with one; anything else is refused by naming the first wrong byte,
because a guessed encoding corrupts silently.
"""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from garage.core.errors import UserError

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_ESCAPED = re.compile("[\udc80-\udcff]")
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")
_BLANK_RUN, _DIGITS = re.compile(r"\n{4,}"), re.compile(r"\d+")


def encoding_of(head: bytes, where: str) -> str:
    """The codec of a text file, from its first bytes.

    Raises:
        UserError: the bytes are not text.
    """
    if name := next((name for mark, name in _MARKS if head.startswith(mark)), ""):
        return name
    if (place := head.find(b"\0")) >= 0:
        raise UserError(f"{where} is not text: zero byte at position {place}", remedy="give text: UTF-8, or UTF-16 with byte order mark")
    return "utf-8"


def decode(data: bytes, where: str) -> str:
    """The text of a whole file."""
    if not data.strip():
        raise UserError(f"{where} is empty", remedy="give a file with text in it")
    try:
        return data.decode(encoding_of(data[:65536], where))
    except UnicodeDecodeError as error:
        message = f"{where} is not {error.encoding.upper()}: byte 0x{data[error.start]:02x} at position {error.start}"
        raise UserError(message, remedy="save it as UTF-8; if an older program wrote it, it may be Windows-1252") from error


def printable(name: str) -> str:
    """A file's name without what could lie about it on a screen: line ends, escapes, changes of direction, broken characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def wrong_byte(text: str) -> str:
    """What is wrong with a text that was decoded with `errors="surrogateescape"`, or "" if nothing is."""
    found = _ESCAPED.search(text)
    return f"byte 0x{ord(found.group()) & 0xFF:02x} at character {found.start()} is not UTF-8" if found else ""


def clean_text(text: str) -> str:
    """NFC, `\\n` line ends, no control or zero-width characters, no trailing spaces, at most two blank lines in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n"))
    text = _INVISIBLE.sub("", text).replace("\u00a0", " ").replace("\u2028", "\n").replace("\u2029", "\n")
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_RUN.sub("\n\n\n", lines).strip("\n")


def drop_running_lines(pages: Sequence[str]) -> list[str]:
    """Pages without headers and footers: first and last lines that, digits aside, stand on more than half of four pages or more.

    A line like others inside the pages is none: it may be the row of a table that goes on."""
    inner = {_DIGITS.sub("0", line) for page in pages for line in page.split("\n")[1:-1]}
    edges = [(page.split("\n")[0], page.rpartition("\n")[2]) for page in pages]
    seen = Counter(kind for pair in edges for kind in {_DIGITS.sub("0", line) for line in pair})
    running = {kind for kind, count in seen.items() if kind and len(pages) >= 4 and count > len(pages) / 2} - inner
    cut = [(line if _DIGITS.sub("0", line) in running else "" for line in pair) for pair in edges]
    return [page.removeprefix(first).removesuffix(last).strip() for page, (first, last) in zip(pages, cut, strict=True)]
