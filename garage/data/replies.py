"""A teacher's reply: what can be read of it, and whether a row made of it may be kept.

Reading is lenient: fenced blocks first, else every JSON array and object in the text, else every object that is whole. Keeping is strict: a
reply is hostile input, for its author has read a document that may say anything. Only the fields of the schema, evidence that stands in the
text, numbers that the text or a right equation gives, a question that stands alone.

Limits: languages written with spaces; an answer in another language than its text is not taken for supported; arithmetic without brackets.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from math import ceil

from garage.core.strict_json import parse_json_at

MAX_REPLY, MAX_FIELD, MAX_STARTS, MAX_TURNS = 200_000, 8_000, 2_000, 8
MIN_QUOTE, SAME_QUOTE, SAME_QUESTION, SUPPORTED, RUN = 8, 0.9, 0.8, 0.5, 8
"""Shortest quote in characters; likeness of a quote and its place, of two questions; share of an answer's words that its text has; words in
a row that count as copied."""

_FENCED = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", **dict.fromkeys("*_`|#\u00ad\u200b", "")})
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_OPERAND = r"[$€£]?\d[\d,]*(?:\.\d+)?%?(?: ?[a-zA-Z]{2,})?"
_EQUATION = re.compile(rf"({_OPERAND}(?:\s*[-+*/×x÷−]\s*{_OPERAND})+)\s*=\s*({_OPERAND})")
_FINAL = re.compile(r"<answer>(.*?)</answer>|####(.*)$", re.DOTALL)

Item = Mapping[str, object]


class Rejected(ValueError):
    """Why something is not kept, in the few words that are counted."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `span` is where the text has its evidence."""

    question: str = ""
    answer: str = ""
    reasoning: str = ""
    span: tuple[int, int] | None = None


def read_items(reply: str) -> tuple[list[Item], bool]:
    """The objects of a reply, and whether all its JSON was whole."""
    text = reply.rpartition("</think>")[2][:MAX_REPLY]
    fenced, is_whole = _objects("\n".join(_FENCED.findall(text)))
    return (fenced, is_whole) if fenced else _objects(text)


def _objects(text: str) -> tuple[list[Item], bool]:
    found, place, num_whole, num_broken = list[Item](), 0, 0, 0
    for start in islice(re.finditer(r"[\[{]", text), MAX_STARTS):
        if start.start() < place:
            continue
        try:
            value, place = parse_json_at(text, start.start())
        except ValueError:
            num_broken += 1
            continue
        num_whole += 1
        only = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 and "turns" not in value else None
        value = only if isinstance(only, list) else value  # {"rows": [...]}
        found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    return found, num_whole > 0 and not num_broken


def turns_of(
    item: Item, fields: Sequence[str], text: str, *, lead: str = "", has_turns: bool = False, is_close: bool = False
) -> tuple[Turn, ...]:
    """An item as checked turns; `lead` stands above the text, and with `is_close` the answers must use the words of the text.

    Raises:
        Rejected: it is not of the schema, or says what the text does not.
    """
    parts = item.get("turns") if has_turns else [item]
    is_list = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
    if not isinstance(parts, list) or not is_list or (has_turns and not 2 <= len(parts) <= MAX_TURNS):
        raise Rejected("not of the schema")
    turns = tuple(_turn(part, fields, text, lead, is_close) for part in parts)
    if is_dependent(turns[0].question):
        raise Rejected("question does not stand alone")
    return turns


def _turn(part: Item, fields: Sequence[str], text: str, lead: str, is_close: bool) -> Turn:
    said = {name: str(value).strip() if isinstance(value := part.get(name), str | int | float) else "" for name in fields}
    if any(not value or len(value) > MAX_FIELD for value in said.values()):
        raise Rejected("not of the schema")
    if "reasoning" in fields and re.search(r"</?(?:reasoning|answer)>", "".join(said.values())):
        raise Rejected("tags inside the text")
    results, evidence = _results(said.get("reasoning", "") + "\n" + said["answer"]), said.pop("evidence", None)
    turn = Turn(said.get("question", ""), said["answer"], said.get("reasoning", ""))
    if evidence is None:
        return turn
    span = locate(evidence, text)
    if span is None:
        raise Rejected("evidence not in the text")
    if numbers(said["answer"]) - numbers(f"{lead}\n{text}") - (results if "reasoning" in fields else set()):
        raise Rejected("number not in the text")
    if is_close and _share(said["answer"], text) < SUPPORTED:
        raise Rejected("answer not supported by the text")
    return replace(turn, span=span)


def is_dependent(question: str) -> bool:
    """Whether a question refers to a text ("this passage") or to something named before ("And how old is it?")."""
    return re.search(_dependent(), question.strip()) is not None


