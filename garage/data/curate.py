"""Is a row worth learning from? Checks that need no model, and a rating by a judge or, without one, by the same checks.

`fault` names the first reason against a row, "KIND: detail" (the expressions stand in assets/curate.toml):

    length       the answer has fewer or more words than allowed (a plain text may be long)
    refusal      it begins with "I cannot ..." or speaks "as an AI"
    boilerplate  cookie, copyright, newsletter and lorem ipsum lines are a third of it
    cut          an open code fence; a last line that ends in a comma, an opening bracket, "and", "the", ...; or, if it is no list item, in
                 a letter four words or more after a full stop
    dependent    the first question refers to a text that it does not hold ("this text") or begins with a pronoun
    language     a known language that is not wanted
    ungrounded   the row's chunk lacks the quoted `meta["support"]`, a number of the answer (not of one that reasons), or too many of its
                 words: alike are words whose first five letters are, and words of the question do not count

A judge sees rows and sources as JSON between two lines that nobody can know before, and answers only with scores by id: it can change no
row. What is not exactly the four scores within their ranges, or is given twice, is no rating.

Limits: refusals, pronouns and boilerplate are English. `language` knows seven languages by their commonest words, others by script and none
below six words; a neighbour of the seven may pass for one. A heuristic rating measures form, not truth.
"""

import ipaddress
import json
import re
import secrets
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from garage.core.errors import UserError
from garage.core.protocols import Generator
from garage.core.strict_json import parse_json
from garage.core.types import Message, Request, Row, Sampling
from garage.data.decontaminate import words
from garage.data.replies import is_dependent, numbers
from garage.specs.curate import CurateSpec

COMMONEST = {
    "en": "the of and to in is that it was for on are with as they be at this have from by but what there we which will how an has you not",
    "de": "der die das und ist nicht ein eine einen einem den dem des mit auf für sich von im auch es zu als wie bei oder nach wird sind",
    "fr": "le la les des de et est un une du en que qui dans pour pas sur au aux avec ce cette il elle nous vous je ne se son sa par plus",
    "es": "el la los las de del y en que es un una por con no para se su al lo como más pero sus este esta cuando muy sobre también está",
    "it": "il lo la i gli le di del della dei delle e è un una che in non per con si sono da dal dalla al alla nel nella come più ma ha",
    "pt": "o a os as de do da dos das e em que é um uma para com não por no na nos nas se mais como mas ao ele ela seu sua ou muito são",
    "nl": "de het een en van is dat op te in voor met die niet zijn er aan om ook als bij door maar uit over tot naar dan ze hij je of",
}
STOP_WORDS = frozenset(word for common in COMMONEST.values() for word in common.split())
RUBRIC = {"accuracy": 3, "relevance": 2, "clarity": 2, "usefulness": 3}
SCRIPTS = {"cjk": "chinese", "hangul": "korean"}
MOST_CHARACTERS = 24_000  # of rows and sources in one question to the judge; a single row may be longer
Pair = tuple[Row, str | None]  # a row and the text of its chunk, None if it is not compared with one


@dataclass(frozen=True)
class Rating:
    """Four scores; the total is out of ten."""

    accuracy: float
    relevance: float
    clarity: float
    usefulness: float

    @property
    def total(self) -> float:
        return self.accuracy + self.relevance + self.clarity + self.usefulness


def curated(pairs: Sequence[Pair], judge: Generator | None, spec: CurateSpec) -> list[dict[str, str]]:
    """What to add to each row's meta: "rejected", "rating", "flags". The judge sees rows without fault; UserError if it rates none."""
    notes = [{"rejected": fault(row, source, spec), "flags": ", ".join(private(row))} for row, source in pairs]
    good = [place for place, note in enumerate(notes) if not note["rejected"]]
    left = [pairs[place] for place in good]
    ratings = [heuristic(*pair) for pair in left] if judge is None else rate(judge, left, spec)
    if left and not any(ratings):
        remedy = "take a larger model, a smaller --batch, or no --judge: the heuristic needs none"
        raise UserError(f"the judge {spec.judge} gave none of {len(left)} rows a rating that counts", remedy=remedy)
    for place, rating in zip(good, ratings, strict=True):
        total = f"{rating.total:g}" if rating else ""
        low = f"rating: {total} of 10" if rating and rating.total < spec.threshold else ""
        notes[place] |= {"rating": total, "rejected": low if rating else "not rated: the judge gave no score that counts"}
    return [{name: text for name, text in note.items() if text} for note in notes]


