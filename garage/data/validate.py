"""What is in a dataset, looked at once: rows and what is wrong with them, lengths, copies, what a run would lose, and advice.

Size guidance is of capabilities C14.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from garage.core.types import Row
from garage.data.describe import Description, Sampled
from garage.data.encode import Ledger, content_key
from garage.data.read import Fault, Reading
from garage.data.stops import Finding, hard_stops

FEW, RECOMMENDED, PLENTY = 50, 500, 5000


@dataclass(frozen=True)
class Lengths:
    """Lengths of the rows in tokens: percentiles, and (upper bound, rows) of bins that double."""

    median: int
    p90: int
    p99: int
    longest: int
    histogram: tuple[tuple[int, int], ...]
    over: float


@dataclass(frozen=True)
class DatasetReport:
    """What is in a dataset. `duplicates` are rows that repeat an earlier one but for case and spaces; `faults` are the first 1,000."""

    path: str
    format: str
    rows: int
    duplicates: int
    unparsable: int
    empty: int
    missing: int
    blank_lines: int
    faults: tuple[Fault, ...]
    lengths: Lengths
    ledger: Ledger
    about: Description
    findings: tuple[Finding, ...]


def inspect(reading: Reading, *, measure: Callable[[Row], Ledger], max_length: int) -> DatasetReport:
    """Read a dataset once and report on it; `measure` is what becomes of one row. Memory is 16 bytes a row and a sample of rows."""
    total, sampled = Ledger(), Sampled()

    def sizes() -> Iterator[tuple[int, int]]:
        nonlocal total
        for row in reading:
            ledger = measure(row)
            total += ledger
            sampled.see(row)
            yield content_key(row), ledger.longest

    seen = np.fromiter(sizes(), dtype=[("content", "u8"), ("size", "i8")])
    rows, counts, lengths = len(seen), reading.counts, _lengths(seen["size"], max_length)
    duplicates = rows - len(np.unique(seen["content"]))
    unparsable, empty, missing, blank = (counts[kind] for kind in ("unparsable", "empty", "missing", "blank"))
    findings = [*_advice(rows, duplicates, unparsable + empty + missing, lengths, max_length), *hard_stops(total)]
    return DatasetReport(str(reading.path), reading.format, rows, duplicates, unparsable, empty, missing, blank, tuple(reading.faults),
                         lengths, total, sampled.describe(), tuple(findings))  # fmt: skip


def _lengths(sizes: np.ndarray, max_length: int) -> Lengths:
    if not len(sizes):
        return Lengths(0, 0, 0, 0, (), 0.0)
    median, p90, p99 = (int(np.percentile(sizes, q, method="higher")) for q in (50, 90, 99))
    bins = Counter(1 << int(size - 1).bit_length() if size > 0 else 0 for size in sizes.tolist())
    return Lengths(median, p90, p99, int(sizes.max()), tuple(sorted(bins.items())), float((sizes > max_length).mean()))


def _advice(rows: int, duplicates: int, unusable: int, lengths: Lengths, max_length: int) -> Iterator[Finding]:
    if rows < FEW:
        yield Finding("warning", f"{rows} rows are learned by heart", f"{FEW} is the least; 500 to 1,000 varied rows are recommended")
    elif rows < RECOMMENDED:
        yield Finding("advice", f"{rows} rows are few", "500 to 1,000 are recommended; ten varied rows beat a hundred alike")
    elif rows < PLENTY:
        yield Finding("advice", f"{rows} rows are a good size", "5,000 to 10,000 are best for a new skill")
    if unusable:
        yield Finding("warning", f"{unusable} rows cannot be used", "repair or remove the lines named in the faults")
    if duplicates > rows * 0.01:
        yield Finding("warning", f"{duplicates} of {rows} rows repeat an earlier one", "remove the copies: they only add weight")
    if lengths.over:
        message = f"{lengths.over:.1%} of the rows are longer than {max_length} tokens and would be cut"
        yield Finding("warning", message, f"raise max_length (90 % of the rows fit into {lengths.p90} tokens), or split the long rows")
