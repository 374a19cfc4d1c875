"""The report on disk: what is written reads back, what is damaged is refused, what was answered survives a crash."""

import json
from pathlib import Path

import pytest

from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.store.report import Answered, AnswerLog, EvalProtocol, Report, read_report, write_report

PROTOCOL = EvalProtocol(1, "custom", "i", "t", "rules", 256, 0.0, 0)


def answered(id: str) -> Answered:
    return Answered(id, "q\u2028 \u20ac", "g", "out\nput\x85", "e", "rule", True, True, True, None, 3, "stop", "right")


REPORT = Report(
    "custom", "m", 2, 1.0, (0.34, 1.0), 1.0, (0.34, 1.0), 1.0, None, 0.0, 0, 3.0, PROTOCOL, (answered("a"), answered("b"))
)


def test_a_report_reads_back_equal(tmp_path: Path) -> None:
    write_report(tmp_path / "r", REPORT, parents=["model-1"], spec={"task": "custom"})
    assert read_report(tmp_path / "r") == REPORT
    manifest = read_manifest(tmp_path / "r", "report")
    assert manifest.parents == ("model-1",) and manifest.facts["accuracy"] == 1.0 and manifest.facts["protocol"]["extraction"] == "rules"
    assert json.loads(json.dumps(REPORT.summary()))["ci95"] == [0.34, 1.0] and "items" not in REPORT.summary()


@pytest.mark.parametrize("damage", ["cut", "missing", "unknown field", "item gone"])
def test_a_damaged_report_is_refused(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "r"
    write_report(place, REPORT)
    if damage == "cut":
        (place / "report.json").write_text('{"task": "cus')
    elif damage == "missing":
        (place / "items.jsonl").unlink()
    elif damage == "unknown field":
        (place / "items.jsonl").write_text('{"nonsense": 1}\n')
    else:
        (place / "items.jsonl").write_text((place / "items.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"is damaged|counts 2 items but holds 1"):
        read_report(place)


def test_the_log_survives_a_line_cut_short(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "r", "settings")
    log.add([answered("a"), answered("b")])
    assert log.path is not None
    whole = log.path.read_text()
    log.path.write_text(whole[:-20])
    taken_up = AnswerLog(tmp_path / "r", "settings")
    assert list(taken_up.answered) == ["a"] and taken_up.answered["a"] == answered("a")
    taken_up.add([answered("b")])
    assert list(AnswerLog(tmp_path / "r", "settings").answered) == ["a", "b"], "the cut line does not swallow the next one"
    assert AnswerLog(tmp_path / "r", "other settings").answered == {}
    taken_up.remove()
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_nothing_is_kept(tmp_path: Path) -> None:
    log = AnswerLog(None, "s")
    log.add([answered("a")])
    assert list(log.answered) == ["a"] and log.path is None
    log.remove()
