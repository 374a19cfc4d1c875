"""Answers: one number parser, one extraction, one comparison, for rewards and evaluation alike.

A number is an exact fraction. Its sign, thousands separators, currency, percent sign, scale word ("2 million") and trailing unit are
understood, so 18, 18.0, $18, "18 dollars" and 18% are one number, -10 is not 10 and 2,125 is 2125. Text with a second number is none.

Two readings of a completion are kept apart, because format and ability are different things:

    strict    the text of the only answer block; its closing tag may be missing; none or several blocks are no answer
    lenient   the first of: answer block (last one), \\boxed{}, "#### ", "answer is" phrase, last number of the whole text

Limits: English digits and decimal points; a separator needs groups of exactly three digits after 1 to 3, the same separator throughout
("1 080" is one number only when it is the whole answer); "5 m2" holds two numbers; a number longer than 100 characters is none.
Sources: the GSM8K data (Cobbe et al. 2021) for golds and marks `<<16-3=13>>`; no text is ever evaluated as code.
"""

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

OPEN_ANSWER, CLOSE_ANSWER = "<answer>", "</answer>"
SEPARATORS = ",_\u00a0\u2009\u202f"
SEVERAL = "several answer blocks"
MAX_NUMBER = 100
MAX_ANSWER = 200
SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.truediv}
ARTICLES = frozenset({"a", "an", "the"})

_DASHES = str.maketrans({"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\u00d7": "*", "\u00f7": "/"})


def _pattern(separators: str) -> str:
    """A signed number in one of its spellings; a thousands separator may not change within the number."""
    groups = "|".join(f"(?:{mark}[0-9]{{3}})+" for mark in separators)
    plain = rf"(?:(?:[1-9][0-9]{{0,2}}(?:{groups})(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    value = rf"(?:(?P<whole>[0-9]+)[ ]+(?={plain}\s*/\s*{plain}))?(?P<top>{plain})(?:\s*/\s*(?P<under>{plain}))?"
    return rf"(?P<sign>[-+]?)[$€£]?(?P<inner>[-+]?){value}(?:\s*(?P<scale>{'|'.join(SCALES)})\b)?"


_WHOLE = re.compile(rf"(?:(?:USD|EUR|GBP)\s*)?{_pattern(SEPARATORS + ' ')}\s*%?\s*(?P<unit>(?:[^\d\s/^*+=.]\D*)?)\.?", re.I)
_WITHIN = re.compile(rf"(?<!\w)(?<![0-9]\.){_pattern(SEPARATORS)}", re.I)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]{0,99}\}){0,99})\}")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_PHRASE = re.compile(r"\banswer\b[ \t*]*(?:is|:|=)[ \t*:]*([^\n]*)", re.I)
_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_MARK = re.compile(r"<<([^<>\n]{1,200})>>")
_FOLLOWS = re.compile(r"[$€£]?[-+]?\.?[0-9]")
_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|//|[-+*/()%])")


@dataclass(frozen=True)
class Extraction:
    """The answer found in a completion, or None, and the rule that found it or the reason that nothing was."""

    text: str | None
    rule: str


@dataclass(frozen=True)
class Grade:
    """One completion against its gold. `strict` implies `lenient` implies `partial` (a number within 10 %); `format_ok` may be None."""

    strict: bool
    lenient: bool
    partial: bool
    extracted: str
    rule: str
    reason: str
    format_ok: bool | None = None


@dataclass(frozen=True)
class Mark:
    """A calculator annotation and whether its two sides are equal."""

    expression: str
    result: str
    holds: bool


def quantity(text: str) -> tuple[Fraction, str] | None:
    """The one number that `text` is, and its unit ("" if none); None if it is not one number."""
    if len(text) > MAX_ANSWER:
        return None
    match = _WHOLE.fullmatch(_plain(text))
    value = _value(match) if match else None
    return (value, match["unit"].strip()) if match and value is not None else None


def number(text: str) -> Fraction | None:
    """The one number that `text` is, whatever its unit; None if it is not one number."""
    found = quantity(text)
    return found[0] if found else None


def same_number(a: str, b: str) -> bool:
    """Both texts are numbers, and the same one."""
    value = number(a)
    return value is not None and value == number(b)


def numbers_in(text: str) -> Iterator[str]:
    """Every number written in running text, in order, as text that `number` reads."""
    for match in _WITHIN.finditer(text.translate(_DASHES)):
        if _value(match) is not None:
            yield match[0]


def extract(text: str, *, strict: bool) -> Extraction:
    """The answer of a completion, by the strict or the lenient rule."""
    if not strict:
        return _cascade(text)
    if text.count(OPEN_ANSWER) != 1 or text.count(CLOSE_ANSWER) > 1:
        return Extraction(None, SEVERAL if OPEN_ANSWER in text else "no answer block")
    return Extraction(text.partition(OPEN_ANSWER)[2].partition(CLOSE_ANSWER)[0].strip(), "answer tag")


def grade_number(text: str, gold: str) -> Grade:
    """Grade a completion whose right answer is the number `gold`."""
    target, block, found = number(gold), extract(text, strict=True), extract(text, strict=False)
    if target is None:
        raise ValueError(f"gold {gold!r} is not a number")
    value = number(found.text) if found.text is not None else None
    strict = block.text is not None and number(block.text) == target
    right = strict or value == target
    partial = right or (value is not None and abs(value - target) * 10 <= abs(target))
    fault = block.rule if block.text is None else f"{block.text[:80]!r} is not {gold}"
    reason = "right" if strict else f"strict: {fault}; lenient: {'right' if right else found.rule}"
    return Grade(strict, right, partial, found.text or "", found.rule, reason)


