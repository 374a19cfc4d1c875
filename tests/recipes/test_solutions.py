"""From GSM8K's file to conversations in the strict format with one command; marks that do not add up and rows without a number are said."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from garage.cli import main
from garage.core.types import Message, Row
from garage.evals.tasks.gsm8k import INSTRUCTION
from garage.recipes.solutions import in_tags
from garage.rewards.answers import without_marks
from garage.rewards.format import default_reward, parse, reference_reward
from garage.store.dataset import read_rows

SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / "gsm8k"


def write(place: Path, *rows: tuple[str, str]) -> Path:
    place.write_text("".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows))
    return place


def mapped(capsys, *words: object) -> dict:
    assert main(["dataset", "map", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "stripped", "brackets"),
    [
        ("48/2 = <<48/2=24>>24 clips.", "48/2 = 24 clips.", "48/2 = (48/2=24)24 clips."),
        ("12/60 = $<<12/60=0.2>>0.2", "12/60 = $0.2", "12/60 = $(12/60=0.2)0.2"),
        ("so <<9*500=4500>>4,500", "so 4,500", "so (9*500=4500)4,500"),
        ("that is <<2*3=6>> in all", "that is 6 in all", "that is (2*3=6) in all"),
        ("a << b, and b >> c", "a << b, and b >> c", "a << b, and b >> c"),
    ],
)
def test_marks_are_taken_out_and_no_result_is_lost(text: str, stripped: str, brackets: str) -> None:
    assert without_marks(text) == stripped and without_marks(text, brackets=True) == brackets


def conversation(*said: str) -> Row:
    roles: Sequence = ("user", "assistant")
    return Row("r", tuple(Message(roles[n % 2], text) for n, text in enumerate(said)))


def test_the_tagged_form_is_the_strict_one() -> None:
    made = in_tags(conversation("How many?", "2 + 2 = 4\nTwice.\n#### 1,008"))
    assert made is not None and made.meta["answer"] == "1008"
    assert made.messages[1].content == "<reasoning>\n2 + 2 = 4\nTwice.\n</reasoning>\n<answer>\n1008\n</answer>"
    assert made.messages[0].content == f"{INSTRUCTION}\n\nHow many?"
    assert default_reward(made.messages[1].content, "1008").value == pytest.approx(1.3)
    assert reference_reward(made.messages[1].content, "1008").parts["format_exact"] == 3
    for lacking in ("#### 4", "no number\n#### many", "<answer>4</answer>\n#### 4", "4"):
        assert in_tags(conversation("How many?", lacking)) is None
    assert in_tags(Row("t", text="#### 4")) is None


def test_what_was_cleaned_is_counted_and_what_does_not_add_up_is_said(tmp_path: Path, capsys) -> None:
    rows = write(tmp_path / "rows.jsonl", ("a", "1+1=<<1+1=2>>2 and <<2*2=4>>4\n#### 4"), ("b", "<<3*3=8>>8\n#### 8"), ("c", "five"))
    made = mapped(capsys, rows, "--marks", "strip", "--form", "tags", "--out", tmp_path / "out")
    assert made["rows"] == {"train": 2}
    assert made["counts"] == {"rows with marks": 2, "marks": 3, "tagged": 2, "without a solution": 1}
    assert main(["dataset", "map", str(rows), "--marks", "strip", "--out", str(tmp_path / "again")]) == 0
    assert "1 rows have a calculator mark whose two sides differ (rows-2)" in capsys.readouterr().err
    plain = mapped(capsys, rows, "--out", tmp_path / "plain")
    assert plain["rows"] == {"train": 3} and plain["counts"] == {}
    assert "<<1+1=2>>" in next(read_rows(tmp_path / "plain", "train")).messages[1].content


def test_the_whole_of_gsm8k(tmp_path: Path, capsys) -> None:
    if not (SHARED / "train.jsonl").exists():
        pytest.skip("GSM8K is not in ../shared/data/gsm8k")
    made = mapped(capsys, SHARED / "train.jsonl", "--marks", "strip", "--form", "tags", "--out", tmp_path / "out")
    assert made["rows"] == {"train": 7473} and made["counts"]["tagged"] == 7473 and made["counts"]["rows with marks"] == 7473 - 95
    rows = list(read_rows(tmp_path / "out", "train"))
    first = parse(rows[0].messages[1].content)
    assert first is not None and first.answer == "72" and "48/2 = 24 clips" in first.reasoning
    for row in rows:
        said = row.messages[1].content
        assert "<<" not in said and ">>" not in said and "####" not in said and default_reward(said, row.meta["answer"]).value > 1.29
