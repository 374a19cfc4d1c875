"""Questions and answers of your own, judged as numbers or as text.

A gold that is nothing but a number is compared as a number, any other as words. No format is asked for, so none is scored. An answer in
one answer block counts as the answer; without a block the whole completion does. Strict: it equals gold (case, articles, punctuation and
white space aside). Lenient: gold's words stand in it, in order and unbroken. Long golds are rarely met word for word by either rule.
"""

from collections.abc import Sequence

from garage.core.types import Row
from garage.evals.task import Item, asked
from garage.rewards.answers import Grade, extract, grade_text
from garage.specs.evals import TaskSpec


class Custom:
    """Items from question/answer or canonical rows; the gold of a tagged answer is the text of its answer block."""

    name = "custom"
    extraction = "text-1: strict = same number or words; lenient = gold within the answer, or the number cascade"

    def items(self, rows: Sequence[Row], spec: TaskSpec) -> list[Item]:
        pairs = [(row.id, *asked(row)) for row in rows]
        return [Item(id, messages, extract(answer, strict=True).text or answer.strip()) for id, messages, answer in pairs]

    def score(self, text: str, gold: str) -> Grade:
        return grade_text(text, gold)
