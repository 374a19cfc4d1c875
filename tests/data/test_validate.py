"""The report on a dataset, and the five hard stops."""

import json
from dataclasses import replace

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data.encode import Ledger, encode_row
from garage.data.read import read_dataset
from garage.data.stops import hard_stops, require_fit
from garage.data.validate import inspect

GOOD = Ledger(rows=100, pieces=100, tokens=1000, learned=500, answer_tokens=500, ended=100, longest=90)


def dataset(tmp_path, answers, extra=()):
    lines = [json.dumps({"question": f"q{n}", "answer": answer}) for n, answer in enumerate(answers)] + list(extra)
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    return read_dataset(path)


def test_the_report_counts_what_is_there(tmp_path):
    extra = ['{"question": "Q5 ", "answer": "xxxxxx"}', "{", '{"question": "a", "answer": ""}']
    reading = dataset(tmp_path, ["x" * n for n in range(1, 101)], extra)
    report = inspect(reading, measure=lambda row: Ledger(1, longest=len(row.messages[1].content)), max_length=90)
    assert (report.rows, report.duplicates, report.unparsable, report.empty, report.missing) == (101, 1, 1, 1, 0)
    assert [(fault.line, fault.kind) for fault in report.faults] == [(102, "unparsable"), (103, "empty")]
    assert (report.lengths.median, report.lengths.p90, report.lengths.longest) == (50, 90, 100)
    assert report.lengths.over == pytest.approx(10 / 101) and sum(n for _, n in report.lengths.histogram) == 101
    assert dict(report.lengths.histogram) == {1: 1, 2: 1, 4: 2, 8: 5, 16: 8, 32: 16, 64: 32, 128: 36}
    messages = " ".join(finding.message for finding in report.findings)
    assert "101 rows are few" in messages and "2 rows cannot be used" in messages and "longer than 90" in messages


@pytest.mark.parametrize(("rows", "severity"), [(49, "warning"), (50, "advice"), (499, "advice"), (500, "advice"), (5000, None)])
def test_size_guidance(tmp_path, rows, severity):
    report = inspect(dataset(tmp_path, [str(n) for n in range(rows)]), measure=lambda row: Ledger(1, longest=1), max_length=9)
    assert [finding.severity for finding in report.findings] == ([severity] if severity else [])


def test_lengths_in_tokens_come_from_the_renderer(tmp_path, encoding):
    how = encoding(max_length=20)
    report = inspect(dataset(tmp_path, ["apples " * 30]), measure=lambda row: encode_row(row, how)[1], max_length=20)
    assert report.lengths.longest > 30 and report.lengths.over == 1.0
    assert report.ledger.cut_rows == 1 and [finding.name for finding in report.findings if finding.severity == "stop"] == ["end", "cut"]


def stops(ledger, template="t"):
    return hard_stops(ledger, template_hash=template, model_template_hash="t")


def test_a_good_split_may_start():
    assert stops(GOOD) == () and stops(Ledger()) == ()
    require_fit(stops(GOOD))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ended": 0}, "never stop"),
        ({"bos_missing": 1}, "begin token"),
        ({"bos_doubled": 3}, "two begin tokens"),
        ({"masked": 2}, "nothing to learn"),
        ({"cut_answer_tokens": 26}, "cut off"),
    ],
)
def test_each_stop_fires_at_its_threshold_and_names_a_remedy(change, says):
    (stop,) = stops(replace(GOOD, **change))
    assert says in stop.message and stop.remedy and stop.severity == "stop"
    with pytest.raises(UserError, match=says) as refused:
        require_fit((stop,))
    assert refused.value.remedy.endswith(f"--allow {stop.name}") and require_fit((stop,), (stop.name,)) == (stop,)


def test_just_below_the_thresholds_nothing_stops():
    assert stops(replace(GOOD, masked=1, cut_answer_tokens=25)) == ()


def test_another_template_stops():
    (stop,) = stops(GOOD, template="other")
    assert "template" in stop.message


def test_a_real_dataset_that_is_cut_too_short_is_stopped(encoding):
    row = Row("1", (Message("user", "Hi"), Message("assistant", "apples " * 50)))
    ledger = encode_row(row, encoding(max_length=30))[1]
    assert {stop.message.split()[0] for stop in stops(ledger)} == {"no", str(ledger.cut_answer_tokens)}
