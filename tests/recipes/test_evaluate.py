"""What an evaluation asks: the same rows whatever the form of the file, and none of a damaged one."""

import json
from pathlib import Path

import pytest

from garage.core.artifact import writing
from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.recipes.evaluate import rows_of
from garage.specs.evals import TaskSpec
from garage.store.dataset import write_rows

PAIRS = [("Capital of France?", "Paris"), ("9 * 2?", "18")]


def spec_of(data: Path, **options: object) -> TaskSpec:
    return TaskSpec.parse({"task": "custom", "data": data, **options})


def turns(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def test_every_form_asks_the_same(tmp_path: Path) -> None:
    lines, table, place = tmp_path / "a.jsonl", tmp_path / "b.csv", tmp_path / "dataset"
    lines.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS))
    table.write_text('question,answer\n"Capital of France?",Paris\n9 * 2?,18\n')
    with writing(place, kind="dataset") as draft:
        write_rows(draft.path, "test", [Row(q, turns(q, a)) for q, a in PAIRS])
    for path in (lines, table, place):
        assert [row.messages for row in rows_of(spec_of(path))] == [turns(q, a) for q, a in PAIRS]
    with pytest.raises(UserError, match="no split 'eval'"):
        rows_of(spec_of(place, split="eval"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"q": 1}\n', "no known format"),
        ('{"question": "q", "answer": "a"}\n{"ques', "line 2"),
        ('{"question": "q", "answer": "a"}\n{"question": "q"}\n', "line 2: has no answer"),
        ("\xff", "no usable row"),
        ('{"messages": 3}', "x.jsonl"),
    ],
)
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        rows_of(spec_of(path))


def test_worksheets_are_made_when_none_are_given() -> None:
    made = rows_of(TaskSpec.parse({"task": "worksheets", "limit": 5}))
    assert len(made) == 5 and made == rows_of(TaskSpec.parse({"task": "worksheets", "limit": 5}))
