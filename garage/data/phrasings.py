"""Many natural ways to ask for one fact.

A fact is (subject, attribute, value). What a person would ask depends on what the value is: a price is asked with "how much", an
address with "where", a person with "who". `shape_of` decides that, `questions` fills the frames of the shape. Every shape has at
least eight frames, so that some can be kept for the test split and still leave several to learn from. No frame mentions "the text"
or "the passage": a question stands alone.

Limits: English only. Where nothing about the value is certain the shape is `plain`, whose frames fit any attribute: a dull question
is better than a wrong one.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

MONEY = re.compile(r"[$€£]\s?\d|\d[\d.,]*\s?(?:EUR|USD|GBP|CHF|euros?|dollars?|pounds?|cents?|[€$£])(?![a-z])")
_NUMBER = r"(?:[\d.,]+|an?|one|two|three|four|five|six|seven|eight|nine|ten|twelve)"
_UNIT = r"(?:second|minute|hour|day|night|week|month|year)s?"
DURATION = re.compile(rf"^(?:about |around |up to |at least )?{_NUMBER}(?: to {_NUMBER})?[ -]{_UNIT}(?: \w+)?$")
PERSON = re.compile(r"^(?:(?:Dr|Mr|Ms|Mrs|Prof)\.? )?[A-Z][a-z'’-]+(?: [A-Z]\.?)?(?: (?:van|de|von|da|el))?(?: [A-Z][a-z'’-]+){1,2}$")
DETERMINED = re.compile(r"^(?:the|an?|our|your|my|its|all|each|every|any|this|that|these|those|both) ", re.IGNORECASE)
WEEKDAYS = re.compile(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)days?\b|^weekdays$|^weekends?$|^(?:public |bank )?holidays$", re.IGNORECASE)
SINGULAR_S = ("ss", "us", "is", "ics", "news", "series", "lens", "gas")
ROLES = re.compile(
    r"\b(?:manager|owner|mechanic|contact|author|founder|director|head|chair|lead|leader|trainer|teacher|officer|coordinator|mayor|president|editor|"
    r"captain|chef|curator|librarian|warden|secretary|treasurer|supervisor|person|responsible|host|keeper|guide|mentor)\b", re.IGNORECASE)

_LOWER = re.compile(r"(?<![A-Za-z])[a-z]{3,}(?![A-Za-z])")
_INSIDE = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+\b")
_VERBS = (("does", "do"), ("costs", "cost"), ("takes", "take"), ("was", "were"), ("has", "have"))
_PRICE = re.compile(r"^(?:unit |list |rental |hire |ticket )?(?:price|cost|fee|rate|charge)s?( (?:per|for|from|in) .+)?$")
_BY_NAME: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("hours", re.compile(r"^(?:opening|business|office) (?:hours|times)$|^hours$|^open$")),
    ("weight", re.compile(r"^weight$")),
    ("place", re.compile(r"^(?:address|location|place|street address|where|venue)$")),
    ("phone", re.compile(r"^(?:phone|telephone|tel|mobile)\.?(?: number)?$")),
    ("email", re.compile(r"^e-?mail(?: address)?$")),
    ("colour", re.compile(r"^colou?rs?$")),
    ("role", re.compile(r"^(?:role|job|position|job title|profession|occupation)$")),
    ("year", re.compile(r"^(?:founded|opened|established|built|created)$")),
)
_HOLDER = re.compile(r"^(?:name|person|contact|contact person|held by|who)$")
_SPAN = re.compile(r"^(?:duration|time|time needed|takes|working time|travel time)$")
_FOR = re.compile(r"^(?:tool|code|password|login|deposit|discount|deadline|delivery .*|.*\b(?:fee|rate|charge|allowance|limit))$")
_GERUND = re.compile(r"^\w+ing (?:an?|the|your|my|our|from|to|in|on|with|for|at)\b", re.IGNORECASE)
_LENGTH = re.compile(r"\b(?:warranty|guarantee|period|life|notice|leave|break|time|contract|stay|season|lifetime|term|limit)\b")


@functools.cache
def frames() -> Mapping[str, tuple[str, ...]]:
    """Frames of questions by shape, as written in `assets/phrasings.toml`."""
    text = (resources.files("garage") / "assets" / "phrasings.toml").read_text(encoding="utf-8")
    return {shape: tuple(lines) for shape, lines in tomllib.loads(text).items()}


def shape_of(subject: str, attribute: str, value: str) -> str:
    """The name of the frames that fit a fact found in a table or a key/value line."""
    name = attribute.lower()
    if _PRICE.match(name):
        return "price"
    for shape, pattern in _BY_NAME:
        if pattern.match(name) and (shape != "role" or PERSON.match(subject)):
            return "plain" if shape == "hours" and WEEKDAYS.match(subject) else shape
    if PERSON.match(value) and (_HOLDER.match(name) or ROLES.search(name)):
        return "holder" if _HOLDER.match(name) else "person"
    if DURATION.match(value) and (_SPAN.match(name) or _LENGTH.search(name)):
        return "span" if _SPAN.match(name) else "length"
    if value.isdigit() and is_plural(name):
        return "count"
    return "amount" if MONEY.search(value) and not is_plural(name) else "plain"


@dataclass(frozen=True)
class Words:
    """What a corpus tells of its words: `common` stand in lower case somewhere, `names` never do and have a capital inside sentences."""

    common: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Words":
        common, names = set[str](), set[str]()
        for text in texts:
            common.update(_LOWER.findall(text))
            names.update(word.lower() for word in _INSIDE.findall(text))
        return cls(frozenset(common), frozenset(names - common))


def questions(shape: str, subject: str, attribute: str, *, words: Words = Words()) -> tuple[str, ...]:
    """All questions that ask for `attribute` of `subject`, in the fixed order of the shape's frames."""
    name, unit = _unit(attribute)
    asked = subject if shape == "faq" else named(subject, words, article=shape not in ("list", "step"))
    many, on = is_plural(asked) and asked != subject, "on" if WEEKDAYS.match(subject) else ""
    on = on or ("for" if _FOR.match(name.lower()) else "")
    auxiliary, _, participle = name.partition("|")
    qualifier = _PRICE.match(name.lower())
    slots = {"s": asked, "S": _capital(asked), "n": f'"{subject}"', "a": participle or lowered(name), "be": auxiliary, "u": unit,
             "q": (qualifier.group(1) or "") if qualifier else "", "of": on or "of", "for": on or "for",
             "is": "are" if is_plural(name) else "is", "is_": "are" if many else "is"}
    slots |= {verb: plural if many else verb for verb, plural in _VERBS}
    return tuple(dict.fromkeys(_capital(frame.format(**slots)) for frame in frames()[shape]))


