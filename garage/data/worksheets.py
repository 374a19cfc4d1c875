"""Arithmetic word problems without end, each with a worked and checked solution.

A problem is a story from a template (`assets/worksheets.toml`) told up to one of its stages. Its reasoning has one line a step, with the
calculator marks of GSM8K (`<<3*4=12>>12`); its answer is wrapped in the tags of the GSM8K reference. Numbers are drawn until every
step's result is a whole number of 2 or more, so that all quantities make sense. Training and test share no template, no name and no
thing: what is measured on the test split is arithmetic and reading, not recall.

Limits: the four operations on whole numbers, one to five steps, English.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from garage.core.errors import UserError
from garage.core.seeds import derive
from garage.core.types import Message, Row

LEVELS = (1, 2, 3, 4, 5)
MAX_RESULT = 9999
_TEMPLATES = Path(__file__).parent.parent / "assets" / "worksheets.toml"
_PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}

SplitName = Literal["train", "test"]


@dataclass(frozen=True)
class Step:
    """One operation of a solution."""

    left: int
    op: str
    right: int
    result: int

    def marked(self, unit: str = "") -> str:
        return f"{self.left} {self.op} {self.right} = {unit}<<{self.left}{self.op}{self.right}={self.result}>>{self.result}"


@dataclass(frozen=True)
class Problem:
    """A question and its solution: `lines` of reasoning, one a step, and the answer, which is the last step's result."""

    id: str
    question: str
    lines: tuple[str, ...]
    steps: tuple[Step, ...]
    template: str

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def level(self) -> int:
        return len(self.steps)


class _Stage(NamedTuple):
    """What a stage adds to the story, its question, and its steps with their reasons in turn."""

    say: str
    ask: str
    steps: Sequence[str]
    reasons: Sequence[str]


@dataclass(frozen=True)
class _Template:
    """A story in stages; `told` maps a level to the stages that make as many steps."""

    name: str
    told: Mapping[int, tuple[_Stage, ...]]
    ranges: Mapping[str, Sequence[int]]
    picks: Mapping[str, Sequence[str]]


def problems(seed: int, levels: Sequence[int] = LEVELS, *, split: SplitName = "train") -> Iterator[Problem]:
    """Problems without end, the same for the same seed; each level is as likely as the others.

    Raises:
        UserError: a level is not between 1 and 5.
    """
    if not levels or not set(levels) <= set(LEVELS):
        raise UserError(f"there are no worksheets of the levels {list(levels)}", remedy="choose levels between 1 and 5")
    rng, templates = Random(derive(seed, "worksheets", split)), _templates(split)
    for number in count():
        level = rng.choice(levels)
        template = rng.choice([template for template in templates if level in template.told])
        yield _tell(template, level, rng, split, f"{split}-{seed}-{number}")


def answer_of(problem: Problem) -> str:
    """The worked solution in the tags of the GSM8K reference."""
    return f"<reasoning>{chr(10).join(problem.lines)}</reasoning><answer>{problem.answer}</answer>"


def row_of(problem: Problem) -> Row:
    """The problem as a conversation; `meta` holds what a task needs to grade and group it."""
    turns = (Message("user", problem.question), Message("assistant", answer_of(problem)))
    meta = {"answer": str(problem.answer), "level": str(problem.level), "template": problem.template}
    return Row(problem.id, turns, source=problem.id, meta=meta)


def _tell(template: _Template, level: int, rng: Random, split: SplitName, id: str) -> Problem:
    stages = template.told[level]
    (name, he), (other, _) = (person.split() for person in rng.sample(_file()["people"][split], 2))
    words = {"name": name, "other": other, **dict(zip(("he", "him", "his"), _PRONOUNS[he], strict=True))}
    words |= {word.capitalize(): words[word].capitalize() for word in ("he", "him", "his")}
    words |= {word: rng.choice(choices) for word, choices in template.picks.items()}
    numbers, steps = _numbers(template, [step for stage in stages for step in stage.steps], rng)
    words |= {letter: str(number) for letter, number in numbers.items()}
    reasons = [reason for stage in stages for reason in stage.reasons]
    lines = [_fill(reason, words | {"=": step.marked(), "$": step.marked("$")}) for reason, step in zip(reasons, steps, strict=True)]
    story = " ".join(_fill(text, words) for text in [*(stage.say for stage in stages), stages[-1].ask] if text)
    return Problem(id, story, tuple(lines), tuple(steps), template.name)


def _numbers(template: _Template, formulas: Sequence[str], rng: Random) -> tuple[dict[str, int], list[Step]]:
    """Numbers drawn until every step works out, and the steps."""
    while True:
        drawn = {letter: rng.randint(low, high) for letter, (low, high) in template.ranges.items()}
        values, steps = dict(drawn), list[Step]()
        for name, _, left, op, right in map(str.split, formulas):
            a, b = (int(term) if term.isdigit() else values[term] for term in (left, right))
            values[name] = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else 0}[op]
            steps.append(Step(a, op, b, values[name]))
            if not 2 <= values[name] <= MAX_RESULT:
                break
        else:
            return drawn, steps


def _fill(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"{{{word}}}", value)
    return text[0].upper() + text[1:]


@cache
def _file() -> Mapping[str, Any]:
    return tomllib.loads(_TEMPLATES.read_text(encoding="utf-8"))


@cache
def _templates(split: SplitName) -> tuple[_Template, ...]:
    return tuple(_Template(raw["name"], _told(raw["stages"]), raw["range"], raw.get("pick", {})) for raw in _file()[split])


def _told(raw: Sequence[Sequence[str]]) -> Mapping[int, tuple[_Stage, ...]]:
    stages = [_Stage(say, ask, rest[::2], rest[1::2]) for say, ask, *rest in raw]
    steps = accumulate(len(stage.steps) for stage in stages)
    return {level: tuple(stages[: number + 1]) for number, level in enumerate(steps)}
