"""Our generated arithmetic worksheets: questions whose rows carry a tagged answer.

The question is asked as the row has it; the gold is the number in the answer block of the row's last message.
"""

from collections.abc import Sequence
from dataclasses import replace

from garage.core.errors import UserError
from garage.core.types import Row
from garage.evals.task import Item, asked
from garage.rewards.answers import Grade, extract, grade_number, number
from garage.rewards.format import parse
from garage.specs.evals import TaskSpec


class Worksheets:
    """Items are worksheets: freshly generated, or rows of a dataset."""

    name = "worksheets"
    extraction = "numbers-1: strict = the only answer block; lenient = answer tag, boxed, hashes, answer phrase, last number"

    def items(self, rows: Sequence[Row], spec: TaskSpec) -> list[Item]:
        """Raises UserError where a row has no number in an answer block."""
        return [_item(row) for row in rows]

    def score(self, text: str, gold: str) -> Grade:
        return replace(grade_number(text, gold), format_ok=parse(text) is not None)


def _item(row: Row) -> Item:
    messages, answer = asked(row)
    gold = extract(answer, strict=True).text or ""
    if number(gold) is None:
        raise UserError(f"row {row.id} has no number in one answer block: {answer[-80:]!r}", remedy="use --task custom for free answers")
    return Item(row.id, messages, gold)
