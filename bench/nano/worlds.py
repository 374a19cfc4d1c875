"""Random fictional organisations, and documents about them in the shapes that real papers have.

Nothing in them repeats from one document to the next (`draws`), so an answer has to be found in the text, which is what nano is to learn.
A `Document` carries its text and its facts as (subject, attribute, value), in the sense of `garage.data.synthesize`.
"""

import re
from dataclasses import dataclass
from random import Random

from draws import LISTS, company, deadline, frequency, hours, phrase, project, syllables, thing, where
from tables import PAIRS, TABLES

from garage.data.phrasings import Words, is_plural, lowered, named


@dataclass(frozen=True)
class Stated:
    """A fact of a document. `shape` is empty where the teacher would tell it from the attribute and the value."""

    subject: str
    attribute: str
    value: str
    shape: str = ""


@dataclass(frozen=True)
class Document:
    title: str
    text: str
    facts: tuple[Stated, ...]


HEADINGS = (
    "Work contract",
    "First day",
    "Staff app",
    "Summer camp",
    "Night shift",
    "Main office",
    "Guest house",
    "Club house",
    "Spring fair",
    "Winter market",
    "Member card",
    "Team trip",
    "Trial week",
    "Parent evening",
)

_KEYS = [
    "nouns",
    "adjectives",
    "modifiers",
    "services",
    "jobs",
    "colours",
    "furniture",
    "spots",
    "emblems",
    "foods",
    "dishes",
    "animals",
    "hobbies",
    "materials",
    "gerunds",
]
_MORE = {"article", "product", "item", "model", "first", "staff", "member", "night", "main", "guest", "work", "trial", "team"}
_ALL = {word.lower() for key in _KEYS for word in " ".join(LISTS[key]).split()} | _MORE
_COMMON = frozenset(
    _ALL | {plural for word in _ALL for plural in (word + "s", word + "es", word[:-1] + "ies")} | {"used", "new", "rented", "the"}
)


class _Invented(frozenset[str]):
    """Every word that is in no list: syllables always make names."""

    def __contains__(self, word: object) -> bool:
        return word not in _COMMON


WORDS = Words(_COMMON, _Invented())


def table(rng: Random) -> tuple[str, list[Stated]]:
    """A section with a table or the same rows as sentences, key/value lines or paths."""
    _, heads, subject, columns = rng.choice(TABLES)
    names = rng.sample(sorted(columns), min(len(columns), rng.choice([1, 1, 2, 2, 3])))
    rows = list({s.lower(): s for s in (subject(rng) for _ in range(rng.randint(2, 6)))}.values())
    facts = [Stated(row, name, columns[name](rng)) for row in rows for name in names]
    return _told(rng, rng.choice(heads), names, rows, facts), facts


