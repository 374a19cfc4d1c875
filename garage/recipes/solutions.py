"""Worked solutions on their way into a dataset: calculator marks cleaned, and the tagged form that the GSM8K recipes train.

GSM8K's answers hold marks such as `48/2 = <<48/2=24>>24` and end in `#### 24`. A pretrained model gains nothing from the marks, and a model
that is to answer in tags must be shown tags:

    question    the instruction of the GSM8K task, an empty line, the question; so that it is asked as it will be measured
    answer      <reasoning>, the solution, </reasoning>, <answer>, the number, </answer>, each on a line of its own

A row whose marks do not add up is kept, counted and named. A row that cannot be written in the tagged form is counted and left out.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from garage.core.types import Message, Row
from garage.evals.tasks.gsm8k import INSTRUCTION
from garage.rewards.answers import check_marks, number, without_marks
from garage.rewards.format import parse, tagged
from garage.specs.datasets import MapSpec


class Solutions:
    """Rows as `spec` wants them. `counts` and `wrong` (ids of rows with a mark that does not hold) are of the latest pass."""

    def __init__(self, rows: Iterable[Row], spec: MapSpec) -> None:
        self._rows, self._marks, self._form = rows, spec.marks, spec.form
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        self.counts, self.wrong = Counter(), []
        for row in self._rows:
            cleaned = row if self._marks == "keep" else self._cleaned(row)
            made = cleaned if self._form == "as_is" else in_tags(cleaned)
            self.counts["tagged" if made else "without a solution"] += self._form == "tags"
            yield from [made] if made else []

    def _cleaned(self, row: Row) -> Row:
        """The row without its marks; what the assistant says, and plain text."""
        texts = [row.text, row.rejected, *(message.content for message in row.messages if message.role == "assistant")]
        marks = [mark for text in texts for mark in check_marks(text) if mark.expression]
        if not marks:
            return row
        self.counts.update({"rows with marks": 1, "marks": len(marks)})
        if not all(mark.holds for mark in marks):
            self.wrong.append(row.id)
        said = tuple(replace(m, content=self._text(m.content)) if m.role == "assistant" else m for m in row.messages)
        return replace(row, messages=said, text=self._text(row.text), rejected=self._text(row.rejected))

    def _text(self, text: str) -> str:
        return without_marks(text, brackets=self._marks == "brackets")


def in_tags(row: Row) -> Row | None:
    """A question and a solution that ends in `#### number`, in the tagged form; None for anything else."""
    if row.rejected or len(row.messages) < 2 or [message.role for message in row.messages[-2:]] != ["user", "assistant"]:
        return None
    *before, asked, answer = row.messages
    solution, _, gold = answer.content.partition("####")
    value = number(gold)
    if value is None:
        return None
    plain = str(value) if value.denominator == 1 else gold.strip()
    form = tagged(solution.strip(), plain)
    if parse(form) is None:
        return None
    turns = (*before, Message("user", f"{INSTRUCTION}\n\n{asked.content}"), replace(answer, content=form))
    return replace(row, messages=turns, meta={**row.meta, "answer": plain})
