"""Datasets of the Hub: a folder in its layout streams as rows, and every refusal says what to do."""

import json

import pytest

from garage.core.errors import UserError
from garage.data.hub import open_hub

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    from pyarrow import Table, parquet

    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, count in (("train", 25), ("test", 3)):
        rows = [{"question": f"{split} {n}", "answer": str(n)} for n in range(count)]
        parquet.write_table(Table.from_pylist(rows), tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "set"


def test_a_folder_in_hub_layout_streams_its_splits(folder):
    rows = list(open_hub(str(folder)))
    assert [line for line, _ in rows] == list(range(1, 26)) and rows[0][1] == {"question": "train 0", "answer": "0"}
    assert len(list(open_hub(str(folder), split="test"))) == 3
    assert [row["answer"] for _, row in open_hub(str(folder), limit=2)] == ["0", "1"]


def test_json_lines_and_configurations(tmp_path):
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(2)))
    card = "---\nconfigs:\n- config_name: small\n  data_files: small/*.jsonl\n- config_name: large\n  data_files: large/*.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert [row["text"] for _, row in open_hub(str(tmp_path), config="large")] == ["large 0", "large 1"]
    with pytest.raises(UserError, match="small") as caught:
        list(open_hub(str(tmp_path)))
    assert "config" in caught.value.remedy


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), "ask for access"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."), "check the name"),
        (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "refs/convert/parquet"),
        (ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)"), "check the connection"),
        (ValueError("Bad split: dev. Available splits: ['train']"), "with split"),
        (KeyError("odd"), "check the name"),
    ],
)
def test_every_refusal_says_what_to_do(monkeypatch, error, remedy):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="o/n") as caught:
        list(open_hub("o/n"))
    assert remedy in caught.value.remedy


def test_a_script_is_refused_and_never_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="scripts") as caught:
        list(open_hub(str(tmp_path / "set")))
    assert "Parquet" in caught.value.remedy and not (tmp_path / "ran").exists()


def test_a_wrong_split_names_those_that_are_there(folder):
    with pytest.raises(UserError, match=r"train.*test") as caught:
        list(open_hub(str(folder), split="dev"))
    assert "split" in caught.value.remedy


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Three times the rows, no more memory: the library reads 10 MB at a time, and rows are handed on one by one."""
    import tracemalloc

    peaks = []
    for count in (25_000, 75_000):
        (tmp_path / str(count)).mkdir()
        (tmp_path / str(count) / "train.jsonl").write_text("".join(json.dumps({"text": "x" * 500 + str(n)}) + "\n" for n in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in open_hub(str(tmp_path / str(count)))) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks
