"""From bytes to clean text: encodings, JSON, and the few normalisations that never change what a text says.

Bytes are UTF-8 (with or without byte order mark) or UTF-16 with one; anything else is refused by naming the first wrong byte,
because a guessed encoding corrupts silently. JSON is the strict standard: the accidents of Python's reader (`NaN`, doubled keys, lone
surrogates, recursion on deep nesting, numbers of thousands of digits) are all one `ValueError` that says what is wrong.
"""

import codecs
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from garage.core.errors import UserError

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_ESCAPED = re.compile("[\udc80-\udcff]")
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")
_BLANK_RUN = re.compile(r"\n{4,}")


def encoding_of(head: bytes, where: str) -> str:
    """The codec of a text file, from its first bytes.

    Raises:
        UserError: the bytes are not text.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
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
        raise UserError(
            f"{where} is not {error.encoding.upper()}: byte 0x{data[error.start]:02x} at position {error.start}",
            remedy="save it as UTF-8; if an older program wrote it, it may be Windows-1252",
        ) from error


def wrong_byte(text: str) -> str:
    """What is wrong with a text that was decoded with `errors="surrogateescape"`, or "" if nothing is."""
    found = _ESCAPED.search(text)
    return f"byte 0x{ord(found.group()) & 0xFF:02x} at character {found.start()} is not UTF-8" if found else ""


def parse_json(text: str) -> object:
    """One JSON value.

    Raises:
        ValueError: it is not standard JSON; the message says why.
    """
    value, end = parse_json_at(text, len(text) - len(text.lstrip()))
    if text[end:].strip():
        raise ValueError(f"text after the JSON value: {text[end : end + 20].strip()!r}")
    return value


def parse_json_at(text: str, start: int) -> tuple[object, int]:
    """The JSON value that starts at `start`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        if "\\ud" in text[start:end].lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    return value, end


def clean_text(text: str) -> str:
    """NFC, `\\n` line ends, no control or zero-width characters, no trailing spaces, at most two blank lines in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n"))
    text = _INVISIBLE.sub("", text).replace("\u00a0", " ").replace("\u2028", "\n").replace("\u2029", "\n")
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_RUN.sub("\n\n\n", lines).strip("\n")


def drop_running_lines(pages: Sequence[str], *, share: float = 0.5) -> list[str]:
    """Pages without their headers and footers: first or last lines that, digits aside, stand on more than `share` of the pages."""
    if len(pages) < 4:
        return list(pages)
    split = [page.strip().split("\n") for page in pages]
    seen = Counter(key for lines in split for key in {_digitless(lines[0]), _digitless(lines[-1])})
    running = {key for key, count in seen.items() if key and count > share * len(pages)}
    return ["\n".join(_trimmed(lines, running)) for lines in split]


def _trimmed(lines: list[str], running: set[str]) -> list[str]:
    first = 1 if _digitless(lines[0]) in running else 0
    last = -1 if len(lines) > first and _digitless(lines[-1]) in running else None
    return lines[first:last]


def _digitless(line: str) -> str:
    return re.sub(r"\d+", "0", line).strip()


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is out of range")
    return number


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return out


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
