"""Rows that teach reading: a document, then questions whose answers stand in it, in all the phrasings of the extractive teacher and more.

Answers are quoted values, as the teacher's are; a full sentence comes only when it is asked for. What a document does not say is
answered with one of a few fixed sentences. Questions about organisations that nothing was said about are answered with `UNKNOWN`.
"""

from functools import cache
from random import Random

import draws
import tables
import worlds
from draws import LISTS
from worlds import Document, Stated

from garage.core.seeds import derive
from garage.data.phrasings import is_plural, lowered, named, questions, shape_of

NOT_STATED = "That is not stated."
UNKNOWN = "I do not know that."
ASK_FIRST = (
    "{d}\n\n{q}",
    "{d}\n\nQuestion: {q}",
    "{d}\n\n{q}",
    "Read this:\n\n{d}\n\n{q}",
    "Here is a text.\n\n{d}\n\nQuestion: {q}",
    "Use the text below to answer.\n\n{d}\n\n{q}",
    "{q}\n\n{d}",
    "Context:\n{d}\n\nQuestion: {q}",
    "Answer from this page:\n\n{d}\n\n{q}",
    "Document:\n\n{d}\n\n{q}",
    "{q}\nHere is the page:\n\n{d}",
)
SYSTEM = (
    "You answer questions about this document.\n\n{d}",
    "Answer from the text.\n\n{d}",
    "Use only this page:\n\n{d}",
    "{d}",
    "You work at the desk. This is what you know:\n\n{d}",
)
SOFTER = (
    "{q}",
    "{q}",
    "{q}",
    "{q}",
    "{q}",
    "{q}",
    "Please tell me: {l}",
    "Hello, {l}",
    "{q} Please answer briefly.",
    "{q} Thanks!",
    "Hi! {q}",
    "One question: {l}",
    "{q} Answer with the value only.",
    "I wonder: {l}",
    "Sorry, {l}",
)
MORE = {
    "plain": ("What {a} does {s} have?", "{a} of {s}?", "Which {a} is given for {s}?", "And the {a} of {s}?", "Find the {a} of {s}.",
              "What do you know about the {a} of {s}?", "{S}, {a}?", "Say the {a} of {s}."),
    "price": ("What must I pay for {s}?", "Price of {s}?", "What is {s} sold for?", "How expensive is {s}?",
              "I want {s}, how much is that?", "What would {s} set me back?"),
    "place": ("Where do you keep {s}?", "I cannot find {s}. Where is it?", "Where would I find {s}?", "In what spot is {s}?"),
    "span": ("How long will {s} keep me busy?", "What time does {s} need?", "Is {s} quick? How long is it?"),
    "definition": ("What does {s} mean?", "Tell me what {s} is.", "What kind of thing is {s}?"),
    "weight": ("What is the mass of {s}?", "Weight of {s}?"),
    "person": ("Name the {a} of {s}.", "Who has the job of {a} at {s}?", "Who do I ask for as {a} of {s}?"),
    "colour": ("Is {s} red, blue or what colour?", "What is the shade of {s}?"),
    "hours": ("Opening times of {s}?", "From when to when is {s} open?"),
    "phone": ("Phone of {s}?", "How do I ring {s}?"),
}  # fmt: skip


def shape(fact: Stated) -> str:
    return fact.shape or shape_of(fact.subject, fact.attribute, fact.value)


def question(rng: Random, fact: Stated) -> str:
    """One way to ask for a fact."""
    kind = shape(fact)
    texts = questions(kind, fact.subject, fact.attribute, words=worlds.WORDS)
    text = rng.choice(texts)
    if kind in MORE and rng.random() < 0.2:
        subject = named(fact.subject, worlds.WORDS)
        text = rng.choice(MORE[kind]).format(s=subject, S=subject[:1].upper() + subject[1:], a=lowered(fact.attribute))
        text = text[:1].upper() + text[1:]
    return rng.choice(SOFTER).format(q=text, l=text[:1].lower() + text[1:] if not text.startswith("I ") else text)


