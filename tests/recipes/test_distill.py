"""Distillation from the command line: nano learns from a tuned nano; another vocabulary is refused with what differs."""

import json
from pathlib import Path

import pytest

from garage.cli import main
from garage.core.events import read_events
from garage.recipes.distill import same_vocabulary
from garage.store.locate import locate

FIT = "--fit.max_steps 6 --fit.batch_tokens 512 --fit.micro_tokens 512 --fit.max_length 128 --fit.threads 1 --fit.save_every 100".split()  # noqa: SIM905
SHAPE = """
[architecture]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Rows, and a nano that was tuned on them."""
    place = tmp_path_factory.mktemp("distill")
    rows = [{"question": f"What is the number of box {n}?", "answer": f"Box {n} has the number {n * 7 + 3}."} for n in range(80)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft", "nano", "--data", place / "rows.jsonl", "--out", place / "teacher", *FIT, "--fit.optimizer.lr", "3e-3"]
    assert main([str(word) for word in words]) == 0
    return place


def metrics(run: Path, name: str) -> list[float]:
    return [event[name] for event in read_events(run / "events.jsonl") if event["kind"] == "metric" and name in event]


@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_a_student_learns_from_a_tuned_teacher(place: Path, tmp_path: Path, capsys, bits: str) -> None:
    words = ["distill", "nano", "--teacher", place / "teacher", "--data", place / "rows.jsonl", "--out", tmp_path / "run", *FIT]
    words += ["--teacher_quantize", bits, "--mix", "1", "--temperature", "2", "--fit.optimizer.lr", "3e-3", "--json"]
    assert main([*map(str, words), "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["teacher"] == "teacher" and plan["rows"] == 80 and plan["steps"] == 6
    assert main([str(word) for word in words]) == 0
    seen = metrics(tmp_path / "run", "divergence")
    assert len(seen) == 6 and seen[-1] < 0.7 * seen[0] and locate(str(tmp_path / "run")).adapter


def test_another_vocabulary_is_refused_with_what_differs(place: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "spec.toml").write_text("vocab_size = 300" + SHAPE)
    words = ["pretrain", tmp_path / "spec.toml", "--data", place / "rows.jsonl", "--out", tmp_path / "other", *FIT]
    assert main([str(word) for word in words]) == 0
    words = ["distill", "nano", "--teacher", tmp_path / "other", "--data", place / "rows.jsonl", "--out", tmp_path / "run", *FIT]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "ids differ" in said and "here and" in said and "synthesize --teacher" in said and not (tmp_path / "run").exists()
    same_vocabulary(locate("nano"), locate(str(place / "teacher")))
