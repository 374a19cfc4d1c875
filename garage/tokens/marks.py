"""Where each character of a rendered conversation comes from.

How: the template is run a second time on a copy whose characters are replaced, one for one, by a private-use character that names their
message. Where the two outputs have the same length and differ only there, the second output is a map of the first. White space, quotes
and tags the template looks for stay as they are, so that it takes the same branches; holes inside one message are filled.
Control tokens in messages are hidden behind one private-use character each while the template runs, and written out afterwards.
Limits: where a template changes the length of what it is given (JSON with escapes, case folding) there is no map and origins stay -1.
"""

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from garage.tokens.sandbox import CLOSE, OPEN

_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
_AS_IS = frozenset({"role", "type"})


class Guard:
    """Hides control tokens of one conversation and marks its messages with characters that occur nowhere in it."""

    def __init__(self, control: re.Pattern[str], data: Sequence[object]) -> None:
        self._control = re.compile(f"{control.pattern}|[{OPEN}{CLOSE}]")
        taken = set(_PRIVATE.findall(repr(data)))
        self._free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in taken)
        self.hidden: dict[str, str] = {}
        self._stands: dict[str, str] = {}
        self.marks: dict[str, int] = {}

    def hide(self, value: Any) -> Any:
        """`value` with each control token in its strings replaced by one character."""
        return _map_strings(value, lambda text: self._control.sub(lambda m: self._stand_in(m[0]), text))

    def mark(self, value: Any, index: int, tags: re.Pattern[str]) -> Any:
        """`value` with the characters of its strings replaced by the mark of message `index`, except what `tags` matches."""
        mark = next(self._free)
        self.marks[mark] = index
        return _map_strings(value, lambda text: tags.sub(lambda m: m["keep"] or mark, text))

    def _stand_in(self, token: str) -> str:
        if token not in self._stands:
            char = next(self._free)
            self._stands[token], self.hidden[char] = char, token
        return self._stands[token]


@dataclass
class Marks:
    """Per character: the message it belongs to (-1: the template), and whether it was certainly written by a message."""

    origins: "array[int]"
    foreign: bytearray
    seen: set[int] = field(default_factory=set)
    is_exact: bool = False


def kept(constants: Sequence[str]) -> re.Pattern[str]:
    """Matches one character to mark, or as `keep` what must stay: white space, quotes, backslashes and tags the template knows."""
    tags = sorted({c for c in constants if len(c) > 1 and not c.isspace() and re.search(r"[^\w\s]", c)}, key=len, reverse=True)
    return re.compile("(?P<keep>" + "|".join([*map(re.escape, tags), r'[\s"\\\x00-\x1f]']) + ")|.", re.DOTALL)


def shadow_marks(text: str, shadow: str, guard: Guard) -> Marks:
    """Read the origins of `text` off its marked copy."""
    out = Marks(array("i", [-1]) * len(text), bytearray(c in guard.hidden for c in text) if guard.hidden else bytearray(len(text)))
    chars = "".join(guard.marks)
    runs = [m.span() for m in re.finditer(f"[{chars}]+", shadow)]
    gaps = zip([0, *(b for _, b in runs)], [*(a for a, _ in runs), len(text)], strict=True)
    if len(text) != len(shadow) or any(text[a:b] != shadow[a:b] for a, b in gaps):
        return out
    for start, end in runs:
        out.foreign[start:end] = b"\1" * (end - start)
    for run in re.finditer(rf"([{chars}])(?:[^{chars}]*\1)*", shadow):
        index = guard.marks[run[1]]
        out.seen.add(index)
        out.origins[run.start():run.end()] = array("i", [index]) * len(run[0])
    out.is_exact = True
    return out


def expand(text: str, guard: Guard, learned: bytearray, origins: "array[int]", foreign: bytearray) -> tuple[str, bytearray, "array[int]", bytearray]:
    """Write hidden control tokens out, and stretch the labels with them."""
    if not guard.hidden:
        return text, learned, origins, foreign
    lengths = [len(guard.hidden.get(c, c)) for c in text]
    stretched = array("i", [v for v, n in zip(origins, lengths, strict=True) for _ in range(n)])
    flags, alien = (bytearray(v for v, n in zip(of, lengths, strict=True) for _ in range(n)) for of in (learned, foreign))
    return "".join(guard.hidden.get(c, c) for c in text), flags, stretched, alien


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k in _AS_IS else _map_strings(v, change) for k, v in value.items()}
    return [_map_strings(v, change) for v in value] if isinstance(value, list | tuple) else value
