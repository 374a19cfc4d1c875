"""One harness: exactly known scores, pairing by id, resuming, failures counted."""

from dataclasses import replace
from pathlib import Path

import pytest

from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.core.types import Request, Row
from garage.evals.harness import Subject, evaluate
from garage.evals.stats import wilson
from garage.evals.tasks.custom import Custom
from garage.evals.tasks.gsm8k import Gsm8k
from garage.specs.evals import TaskSpec
from garage.store.report import read_report

SUBJECT = Subject("scripted", "1", "t")


def spec_of(**options: object) -> TaskSpec:
    return TaskSpec.parse({"task": "gsm8k", "data": "rows.jsonl", "split": "dev", **options})


def sum_of(prompt: str) -> int:
    left, right = prompt.splitlines()[-1].split(" + ")
    return int(left) + int(right)


def mixed(prompt: str) -> str:
    """Of ten questions: 4 right in form, 1 right and out of form, 2 right without tags, 1 wrong but near, 2 wrong in form."""
    value = sum_of(prompt)
    kind = (value - 7) % 10
    if kind < 4:
        return f"<reasoning>r</reasoning><answer>{value}</answer>"
    forms = {4: f"So <answer>{value}", 5: f"It is {value}.", 6: f"\\boxed{{{value}}}", 7: f"<answer>{value + value / 20}</answer>"}
    return forms.get(kind, "<reasoning>r</reasoning><answer>-1</answer>")


def test_a_scripted_generator_scores_exactly(scripted, sums: list[Row]) -> None:
    report = evaluate(scripted(mixed), Gsm8k(), sums, spec_of(), subject=SUBJECT, place=None)
    assert (report.n, report.accuracy, report.lenient, report.format_rate) == (150, 0.5, 0.7, 0.6)
    assert report.ci95 == wilson(75, 150) and report.partial == 0.8 and (report.failed, report.truncated) == (0, 0)
    first = report.items[5]
    assert (first.id, first.gold, first.extracted, first.rule) == ("gsm8k-0005", "12", "12", "last number")
    assert (first.strict, first.lenient) == (False, True) and "no answer block" in first.reason


def test_answers_are_paired_by_id_not_by_place(scripted, sums: list[Row]) -> None:
    def answer(prompt: str) -> str:
        return f"<answer>{sum_of(prompt)}</answer>"

    report = evaluate(scripted(answer, shuffled=True), Gsm8k(), sums, spec_of(), subject=SUBJECT, place=None)
    assert report.accuracy == 1.0 and [item.id for item in report.items] == [f"gsm8k-{k:04d}" for k in range(150)]
    generator, items = scripted(answer, shuffled=True), Gsm8k().items(sums, spec_of())
    completions = generator.generate([Request(item.id, item.messages) for item in items])
    zipped = [Gsm8k().score(c.text, item.gold).strict for c, item in zip(completions, items, strict=True)]
    assert sum(zipped) == 0, "the broken twin: zipping with the data set's order scores answers against the wrong questions"


@pytest.mark.parametrize("fault", ["lost", "doubled", "invented"])
def test_a_generator_that_loses_requests_is_stopped(scripted, sums: list[Row], fault: str) -> None:
    class Broken(scripted):
        def generate(self, requests):
            good = super().generate(requests)
            return {"lost": good[1:], "doubled": [good[0], *good[:-1]], "invented": [replace(good[0], id="x"), *good[1:]]}[fault]

    with pytest.raises(RuntimeError, match="was asked 64 items"):
        evaluate(Broken(lambda p: ""), Gsm8k(), sums, spec_of(), subject=SUBJECT, place=None)