@lru_cache
def _dependent() -> str:
    raw = (files("garage") / "assets" / "curate.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(raw)["checks"]["dependent"])


def numbers(text: str) -> set[str]:
    """The numbers of a text, each in one spelling; numbers of list items are none."""
    return {_number(found) for found in _NUMBER.findall(re.sub(r"(?m)^\s*\d+[.)]\s", "", text))}


def _number(digits: str) -> str:
    plain = re.sub(r",(?=\d{3}(?!\d))", "", digits)
    return ((plain.rstrip("0").rstrip(".") if "." in plain else plain).lstrip("0")) or "0"


def _results(text: str) -> set[str]:
    """What the equations of a text come to; Rejected if one is wrong."""
    found = set()
    for chain, result in _EQUATION.findall(text):
        parts = re.findall(r"\d[\d,]*(?:\.\d+)?|[-+*/×x÷−]", re.sub(r"[a-zA-Z]{2,}|[$€£,]", "", chain).replace("%", "/100"))
        terms = [float(parts[0])]
        for sign, digits in zip(parts[1::2], parts[2::2], strict=True):
            value = float(digits)
            if sign in "*×x":
                terms[-1] *= value
            elif sign in "/÷":
                terms[-1] = terms[-1] / value if value else float("inf")
            else:
                terms.append(value if sign == "+" else -value)
        stated = float(_NUMBER.findall(result)[0].replace(",", ""))
        if abs(abs(sum(terms)) - stated) > 0.01 + 1e-4 * stated:
            raise Rejected("wrong arithmetic")
        found.add(_number(_NUMBER.findall(result)[0]))
    return found


def _share(answer: str, text: str) -> float:
    words, whole = re.findall(r"[^\W\d_]{4,}", answer.lower()), text.lower()
    return sum(word[:5] in whole for word in words) / len(words) if words else 1.0


def locate(quote: str, text: str) -> tuple[int, int] | None:
    """Where the text has a quote, but for case, white space, markup and small slips; None if nowhere."""
    (whole, places), wanted = _folded(text), _folded(quote)[0].strip()
    if len(wanted) < MIN_QUOTE:
        return None
    exact = whole.find(wanted)
    start, end = (exact, exact + len(wanted)) if exact >= 0 else _nearest(wanted, whole)
    return (places[start], places[end - 1] + 1) if end else None


@lru_cache(maxsize=64)
def _folded(text: str) -> tuple[str, list[int]]:
    """A text as it is compared, and where each of its characters comes from."""
    out, places = list[str](), list[int]()
    for place, char in enumerate(text):
        for piece in " " * (out[-1:] != [" "]) if char.isspace() else char.translate(_PLAIN).lower():
            out.append(piece)
            places.append(place)
    return "".join(out), places


def _nearest(wanted: str, whole: str) -> tuple[int, int]:
    """The place where most short pieces of `wanted` line up, if it is alike enough; else (0, 0)."""
    size = min(5, len(wanted))
    pieces = {wanted[i : i + size]: i for i in range(len(wanted) - size + 1)}
    votes = Counter(i - pieces[piece] for i in range(len(whole) - size + 1) if (piece := whole[i : i + size]) in pieces)
    slack = 2 + len(wanted) // 10
    for offset, _ in votes.most_common(3):
        low = max(0, offset - slack)
        blocks = SequenceMatcher(None, whole[low : offset + len(wanted) + slack], wanted, autojunk=False).get_matching_blocks()
        if sure := [block for block in blocks if block.size > 2]:
            start, end = sure[0].a, sure[-1].a + sure[-1].size
            matched = sum(block.size for block in blocks if start <= block.a < end)
            if 2 * matched / (len(wanted) + end - start) >= SAME_QUOTE:
                return low + start, low + end
    return 0, 0


def final_answer(text: str) -> str:
    """What an answer comes to: the part in answer tags or behind ####, else all of it."""
    found = _FINAL.search(text)
    return (found[1] or found[2] or "").strip() if found else text.strip()


def is_same_answer(one: str, other: str) -> bool:
    """Equal but for case, white space, markup, and how numbers and the end are written."""
    a, b = (_NUMBER.sub(lambda found: _number(found[0]), _folded(text)[0]).strip(" .$€£") for text in (one, other))
    return a == b


def word_runs(text: str, size: int = RUN) -> set[str]:
    """Every `size` words in a row; two texts that share one of eight words copy each other."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


class Seen:
    """What has been asked, so that nothing is asked twice: word for word, or in nearly the same words about the same numbers.

    Texts that share four fifths of their runs share one of any fifth and one more of them: only the holders of the rarest are compared.
    """

    def __init__(self) -> None:
        self._exact, self._texts, self._holders = set[str](), list[tuple[set[str], set[str]]](), dict[str, list[int]]()

    def add(self, text: str) -> bool:
        """Remember a text; False if it repeats an earlier one, which is then all that is remembered."""
        plain, runs, digits = " ".join(re.findall(r"\w+", text.lower())), word_runs(text, 3), numbers(text)
        rarest = sorted(runs, key=lambda run: len(self._holders.get(run, ())))[: len(runs) - ceil(SAME_QUESTION * len(runs)) + 1]
        near = [self._texts[holder] for holder in {holder for run in rarest for holder in self._holders.get(run, ())}]
        if plain in self._exact or any(d == digits and len(runs & r) >= SAME_QUESTION * len(runs | r) for r, d in near):
            return False
        for run in runs:
            self._holders.setdefault(run, []).append(len(self._texts))
        self._texts.append((runs, digits))
        self._exact.add(plain)
        return True
