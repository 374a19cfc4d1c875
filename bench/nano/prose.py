"""Plain English: small stories, descriptions and reports from grammars with many free places."""

from random import Random

import draws
from draws import LISTS

WANTS = (
    "wanted to bake a cake",
    "wanted to build a small boat",
    "was looking for {p} lost {n}",
    "wanted to visit {p} aunt in {t}",
    "had to repair the {a} {n}",
    "wanted to learn {h}",
    "was on the way to the market in {t}",
    "wanted to plant a tree",
    "had to bring a letter to {t}",
    "wanted to paint the {n}",
    "was waiting for the first day of {m}",
    "wanted to sell {p} {a} {n}",
    "had promised to help {o}",
    "wanted to cook {f}",
)
TROUBLES = (
    "But the {n} was broken.",
    "But it began to rain.",
    "But the door was locked and the key was gone.",
    "But there was no {f} left.",
    "But {o} had taken the {n}.",
    "Then a {c} {x} ran across the road.",
    "But the bus was late.",
    "But nobody knew where the {n} was.",
    "Then the light went out.",
    "But the wind was too strong.",
    "But it was far too heavy.",
    "Then {he} heard a strange noise {w}.",
)
HELPS = (
    "{o} came by and lent {him} a {n}.",
    "{He} asked {o} for help.",
    "After a while {he} found a {a} {n} {w}.",
    "{He} sat down and thought about it.",
    "Together with {o}, {he} tried again.",
    "{He} walked all the way to {t} and came back with a {n}.",
    "An old {j} showed {him} how to do it.",
    "{He} took a deep breath and started again.",
    "{He} looked {w}, and there it was.",
    '{o} said: "Take your time, we will find a way."',
)
ENDS = (
    "In the end everything was fine.",
    "That evening they all had {f} together.",
    "{He} was tired but happy.",
    "From that day on {he} always carried a {n}.",
    "{o} laughed and gave {him} some {f}.",
    "{He} never forgot that day.",
    '"Next time I will ask earlier," said {w1}.',
    "And so the {x} got a new home.",
    "They went home before it was dark.",
    "It had been a good day.",
)
SCENES = (
    "The {n} stands {w}.",
    "It is {c} and made of {k}.",
    "People come here to look at the {a} {n}.",
    "In {m} it is often {g}.",
    "A {x} sleeps {w2}.",
    "The {j} of {t} comes by on {d}.",
    "Next to it there is a {a} {n2}.",
    "Nobody knows who made it.",
    "In the morning it smells of {f}.",
    "Children like it because it is {a}.",
    "It is older than the town of {t}.",
    "On {d} the place is closed.",
)
STEPS = (
    "First, {v} the {n}.",
    "Then {v2} the {a} {n2}.",
    "Make sure that the {n} is {a2}.",
    "If the {n2} is {a}, {v} it again.",
    "Wait for {u}.",
    "Finally, {v3} the {n3} and put it {w}.",
    "Ask the {j} if something is not clear.",
)


def slots(rng: Random) -> dict[str, str]:
    he, him, his = rng.choice([("he", "him", "his"), ("she", "her", "her")])
    name = draws.first_name(rng)
    pick = lambda key: rng.choice(LISTS[key])  # noqa: E731
    return {
        "who": name,
        "w1": name,
        "o": draws.first_name(rng),
        "he": he,
        "He": he.capitalize(),
        "him": him,
        "p": his,
        "n": pick("nouns"),
        "n2": pick("nouns"),
        "n3": pick("nouns"),
        "a": pick("adjectives"),
        "a2": pick("adjectives"),
        "t": draws.place(rng),
        "h": pick("hobbies"),
        "m": pick("months"),
        "f": pick("foods"),
        "x": pick("animals"),
        "c": pick("colours"),
        "j": pick("jobs"),
        "w": draws.where(rng),
        "w2": draws.where(rng),
        "k": pick("materials"),
        "d": pick("weekdays"),
        "v": pick("verbs"),
        "v2": pick("verbs"),
        "v3": pick("verbs"),
        "u": draws.duration(rng),
        "g": rng.choice(["cold", "warm", "sunny", "windy", "foggy", "quiet", "rainy"]),
    }


def story(rng: Random) -> str:
    s = slots(rng)
    opening = rng.choice(
        [
            "{who} {v}.",
            "One {m} morning, {who} {v}.",
            "{who} lived in {t}. One day {he} {v}.",
            "There was once a {j} called {who}. On a {d}, {he} {v}.",
            "Last {d}, {who} {v}.",
        ]
    )
    first = opening.replace("{v}", rng.choice(WANTS)).format(**s)
    parts = [
        first,
        rng.choice(TROUBLES).format(**s),
        *[text.format(**s) for text in rng.sample(HELPS, rng.randint(1, 3))],
        rng.choice(ENDS).format(**s),
    ]
    return " ".join(parts)


def scene(rng: Random) -> str:
    s = slots(rng)
    return f"There is a {s['a']} {s['n']} in {s['t']}. " + " ".join(text.format(**s) for text in rng.sample(SCENES, rng.randint(2, 5)))


def manual(rng: Random) -> str:
    s = slots(rng)
    return f"How to {s['v']} a {s['n']}. " + " ".join(text.format(**s) for text in STEPS if rng.random() < 0.8)


def text(rng: Random) -> dict[str, object]:
    return {"text": rng.choice([story, story, scene, manual])(rng) + "\n"}


def asked(rng: Random) -> dict[str, object]:
    """A story on request, or questions about one."""
    if rng.random() < 0.35:
        ask = rng.choice(["Tell me a short story.", "Write a short story.", "Please tell me a story.", "Make up a little story."])
        return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": story(rng)}]}
    s = slots(rng)
    want = rng.choice(WANTS).format(**s)
    rest = [rng.choice(TROUBLES).format(**s), rng.choice(HELPS).format(**s), rng.choice(ENDS).format(**s)]
    told = f"{s['who']} lived in {s['t']} and worked as a {s['j']}. One {s['d']}, {s['he']} {want}. {' '.join(rest)}"
    asks = [
        (f"Where did {s['who']} live?", f"In {s['t']}."),
        (f"What was the job of {s['who']}?", s["j"]),
        ("On which day was it?", s["d"]),
        ("Who is the story about?", s["who"]),
        ("How does the story end?", rest[-1]),
        (f"What did {s['who']} do for a living?", s["j"]),
    ]
    turns = rng.sample(asks, rng.randint(1, 3))
    messages = [{"role": role, "content": content} for pair in turns for role, content in zip(("user", "assistant"), pair, strict=True)]
    messages[0]["content"] = rng.choice(["{t}\n\n{q}", "{q}\n\n{t}", "Read the story.\n\n{t}\n\n{q}"]).format(t=told, q=turns[0][0])
    return {"messages": messages}