def _told(rng: Random, head: str, names: list[str], rows: list[str], facts: list[Stated]) -> str:
    form = rng.random()
    cells = {(f.subject, f.attribute): f.value for f in facts}
    if form < 0.55:
        lines = [[head, *names], ["---"] * (len(names) + 1), *([row, *(cells[row, name] for name in names)] for row in rows)]
        if rng.random() < 0.15:
            width = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
            lines = [[cell.ljust(width[i]) if cell != "---" else "-" * width[i] for i, cell in enumerate(line)] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if form < 0.65:
        key = rng.choice(["name", "title", "item"])
        stem = rng.choice(["items", "list", "entries", syllables(rng)])
        return "\n".join(
            f"{stem}[{i}].{k}: {v}"
            for i, row in enumerate(rows)
            for k, v in [(key, row), *((name.lower().replace(" ", "_"), cells[row, name]) for name in names)]
        )
    if form < 0.8:
        return "\n".join(f"- {row}: {', '.join(f'{name.lower()} {cells[row, name]}' for name in names)}" for row in rows)
    return " ".join(sentence(rng, fact) for fact in facts)


def sentence(rng: Random, fact: Stated) -> str:
    """A plain sentence that states a fact."""
    subject, attribute = named(fact.subject, WORDS), lowered(fact.attribute)
    be = "are" if is_plural(attribute) else "is"
    if attribute == "price" and rng.random() < 0.6:
        text = f"{subject} costs {fact.value}"
    elif attribute in ("place", "location"):
        text = f"{subject} is {rng.choice(['', 'kept ', 'stored ', 'found '])}{fact.value}"
    elif attribute == "duration" and rng.random() < 0.6:
        text = f"{subject} takes {fact.value}"
    elif attribute == "weight" and rng.random() < 0.6:
        text = f"{subject} weighs {fact.value}"
    else:
        text = rng.choice(
            [
                f"the {attribute} of {subject} {be} {fact.value}",
                f"the {attribute} of {subject} {be} {fact.value}",
                f"for {subject}, the {attribute} {be} {fact.value}",
                f"{subject} has the {attribute} {fact.value}",
            ]
        )
    return text[:1].upper() + text[1:] + "."


def pairs(rng: Random, subject: str) -> tuple[str, list[Stated]]:
    """Key/value lines about the company or about something of its own."""
    facts = [Stated(subject, name, PAIRS[name](rng)) for name in rng.sample(sorted(PAIRS), rng.randint(2, 5))]
    if rng.random() < 0.25:
        return " ".join(sentence(rng, fact) for fact in facts), facts
    return rng.choice(["\n", "\n", "\n\n"]).join(f"{fact.attribute}: {fact.value}" for fact in facts), facts


def week(rng: Random) -> tuple[str, list[Stated]]:
    facts = [
        Stated(day, "Opening hours", hours(rng))
        for day in sorted(rng.sample(LISTS["weekdays"], rng.randint(2, 5)), key=LISTS["weekdays"].index)
    ]
    return "\n".join(f"{fact.subject}: {fact.value}" for fact in facts), facts


def rules(rng: Random) -> tuple[str, list[Stated]]:
    """Deadlines, intervals, definitions and places as running text."""
    facts, lines = [], []
    for _ in range(rng.randint(2, 5)):
        kind = rng.random()
        noun = rng.choice([thing(rng).lower(), rng.choice(LISTS["nouns"])])
        if kind < 0.3:
            verb, who = rng.choice(LISTS["participles"]), rng.choice(["", "", "used ", "new ", "rented "]) + _plural(noun)
            facts.append(Stated(who, f"be {verb}", deadline(rng), "deadline"))
            lines.append(f"{who.capitalize()} must be {verb} {facts[-1].value}.")
        elif kind < 0.6:
            verb, many = rng.choice(LISTS["participles"]), rng.random() < 0.5
            who = _plural(noun).capitalize() if many else f"The {noun}"
            facts.append(Stated(who, f"{'are' if many else 'is'}|{verb}", frequency(rng), "often"))
            lines.append(f"{who} {'are' if many else 'is'} {verb} {facts[-1].value}.")
        elif kind < 0.8:
            who = rng.choice([f"A {noun}", project(rng), f"A {rng.choice(LISTS['colours'])} {noun}"])
            facts.append(Stated(who, "meaning", phrase(rng), "definition"))
            lines.append(f"{who} is {facts[-1].value}.")
        else:
            facts.append(Stated(f"The {noun}", "location", where(rng), "place"))
            lines.append(f"The {noun} is {rng.choice(['', 'kept ', 'stored '])}{facts[-1].value}.")
    return " ".join(lines), facts


def glossary(rng: Random) -> tuple[str, list[Stated]]:
    facts = [
        Stated(
            rng.choice([project(rng), f"{rng.choice(LISTS['colours'])} {rng.choice(LISTS['nouns'])}".capitalize(), thing(rng)]),
            "meaning",
            phrase(rng),
            "definition",
        )
        for _ in range(rng.randint(2, 4))
    ]
    return "\n".join(f"{rng.choice(['', '', '- '])}{fact.subject}: {fact.value}" for fact in facts), facts


def steps(rng: Random, heading: str) -> tuple[str, list[Stated]]:
    actions = [
        f"{rng.choice(LISTS['verbs'])} the {rng.choice(LISTS['adjectives'] + LISTS['colours'])} {rng.choice(LISTS['nouns'])}".capitalize()
        for _ in range(rng.randint(2, 5))
    ]
    facts = [Stated(heading, f"step {i}", action, "step") for i, action in enumerate(actions, start=1)]
    return "\n".join(f"{i}. {action}" for i, action in enumerate(actions, start=1)), facts


def _plural(noun: str) -> str:
    return (
        noun
        if noun.endswith("s")
        else noun[:-1] + "ies"
        if re.search(r"[^aeiou]y$", noun)
        else noun + ("es" if re.search(r"(?:s|x|ch|sh)$", noun) else "s")
    )


def document(rng: Random, sections: int) -> Document:
    """A document of one company with some sections."""
    name = company(rng)
    parts, facts = [], []
    for _ in range(sections):
        heading, (text, stated) = _section(rng, name)
        lead = f"{rng.choice(LISTS['leads'])}\n\n" if rng.random() < 0.25 else ""
        parts.append(f"{heading}{lead}{text}")
        facts += stated
    known: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        known.setdefault((fact.subject.lower(), fact.attribute.lower()), set()).add(fact.value)
    sure = tuple(fact for fact in facts if len(known[fact.subject.lower(), fact.attribute.lower()]) == 1)
    title = f"# {name}\n\n" if rng.random() < 0.3 else ""
    return Document(name, title + "\n\n".join(parts), sure)


def _section(rng: Random, name: str) -> tuple[str, tuple[str, list[Stated]]]:
    mark = rng.choice(["# ", "## ", "## ", "**", ""])
    show = lambda text: f"{mark}{text}{'**' if mark == '**' else ''}\n\n" if mark else f"{text}\n\n"  # noqa: E731
    kind = rng.random()
    if kind < 0.5:
        return (show(rng.choice(LISTS["topics"])) if rng.random() < 0.6 else ""), table(rng)
    if kind < 0.72:
        subject = rng.choice([name, rng.choice(HEADINGS), project(rng), thing(rng)])
        return show(subject), pairs(rng, subject)
    if kind < 0.78:
        return show("Opening hours"), week(rng)
    if kind < 0.92:
        return (show(rng.choice(["Rules", "Good to know", "House rules", "Notes for the team"])) if rng.random() < 0.5 else ""), rules(rng)
    if kind < 0.96:
        return show(rng.choice(["Glossary", "Words we use", "Terms"])), glossary(rng)
    heading = f"{rng.choice(LISTS['gerunds']).capitalize()} the {rng.choice(LISTS['nouns'])}"
    return show(heading), steps(rng, heading)
