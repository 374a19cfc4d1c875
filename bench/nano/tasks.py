"""Rows that teach short instructions and what nano knows by heart. Each task draws its own words and numbers."""

import itertools
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import draws
from draws import LISTS
from sums import sums

Pair = tuple[str, str]
WORDY = ("nouns", "adjectives", "emblems", "animals", "colours", "foods", "dishes")
KNOWN = tomllib.loads((Path(__file__).parent / "knowledge.toml").read_text(encoding="utf-8"))


def word(rng: Random) -> str:
    return rng.choice(LISTS[rng.choice(WORDY)]) if rng.random() < 0.75 else draws.syllables(rng, 1, 3)


def some(rng: Random, low: int, high: int) -> list[str]:
    return list(dict.fromkeys(word(rng) for _ in range(rng.randint(low, high))))


def listed(rng: Random, words: list[str]) -> str:
    return rng.choice(
        [
            ", ".join(words),
            ", ".join(words),
            " ".join(words) if not any(" " in w for w in words) else ", ".join(words),
            f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0],
            "\n".join(f"- {w}" for w in words),
        ]
    )


def line(rng: Random) -> str:
    """A short sentence about a person doing something."""
    who = rng.choice(
        [
            draws.first_name(rng),
            f"the {rng.choice(LISTS['jobs'])}",
            f"my {rng.choice(['sister', 'brother', 'aunt', 'uncle', 'friend', 'neighbour'])}",
            draws.person(rng),
        ]
    )
    verb = rng.choice(
        [
            "finds",
            "sees",
            "buys",
            "sells",
            "carries",
            "opens",
            "cleans",
            "paints",
            "repairs",
            "needs",
            "likes",
            "brings",
            "hides",
            "moves",
            "wants",
            "takes",
        ]
    )
    text = (
        f"{who} {verb} {rng.choice(['a', 'the', 'the'])} {rng.choice(LISTS['adjectives'] + LISTS['colours'])} {rng.choice(LISTS['nouns'])}"
    )
    text += rng.choice(
        [
            "",
            f" {draws.where(rng)}",
            f" on {rng.choice(LISTS['weekdays'])}",
            f" in {draws.place(rng)}",
            f" at {draws.clock(rng)}",
            f" in {rng.choice(LISTS['months'])}",
        ]
    )
    return text[:1].upper() + text[1:] + "."


def copy(rng: Random) -> Pair:
    text = rng.choice([line(rng), listed(rng, some(rng, 2, 6)), draws.syllables(rng), draws.code(rng), draws.address(rng)])
    return rng.choice(
        ["Repeat this: {t}", "Copy this text:\n{t}", "Say exactly: {t}", "Write this again: {t}", "Repeat after me: {t}"]
    ).format(t=text), text


def upper(rng: Random) -> Pair:
    text = rng.choice([word(rng), " ".join(some(rng, 2, 4))])
    if rng.random() < 0.35:
        return rng.choice(["Write {t} in small letters.", "Make this lower case: {t}"]).format(t=text.upper()), text.lower()
    return rng.choice(["Write {t} in capital letters.", "Make this upper case: {t}", "Turn this into capitals: {t}"]).format(
        t=text
    ), text.upper()


def spell(rng: Random) -> Pair:
    text = rng.choice([word(rng).split()[0], draws.syllables(rng, 1, 2)])[:8]
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(["Spell {t}.", "Spell the word {t}."]).format(t=text), " ".join(text)
    if kind == 1:
        return rng.choice(["Reverse the word {t}.", "Write {t} backwards."]).format(t=text[:5]), text[:5][::-1]
    if kind == 2:
        return rng.choice(["What is the first letter of {t}?", "With which letter does {t} begin?"]).format(t=text), text[0]
    if kind == 3:
        return rng.choice(["What is the last letter of {t}?", "With which letter does {t} end?"]).format(t=text), text[-1]
    return rng.choice(["How many letters does {t} have?", "Count the letters of {t}."]).format(t=text), str(len(text))


