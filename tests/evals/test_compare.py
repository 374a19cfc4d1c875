"""Before against after: who was gained and lost, and when a comparison is refused."""

from dataclasses import replace

import pytest

from garage.core.errors import UserError
from garage.evals.compare import compare
from garage.evals.harness import summarise
from garage.evals.stats import mcnemar, paired_interval
from garage.store.report import Answered, EvalProtocol, Report

PROTOCOL = EvalProtocol(1, "gsm8k", "items", "template", "rules", 256, 0.0, 0)


def report_of(strict: list[bool], lenient: list[bool] | None = None, form: bool | None = True) -> Report:
    pairs = zip(strict, lenient or strict, strict=True)
    items = [
        Answered(f"i{k}", "q", "1", "o", "1", "answer tag", a, a or b, a or b, form, 3, "stop", "") for k, (a, b) in enumerate(pairs)
    ]
    return summarise("m", PROTOCOL, items)


BASE = [True] * 20 + [False] * 80
TUNED = [True] * 17 + [False] * 3 + [True] * 25 + [False] * 55


def test_gains_losses_and_statistics() -> None:
    found = compare(report_of(BASE), report_of(TUNED))
    assert found.lost == ("i17", "i18", "i19") and found.gained == tuple(f"i{k}" for k in range(20, 45))
    assert (found.base, found.tuned, found.delta) == (0.2, 0.42, 0.22)
    assert found.p == mcnemar(25, 3) and found.ci95 == paired_interval(17, 25, 3, 55) and found.verdict == "better"
    back = compare(report_of(TUNED), report_of(BASE))
    assert back.delta == -0.22 and back.verdict == "worse" and back.p == found.p


def test_pairs_are_matched_by_id() -> None:
    shuffled = report_of(TUNED)
    shuffled = replace(shuffled, items=shuffled.items[::-1])
    assert compare(report_of(BASE), shuffled) == compare(report_of(BASE), report_of(TUNED))
    twin = sum(b.strict and not a.strict for a, b in zip(report_of(BASE).items, shuffled.items, strict=True))
    assert twin != 25, "the broken twin pairs by position"


def test_a_gain_of_form_is_called_one() -> None:
    able = [True] * 60 + [False] * 40
    form_only = compare(report_of([False] * 100, able), report_of([True] * 60 + [False] * 40, able))
    assert form_only.delta == 0.6 and form_only.lenient_delta == 0.0 and form_only.verdict == "better in form, not shown in ability"
    assert compare(report_of(BASE), report_of([True] * 22 + [False] * 78)).verdict == "no change shown"


@pytest.mark.parametrize("field", ["items", "template", "extraction", "max_tokens", "temperature", "seed", "task", "version"])
def test_reports_made_differently_are_refused(field: str) -> None:
    old = getattr(PROTOCOL, field)
    tuned = replace(report_of(TUNED), protocol=replace(PROTOCOL, **{field: old + "x" if isinstance(old, str) else old + 1}))
    with pytest.raises(UserError, match=field):
        compare(report_of(BASE), tuned)


def test_reports_of_other_items_are_refused() -> None:
    with pytest.raises(UserError, match="different items"):
        compare(report_of(BASE), report_of(TUNED[:99]))


def test_a_task_without_format_has_no_format_rate() -> None:
    found = compare(report_of(BASE, form=None), report_of(TUNED, form=None))
    assert report_of(BASE, form=None).format_rate is None and found.format_delta is None
