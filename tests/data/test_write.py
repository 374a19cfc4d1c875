"""Files for other programs: complete or absent, and read back as they were."""

import json
from pathlib import Path

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data.formats import from_rows
from garage.data.read import read_dataset
from garage.data.write import BATCH, write_objects

ROWS = [Row(f"rows-{n}", (Message("user", f"{n}?"), Message("assistant", f"é{n}"))) for n in range(1, 8)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("format", ["messages", "alpaca", "sharegpt", "question/answer"])
def test_what_is_written_is_read_again(tmp_path: Path, kind: str, format: str) -> None:
    path = tmp_path / f"deep/rows.{kind}"
    assert write_objects(from_rows(ROWS, format), path, kind) == len(ROWS)
    reading = read_dataset(path)
    assert [row.messages for row in reading] == [row.messages for row in ROWS] and not reading.faults


def test_a_file_is_not_written_over_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def broken():
        yield {"question": "q", "answer": "a"}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_objects(broken(), path, "jsonl")
    assert list(tmp_path.iterdir()) == []
    write_objects([{"question": "q", "answer": "a"}], path, "jsonl")
    with pytest.raises(UserError, match="exists already"):
        write_objects([], path, "jsonl")
    assert json.loads(path.read_text()) == {"question": "q", "answer": "a"}


def test_parquet_wants_the_same_columns_in_every_row(tmp_path: Path) -> None:
    objects = [{"a": 1}] * BATCH + [{"a": "text"}]
    with pytest.raises(UserError, match="one table"):
        write_objects(objects, tmp_path / "x.parquet", "parquet")
    assert list(tmp_path.iterdir()) == []
    assert write_objects([{"a": 1}] * (2 * BATCH + 1), tmp_path / "x.parquet", "parquet") == 2 * BATCH + 1