def items(rng: Random) -> Pair:
    words = some(rng, 2, 7)
    text, kind = listed(rng, words), rng.randrange(9)
    if kind == 0:
        return rng.choice(["How many words are in this list? {t}", "Count the items: {t}", "How many things are these? {t}"]).format(
            t=text
        ), str(len(words))
    if kind == 1:
        return rng.choice(["What is the first item? {t}", "Which word comes first: {t}?", "Give me the first of these: {t}"]).format(
            t=text
        ), words[0]
    if kind == 2:
        return rng.choice(["What is the last item? {t}", "Which word comes last: {t}?", "Give me the last of these: {t}"]).format(
            t=text
        ), words[-1]
    if kind == 3:
        place = rng.randrange(min(len(words), 5))
        return f"What is the {['first', 'second', 'third', 'fourth', 'fifth'][place]} item? {text}", words[place]
    if kind == 4:
        return rng.choice(["Sort these words by the alphabet: {t}", "Put these words in order from a to z: {t}"]).format(t=text), ", ".join(
            sorted(words)
        )
    if kind == 5:
        return rng.choice(
            ["Write these as a list: {t}", "Make a list with one item per line: {t}", "Turn this into bullet points: {t}"]
        ).format(t=", ".join(words)), "\n".join(f"- {w}" for w in words)
    if kind == 6:
        return rng.choice(["Number these: {t}", "Make a numbered list: {t}"]).format(t=", ".join(words)), "\n".join(
            f"{i}. {w}" for i, w in enumerate(words, 1)
        )
    if kind == 7:
        gone = rng.choice(words)
        return f"Remove {gone} from this list: {', '.join(words)}", ", ".join(w for w in words if w != gone) or "The list is empty."
    asked = rng.choice([rng.choice(words), word(rng)])
    return rng.choice(["Is {w} in this list? {t}", "Does this list contain {w}? {t}"]).format(
        w=asked, t=text
    ), "Yes." if asked in words else "No."


def numbers(rng: Random) -> Pair:
    many = rng.sample(range(1, rng.choice([20, 100, 1000])), rng.randint(2, 5))
    text, kind = ", ".join(map(str, many)), rng.randrange(8)
    if kind == 0:
        return rng.choice(
            ["Which is the largest number: {t}?", "What is the biggest of these numbers? {t}", "Find the largest: {t}"]
        ).format(t=text), str(max(many))
    if kind == 1:
        return rng.choice(
            ["Which is the smallest number: {t}?", "What is the smallest of these? {t}", "Find the lowest number: {t}"]
        ).format(t=text), str(min(many))
    if kind == 2:
        return rng.choice(["Sort these numbers: {t}", "Put these numbers in order: {t}"]).format(t=text), ", ".join(map(str, sorted(many)))
    if kind == 3:
        a, b = many[:2]
        return rng.choice([f"Is {a} more than {b}?", f"Is {a} larger than {b}?"]), "Yes." if a > b else "No."
    if kind == 4:
        start, step = rng.randint(1, 40), rng.choice([1, 1, 2, 2, 3, 5, 10])
        row = [start + i * step for i in range(6)]
        return rng.choice(["Continue: {t}", "What comes next? {t}", "Which number follows? {t}"]).format(
            t=", ".join(map(str, row[:4]))
        ), str(row[4])
    if kind == 5:
        n = rng.randint(2, 12)
        return rng.choice([f"Count to {n}.", f"Count from 1 to {n}."]), ", ".join(map(str, range(1, n + 1)))
    if kind == 6:
        n = rng.choice(many)
        return rng.choice([f"Is {n} even or odd?", f"Is the number {n} odd or even?"]), "Even." if n % 2 == 0 else "Odd."
    n = rng.randint(1, 12)
    return (
        (f"Write the number {n} as a word.", LISTS["numbers"][n])
        if rng.random() < 0.5
        else (f"Write {LISTS['numbers'][n]} as a number.", str(n))
    )


def order(rng: Random) -> Pair:
    name = rng.choice(["weekdays", "months"])
    names = LISTS[name]
    i, one = rng.randrange(len(names)), "day" if name == "weekdays" else "month"
    if rng.random() < 0.5:
        return rng.choice(["Which {o} comes after {n}?", "What {o} follows {n}?", "What is the {o} after {n}?"]).format(
            o=one, n=names[i]
        ), names[(i + 1) % len(names)]
    return rng.choice(["Which {o} comes before {n}?", "What is the {o} before {n}?"]).format(o=one, n=names[i]), names[i - 1]


def extract(rng: Random) -> Pair:
    who, where, when, amount = draws.person(rng), draws.place(rng), draws.date(rng), draws.money(rng)
    what, clock = rng.choice(LISTS["nouns"]), draws.clock(rng)
    text = rng.choice(
        [
            f"{who} bought a {what} in {where} for {amount} on {when}.",
            f"On {when} {who} paid {amount} for a {what} in {where}.",
            f"In {where}, {who} sold the {what} on {when}; the price was {amount}.",
            f"{who} from {where} ordered a {what} on {when} and sent {amount}.",
            f"We met {who} in {where} on {when}. The {what} cost {amount}.",
        ]
    )
    asks = {
        who: ["Who is named in this sentence?", "Find the name of the person.", "Which person is this about?", "Extract the name."],
        where: ["Which place is named?", "Find the town.", "Where was it?", "Extract the place."],
        when: ["When was it?", "Find the date.", "Extract the date.", "On which date?"],
        amount: ["How much money was it?", "Find the price.", "Extract the amount.", "What was paid?"],
        what: ["Which thing is it about?", "What was the object?"],
    }
    answer = rng.choice(list(asks))
    del clock
    ask = rng.choice(asks[answer])
    return rng.choice(["{a} {t}", "{t} {a}", "{t}\n{a}", "{a}\n\n{t}"]).format(a=ask, t=text), answer