def absent(rng: Random, doc: Document) -> str:
    """A question that the document does not answer."""
    subjects, known = [fact.subject for fact in doc.facts], {(fact.subject.lower(), fact.attribute.lower()) for fact in doc.facts}
    while True:
        _, _, subject, columns = rng.choice(tables.TABLES)
        who = rng.choice(subjects) if subjects and rng.random() < 0.5 else subject(rng)
        name = rng.choice(sorted(columns)) if rng.random() < 0.7 else rng.choice(sorted(tables.PAIRS))
        if (who.lower(), name.lower()) not in known and not (
            who in subjects and {name.lower(), "meaning"} & {a for s, a in known if s == who.lower()}
        ):
            return question(rng, Stated(who, name, columns[name](rng) if name in columns else tables.PAIRS[name](rng)))


def turn(rng: Random, doc: Document) -> tuple[str, str]:
    """A question about a document, and its answer."""
    kind = rng.random()
    if not doc.facts or kind < 0.07:
        return absent(rng, doc), NOT_STATED
    fact = rng.choice(doc.facts)
    if kind < 0.13 and shape(fact) not in ("step", "often", "deadline", "definition", "place"):
        text = rng.choice(["{q} Answer in a full sentence.", "{q} Please answer in one sentence.", "Say it in a sentence: {q}"]).format(
            q=questions(shape(fact), fact.subject, fact.attribute, words=worlds.WORDS)[0]
        )
        be = "are" if is_plural(fact.attribute) else "is"
        return text, f"The {lowered(fact.attribute)} of {named(fact.subject, worlds.WORDS)} {be} {fact.value}."
    if kind < 0.2:
        same = [other for other in doc.facts if other.attribute == fact.attribute and other.value == fact.value]
        if len(same) == 1 and not fact.shape:
            frame = rng.choice(
                ["Which has the {a} {v}?", "What has the {a} {v}?", "Which entry has {v} as its {a}?", "{v} is the {a} of what?"]
            )
            text = frame.format(a=lowered(fact.attribute), v=fact.value)
            return text[:1].upper() + text[1:], fact.subject
    if kind < 0.27 and not fact.shape:
        other = rng.choice([f for f in doc.facts if f.attribute == fact.attribute])
        return (
            f"Is it true that the {lowered(fact.attribute)} of {named(fact.subject, worlds.WORDS)} is {other.value}?",
            "Yes." if other.value == fact.value else f"No, it is {fact.value}.",
        )
    if kind < 0.31:
        group = [f for f in doc.facts if f.attribute == fact.attribute]
        if len(group) > 1 and not fact.shape:
            return rng.choice(["List the {a} of each entry.", "Give every {a}.", "Name all values of {a}."]).format(
                a=lowered(fact.attribute)
            ), "\n".join(f"{f.subject}: {f.value}" for f in group)
    return question(rng, fact), fact.value


def conversation(rng: Random) -> dict[str, object]:
    """A document and several turns about it."""
    doc = worlds.document(rng, rng.choice([1, 1, 1, 1, 2, 2, 3]))
    turns = list(dict.fromkeys(turn(rng, doc) for _ in range(rng.choice([2, 3, 4, 5, 6, 7]))))
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)]
    if rng.random() < 0.2:
        return {"messages": [{"role": "system", "content": rng.choice(SYSTEM).format(d=doc.text)}, *messages]}
    messages[0] = {"role": "user", "content": rng.choice(ASK_FIRST).format(d=doc.text, q=turns[0][0])}
    return {"messages": messages}


def lookup(rng: Random) -> dict[str, object]:
    """The smallest documents: a few keys with values, and several look-ups. Finding is learned here first."""
    kind = rng.randrange(4)
    maker = [lambda r: draws.thing(r).lower(), draws.syllables, draws.person, lambda r: rng.choice(LISTS["nouns"])][kind]
    keys = list(dict.fromkeys(maker(rng) for _ in range(rng.randint(2, 7))))
    draw = rng.choice(
        [draws.code, draws.money, draws.colour, draws.person, draws.where, draws.syllables, draws.duration, draws.count(1, 99), draws.thing]
    )
    values = {key: draw(rng) for key in keys}
    between, after = rng.choice([(": ", "\n"), (" = ", ", "), (" is ", ". "), (": ", ", "), (" - ", "\n"), (" | ", "\n"), (" -> ", "; ")])
    text = after.join(f"{key}{between}{value}" for key, value in values.items())
    turns = []
    for key in rng.choices(keys, k=rng.randint(3, 7)):
        back = rng.random() < 0.15 and list(values.values()).count(values[key]) == 1
        frames = (
            ("Which one is {v}?", "What has {v}?", "Who or what is {v}?")
            if back
            else ("{k}?", "What is {k}?", "And {k}?", "Give me {k}.", "What about {k}?")
        )
        turns.append((rng.choice(frames).format(k=key, v=values[key]), key if back else values[key]))
    messages = [{"role": role, "content": content} for pair in turns for role, content in zip(("user", "assistant"), pair, strict=True)]
    messages[0]["content"] = rng.choice(["{t}\n\n{q}", "{t}\n{q}", "Here is a list.\n\n{t}\n\n{q}"]).format(
        t=text, q=messages[0]["content"]
    )
    return {"messages": messages}


