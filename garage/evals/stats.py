"""Statistics of yes-or-no scores: Wilson's interval, the exact McNemar test, and an interval of a paired difference.

z is the 97.5 % point of the normal distribution. The McNemar test is exact (binomial on the pairs that differ), two-sided. The interval
of a paired difference is Newcombe's square-and-add (his method 10 with the corrected correlation): closed form, no random numbers, and
it does not shrink to nothing when all pairs agree. Test and interval may disagree at the very edge; a claim of change rests on the test.

Sources: Wilson 1927; McNemar 1947; Newcombe, Statistics in Medicine 17 (1998) 2635.
"""

from fractions import Fraction
from math import comb, sqrt

Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share; the whole of [0, 1] if nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact probability of a split at least this uneven if gains and losses were equally likely."""
    n = gained + lost
    tail = sum(comb(n, k) for k in range(min(gained, lost) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def paired_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of (share right after - share right before) over the same items."""
    n = both + gained + lost + neither
    if n == 0:
        return -1.0, 1.0
    after, before = both + gained, both + lost
    product = after * (n - after) * before * (n - before)
    excess = both * neither - gained * lost
    phi = (max(excess - n / 2, 0.0) if excess > 0 else excess) / sqrt(product) if product else 0.0
    delta, a, b = (gained - lost) / n, after / n, before / n
    (low_a, high_a), (low_b, high_b) = wilson(after, n), wilson(before, n)
    down = sqrt(max(0.0, (a - low_a) ** 2 - 2 * phi * (a - low_a) * (high_b - b) + (high_b - b) ** 2))
    up = sqrt(max(0.0, (high_a - a) ** 2 - 2 * phi * (high_a - a) * (b - low_b) + (b - low_b) ** 2))
    return delta - down, delta + up
