"""The dataset tools from the command line: new versions beside old ones, and other forms."""

import json
from pathlib import Path

import pytest

from garage.cli import main
from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.data.formats import detect, mapped, to_rows
from garage.export.hub import push
from garage.recipes.reshape import recommended
from garage.store.dataset import read_rows


def garage(capsys, *words: object) -> dict:
    assert main([str(word) for word in (*words, "--json")]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Ninety rows of thirty documents, under columns of another name."""
    path = tmp_path / "rows.jsonl"
    lines = [{"ask": f"What is {n} plus {k}?", "say": str(n + k), "document": f"d{n}"} for n in range(30) for k in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


COLUMNS = ("--columns.prompt", "ask", "--columns.answer", "say")


def test_map_split_edit_and_export(rows: Path, tmp_path: Path, capsys) -> None:
    assert main(["dataset", "map", str(rows)]) == 2 and "no known format" in capsys.readouterr().err
    made = garage(capsys, "dataset", "map", rows, *COLUMNS, "--out", tmp_path / "a")
    assert made["rows"] == {"train": 90} and made["confidence"] == 1.0
    parted = garage(capsys, "dataset", "split", tmp_path / "a", "--out", tmp_path / "b", "--eval_share", "0.1", "--test_share", "0.2")
    assert sum(parted["rows"].values()) + parted["counts"]["copies"] == 90 and min(parted["rows"].values()) >= 3
    documents = {name: {row.meta["document"] for row in read_rows(tmp_path / "b", name)} for name in parted["rows"]}
    assert sum(map(len, documents.values())) == len(set.union(*documents.values())), "a document stands on one side only"
    assert read_manifest(tmp_path / "b").parents == (read_manifest(tmp_path / "a").id,)

    first = next(read_rows(tmp_path / "b", "train"))
    (tmp_path / "changes.jsonl").write_text(json.dumps({"change": first.id, "answer": "none"}) + "\n")
    edited = garage(capsys, "dataset", "edit", tmp_path / "b", tmp_path / "changes.jsonl", "--author", "Ada", "--out", tmp_path / "c")
    assert edited["counts"] == {"changed": 1} and edited["rows"] == parted["rows"]
    assert next(read_rows(tmp_path / "c", "train")).messages[1].content == "none" and next(read_rows(tmp_path / "b", "train")) == first
    facts = read_manifest(tmp_path / "c").facts
    assert (facts["author"], facts["edited"]) == ("Ada", {"changed": 1})
    assert main(["dataset", "edit", str(tmp_path / "b"), "--delete", "nobody", "--out", str(tmp_path / "d")]) == 2
    assert "no row 'nobody'" in capsys.readouterr().err and not (tmp_path / "d").exists()

    refused = (("--config", "en"), ("--revision", "main"), ("--columns.prompt", "ask"))
    assert [main(["dataset", "validate", str(tmp_path / "c"), *option]) for option in refused] == [2, 2, 2], "none is accepted and ignored"
    assert main(["dataset", "export", str(tmp_path / "c"), "--out", str(tmp_path), "--push", "org/name"]) == 2
    assert "would be uploaded" in capsys.readouterr().err
    assert garage(capsys, "dataset", "map", rows, *COLUMNS, "--split", "train[:1%]", "--out", tmp_path / "e")["rows"] == {"train": 90}
    for format, kind in (("alpaca", "jsonl"), ("messages", "parquet")):
        path = tmp_path / f"out.{kind}"
        assert garage(capsys, "dataset", "export", tmp_path / "c", "--format", format, "--out", path)["rows"] == parted["rows"]["train"]
        again = garage(capsys, "dataset", "validate", path)
        assert (again["rows"], again["format"]) == (parted["rows"]["train"], format)


def test_preview_and_stats_write_pages(rows: Path, tmp_path: Path, capsys) -> None:
    shown = garage(capsys, "dataset", "preview", rows, *COLUMNS, "--rows", "2", "--html", tmp_path / "p.html")
    marks = {token["mark"] for tokens in shown["rows"] for token in tokens}
    assert len(shown["rows"]) == 2 and marks == {"learned", "masked", "template"}
    assert any(token["special"] and token["mark"] == "learned" for token in shown["rows"][0]), "the end of the answer is learned"
    short = garage(capsys, "dataset", "preview", rows, *COLUMNS, "--max_length", "8")
    assert "cut" in {token["mark"] for token in short["rows"][0]}
    stats = garage(capsys, "dataset", "stats", rows, *COLUMNS, "--max_length", "12", "--html", tmp_path / "s.html")
    assert stats["report"]["ledger"]["cut_rows"] > 0 and stats["report"]["about"]["languages"][0][0] == "en"
    for name in ("p", "s"):
        page = (tmp_path / f"{name}.html").read_text()
        assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "") and "</html>" in page


def test_a_page_shows_text_as_text(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "<script>alert(1)</script>", "answer": "<b>"}) + "\n")
    garage(capsys, "dataset", "preview", tmp_path / "x.jsonl", "--html", tmp_path / "x.html")
    assert "<script>" not in (tmp_path / "x.html").read_text()


def test_a_dataset_that_stops_a_run_is_allowed_by_name_only(tmp_path: Path, capsys) -> None:
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"question": f"q{n}", "answer": "word " * 80}) + "\n" for n in range(4)))
    words = ["sft", "nano", "--data", tmp_path / "long.jsonl", "--out", tmp_path / "run", "--fit.max_length", "32", "--fit.max_steps", "1",
             "--fit.batch_tokens", "64", "--fit.micro_tokens", "64", "--fit.threads", "1", "--eval_share", "0"]  # fmt: skip
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "cut off" in error and "--allow end,cut" in error
    assert main([str(word) for word in (*words, "--allow", "cut", "--out", tmp_path / "run2")]) == 2
    assert main([str(word) for word in (*words, "--allow", "end,cut", "--out", tmp_path / "run3")]) == 0


def test_every_recommended_dataset_maps_to_rows() -> None:
    uses = recommended()
    assert set(uses) == {"code", "chat", "domain", "creative", "reasoning"}
    assert sum(bool(each.get("first")) for entry in uses.values() for each in entry["sets"]) == 5
    for each in (each for entry in uses.values() for each in entry["sets"]):
        assert each["licence"] and each["about"]
        found = mapped(each["columns"], [each["sample"]], each["id"]) if "columns" in each else detect([each["sample"]], each["id"])
        assert to_rows(found, each["sample"], id="1", source=each["id"])


def test_a_push_without_the_hub_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no name|no Hub login|cannot be reached|refuses"):
        push(tmp_path, "bad name/x y", kind="dataset")