def fault(row: Row, source: str | None, spec: CurateSpec) -> str:
    """The first reason against a row, "" if none. `source` is the text of its chunk, None if it is not compared with one."""
    question, answer = asked(row), answered(row)
    known = language(f"{question}\n{answer}") if spec.languages else "unknown"
    size, kinds = len(words(answer)), private(row) if spec.private == "drop" else ()
    is_short = size < spec.min_words and not any(message.tool_calls for message in row.messages)
    lines = [line for line in answer.splitlines() if re.search(_asset()["checks"]["boilerplate"], line)]
    reasons = (
        f"length: an answer of {size} words" if is_short or (row.messages and size > spec.max_words) else "",
        f"refusal: {answer.strip()[:60]}" if re.match(_asset()["checks"]["refusal"], answer) else "",
        f"boilerplate: {lines[0][:60]}" if lines and 3 * sum(map(len, lines)) >= len(answer) else "",
        "cut: the answer does not end" if row.messages and _is_cut(row.messages[-1].content) else "",
        "" if stands_alone(row) else f"dependent: {question[:60]}",
        "" if known in ("unknown", *spec.languages) else f"language: {known}",
        "" if source is None else _ungrounded(row, source, spec.support),
        f"private: {', '.join(kinds)}" if kinds else "",
    )
    return next(filter(None, reasons), "")


def asked(row: Row) -> str:
    """The first question."""
    return next((message.content for message in row.messages if message.role == "user"), "")


def answered(row: Row) -> str:
    """All that is learned: the assistant's words, or the plain text."""
    return "\n".join(message.content for message in row.messages if message.role == "assistant") if row.messages else row.text


def stands_alone(row: Row) -> bool:
    """Whether the first question says what it is about; one that brings a text along does: over 80 words, paragraphs, or the support."""
    before = "\n".join(message.content for message in row.messages if message.role == "system") + "\n" + asked(row).strip()
    brings_text = len(words(before)) > 80 or "\n\n" in before or (row.meta.get("support") or "\0") in before
    return brings_text or not is_dependent(asked(row))


def supported(row: Row, source: str) -> float:
    """The share of the answer's different content words that stand in its source; 1 if it has none of its own."""
    wanted = _content(answered(row)) - _content(asked(row))
    return len(wanted & _content(source)) / len(wanted) if wanted else 1.0


def language(text: str) -> str:
    """One of `COMMONEST`, the name of another script ("cyrillic"), or "unknown"."""
    letters = Counter(unicodedata.name(char, "?").split()[0].lower() for char in text[:2000] if char.isalpha())
    script = "japanese" if letters["hiragana"] + letters["katakana"] else letters.most_common(1)[0][0] if letters else "unknown"
    if script != "latin":
        return SCRIPTS.get(script, script)
    found = Counter(words(text[:4000]))
    hits = Counter({name: sum(found[word] for word in set(common.split())) for name, common in COMMONEST.items()})
    (best, most), (_, second) = hits.most_common(2)
    return best if found.total() >= 6 and most > second and most >= found.total() / 10 else "unknown"


def private(row: Row) -> tuple[str, ...]:
    """The kinds of personal data and secrets that stand in a row: e-mail, phone, IBAN, card, key, IP."""
    text = "\n".join([*(message.content for message in row.messages), row.text, row.rejected])
    return tuple(kind for kind, shape in _asset()["private"].items() if any(_is_real(kind, one[0]) for one in re.finditer(shape, text)))


def _is_real(kind: str, text: str) -> bool:
    """Phones by their length, IBANs and cards by their check digits, addresses by their parts."""
    digits, plain = [int(char) for char in text if char.isdecimal()], text.replace(" ", "")
    if kind == "card":
        return sum(digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))) % 10 == 0
    if kind == "IBAN":
        return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1
    try:
        return not ipaddress.ip_address(plain).is_loopback if kind == "IP" else kind != "phone" or 9 <= len(digits) <= 15
    except ValueError:
        return False


def _content(text: str) -> set[str]:
    return {word[:5] for word in words(text) if len(word) > 2 and word not in STOP_WORDS and not word[0].isdigit()}


def _is_cut(answer: str) -> bool:
    last = answer.rstrip().rpartition("\n")[2].strip()
    is_half = last[-1:].isalpha() and re.search(r"[^\W\d]{3}[.!?](?: \S+){4,}$", last) and not re.match(r"[-*•|#]|\d+[.)]", last)
    return answer.count("```") % 2 == 1 or bool(is_half or re.search(_asset()["checks"]["cut"], last))


def _ungrounded(row: Row, source: str, least: float) -> str:
    quoted, lost = words(row.meta.get("support", "")), numbers(answered(row)) - numbers(source)
    if f" {' '.join(quoted)} " not in f" {' '.join(words(source))} " and quoted:
        return "ungrounded: the quoted support is not in the chunk"
    if lost and not any(message.reasoning or "<reasoning>" in message.content for message in row.messages):
        return f"ungrounded: the number {min(lost)} is not in the chunk"
    share = supported(row, source)
    return f"ungrounded: {share:.0%} of the words are in the chunk" if share < least else ""


