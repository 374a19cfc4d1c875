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
from pathlib import Path
from random import Random
from typing import Any, Literal

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


@dataclass(frozen=True)
class _Stage:
    say: str
    ask: str
    steps: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Template:
    name: str
    stages: tuple[_Stage, ...]
    ranges: Mapping[str, tuple[int, int]]
    picks: Mapping[str, Sequence[str]]

    def until(self, level: int) -> tuple[_Stage, ...] | None:
        """The stages that make `level` steps, if it has a stage that ends there."""
        ends = [sum(len(stage.steps) for stage in self.stages[: i + 1]) for i in range(len(self.stages))]
        return self.stages[: ends.index(level) + 1] if level in ends else None


def problems(seed: int, levels: Sequence[int] = LEVELS, *, split: SplitName = "train") -> Iterator[Problem]:
    """Problems without end, the same for the same seed; each level is as likely as the others.

    Raises:
        UserError: a level is not between 1 and 5.
    """
    if not levels or any(level not in LEVELS for level in levels):
        raise UserError(f"there are no worksheets of the levels {list(levels)}", remedy="choose levels between 1 and 5")
    rng, templates, people = Random(derive(seed, "worksheets", split)), _read(split), _people(split)
    number = 0
    while True:
        level = rng.choice(levels)
        template = rng.choice([template for template in templates if template.until(level)])
        yield _tell(template, level, rng, people, f"{split}-{seed}-{number}")
        number += 1


def answer_of(problem: Problem) -> str:
    """The worked solution in the tags of the GSM8K reference."""
    return f"<reasoning>{chr(10).join(problem.lines)}</reasoning><answer>{problem.answer}</answer>"


def row_of(problem: Problem) -> Row:
    """The problem as a conversation; `meta` holds what a task needs to grade and group it."""
    turns = (Message("user", problem.question), Message("assistant", answer_of(problem)))
    meta = {"answer": str(problem.answer), "level": str(problem.level), "template": problem.template}
    return Row(problem.id, turns, source=problem.id, meta=meta)


def compute(left: int, op: str, right: int) -> int | None:
    """The result of one operation, or None if it is not a whole number."""
    if op == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def _tell(template: _Template, level: int, rng: Random, people: Sequence[str], id: str) -> Problem:
    stages = template.until(level) or ()
    (name, he), (other, _) = (person.split() for person in rng.sample(people, 2))
    words = {"name": name, "other": other, **dict(zip(("he", "him", "his"), _PRONOUNS[he], strict=True))}
    words |= {word: rng.choice(choices) for word, choices in template.picks.items()}
    words |= {word.capitalize(): text.capitalize() for word, text in words.items() if word in ("he", "him", "his")}
    numbers, steps = _numbers(template, [step for stage in stages for step in stage.steps], rng)
    words |= {letter: str(number) for letter, number in numbers.items()}
    reasons = [reason for stage in stages for reason in stage.reasons]
    lines = [_fill(reason, words | {"=": step.marked(), "$": step.marked("$")}) for reason, step in zip(reasons, steps, strict=True)]
    story = " ".join(_fill(text, words) for text in [*(stage.say for stage in stages), stages[-1].ask] if text)
    return Problem(id, story, tuple(lines), tuple(steps), template.name)


def _numbers(template: _Template, formulas: Sequence[str], rng: Random) -> tuple[dict[str, int], list[Step]]:
    """Numbers drawn until every step works out, and the steps."""
    while True:
        values = {letter: rng.randint(*bounds) for letter, bounds in template.ranges.items()}
        drawn, steps = dict(values), []
        for formula in formulas:
            name, _, left, op, right = formula.split()
            a, b = (int(term) if term.isdigit() else values[term] for term in (left, right))
            result = compute(a, op, b)
            if result is None or not 2 <= result <= MAX_RESULT:
                break
            values[name] = result
            steps.append(Step(a, op, b, result))
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
def _read(split: SplitName) -> tuple[_Template, ...]:
    templates = []
    for raw in _file()[split]:
        stages = tuple(_Stage(say, ask, tuple(rest[::2]), tuple(rest[1::2])) for say, ask, *rest in raw["stages"])
        ranges = {letter: (low, high) for letter, (low, high) in raw["range"].items()}
        templates.append(_Template(raw["name"], stages, ranges, raw.get("pick", {})))
    return tuple(templates)


def _people(split: SplitName) -> Sequence[str]:
    people: list[str] = _file()["people"][split]
    return people