def named(subject: str, words: Words, *, article: bool = True) -> str:
    """A subject as it stands inside a sentence: "Basic tune-up" becomes "the basic tune-up", "Mill Lane" stays.

    A capital is part of a name if a later word has one too, if the corpus never writes the only word without it, or if it writes
    the first of several words with one inside sentences.
    """
    first, _, rest = subject.partition(" ")
    if WEEKDAYS.match(subject) or not subject[:1].isalpha():
        return subject
    if DETERMINED.match(subject):
        return lowered(subject)
    has_names = any(word[:1].isupper() and not word.isupper() and word.lower() not in words.common for word in rest.split())
    if has_names or (not rest and first.lower() not in words.common):
        return subject
    text = subject if first.lower() in words.names else lowered(subject)
    bare = not article or _GERUND.match(subject) or is_plural(subject)
    return text if bare else f"the {text}"


def lowered(text: str) -> str:
    """`text` without the capital of its first word; abbreviations keep theirs."""
    first = text.partition(" ")[0]
    return text[:1].lower() + text[1:] if first[1:].islower() or len(first) == 1 else text


def is_plural(text: str) -> bool:
    """Whether the head noun of a phrase looks plural."""
    head = re.split(r" (?:of|for|with|in|per|on|from|to|at|by) ", text)[0].rpartition(" ")[2].lower()
    return head.endswith("s") and not head.endswith(SINGULAR_S) and len(head) > 3


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unit(attribute: str) -> tuple[str, str]:
    """A column title like "Weight (kg)" as its name and the words that ask for the unit."""
    match = re.fullmatch(r"(.+?) ?[(\[]([^()\[\]]{1,12})[)\]]", attribute)
    return (match.group(1), f" in {match.group(2)}") if match else (attribute, "")
