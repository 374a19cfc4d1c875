"""Random names and values: people, places, products, prices, times, codes.

Syllables make what is new, word lists (`words.toml`) make what is known. The name space is far larger than any corpus, so that a model
cannot know a value beforehand.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random

LISTS: dict[str, list[str]] = {
    key: text.split("|") if "|" in text else text.split()
    for key, text in tomllib.loads((Path(__file__).parent / "words.toml").read_text(encoding="utf-8"))["lists"].items()
}
Draw = Callable[[Random], str]


def syllables(rng: Random, low: int = 2, high: int = 3) -> str:
    """An invented word."""
    onset = [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "w",
        "z",
        "br",
        "ch",
        "cl",
        "dr",
        "fl",
        "gr",
        "kl",
        "pl",
        "pr",
        "sh",
        "sk",
        "st",
        "th",
        "tr",
        "qu",
    ]
    return "".join(
        rng.choice(onset)
        + rng.choice(["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oa", "ou", "y"])
        + rng.choice(["", "", "l", "n", "r", "s", "m", "t", "nd", "ck"])
        for _ in range(rng.randint(low, high))
    )


def first_name(rng: Random) -> str:
    return rng.choice(LISTS["first_names"]) if rng.random() < 0.6 else syllables(rng, 2, 2).capitalize()


def person(rng: Random) -> str:
    last = rng.choice(LISTS["last_names"]) if rng.random() < 0.4 else syllables(rng, 2, 2).capitalize()
    return f"{first_name(rng)} {last}"


def place(rng: Random) -> str:
    return (
        syllables(rng, 1, 2).capitalize()
        + rng.choice(["ford", "ham", "dale", "by", "ton", "stead", "port", "field", "wick", "bury", "mouth", "haven", "brook", "holm"])
        if rng.random() < 0.7
        else syllables(rng).capitalize()
    )


def company(rng: Random) -> str:
    lead = rng.choice(
        [
            syllables(rng).capitalize(),
            rng.choice(LISTS["last_names"]),
            rng.choice(LISTS["adjectives"]).capitalize() + " " + rng.choice(LISTS["emblems"]).capitalize(),
            place(rng),
        ]
    )
    return f"{lead} {rng.choice(LISTS['company_kinds']).title()}"


def thing(rng: Random) -> str:
    """A thing as a table cell writes it: "Folding chair"."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(LISTS["nouns"]).capitalize()
    if kind < 0.8:
        return f"{rng.choice(LISTS['adjectives'] + LISTS['modifiers'])} {rng.choice(LISTS['nouns'])}".capitalize()
    if kind < 0.9:
        return f"{syllables(rng, 2, 2).capitalize()} {rng.choice(LISTS['nouns'])}"
    return f"{syllables(rng, 1, 2).capitalize()}{rng.choice(['', f' {rng.randint(2, 990)}'])}"


def service(rng: Random) -> str:
    return f"{rng.choice(LISTS['modifiers'] + LISTS['nouns'] + LISTS['adjectives'])} {rng.choice(LISTS['services'])}".capitalize()


def project(rng: Random) -> str:
    return f"{rng.choice([syllables(rng, 1, 2).capitalize(), rng.choice(LISTS['emblems']).capitalize()])}"


def number(rng: Random, low: int, high: int) -> str:
    """A whole number, small ones more often."""
    return str(min(rng.randint(low, high), rng.randint(low, high)))


def money(rng: Random) -> str:
    amount = rng.choice([number(rng, 2, 99), number(rng, 10, 400), f"{rng.randint(1, 60)}.{rng.choice(['50', '90', '20', '75', '95'])}"])
    return rng.choice(
        [f"{amount} EUR", f"{amount} EUR", f"{amount} EUR", f"${amount}", f"{amount} euros", f"{amount} pounds", f"{amount} USD"]
    )


def clock(rng: Random) -> str:
    return f"{rng.randint(6, 22)}:{rng.choice(['00', '15', '30', '45', '10'])}"


def hours(rng: Random) -> str:
    return rng.choice(
        [f"{clock(rng)} to {clock(rng)}", f"{rng.randint(6, 11)} to {rng.randint(14, 22)}", f"{clock(rng)} to {clock(rng)}", "closed"]
    )


def duration(rng: Random) -> str:
    unit, top = rng.choice([("minute", 59), ("hour", 12), ("day", 30), ("week", 12), ("month", 24), ("year", 10)])
    count = rng.randint(1, top)
    word = rng.choice([str(count), str(count), LISTS["numbers"][count]]) if count < len(LISTS["numbers"]) else str(count)
    return f"{word} {unit}{'s' if count != 1 else ''}"


