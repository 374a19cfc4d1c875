"""Preferences from a file to an adapter, and the warning that the better answers are being forgotten."""

import json
from pathlib import Path

import numpy as np
import pytest

from garage.cli import main
from garage.core.events import EventLog, read_events
from garage.core.types import Message, Row
from garage.data.encode import Encoding, encode_row
from garage.recipes.dpo import Watch
from garage.recipes.run import Run
from garage.store.locate import locate
from garage.tokens.voice import Voice
from garage.train.objectives.preference import Preference

FIT = "--fit.max_steps 12 --fit.batch_tokens 512 --fit.micro_tokens 512 --fit.max_length 128 --fit.threads 1 --fit.save_every 100".split()  # noqa: SIM905


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    better = "It is {m}, because {n} + {n} = {m}."
    rows = [{"prompt": f"What is {n} plus {n}?", "chosen": better.format(n=n, m=n + n), "rejected": "No."} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(run: Path) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event["kind"] == "metric" and "margin" in event]


def test_pairs_become_an_adapter(pairs: Path, tmp_path: Path, capsys) -> None:
    settings = ["--fit.optimizer.lr", "1e-3", "--preference.rpo", "1", "--json"]
    words = ["dpo", "nano", "--data", pairs, "--out", tmp_path / "run", *FIT, *settings]
    assert main([str(word) for word in words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seen = metrics(tmp_path / "run")
    assert seen[0]["margin"] == pytest.approx(0, abs=0.03) and seen[-1]["margin"] > 0.1 and seen[-1]["chosen_change"] > 0
    assert (Path(result["checkpoint"]) / "adapter_config.json").exists() and locate(str(tmp_path / "run")).adapter


def test_it_says_once_that_the_better_answers_are_forgotten(tmp_path: Path) -> None:
    for changes, count in (([-1.0] * 9, 0), ([-1.0] * 30, 1), (([-1.0] * 9 + [1.0]) * 3, 0), ([1.0] * 5 + [-0.1] * 10, 1)):
        said: list[dict] = []
        run = Run(tmp_path, EventLog(None, said.append))
        run.events.listen(Watch(run))
        for change in changes:
            run.events.emit("metric", chosen_change=change)
        assert sum(event["kind"] == "warning" for event in said) == count


def test_a_run_is_watched(pairs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    real = Preference.metrics
    monkeypatch.setattr(Preference, "metrics", lambda self: real(self) | {"chosen_change": -1.0})
    assert main([str(word) for word in ["dpo", "nano", "--data", pairs, "--out", tmp_path / "run", *FIT]]) == 0
    said = [event for event in read_events(tmp_path / "run" / "events.jsonl") if "become less likely" in str(event.get("message"))]
    assert len(said) == 1, "twelve steps, said at the tenth"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "q", "answer": "a"}], "no better and worse answer"),
        ([{"prompt": "q", "chosen": "same", "rejected": "same"}], "no better and worse answer"),
        ([{"prompt": "q", "chosen": "word " * 200, "rejected": "b"}], "longer than max_length"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(rows, says, tmp_path: Path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(word) for word in ["dpo", "nano", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run", *FIT]]) == 2
    assert says in capsys.readouterr().err


def test_only_the_last_answer_is_learned_and_a_long_prompt_loses_its_beginning() -> None:
    voice = Voice.load(locate("nano").newest)
    earlier = (Message("user", "Once. " * 60), Message("assistant", "Noted."), Message("user", "Now?"))
    row = Row("r", (*earlier, Message("assistant", "Yes.")), rejected="No, never.")
    how = Encoding(voice.tokenizer, voice.chat, 64, pairs=True)
    (better, worse), ledger = encode_row(row, how)
    said = [voice.tokenizer.decode(ids[flags > 0].tolist()).strip() for ids, flags in (better, worse)]
    assert said == ["Yes.", "No, never."] and ledger.cut_rows == 1 and ledger.cut_answer_tokens == 0
    assert max(len(better[0]), len(worse[0])) == 64 and "Now?" in voice.tokenizer.decode(better[0].tolist())
    start = len(better[0]) - np.flatnonzero(better[1])[0]
    whole = encode_row(row, Encoding(voice.tokenizer, voice.chat, 4096, pairs=True))[0][0]
    assert (whole[0][-start:] == better[0][-start:]).all(), "the answer is whole"
