"""The tasks: prompts as published, golds normalised, files refused in words."""

import hashlib
import os
from itertools import islice
from pathlib import Path

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data.read import read_dataset
from garage.data.worksheets import problems, row_of
from garage.evals.tasks.catalogue import TASKS
from garage.evals.tasks.custom import Custom
from garage.evals.tasks.gsm8k import INSTRUCTION, REFERENCE, TEST_ROWS, Gsm8k, gold_of
from garage.evals.tasks.worksheets import Worksheets
from garage.rewards.answers import check_marks
from garage.specs.evals import TaskSpec

SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).parents[2] / "../shared")).resolve()


def spec_of(task: str, **options: object) -> TaskSpec:
    return TaskSpec.parse({"task": task, "data": None if task == "worksheets" else "rows.jsonl", **options})


def row(id: str, question: str, answer: str) -> Row:
    return Row(id, (Message("user", question), Message("assistant", answer)))


def test_the_prompt_is_the_published_one(sums: list[Row]) -> None:
    item = Gsm8k().items(sums, spec_of("gsm8k", split="dev"))[3]
    assert item.messages == (Message("user", INSTRUCTION + "\n\n3 + 7"),) and item.gold == "10" and item.id == "gsm8k-0003"
    assert INSTRUCTION == (
        "You are given a problem. Think about the problem and provide your reasoning. Place it between <reasoning> and </reasoning>. "
        "Then, provide the final answer (i.e., just one numerical value) between <answer> and </answer>."
    )


def test_golds_keep_their_sign_and_lose_their_separators() -> None:
    assert [gold_of(f"so\n#### {text}") for text in ("18", "2,125", "-10", " 0 ", "$1,000,000")] == ["18", "2125", "-10", "0", "1000000"]
    with pytest.raises(UserError, match="no number after ####"):
        gold_of("#### eighteen")


def test_the_reference_questions() -> None:
    published = "2e2c5cf5b6c43f07fabd5c485353d5eae5a309a1cd1085689d549e9aaca272b0"
    assert hashlib.sha256(",".join(map(str, REFERENCE)).encode()).hexdigest() == published
    assert len(set(REFERENCE)) == 400 and sum(place > 999 for place in REFERENCE) == 89


def test_a_part_of_the_test_file_is_not_the_test_split(sums: list[Row]) -> None:
    for split in ("test", "reference"):
        with pytest.raises(UserError, match=r"150 rows; GSM8K's test split has 1319"):
            Gsm8k().items(sums, spec_of("gsm8k", split=split))
    with pytest.raises(UserError, match="no split 'train'"):
        Gsm8k().items(sums, spec_of("gsm8k", split="train"))
    assert len(Gsm8k().items(sums, spec_of("gsm8k", limit=150))) == 150
    whole = [row(str(k), str(k), f"#### {k}") for k in range(TEST_ROWS)]
    assert len(Gsm8k().items(whole, spec_of("gsm8k"))) == TEST_ROWS
    assert [int(item.gold) for item in Gsm8k().items(whole, spec_of("gsm8k", split="reference"))] == list(REFERENCE)


def test_the_real_file() -> None:
    path = SHARED / "data" / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("test.jsonl of GSM8K is not in ../shared/data/gsm8k")
    rows = list(read_dataset(path))
    items = Gsm8k().items(rows, spec_of("gsm8k", limit=1000))
    assert items[0].gold == "18" and len(items) in (1000, TEST_ROWS) and any("-" in item.gold for item in items)
    if len(items) == 1000:
        with pytest.raises(UserError, match="1000 rows"):
            Gsm8k().items(rows, spec_of("gsm8k"))


TAGGED = "<reasoning>9 * 2 = 18</reasoning>\n<answer>18</answer>"


def test_worksheets_are_graded_by_their_answer_block() -> None:
    rows = [row("w1", "9 * 2 = ?", TAGGED), row("w2", "1 + 1 = ?", TAGGED.replace("18", "2"))]
    items = Worksheets().items(rows, spec_of("worksheets"))
    assert [(item.id, item.question, item.gold) for item in items] == [("w1", "9 * 2 = ?", "18"), ("w2", "1 + 1 = ?", "2")]
    grade = Worksheets().score(TAGGED, "18")
    assert grade.strict and grade.format_ok and not Worksheets().score("<answer>18", "18").format_ok
    with pytest.raises(UserError, match="no number in one answer block"):
        Worksheets().items([row("w", "q", "18")], spec_of("worksheets"))


def test_generated_worksheets_solve_themselves() -> None:
    rows = [row_of(problem) for problem in islice(problems(0, (1, 2, 3), split="test"), 60)]
    items = Worksheets().items(rows, spec_of("worksheets"))
    solved = [Worksheets().score(row.messages[-1].content, item.gold) for row, item in zip(rows, items, strict=True)]
    assert all(grade.strict and grade.format_ok for grade in solved)
    assert all(mark.holds for row in rows for mark in check_marks(row.messages[-1].content))
    shifted = [Worksheets().score(row.messages[-1].content, item.gold) for row, item in zip(rows, items[1:] + items[:1], strict=True)]
    assert sum(grade.strict for grade in shifted) < 10, "answers to other questions are wrong"


def test_custom_compares_numbers_and_words() -> None:
    items = Custom().items([row("1", "Capital of France?", "Paris"), row("2", "9 * 2?", TAGGED)], spec_of("custom"))
    assert [item.gold for item in items] == ["Paris", "18"]
    assert Custom().score("It is 18.", "18").lenient and Custom().score("paris", "Paris").strict
    assert Custom().score("paris", "Paris").format_ok is None
    with pytest.raises(UserError, match="no question followed by an answer"):
        Custom().items([Row("1", (Message("user", "q"),))], spec_of("custom"))


def test_the_catalogue_has_every_task_of_the_spec() -> None:
    assert list(TASKS) == list(TaskSpec.model_fields["task"].annotation.__args__)
