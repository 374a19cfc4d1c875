"""Datasets on disk: line numbers of faults, the rest usable, bounded memory, hostile bytes."""

import json
import sys
import tracemalloc

import pytest

from garage.core.artifact import writing
from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data import read
from garage.data.read import read_dataset
from garage.store.corpus import Document, write_corpus
from garage.store.dataset import write_rows

GOOD = '{"question": "a?", "answer": "b"}'


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_faults_have_line_numbers_and_the_rest_is_usable(tmp_path):
    lines = [GOOD, '{"question": "a?"', "", '{"question": "", "answer": "b"}', '{"question": "c?"}', "[1]",
             '{"question": NaN, "answer": 1}', GOOD,
             '{"question": "a", "question": "b", "answer": "c"}', '{"question": "\\ud800", "answer": "c"}', "[" * 100_000,
             '{"question": ' + "9" * 5000 + ', "answer": "x"}']  # fmt: skip
    reading = read_dataset(write(tmp_path / "d.jsonl", "\n".join(lines)))
    rows = list(reading)
    assert [row.source for row in rows] == ["d.jsonl:1", "d.jsonl:8"]
    assert [(fault.line, fault.kind) for fault in reading.faults] == [
        (2, "unparsable"), (4, "empty"), (5, "missing"), (6, "unparsable"), (7, "unparsable"), (9, "unparsable"), (10, "unparsable"),
        (11, "unparsable"), (12, "unparsable")]  # fmt: skip
    said = {fault.line: fault.message for fault in reading.faults}
    assert "NaN" in said[7] and "'question' stands twice" in said[9] and "surrogate" in said[10] and "deep" in said[11]
    assert reading.counts == {"rows": 2, "unparsable": 7, "empty": 1, "missing": 1, "blank": 1}
    assert len(list(reading)) == 2 and len(reading.faults) == 9, "a second pass starts anew"


def test_json_lists_values_and_damage(tmp_path):
    good = read_dataset(write(tmp_path / "a.json", json.dumps([json.loads(GOOD)] * 3, indent=1)))
    assert [row.id for row in good] == ["a-2", "a-6", "a-10"]
    lines = read_dataset(write(tmp_path / "b.json", GOOD + "\n" + GOOD))
    assert len(list(lines)) == 2, "JSON Lines in a .json file"
    cut = read_dataset(write(tmp_path / "c.json", "[\n" + GOOD + ",\n{\"question\": \"x"))
    assert len(list(cut)) == 1
    assert [(fault.line, fault.kind) for fault in cut.faults] == [(3, "unparsable")] and "lost" in cut.faults[0].message


def test_csv_in_the_forms_that_programs_write(tmp_path):
    comma = read_dataset(write(tmp_path / "a.csv", 'question,answer\n"a, b?","line 1\nline 2"\nonly one\nx,y\n'))
    rows = list(comma)
    assert [row.messages[1].content for row in rows] == ["line 1\nline 2", "y"]
    assert [(fault.line, fault.message) for fault in comma.faults] == [(4, "1 cells under a header of 2")]
    semicolon = read_dataset(write(tmp_path / "b.csv", "\ufefffrage;antwort\nä;ö\n"), columns={"prompt": "frage", "answer": "antwort"})
    assert [row.messages[0].content for row in semicolon] == ["ä"]
    utf16 = read_dataset(write(tmp_path / "c.csv", "question\tanswer\na\tb\n".encode("utf-16")))
    assert len(list(utf16)) == 1


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b"", "no usable row; it is empty"),
        ("a.jsonl", b"not json\n", "line 1"),
        ("a.jsonl", b"\x00\x01\x02", "zero byte at position 0"),
        ("a.csv", b"question,answer\n", "it is empty"),
        ("a.json", b"   ", "is empty"),
        ("a.txt", b"caf\xe9", "byte 0xe9 at position 3"),
        ("a.parquet", b"PAR1", "no whole Parquet file"),
        ("a.xyz", b"x", "no known dataset type"),
        ("a.jsonl", b'{"size": 1}', "columns size"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path, name, data, says):
    with pytest.raises(UserError, match=says):
        read_dataset(write(tmp_path / name, data))


def test_windows_1252_lines_are_faults_that_name_the_byte(tmp_path):
    reading = read_dataset(write(tmp_path / "a.jsonl", GOOD.encode() + b'\n{"question": "caf\xe9", "answer": "b"}\n'))
    assert len(list(reading)) == 1 and "byte 0xe9 at character 17" in reading.faults[0].message


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="no dataset"):
        read_dataset(tmp_path / "none.jsonl")


def test_a_line_without_end_is_one_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_LINE", 1000)
    reading = read_dataset(write(tmp_path / "a.jsonl", f"{GOOD}\n{'x' * 5000}\n{GOOD}\n"))
    assert [row.source for row in reading] == ["a.jsonl:1", "a.jsonl:3"]
    assert [(fault.line, fault.kind) for fault in reading.faults] == [(2, "unparsable")]


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(rows):
        path = write(tmp_path / "big.jsonl", (json.dumps({"question": "q" * 500, "answer": "a" * 500}) + "\n") * rows)
        tracemalloc.start()
        count = sum(1 for _ in read_dataset(path))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == rows
        return used

    assert peak(8000) < peak(800) + 300_000


def test_artifacts_are_datasets_too(tmp_path):
    row = Row("1", (Message("user", "a"), Message("assistant", "b")), source="doc")
    with writing(tmp_path / "d", kind="dataset") as draft:
        write_rows(draft.path, "train", [row])
        write_rows(draft.path, "test", [row, row])
    assert list(read_dataset(tmp_path / "d")) == [row] and len(list(read_dataset(tmp_path / "d", split="test"))) == 2
    write_corpus(tmp_path / "c", [(Document("x1", "a.txt", "txt", 5), "Hello")], [], [], spec={})
    assert [(row.text, row.source) for row in read_dataset(tmp_path / "c")] == [("Hello", "x1")]


def test_the_shared_gsm8k_reads_whole(shared):
    reading = read_dataset(shared / "gsm8k" / "train.jsonl")
    assert sum(1 for _ in reading) == 7473 and reading.format == "question/answer" and not reading.faults


def test_parquet_is_read_in_batches_like_any_other_dataset(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}], "n": n} for n in range(1000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    reading = read_dataset(tmp_path / "a.parquet")
    found = list(reading)
    assert reading.format == "messages" and reading.counts == {"rows": 1000} and len(list(reading)) == 1000
    assert (found[999].messages[1].content, found[999].source, found[999].meta["n"]) == ("a999", "a.parquet:1000", "999")


def test_without_the_extra_parquet_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as caught:
        read_dataset(tmp_path / "a.parquet")
    assert "llm-garage[data]" in caught.value.remedy