def grade_text(text: str, gold: str) -> Grade:
    """Grade a completion whose right answer is the text `gold`.

    The answer is the only answer block, or the whole completion if it has no block. Strict: both are the same numbers (if gold is
    nothing but a number) or the same words. Lenient: the words of gold occur in the answer, in order and unbroken; or, for a number,
    the cascade finds it. Words are compared without case, punctuation, articles and white space.
    """
    block, held = extract(text, strict=True), quantity(gold)
    answer = text.strip() if block.text is None else block.text
    words, wanted = normalise(answer), normalise(gold)
    if held is not None and not held[1]:
        strict, lenient = number(answer) == held[0], grade_number(text, gold).lenient
    else:
        strict, lenient = words == wanted != "", bool(wanted) and f" {wanted} " in f" {words} "
    strict = strict and block.rule != SEVERAL
    right = strict or lenient
    reason = "right" if strict else "gold is within a longer answer" if right else f"the answer is not {gold[:80]!r}"
    return Grade(strict, right, right, answer, "whole text" if block.text is None else block.rule, reason)


def normalise(text: str) -> str:
    """Casefolded words without punctuation and articles, one space apart; text of articles alone keeps them."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join([word for word in words if word not in ARTICLES] or words)


def calculate(expression: str) -> Fraction | None:
    """The exact value of sums, differences, products, quotients (`//` is `/`) and brackets; `%` is /100; None if it is anything else."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", expression.translate(_DASHES)).strip()
    tokens = _TOKEN.findall(text)
    if len(text) > MAX_ANSWER or _TOKEN.sub("", text).strip() or any(len(token) > MAX_NUMBER for token in tokens):
        return None
    tokens.append("")
    try:
        value = _terms(tokens)
    except (ZeroDivisionError, ValueError):
        return None
    return value if tokens == [""] else None


def check_marks(text: str) -> list[Mark]:
    """Every `<<expression=result>>` of `text`. A result with two or more decimals may be rounded in the last one."""
    marks = []
    for body in _MARK.findall(text):
        expression, _, result = body.rpartition("=")
        left, right = calculate(expression), calculate(result)
        decimals = len(result.strip().partition(".")[2])
        slack = Fraction(1, 2 * 10**decimals) if decimals >= 2 else Fraction(0)
        marks.append(Mark(expression, result, left is not None and right is not None and abs(left - right) <= slack))
    return marks


def without_marks(text: str, *, brackets: bool = False) -> str:
    """`text` without its `<<expression=result>>`, or with `(expression=result)` in their place; where no number follows a mark that is
    taken out, its result is written."""

    def written(mark: re.Match[str]) -> str:
        if "=" not in mark[1]:
            return mark[0]
        bare = "" if _FOLLOWS.match(text, mark.end()) else mark[1].rpartition("=")[2].strip()
        return f"({mark[1]})" if brackets else bare

    return _MARK.sub(written, text)


def _plain(text: str) -> str:
    """`text` without the marks of markdown and LaTeX around or inside a number."""
    text = _FRACTION.sub(r"\1/\2", text).translate(_DASHES).replace("{,}", ",").replace("\\", "")
    return text.strip().strip("*`").strip()


def _value(match: re.Match[str]) -> Fraction | None:
    whole, top, under = _digits(match["whole"] or "0"), _digits(match["top"]), _digits(match["under"] or "1")
    if whole is None or top is None or not under or (match["sign"] and match["inner"]):
        return None
    value = (whole + top / under) * SCALES.get((match["scale"] or "").lower(), 1)
    return -value if "-" in match["sign"] + match["inner"] else value


def _digits(text: str) -> Fraction | None:
    kept = re.sub(r"[^0-9.]", "", text)
    return Fraction(kept) if len(kept) <= MAX_NUMBER else None


def _cascade(text: str) -> Extraction:
    places = (
        ("answer tag", [piece.partition(CLOSE_ANSWER)[0] for piece in text.split(OPEN_ANSWER)[1:]]),
        ("boxed", [_plain(found) for found in _BOXED.findall(text)]),
        ("hashes", _HASHES.findall(text)),
        ("answer phrase", _PHRASE.findall(text)),
        ("last number", [text]),
    )
    for rule, candidates in places:
        found = _read(candidates[-1], first=rule == "answer phrase") if candidates else None
        if found is not None:
            return Extraction(found, rule)
    return Extraction(None, "no number")


def _read(text: str, *, first: bool) -> str | None:
    """The number that `text` is, else the first or last one in it."""
    if number(text) is not None:
        return text.strip()
    found = list(numbers_in(text))
    return found[0 if first else -1] if found else None


def _terms(tokens: list[str], signs: tuple[str, ...] = ("+", "-")) -> Fraction:
    inner = (lambda rest: _terms(rest, ("*", "/", "//"))) if "+" in signs else _factor
    value = inner(tokens)
    while tokens[0] in signs:
        value = OPERATIONS[tokens.pop(0)](value, inner(tokens))
    return value


def _factor(tokens: list[str]) -> Fraction:
    token = tokens.pop(0)
    if token in ("+", "-"):
        return _factor(tokens) if token == "+" else -_factor(tokens)
    value = _terms(tokens) if token == "(" else Fraction(token)
    if token == "(" and tokens.pop(0) != ")":
        raise ValueError("a bracket is not closed")
    while tokens[0] == "%":
        tokens.pop(0)
        value /= 100
    return value
