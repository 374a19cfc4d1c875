"""The tasks: prompts as published, golds normalised, files refused in words."""

import hashlib
import json
import os
from itertools import islice
from pathlib import Path

import pytest

from garage.core.artifact import writing
from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data.worksheets import problems, row_of
from garage.evals.tasks.catalogue import TASKS, task_named
from garage.evals.tasks.custom import Custom
from garage.evals.tasks.gsm8k import INSTRUCTION, REFERENCE, TEST_ROWS, Gsm8k, gold_of
from garage.evals.tasks.worksheets import Worksheets
from garage.rewards.answers import check_marks
from garage.specs.evals import TaskSpec
from garage.store.dataset import write_rows

SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).parents[2] / "../shared")).resolve()


def spec_of(task: str, data: Path | None = None, **options: object) -> TaskSpec:
    return TaskSpec.parse({"task": task, "data": data, **options})


def lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def row(id: str, question: str, answer: str) -> Row:
    return Row(id, (Message("user", question), Message("assistant", answer)))


def test_the_prompt_is_the_published_one(sums: Path) -> None:
    item = Gsm8k().items(spec_of("gsm8k", sums, split="dev"))[3]
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


def test_a_part_of_the_test_file_is_not_the_test_split(sums: Path, tmp_path: Path) -> None:
    for split in ("test", "reference"):
        with pytest.raises(UserError, match=r"150 rows; GSM8K's test split has 1319"):
            Gsm8k().items(spec_of("gsm8k", sums, split=split))
    with pytest.raises(UserError, match="no split 'train'"):
        Gsm8k().items(spec_of("gsm8k", sums, split="train"))
    assert len(Gsm8k().items(spec_of("gsm8k", sums, limit=150))) == 150
    whole = lines(tmp_path / "whole.jsonl", [{"question": str(k), "answer": f"#### {k}"} for k in range(TEST_ROWS)])
    assert len(Gsm8k().items(spec_of("gsm8k", whole))) == TEST_ROWS
    assert [int(item.gold) for item in Gsm8k().items(spec_of("gsm8k", whole, split="reference"))] == list(REFERENCE)


def test_the_real_file() -> None:
    path = SHARED / "data" / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("test.jsonl of GSM8K is not in ../shared/data/gsm8k")
    items = Gsm8k().items(spec_of("gsm8k", path, limit=1000))
    assert items[0].gold == "18" and len(items) in (1000, TEST_ROWS) and any("-" in item.gold for item in items)
    if len(items) == 1000:
        with pytest.raises(UserError, match="1000 rows"):
            Gsm8k().items(spec_of("gsm8k", path))


TAGGED = "<reasoning>9 * 2 = 18</reasoning>\n<answer>18</answer>"


def test_worksheets_from_rows_and_from_a_dataset(tmp_path: Path) -> None:
    rows = [row("w1", "9 * 2 = ?", TAGGED), row("w2", "1 + 1 = ?", TAGGED.replace("18", "2"))]
    given = Worksheets(iter(rows)).items(spec_of("worksheets"))
    with writing(tmp_path / "d", kind="dataset") as draft:
        write_rows(draft.path, "eval", rows)
    assert given == Worksheets().items(spec_of("worksheets", tmp_path / "d", split="eval"))
    assert [(item.id, item.question, item.gold) for item in given] == [("w1", "9 * 2 = ?", "18"), ("w2", "1 + 1 = ?", "2")]
    grade = Worksheets().score(TAGGED, "18")
    assert grade.strict and grade.format_ok and not Worksheets().score("<answer>18", "18").format_ok
    with pytest.raises(UserError, match="no split 'test'"):
        Worksheets().items(spec_of("worksheets", tmp_path / "d"))
    with pytest.raises(UserError, match="no worksheets"):
        Worksheets().items(spec_of("worksheets"))
    with pytest.raises(UserError, match="no number in one answer block"):
        Worksheets([row("w", "q", "18")]).items(spec_of("worksheets"))


def test_generated_worksheets_solve_themselves() -> None:
    rows = [row_of(problem) for problem in islice(problems(0, (1, 2, 3), split="test"), 60)]
    items = Worksheets(rows).items(spec_of("worksheets"))
    solved = [Worksheets().score(row.messages[-1].content, item.gold) for row, item in zip(rows, items, strict=True)]
    assert all(grade.strict and grade.format_ok for grade in solved)
    assert all(mark.holds for row in rows for mark in check_marks(row.messages[-1].content))
    shifted = [Worksheets().score(row.messages[-1].content, item.gold) for row, item in zip(rows, items[1:] + items[:1], strict=True)]
    assert sum(grade.strict for grade in shifted) < 10, "answers to other questions are wrong"


def test_custom_reads_every_form_alike(tmp_path: Path) -> None:
    pairs = [("Capital of France?", "Paris"), ("9 * 2?", "18")]
    jsonl = lines(tmp_path / "a.jsonl", [{"question": q, "answer": a} for q, a in pairs])
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    canonical = lines(tmp_path / "b.jsonl", [{"messages": messages} for messages in turns])
    table = tmp_path / "c.csv"
    table.write_text('question,answer\n"Capital of France?",Paris\n9 * 2?,18\n', encoding="utf-8")
    with writing(tmp_path / "d", kind="dataset") as draft:
        write_rows(draft.path, "test", [row(str(k), q, a) for k, (q, a) in enumerate(pairs, start=1)])
    read = [Custom().items(spec_of("custom", path)) for path in (jsonl, canonical, table, tmp_path / "d")]
    assert read[0] == read[1] == read[2] == read[3] and [item.gold for item in read[0]] == ["Paris", "18"]
    assert Custom().score("It is 18.", "18").lenient and Custom().score("paris", "Paris").strict
    assert Custom().score("paris", "Paris").format_ok is None


NOT_ITEMS = [
    ('{"q": 1}\n', "x.jsonl:1 has no text fields"),
    ('{"question": "q", "answer": "a"}\n{"ques', "line 2"),
    ("\xff", "cannot be read as items"),
    ('{"messages": [{"role": "user", "content": "q"}]}', "no question followed by an answer"),
    ('{"messages": 3}', "cannot be read as items"),
]


@pytest.mark.parametrize(("text", "words"), NOT_ITEMS)
def test_files_that_are_not_items_are_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        Custom().items(spec_of("custom", path))


def test_the_catalogue_has_every_task_of_the_spec(tmp_path: Path) -> None:
    assert [task_named(name).name for name in TASKS] == list(TASKS) == list(TaskSpec.model_fields["task"].annotation.__args__)
    with pytest.raises(UserError, match="there is no file"):
        Custom().items(spec_of("custom", tmp_path / "none.jsonl"))
