"""Intervals and the test against published values, closed forms and their own promise of coverage."""

import random
from math import comb

import pytest

from garage.evals.stats import mcnemar, paired_interval, wilson

# Newcombe 1998 (873), table I
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("counts", "interval"), WILSON.items())
def test_wilson_published(counts: tuple[int, int], interval: tuple[float, float]) -> None:
    assert wilson(*counts) == pytest.approx(interval, abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0) and wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    low, high = wilson(660, 1319)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.01377, rel=0.01), "about 2.7 points at n = 1,319"


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 256)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0 and mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(30, 12) == pytest.approx(2 * sum(comb(42, k) for k in range(13)) / 2**42)
    assert mcnemar(900, 1000) == pytest.approx(0.0231, abs=5e-4), "large counts neither overflow nor lose the tail"


PAIRED = [  # both, after only, before only, neither -> difference, interval to three digits: examples of Fagerland, Lydersen and Laake 2014
    ((59, 6, 16, 80), -0.0621, (-0.119, -0.005)),
    ((1, 1, 7, 12), -0.2857, (-0.507, -0.026)),
]


@pytest.mark.parametrize(("table", "delta", "interval"), PAIRED)
def test_paired_interval_published(table: tuple[int, int, int, int], delta: float, interval: tuple[float, float]) -> None:
    both, gained, lost, neither = table
    assert (gained - lost) / sum(table) == pytest.approx(delta, abs=5e-5)
    assert paired_interval(*table) == pytest.approx(interval, abs=5e-4)
    low, high = paired_interval(both, lost, gained, neither)
    assert (-high, -low) == pytest.approx(interval, abs=5e-4), "swapping the models mirrors the interval"


def test_paired_interval_never_shrinks_to_nothing() -> None:
    low, high = paired_interval(10, 0, 0, 10)
    assert low < -0.03 and high > 0.03 and paired_interval(0, 0, 0, 0) == (-1.0, 1.0)
    assert paired_interval(20, 0, 0, 0)[1] > 0.1 and paired_interval(0, 20, 0, 0) == pytest.approx((0.7722, 1.0), abs=1e-3)


def test_paired_interval_covers_what_it_promises() -> None:
    """4,000 draws: a rate outside 93.5 to 97 % has a chance below 1e-4 if the true coverage is 95 to 96 %. A Wald interval is the twin."""
    rng, shares, n = random.Random(5), (0.35, 0.12, 0.02, 0.51), 60
    covered = twin = 0
    for _ in range(4000):
        draws = rng.choices(range(4), shares, k=n)
        both, gained, lost, neither = (draws.count(k) for k in range(4))
        low, high = paired_interval(both, gained, lost, neither)
        covered += low <= 0.10 <= high
        delta = (gained - lost) / n
        wald = 1.96 * ((gained + lost) / n - delta**2) ** 0.5 / n**0.5
        twin += abs(delta - 0.10) <= wald
    assert 0.935 < covered / 4000 < 0.97 and twin < covered