def echo(rng: Random) -> dict[str, object]:
    """Words, lines or invented words, said again: the bare skill of copying."""
    count = rng.randint(2, 10) if rng.random() < 0.5 else rng.randint(8, 24)
    words = [rng.choice([draws.syllables, draws.thing, draws.person, draws.code, draws.money])(rng) for _ in range(count)]
    text = rng.choice([" ", ", ", "\n"]).join(words)
    if rng.random() < 0.5:
        return {"text": "\n".join([text] * rng.randint(2, 3)) + "\n"}
    ask = rng.choice(["Repeat this: {t}", "Copy this text:\n{t}", "Say exactly: {t}", "Write this again: {t}", "Repeat after me: {t}"])
    return {"messages": [{"role": "user", "content": ask.format(t=text)}, {"role": "assistant", "content": text}]}


def plain(rng: Random) -> dict[str, object]:
    """A document as plain text, with or without questions after it."""
    doc = worlds.document(rng, rng.choice([1, 2, 3]))
    style = rng.choice([("Question: {q}\nAnswer: {a}", "\n\n"), ("Q: {q}\nA: {a}", "\n"), ("## {q}\n\n{a}", "\n\n"), ("- {q} {a}", "\n")])
    asked = style[1].join(style[0].format(q=q, a=a) for q, a in dict.fromkeys(turn(rng, doc) for _ in range(rng.randint(2, 6))))
    return {"text": f"{doc.text}\n\n{asked}\n"}


def unknown(rng: Random) -> dict[str, object]:
    """Questions about things that nothing was said about."""
    doc = worlds.document(rng, 1)
    facts = rng.sample(doc.facts, min(len(doc.facts), rng.choice([1, 1, 2])))
    return {
        "messages": [
            message
            for fact in facts
            for message in ({"role": "user", "content": question(rng, fact)}, {"role": "assistant", "content": UNKNOWN})
        ]
    }


@cache
def _almanac() -> tuple[Stated, ...]:
    """The facts of a fixed small world that nano knows by heart: so it learns how to know a fact whatever the words of the question."""
    facts: dict[tuple[str, str], Stated] = {}
    for number in range(60):
        for fact in worlds.document(Random(derive(0, "almanac", number)), 1).facts:
            if shape(fact) != "step" and fact.subject not in LISTS["weekdays"]:
                facts.setdefault((fact.subject.lower(), fact.attribute), fact)
    return tuple(facts.values())


def almanac(rng: Random) -> dict[str, object]:
    """Questions about the fixed world, without a document."""
    facts = rng.sample(_almanac(), rng.randint(1, 3))
    return {
        "messages": [
            message
            for fact in facts
            for message in ({"role": "user", "content": question(rng, fact)}, {"role": "assistant", "content": fact.value})
        ]
    }


def told(rng: Random) -> dict[str, object]:
    """Facts told by the user one by one and asked for later."""
    doc = worlds.document(rng, 1)
    facts = [fact for fact in doc.facts if not fact.shape]
    if len(facts) < 2:
        return conversation(rng)
    facts = rng.sample(facts, min(len(facts), rng.randint(2, 4)))
    messages = []
    for fact in facts:
        messages += [
            {"role": "user", "content": f"{rng.choice(['', '', 'Remember: ', 'Please note: '])}{worlds.sentence(rng, fact)}"},
            {"role": "assistant", "content": rng.choice(["Noted.", "I will remember that.", "Thank you, noted."])},
        ]
    for fact in rng.sample(facts, min(len(facts), rng.randint(1, 3))):
        messages += [{"role": "user", "content": question(rng, fact)}, {"role": "assistant", "content": fact.value}]
    return {"messages": messages}
