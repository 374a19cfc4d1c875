"""Is this dataset fit to train on? Advice while it is looked at, hard stops before a run starts.

The stops are the five ways in which a run is lost before its first step: the end of an answer is never learned (the model never
stops), the begin token is missing or doubled, rows in which nothing is learned, answers cut away, and a chat template that is not the
model's own. Size guidance is of capabilities C14.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from garage.core.errors import UserError
from garage.core.types import Row
from garage.data.encode import Ledger, content_key
from garage.data.read import Fault, Reading

MAX_MASKED, MAX_CUT = 0.01, 0.05
FEW, RECOMMENDED, PLENTY = 50, 500, 5000


@dataclass(frozen=True)
class Finding:
    """Something to know about a dataset; a "stop" keeps a run from starting."""

    severity: Literal["advice", "warning", "stop"]
    message: str
    remedy: str


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
    findings: tuple[Finding, ...]


def inspect(reading: Reading, *, length: Callable[[Row], int], max_length: int) -> DatasetReport:
    """Read a dataset once and report on it; `length` is the number of tokens of a row. Memory is 16 bytes a row."""
    seen = np.fromiter(((content_key(row), length(row)) for row in reading), dtype=[("content", "u8"), ("size", "i8")])
    rows, counts, lengths = len(seen), reading.counts, _lengths(seen["size"], max_length)
    duplicates = rows - len(np.unique(seen["content"]))
    unparsable, empty, missing, blank = (counts[kind] for kind in ("unparsable", "empty", "missing", "blank"))
    findings = _advice(rows, duplicates, unparsable + empty + missing, lengths, max_length)
    return DatasetReport(str(reading.path), reading.format, rows, duplicates, unparsable, empty, missing, blank, tuple(reading.faults),
                         lengths, tuple(findings))  # fmt: skip


def hard_stops(ledger: Ledger, *, template_hash: str, model_template_hash: str) -> tuple[Finding, ...]:
    """The reasons not to start a run on this split; none if it may start."""
    lost = ledger.cut_answer_tokens / max(1, ledger.answer_tokens)
    masked = ledger.masked / max(1, ledger.rows)
    checks = (
        (ledger.pieces > 0 and ledger.ended == 0, "no row learns its end token, so the model would never stop",
         "raise max_length, or use the chat template that the model came with"),
        (ledger.bos_missing > 0, f"{ledger.bos_missing} rows lack the begin token of this model", "use the model's own chat template"),
        (ledger.bos_doubled > 0, f"{ledger.bos_doubled} rows have two begin tokens", "remove it from the rows or from the template"),
        (masked > MAX_MASKED, f"{ledger.masked} of {ledger.rows} rows ({masked:.1%}) have nothing to learn",
         "raise max_length, or remove rows without an answer"),
        (lost > MAX_CUT, f"{ledger.cut_answer_tokens} of {ledger.answer_tokens} answer tokens ({lost:.1%}) are cut off",
         f"raise max_length (the longest row has {ledger.longest} tokens), or shorten the rows"),
        (template_hash != model_template_hash, f"the rows' template is {template_hash}, the model's is {model_template_hash}",
         "encode the dataset again for this model"),
    )  # fmt: skip
    return tuple(Finding("stop", message, remedy) for wrong, message, remedy in checks if wrong)


def require_fit(findings: Sequence[Finding]) -> None:
    """Refuse to go on if any finding is a stop.

    Raises:
        UserError: with every stop and the first remedy of each.
    """
    if stops := [finding for finding in findings if finding.severity == "stop"]:
        raise UserError("; ".join(stop.message for stop in stops), remedy="; ".join(stop.remedy for stop in stops))


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