def quantity(*units: str, low: int = 1, high: int = 200) -> Draw:
    return lambda rng: (
        f"{rng.choice([number(rng, low, high), number(rng, low, high), f'{rng.randint(low, 40)}.{rng.randint(1, 9)}'])} {rng.choice(units)}"
    )


def count(low: int = 2, high: int = 60) -> Draw:
    return lambda rng: number(rng, low, high)


def one_of(name: str) -> Draw:
    return lambda rng: rng.choice(LISTS[name])


def where(rng: Random) -> str:
    spot = (
        rng.choice(LISTS["spots"])
        if rng.random() < 0.5
        else f"{rng.choice(LISTS['adjectives'] + LISTS['colours'] + LISTS['modifiers'])} {rng.choice(LISTS['furniture'])}"
    )
    return f"{rng.choice(LISTS['prepositions'])} the {spot}"


def code(rng: Random) -> str:
    return rng.choice(
        [
            f"{rng.randint(1000, 9999)}",
            f"{rng.choice('ABCDEFGHKLMRST')}{rng.randint(2, 99)}",
            f"{syllables(rng, 1, 2)}-{rng.randint(10, 99)}",
            syllables(rng),
        ]
    )


def colour(rng: Random) -> str:
    return rng.choice(["", "", "", "dark ", "light ", "bright "]) + rng.choice(LISTS["colours"])


def phone(rng: Random) -> str:
    return rng.choice(
        [
            f"0{rng.randint(100, 999)} {rng.randint(1000, 9999)}",
            f"{rng.randint(100, 999)} {rng.randint(1000, 9999)}",
            f"0{rng.randint(20, 99)} {rng.randint(10000, 99999)}",
        ]
    )


def address(rng: Random) -> str:
    street = rng.choice(
        [syllables(rng, 1, 2).capitalize(), rng.choice(LISTS["emblems"]).capitalize(), rng.choice(LISTS["nouns"]).capitalize()]
    )
    return f"{street} {rng.choice(['Street', 'Road', 'Lane', 'Square', 'Hill', 'Row'])} {rng.randint(1, 99)}" + (
        f", {place(rng)}" if rng.random() < 0.6 else ""
    )


def email(rng: Random) -> str:
    return f"{rng.choice(['info', 'hello', 'office', 'team', 'post', syllables(rng, 1, 2)])}@{syllables(rng)}.example"


def date(rng: Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(LISTS['months'])}" + (f" {rng.randint(1990, 2030)}" if rng.random() < 0.3 else "")


def frequency(rng: Random) -> str:
    return rng.choice(
        [
            f"every {rng.choice(LISTS['weekdays'])}",
            f"every {rng.randint(2, 90)} {rng.choice(['days', 'weeks', 'months', 'hours'])}",
            f"{rng.choice(['once', 'twice'])} a {rng.choice(['day', 'week', 'month', 'year'])}",
            f"every {rng.choice(['morning', 'evening', 'week', 'month', 'spring', 'autumn'])}",
            f"every {rng.randint(1, 90) * 100} km",
            f"every {rng.choice(LISTS['numbers'][2:])} months",
        ]
    )


def deadline(rng: Random) -> str:
    return rng.choice(
        [
            f"within {rng.choice([str(rng.randint(2, 60)), rng.choice(LISTS['numbers'][2:])])} {rng.choice(['days', 'hours', 'weeks'])}",
            f"before {rng.choice(['noon', 'closing time', 'the weekend', clock(rng)])}",
            f"by {clock(rng)}",
            f"no later than {date(rng)}",
        ]
    )


def phrase(rng: Random) -> str:
    """A noun phrase that explains something."""
    noun = rng.choice(LISTS["nouns"] + ["tool", "list", "place", "day", "bag", "sign", "room", "person", "machine", "part"])
    lead = f"{rng.choice(['a', 'the'])} {rng.choice(LISTS['adjectives'])} {noun}"
    return (
        f"{lead} {rng.choice(LISTS['tails'])}"
        if rng.random() < 0.7
        else f"{lead} {rng.choice(['for', 'with', 'near', 'in', 'under'])} the {rng.choice(LISTS['nouns'])}"
    )


def motto(rng: Random) -> str:
    first, second = rng.choice(LISTS["verbs"]).capitalize(), rng.choice(LISTS["verbs"])
    how, then = rng.choice(["it", "well", "slowly", "with care", "early"]), rng.choice(["it", "well", "again", "together", "on"])
    return f"{first} {how}, {second} {then}"
