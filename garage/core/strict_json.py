"""JSON that others wrote, by the standard: the accidents of Python's reader are all one `ValueError` that says what is wrong.

Python's reader takes `NaN`, makes `1e999` infinite, keeps the last of two equal keys, lets half a surrogate pair through until something is
encoded, and raises `RecursionError` for deep nesting.
"""

import json
import math
from collections import Counter


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


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is not a JSON number")
    return number


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(out := dict(pairs)) != len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} stands twice in one object")
    return out


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique)
