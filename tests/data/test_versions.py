"""Editing: the next version of a dataset, or one clear reason why there is none."""

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data.versions import apply_changes


def row(id: str, question: str, answer: str) -> Row:
    return Row(id, (Message("user", question), Message("assistant", answer)))


ROWS = (row("a", "1 + 1?", "2"), row("b", "1 + 2?", "4"), Row("t", text="Once."))


def edited(*changes: dict[str, object]) -> tuple[Row, ...]:
    return apply_changes(ROWS, list(enumerate(changes, start=1))).rows


def test_rows_are_added_changed_deleted_and_rated() -> None:
    changes = [{"change": "b", "answer": "3", "system": "Be brief."}, {"delete": "a"}, {"rate": "t", "rating": 7.5},
               {"add": {"id": "c", "question": "2 + 2?", "answer": "4"}}, {"change": "t", "text": "Twice."}]  # fmt: skip
    after = apply_changes(ROWS, list(enumerate(changes, start=1)))
    assert [r.id for r in after.rows] == ["b", "t", "c"] and after.counts == {"changed": 2, "deleted": 1, "rated": 1, "added": 1}
    assert [m.content for m in after.rows[0].messages] == ["Be brief.", "1 + 2?", "3"]
    assert after.rows[1] == Row("t", text="Twice.", meta={"rating": "7.5"}) and after.rows[2].messages == row("c", "2 + 2?", "4").messages
    assert ROWS[1].messages[1].content == "4", "the old version is as it was"


def test_only_the_last_turn_of_a_conversation_changes() -> None:
    long = Row("m", (*ROWS[0].messages, *ROWS[1].messages))
    (after,) = apply_changes((long,), [(1, {"change": "m", "answer": "3"})]).rows
    assert [m.content for m in after.messages] == ["1 + 1?", "2", "1 + 2?", "3"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"delete": "z"}, "there is no row 'z'"),
        ({"change": "z", "answer": "1"}, "there is no row 'z'"),
        ({"change": "a", "id": "b"}, "a row's id cannot be changed"),
        ({"change": "a", "answer": " "}, "answer is no text"),
        ({"change": "t", "answer": "1"}, "it has no assistant turn"),
        ({"rate": "a", "rating": 11}, "from 0 to 10"),
        ({"rate": "a", "rating": float("nan")}, "from 0 to 10"),
        ({"add": {"id": "a", "question": "q", "answer": "x"}}, "a row 'a' already"),
        ({"add": {"question": "q", "answer": ""}}, "empty|blank|no "),
        ({"add": 3}, "no JSON object"),
        ({"swap": "a"}, "begins with one of"),
    ],
)
def test_a_wrong_change_is_named_by_its_line(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        edited({"rate": "a", "rating": 1}, change)
    assert "line 2" in str(refused.value) and refused.value.remedy


def test_rows_that_share_an_id_are_refused_and_not_lost() -> None:
    with pytest.raises(UserError, match="two rows have the id 'a'"):
        apply_changes((*ROWS, row("a", "2 + 2?", "4")), [(1, {"delete": "b"})])


def test_a_row_deleted_twice_is_an_error() -> None:
    with pytest.raises(UserError, match="line 2"):
        edited({"delete": "a"}, {"delete": "a"})