def test_an_evaluation_cut_off_is_taken_up(scripted, sums: list[Row], tmp_path: Path) -> None:
    place, seen = tmp_path / "report", []
    with pytest.raises(KeyboardInterrupt):
        evaluate(scripted(mixed, dies_after=128), Gsm8k(), sums, spec_of(), subject=SUBJECT, place=place)
    kept = place.with_name("report.partial.jsonl")
    kept.write_text(kept.read_text() + '{"id": "gsm8k-0140", "ques')  # a crash in the middle of a line
    rest = scripted(mixed)
    report = evaluate(rest, Gsm8k(), sums, spec_of(), subject=SUBJECT, place=place, progress=lambda done, total: seen.append((done, total)))
    assert len(rest.asked) == 22 and seen == [(128, 150), (150, 150)] and not kept.exists()
    whole = evaluate(scripted(mixed), Gsm8k(), sums, spec_of(), subject=SUBJECT, place=None)
    assert report == whole == read_report(place)


CHANGES = [({"max_tokens": 99}, SUBJECT), ({"seed": 1}, SUBJECT), ({"limit": 140}, SUBJECT), ({}, Subject("scripted", "2", "t"))]


@pytest.mark.parametrize(("options", "subject"), CHANGES)
def test_other_settings_or_weights_start_afresh(scripted, sums, tmp_path: Path, options: dict[str, object], subject: Subject) -> None:
    place = tmp_path / "report"
    with pytest.raises(KeyboardInterrupt):
        evaluate(scripted(mixed, dies_after=64), Gsm8k(), sums, spec_of(), subject=SUBJECT, place=place)
    rest = scripted(mixed)
    report = evaluate(rest, Gsm8k(), sums, spec_of(**options), subject=subject, place=place)
    assert len(rest.asked) == report.n


def test_an_outage_is_not_a_bad_model(scripted, sums: list[Row], tmp_path: Path) -> None:
    away = scripted(lambda prompt: None if sum_of(prompt) % 10 == 0 else mixed(prompt))
    with pytest.raises(UserError, match=r"15 of 150 requests failed.*the server is away"):
        evaluate(away, Gsm8k(), sums, spec_of(), subject=SUBJECT, place=tmp_path / "report")
    assert len(away.asked) == 165 and not (tmp_path / "report").exists(), "asked once more, and no report"
    again = scripted(mixed)
    assert evaluate(again, Gsm8k(), sums, spec_of(), subject=SUBJECT, place=tmp_path / "report").accuracy == 0.5 and len(again.asked) == 15


def test_a_few_failures_are_counted_and_wrong(scripted, sums: list[Row]) -> None:
    generator = scripted(lambda prompt: None if sum_of(prompt) == 8 else mixed(prompt))
    report = evaluate(generator, Gsm8k(), sums, spec_of(), subject=SUBJECT, place=None)
    assert report.failed == 1 and report.accuracy == 74 / 150 and report.items[1].reason == "the server is away"


def test_the_report_names_its_protocol(scripted, sums: list[Row], tmp_path: Path) -> None:
    generator = scripted(mixed)
    spec = spec_of(limit=3, system="Be brief.", temperature=0.7, seed=4, max_tokens=32)
    report = evaluate(generator, Gsm8k(), sums, spec, subject=Subject("m", "f", "template", ("model-1",)), place=tmp_path / "r")
    manifest = read_manifest(tmp_path / "r", "report")
    assert manifest.parents == ("model-1",) and manifest.facts["n"] == 3 and manifest.facts["protocol"]["template"] == "template"
    assert (report.protocol.temperature, report.protocol.seed, report.protocol.max_tokens) == (0.7, 4, 32)
    assert [m.role for m in generator.asked[0].prompt] == ["system", "user"] and generator.asked[0].sampling.max_tokens == 32
    assert len({request.sampling.seed for request in generator.asked}) == 3, "each item samples from a stream of its own"
    other = evaluate(scripted(mixed), Gsm8k(), sums, spec_of(limit=3), subject=SUBJECT, place=None)
    assert other.protocol.items != report.protocol.items, "the system prompt is part of what is asked"


def test_items_that_cannot_be_told_apart_or_are_none_are_refused(scripted, sums: list[Row]) -> None:
    for rows, words in ((sums[:1] * 2, "same id"), ([], "no items")):
        with pytest.raises(UserError, match=words):
            evaluate(scripted(mixed), Custom(), rows, TaskSpec.parse({"task": "custom", "data": "x"}), subject=SUBJECT, place=None)
