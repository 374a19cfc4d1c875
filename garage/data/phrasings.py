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
from collections.abc import Mapping, Set
from importlib import resources

MONEY = re.compile(r"[$€£]\s?\d|\d[\d.,]*\s?(?:EUR|USD|GBP|CHF|euros?|dollars?|pounds?|cents?|[€$£])(?![a-z])")
_NUMBER = r"(?:[\d.,]+|an?|one|two|three|four|five|six|seven|eight|nine|ten|twelve)"
_UNIT = r"(?:second|minute|hour|day|night|week|month|year)s?"
DURATION = re.compile(rf"^(?:about |around |up to |at least )?{_NUMBER}(?: to {_NUMBER})?[ -]{_UNIT}(?: \w+)?$")
PERSON = re.compile(r"^(?:(?:Dr|Mr|Ms|Mrs|Prof)\.? )?[A-Z][a-z'’-]+(?: [A-Z]\.?)?(?: (?:van|de|von|da|el))?(?: [A-Z][a-z'’-]+){1,2}$")
DETERMINED = re.compile(r"^(?:the|an?|our|your|my|its|all|each|every|any|this|that|these|those|both) ", re.IGNORECASE)
WEEKDAYS = re.compile(r"^(?:mon|tues|wednes|thurs|fri|satur|sun)days?\b|^weekdays$|^weekends?$|^(?:public |bank )?holidays$", re.IGNORECASE)
_ORDINARY = re.compile(
    r"^(?:basic|full|small|large|big|new|old|light|heavy|standard|extra|electric|front|rear|main|first|second|last|daily|weekly|monthly|annual|adult|"
    r"child|children|student|family|group|single|double|simple|complete|quick|free|used|spare|left|right|inner|outer|late|early|lost)$", re.IGNORECASE)
SINGULAR_S = ("ss", "us", "is", "ics", "news", "series", "lens", "gas")
ROLES = re.compile(
    r"\b(?:manager|owner|mechanic|contact|author|founder|director|head|chair|lead|leader|trainer|teacher|officer|coordinator|mayor|president|editor|"
    r"captain|chef|curator|librarian|warden|secretary|treasurer|supervisor|person|responsible|host|keeper|guide)\b", re.IGNORECASE)

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
            return shape
    if PERSON.match(value) and (_HOLDER.match(name) or ROLES.search(name)):
        return "holder" if _HOLDER.match(name) else "person"
    if DURATION.match(value) and (_SPAN.match(name) or _LENGTH.search(name)):
        return "span" if _SPAN.match(name) else "length"
    return "amount" if MONEY.search(value) and not is_plural(name) else "plain"


def questions(shape: str, subject: str, attribute: str, *, common: Set[str] = frozenset()) -> tuple[str, ...]:
    """All questions that ask for `attribute` of `subject`, in the fixed order of the shape's frames.

    Args:
        common: words seen in lower case in the corpus; a capital at the start of a subject made of them is not a name.
    """
    name, unit = _unit(attribute)
    asked = subject if shape == "faq" else named(subject, common, article=shape not in ("list", "step"))
    many, on = is_plural(asked) and asked != subject, "on" if WEEKDAYS.match(subject) else ""
    auxiliary, _, verb = name.partition("|")
    qualifier = _PRICE.match(name.lower())
    slots = {"s": asked, "S": _capital(asked), "n": f'"{subject}"', "a": verb or lowered(name), "be": auxiliary, "u": unit,
             "q": (qualifier.group(1) or "") if qualifier else "", "of": on or "of", "for": on or "for",
             "is": "are" if is_plural(name) else "is", "is_": "are" if many else "is"}
    slots |= {one: other if many else one for one, other in (("does", "do"), ("costs", "cost"), ("takes", "take"), ("was", "were"))}
    return tuple(dict.fromkeys(_capital(frame.format(**slots)) for frame in frames()[shape]))


def named(subject: str, common: Set[str], *, article: bool = True) -> str:
    """A subject as it stands inside a sentence: "Basic tune-up" becomes "the basic tune-up", "Mill Lane" stays."""
    first, _, rest = subject.partition(" ")
    if WEEKDAYS.match(subject) or not subject[:1].isalpha():
        return subject
    if DETERMINED.match(subject):
        return lowered(subject)
    is_known = first.lower() in common or bool(_ORDINARY.match(first)) or first.endswith("ing")
    if any(word[:1].isupper() and not word.isupper() and word.lower() not in common for word in rest.split()) or not (rest or is_known):
        return subject
    text = lowered(subject) if is_known else subject
    bare = not article or first.lower().endswith("ing") or is_plural(subject) or first.endswith(("'s", "’s"))
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
