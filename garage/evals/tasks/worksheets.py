"""Our generated arithmetic worksheets: questions whose rows carry a tagged answer.

The recipe hands over freshly generated rows, or the items come from a dataset artifact or a file of such rows. The question is asked as
the row has it; the gold is the number in the answer block of the row's last message.
"""

from collections.abc import Iterable
from dataclasses import replace

from garage.core.errors import UserError
from garage.core.types import Row
from garage.evals.task import Item, asked, read_items
from garage.rewards.answers import Grade, extract, grade_number, number
from garage.rewards.format import parse
from garage.specs.evals import TaskSpec


class Worksheets:
    """The task over `rows`, or over the rows of the spec's data if none are given."""

    name = "worksheets"
    extraction = "numbers-1: strict = the only answer block; lenient = answer tag, boxed, hashes, answer phrase, last number"

    def __init__(self, rows: Iterable[Row] | None = None) -> None:
        self._rows = None if rows is None else tuple(rows)

    def items(self, spec: TaskSpec) -> list[Item]:
        """Raises UserError where there are no rows, or one has no number in an answer block."""
        if self._rows is None and spec.data is None:
            raise UserError("there are no worksheets to ask", remedy="give --data DATASET")
        rows = self._rows if self._rows is not None else read_items(spec.data, spec.split) if spec.data else ()
        return [_item(row) for row in rows]

    def score(self, text: str, gold: str) -> Grade:
        return replace(grade_number(text, gold), format_ok=parse(text) is not None)


def _item(row: Row) -> Item:
    messages, answer = asked(row)
    gold = extract(answer, strict=True).text or ""
    if number(gold) is None:
        raise UserError(f"row {row.id} has no number in one answer block: {answer[-80:]!r}", remedy="use --task custom for free answers")
    return Item(row.id, messages, gold)
