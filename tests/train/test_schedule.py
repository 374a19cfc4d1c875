"""The schedule by hand-computed values, and the two mistakes that [schedule] in the plan describes."""

import math
from itertools import pairwise

import pytest

from garage.specs.train import FitSpec, ScheduleSpec
from garage.train.schedule import amount, factor


def values(total, **spec):
    return [factor(step, total, ScheduleSpec(**spec)) for step in range(total + 1)]


def test_constant_rises_then_stays():
    assert values(10, kind="constant", warmup=0.4) == [0.25, 0.5, 0.75] + [1.0] * 8


def test_linear_falls_to_its_floor_at_the_step_after_the_last():
    got = values(12, kind="linear", warmup=2 / 12, floor=0.5)
    assert got[:3] == [0.5, 1.0, 1.0]
    assert got[2:] == pytest.approx([1 - 0.5 * i / 10 for i in range(11)])


def test_cosine_is_half_way_at_its_middle():
    got = values(100, kind="cosine", warmup=0.0, floor=0.1)
    assert got[0] == 1.0 and got[50] == pytest.approx(0.55) and got[100] == pytest.approx(0.1)
    assert got[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a > b for a, b in pairwise(got))


def test_wsd_is_flat_until_its_last_share():
    got = values(10, kind="wsd", warmup=0.2, decay=0.3, floor=0.0)
    assert got[:2] == [0.5, 1.0] and got[2:8] == [1.0] * 6 and got[7:] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_no_step_of_a_short_run_is_without_effect(kind, total):
    assert all(0 < value <= 1 for value in values(total, kind=kind, warmup=0.5, floor=0.0, decay=0.5)[:-1])


def test_planned_over_micro_batches_it_would_stop_half_way():
    """The reference planned 1,000 micro-steps for 500 updates; its last factor was .587 instead of about .1."""
    spec = ScheduleSpec(kind="cosine", warmup=0.05, floor=0.1)
    assert factor(499, 1000, spec) > 0.55 and factor(499, 500, spec) < 0.11


def test_max_steps_overrides_epochs_and_says_so():
    """The reference's figures: 18,000 rows at 4 a step, two epochs asked for, 60 steps made, 240 rows seen."""
    both = amount(FitSpec.parse({"epochs": 2, "max_steps": 60}), 4500, 18_000)
    assert (both.steps, both.rows, both.overridden) == (60, 240, 9000) and both.epochs == pytest.approx(60 / 4500)
    assert "max_steps overrides epochs, which would be 9,000 steps" in str(both)
    alone = [amount(FitSpec.parse(given), 4500, 18_000) for given in ({"epochs": 2}, {"max_steps": 9000})]
    assert alone[0] == alone[1] and alone[0].rows == 36_000 and "overrides" not in str(alone[0])
    assert amount(FitSpec.parse({"epochs": 1, "max_steps": 9}), 3, 10).steps == 9, "it may also be the longer one"
