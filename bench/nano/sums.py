"""Rows that teach arithmetic: sums alone, lines of sums, and word problems.

Word problems come from the training templates of `garage.data.worksheets`, at most three steps, and from `stories.toml`, at most two. They
are answered in the tags `<reasoning>` and `<answer>` when the tags are asked for and in about a third of the other cases, else with the
same working in plain words: the base knows the format without preferring it. No story uses a thing or a name of the test worksheets.
"""

import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import draws

from garage.data import worksheets
from garage.data.worksheets import Problem, Step, answer_of, problems

Pair = tuple[str, str]
TAGS = (
    "Think first and put your reasoning between <reasoning> and </reasoning>, then put the answer between <answer> and </answer>.",
    "Show your work in <reasoning></reasoning> and the number in <answer></answer>.",
    "Use the tags <reasoning> and <answer>.",
    "You are given a problem. Think about the problem and provide your reasoning. Place it between <reasoning> and </reasoning>. "
    "Then, provide the final answer (i.e., just one numerical value) between <answer> and </answer>.",
)
SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
STORIES = tomllib.loads((Path(__file__).parent / "stories.toml").read_text(encoding="utf-8"))
WORKSHEETS = Path(worksheets.__file__).parents[1] / "assets" / "worksheets.toml"


def step(rng: Random, op: str, left: int | None = None) -> Step | None:
    """A sum whose result is 1 to 999; with `left` given, None where no such sum exists."""
    size = rng.choice([10, 20, 20, 50, 100])
    if op in "+-":
        a, b = left or rng.randint(2, size), rng.randint(1, size)
        a, b = (max(a, b + 1), min(a, b)) if op == "-" and left is None else (a, b)
        result = a + b if op == "+" else a - b
    else:
        b = rng.randint(2, rng.choice([5, 9, 12]))
        result = left or rng.randint(2, rng.choice([9, 12, 12, 30]))
        a, result = (result * b, result) if op == "/" else (result, result * b)
        if op == "/" and left is not None:
            b = rng.choice([n for n in range(2, 13) if left % n == 0] or [0])
            a, result = left, left // b if b else 0
    return Step(a, op, b, result) if 1 <= result <= 999 else None


def sure(rng: Random, op: str) -> Step:
    """A sum of the kind."""
    while (found := step(rng, op)) is None:
        pass
    return found


def sums(rng: Random) -> Pair:
    """One sum, written or spoken; the answer is the number."""
    one = sure(rng, rng.choice("++--**/"))
    written = f"{one.left} {one.op} {one.right}"
    asked = rng.choice([written, written, f"{one.left} {SPOKEN[one.op]} {one.right}"])
    return rng.choice(["What is {x}?", "{x} =", "Calculate {x}.", "How much is {x}?", "{x}?"]).format(x=asked), str(one.result)


def drill(rng: Random) -> dict[str, object]:
    """Lines of sums as plain text, of one kind or mixed, with and without the calculator marks."""
    ops, many, form = rng.choice(["+", "-", "*", "/", "+-*/", "+-*/", "+-"]), rng.randint(4, 16), rng.random()
    steps = [sure(rng, rng.choice(ops)) for _ in range(many)]
    lines = [s.marked() if form < 0.4 else f"{s.left} {s.op} {s.right} = {s.result}" for s in steps]
    return {"text": "\n".join(lines) + "\n"}


def story(rng: Random) -> Problem:
    """A word problem of one or two steps."""
    words, (kind, *texts) = _words(rng), _frame(rng, "openings")
    first = sure(rng, kind[-1])
    told, ask, reason = (_fill(text, words, first) for text in texts)
    lines, steps = [reason], [first]
    if rng.random() < 0.4 and ("{t}" in texts[1] + texts[2] or kind[0] == "$"):
        kind, *texts = _frame(rng, "money" if kind[0] == "$" else "changes")
        if (second := step(rng, kind[-1], first.result)) is not None:
            more, ask, reason = (_fill(text, words, second) for text in texts)
            told, lines, steps = f"{told} {more}", [*lines, reason], [*steps, second]
    return Problem("story", f"{told} {ask}", tuple(lines), tuple(steps), "story")


def _frame(rng: Random, name: str) -> list[str]:
    return [part.strip() for part in rng.choice(STORIES[name]).split(" | ")]


def _words(rng: Random) -> dict[str, str]:
    names = list(dict.fromkeys(name for name in (draws.first_name(rng) for _ in range(9)) if name not in _tested()))
    he, lists = rng.choice(["he", "she"]), STORIES["lists"].items()
    words = {key: rng.choice([word for word in text.split("|") if word not in _tested()]) for key, text in lists}
    return {"n": names[0], "o": names[1], "he": he, "He": he.capitalize(), "his": "his" if he == "he" else "her", **words}


@cache
def _tested() -> frozenset[str]:
    """The names and things of the test worksheets."""
    raw = tomllib.loads(WORKSHEETS.read_text(encoding="utf-8"))
    things = (word for template in raw["test"] for words in template.get("pick", {}).values() for word in words)
    return frozenset([*things, *(person.split()[0] for person in raw["people"]["test"])])


def _fill(text: str, words: dict[str, str], one: Step) -> str:
    for key, value in {**words, "a": str(one.left), "b": str(one.right), "=": one.marked(), "$": one.marked("$")}.items():
        text = text.replace(f"{{{key}}}", value)
    return text


_STREAMS: dict[int, Iterator[Problem]] = {}


def worksheet(rng: Random) -> dict[str, object]:
    """A worksheet of one to three steps."""
    level = rng.choice([1, 1, 1, 2, 2, 3])
    return worded(rng, next(_STREAMS.setdefault(level, problems(rng.getrandbits(40), (level,), split="train"))))


def stories(rng: Random) -> dict[str, object]:
    return worded(rng, story(rng))


def worded(rng: Random, task: Problem) -> dict[str, object]:
    """The problem as a conversation, in one of the forms of answer."""
    kind, messages, text = rng.random(), [], task.question
    plain = "\n".join(line.split("<<")[0] + line.split(">>")[1] for line in task.lines)
    if kind < 0.35:
        asked, place = rng.choice(TAGS), rng.randrange(3)
        if place == 0:
            messages = [{"role": "system", "content": asked}]
        else:
            text = f"{text}\n{asked}" if place == 1 else f"{asked}\n\n{text}"
        answer = answer_of(task)
    elif kind < 0.55:
        answer = answer_of(task)
    elif kind < 0.6:
        text, answer = f"{text} Answer with the number only.", str(task.answer)
    else:
        answer = f"{plain}\nThe answer is {task.answer}."
    return {"messages": [*messages, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