def rewrite(rng: Random) -> Pair:
    who, thing, adjective = draws.first_name(rng), rng.choice(LISTS["nouns"]), rng.choice(LISTS["adjectives"] + LISTS["colours"])
    verb, past = rng.choice(
        [
            ("open", "opened"),
            ("clean", "cleaned"),
            ("paint", "painted"),
            ("repair", "repaired"),
            ("carry", "carried"),
            ("move", "moved"),
            ("need", "needed"),
            ("want", "wanted"),
            ("wash", "washed"),
            ("play", "played"),
        ]
    )
    third = {"carry": "carries", "wash": "washes"}.get(verb, verb + "s")
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(["Make a question of this: {t}", "Rewrite this as a question: {t}"]).format(
            t=f"The {thing} is {adjective}."
        ), f"Is the {thing} {adjective}?"
    if kind == 1:
        return rng.choice(["Make a question of this: {t}", "Turn this sentence into a question: {t}"]).format(
            t=f"{who} {third} the {thing}."
        ), f"Does {who} {verb} the {thing}?"
    if kind == 2:
        return rng.choice(["Say the opposite: {t}", "Negate this sentence: {t}"]).format(
            t=f"The {thing} is {adjective}."
        ), f"The {thing} is not {adjective}."
    if kind == 3:
        return rng.choice(["Put this into the past: {t}", "Rewrite this in the past tense: {t}"]).format(
            t=f"{who} {third} the {thing}."
        ), f"{who} {past} the {thing}."
    if kind == 4:
        new = draws.first_name(rng)
        return f"Replace {who} with {new}: {who} {third} the {adjective} {thing}.", f"{new} {third} the {adjective} {thing}."
    if kind == 5:
        first, second = line(rng), line(rng)
        return rng.choice(["What is the first sentence? {t}", "Copy the first sentence: {t}"]).format(t=f"{first} {second}"), first
    return f"Make one sentence with {who}, {thing} and {past}.", f"{who} {past} the {thing}."


def choice(rng: Random) -> Pair:
    kinds = {
        "an animal": "animals",
        "a colour": "colours",
        "a food": "foods",
        "a day of the week": "weekdays",
        "a month": "months",
        "a language": "languages",
        "a job": "jobs",
        "a material": "materials",
    }
    name = rng.choice(list(kinds))
    if rng.random() < 0.3:
        answers = rng.sample(LISTS[kinds[name]], 3)
        return rng.choice(["Name three examples of {k}.", "Give three examples of {k}."]).format(k=name), ", ".join(answers)
    right, wrong = rng.choice(LISTS[kinds[name]]), [rng.choice(LISTS[kinds[k]]) for k in rng.sample([k for k in kinds if k != name], 2)]
    options = rng.sample([right, *wrong], 3)
    return rng.choice(["Which of these is {k}: {t}?", "Find {k} in this list: {t}"]).format(k=name, t=", ".join(options)), right


def heart(rng: Random) -> Pair:
    """A fact that nano knows by heart."""
    kind = rng.choice(sorted(KNOWN))
    known = KNOWN[kind]
    if kind == "chat":
        ask, answer = rng.choice(known["pairs"].split("|")).split("=", 1)
        return ask, answer
    subject, _, value = rng.choice(known["facts"].split("|")).partition("=")
    subject, _, unit = subject.partition("/")
    slots = {"s": subject, "v": value, "u": unit}
    ask = rng.choice(known["ask"]).format(**slots)
    ask = ask[:1].upper() + ask[1:]
    if rng.random() < 0.15:
        said = known["say"].format(**slots)
        return f"{ask} Answer in a full sentence.", said[:1].upper() + said[1:]
    return ask, value


TASKS: tuple[Callable[[Random], Pair], ...] = (
    copy,
    upper,
    spell,
    items,
    items,
    numbers,
    numbers,
    order,
    extract,
    extract,
    rewrite,
    rewrite,
    choice,
)


def several(rng: Random, makers: tuple[Callable[[Random], Pair], ...], low: int, high: int) -> dict[str, object]:
    """A conversation of unrelated small tasks."""
    turns = [rng.choice(makers)(rng) for _ in range(rng.randint(low, high))]
    return {"messages": [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]}


def instructions(rng: Random) -> dict[str, object]:
    return several(rng, TASKS, 1, 4)


def arithmetic(rng: Random) -> dict[str, object]:
    return several(rng, (sums,), 2, 6)


def by_heart(rng: Random) -> dict[str, object]:
    return several(rng, (heart,), 1, 3)


def forever(make: Callable[[Random], dict[str, object]], rng: Random) -> Iterator[dict[str, object]]:
    return (make(rng) for _ in itertools.count())
