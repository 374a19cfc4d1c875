"""Format: the tagged answer form, and what a completion earns.

    <reasoning> working </reasoning> <answer> one number </answer>

Our default reward is 1.0 x correct + 0.2 x strict format + 0.1 x share of the four tags that occur exactly once. *Correct* needs only a
right, single answer block, so every right answer (at least 1.0) beats every wrong one (at most 0.3), however either is dressed up.

`reference_reward` is the mix of four that published GSM8K runs used, kept to compare with them and for nothing else: it pays a wrong
well-formed answer 4.0 and a right one with a slip of form 3.5.
"""

import re
from dataclasses import dataclass

from garage.core.errors import UserError
from garage.core.types import Score
from garage.rewards.answers import CLOSE_ANSWER, OPEN_ANSWER, grade_number

TAGS = ("<reasoning>", "</reasoning>", OPEN_ANSWER, CLOSE_ANSWER)
TURN_ENDS = ("<end_of_turn>", "<eos>", "<|im_end|>", "<|endoftext|>", "</s>")
REFERENCE_RANGE = (-2.0, 9.5)

_BLOCKS = re.compile(r"{}(.*?){}\s*{}(.*?){}".format(*TAGS), re.S)
_REFERENCE = re.compile(r"^\s*{}.+?{}.*?{}(.+?){}\s*$".format(*TAGS), re.M | re.S)
_REFERENCE_NUMBER = re.compile(r"<answer>.*?([0-9.]+)", re.S)


@dataclass(frozen=True)
class Parsed:
    """The two blocks of a well-formed completion, stripped."""

    reasoning: str
    answer: str


@dataclass(frozen=True)
class Weights:
    """What the parts of the default reward are worth; a UserError if a wrong answer could earn as much as a right one."""

    correct: float = 1.0
    format: float = 0.2
    tags: float = 0.1

    def __post_init__(self) -> None:
        if min(self.correct, self.format, self.tags) < 0 or self.correct <= self.format + self.tags:
            raise UserError(f"reward weights {self} let form outweigh correctness", remedy="set correct above format + tags, none negative")

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest reachable reward."""
        return 0.0, self.correct + self.format + self.tags


def parse(text: str) -> Parsed | None:
    """The strict reading: both blocks in order, each tag once, neither empty, and nothing else but an end of turn."""
    body = text.strip()
    while body.endswith(TURN_ENDS):
        body = body[: body.rindex("<")].rstrip()
    match = _BLOCKS.fullmatch(body) if tag_share(text) == 1 else None
    return Parsed(match[1].strip(), match[2].strip()) if match and match[1].strip() and match[2].strip() else None


def tagged(reasoning: str, answer: str) -> str:
    """The two blocks as the reference recipe writes them: every tag on a line of its own."""
    return "\n".join([TAGS[0], reasoning, TAGS[1], OPEN_ANSWER, answer, CLOSE_ANSWER])


def tag_share(text: str) -> float:
    """Share of the four tags that occur exactly once."""
    return sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS)


def default_reward(text: str, gold: str, weights: Weights = Weights()) -> Score:
    """Our reward of one completion; its range is `weights.range`, 0 to 1.3 by default."""
    grade = grade_number(text, gold)
    parts = {
        "correct": weights.correct * grade.strict,
        "format": weights.format * (parse(text) is not None),
        "tags": weights.tags * tag_share(text),
    }
    return Score(sum(parts.values()), grade.reason, parts)


def reference_reward(text: str, gold: str) -> Score:
    """The published four, exactly as defined; range -2 to 9.5. For comparison only."""
    match, digits = _REFERENCE.search(text), _REFERENCE_NUMBER.search(text)
    parts = {
        "format_exact": 3.0 if match else 0.0,
        "format_approximate": sum(0.5 if text.count(tag) == 1 else -0.5 for tag in TAGS),
        "answer": _reference_answer(match[1], gold) if match else 0.0,
        "number": 1.5 if digits and _float(digits[1]) == _float(gold) is not None else 0.0,
    }
    return Score(sum(parts.values()), "reference mix", parts)


def _reference_answer(guess: str, gold: str) -> float:
    if guess == gold:
        return 3.0
    if guess.strip() == gold.strip():
        return 1.5
    value, target = _float(guess), _float(gold)
    ratio = value / target if value is not None and target else None
    return -0.5 if ratio is None else 0.5 if 0.9 <= ratio <= 1.1 else 0.25 if 0.8 <= ratio <= 1.2 else -1.0


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