@lru_cache
def _asset() -> dict[str, dict[str, str]]:
    return tomllib.loads((files("garage") / "assets" / "curate.toml").read_text(encoding="utf-8"))


def heuristic(row: Row, source: str | None) -> Rating:
    """A rating by form: accuracy is the share of words found in the source (2 without one); relevance 2 if nothing was asked or the answer
    takes up a word of the question or source, else 1; clarity loses 1 for a cut answer, 1 for a dependent question; usefulness is 0 for an
    answer that is the question, else 3, less 1 for a single word, less 2 if over half of 20 or more three-word runs stand there before."""
    question, found, answer = asked(row), words(answered(row)), _content(answered(row))
    runs = list(zip(found, found[1:], found[2:], strict=False))
    repeats = len(runs) >= 20 and len(set(runs)) < len(runs) / 2
    return Rating(
        accuracy=2 if source is None else round(3 * supported(row, source), 1),
        relevance=2 if not question or answer & (_content(question) | _content(source or "")) else 1,
        clarity=2 - (bool(question) and _is_cut(answered(row))) - (not stands_alone(row)),
        usefulness=0 if not found or found == words(question) else 3 - (len(found) == 1) - 2 * repeats,
    )


def rate(generator: Generator, pairs: Sequence[Pair], spec: CurateSpec) -> list[Rating | None]:
    """The judge's rating of each row beside its source; None where it gave none that counts, asked twice (then with fewer at once)."""
    ratings: list[Rating | None] = [None] * len(pairs)
    for attempt, size in enumerate((spec.batch, max(1, spec.batch // 4))):
        groups = _groups([place for place, rating in enumerate(ratings) if rating is None], pairs, size)
        sampling = Sampling(max_tokens=64 * size + 512, temperature=spec.temperature, seed=spec.seed + attempt)
        requests = [Request(f"{attempt}-{n}", _question([pairs[i] for i in group]), sampling) for n, group in enumerate(groups)]
        for group, completion in zip(groups, generator.generate(requests) if requests else [], strict=True):
            for place, rating in zip(group, verdicts(completion.text, len(group)), strict=True):
                ratings[place] = rating
    return ratings


def verdicts(reply: str, count: int) -> list[Rating | None]:
    """The ratings of r1, r2, ... in a judge's reply. Two that differ for one row are none."""
    found: dict[str, Rating | None] = {}
    for name, body in re.findall(r'\b(r\d{1,4})"?\s*:\s*(\{[^{}]{0,400}\})', reply.rpartition("</think>")[2]):
        rating = _verdict(body)
        found[name] = rating if found.get(name, rating) == rating else None
    return [found.get(f"r{number + 1}") for number in range(count)]


def _verdict(body: str) -> Rating | None:
    with suppress(ValueError):
        scores: Any = parse_json(body)
        is_whole = isinstance(scores, dict) and set(scores) == set(RUBRIC)
        if is_whole and all(type(scores[name]) in (int, float) and 0 <= scores[name] <= most for name, most in RUBRIC.items()):
            return Rating(**scores)
    return None


def _groups(places: Sequence[int], pairs: Sequence[Pair], batch: int) -> list[list[int]]:
    groups, room = list[list[int]](), 0
    for place in places:
        size = sum(map(len, [*_shown(pairs[place][0]).values(), pairs[place][1] or ""]))
        if not groups or len(groups[-1]) == batch or size > room:
            groups.append([])
            room = MOST_CHARACTERS
        groups[-1].append(place)
        room -= size
    return groups


def _question(pairs: Sequence[Pair]) -> tuple[Message, ...]:
    """One question to the judge: the rows as data between two lines that nobody can know before."""
    sources = list(dict.fromkeys(source for _, source in pairs if source))
    rows = [{"id": f"r{n}", "source": sources.index(text) if text else None, **_shown(row)} for n, (row, text) in enumerate(pairs, start=1)]
    data = {"sources": sources, "rows": rows}
    filled = {"FENCE": secrets.token_hex(16), "COUNT": str(len(pairs)), "DATA": json.dumps(data, ensure_ascii=False)}
    texts = {part: re.sub("|".join(filled), lambda found: filled[found[0]], text).strip() for part, text in _asset()["judge"].items()}
    return Message("system", texts["system"]), Message("user", texts["task"])


def _shown(row: Row) -> dict[str, str]:
    if not row.messages:
        return {"answer": row.text}
    return {"asked": "\n".join(f"{m.role}: {m.content}" for m in row.messages[:-1]), "answer": row.messages[-1].content}
