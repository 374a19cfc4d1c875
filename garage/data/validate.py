"""Is this dataset fit to train on? Advice while it is looked at, hard stops before a run starts.

The stops are the five ways in which a run is lost before its first step: the end of an answer is never learned (the model never
stops), the begin token is missing or doubled, rows in which nothing is learned, answers cut away, and a chat template that is not the
model's own. Size guidance is of capabilities C14.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from garage.core.errors import UserError
from garage.core.types import Row
from garage.data.encode import Ledger, content_key
from garage.data.formats import Fault
from garage.data.read import Reading

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
    """What is in a dataset. `duplicates` are rows that repeat an earlier one but for case and spaces; `faults` holds the first 1,000."""

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
    """Read a dataset once and report on it; `length` is the number of tokens of a row. Memory is about 100 bytes a row."""
    seen: set[int] = set()
    sizes = np.fromiter((_noted(row, seen, length) for row in reading), dtype=np.int64)
    counts, rows = reading.counts, len(sizes)
    lengths, duplicates = _lengths(sizes, max_length), rows - len(seen)
    findings = (*_size_advice(rows), *_fault_advice(counts, rows, duplicates), *_length_advice(lengths, max_length))
    kinds = {"unparsable": counts["unparsable"], "empty": counts["empty"], "missing": counts["missing"], "blank_lines": counts["blank"]}
    faults = tuple(reading.faults)
    return DatasetReport(str(reading.path), reading.format, rows, duplicates, faults=faults, lengths=lengths, findings=findings, **kinds)


def hard_stops(ledger: Ledger, *, template_hash: str, model_template_hash: str) -> tuple[Finding, ...]:
    """The reasons not to start a run on this split; none if it may start."""
    lost = ledger.cut_answer_tokens / max(1, ledger.answer_tokens)
    masked = ledger.masked / max(1, ledger.rows)
    checks = (
        (ledger.pieces > 0 and ledger.ended == 0, "no row learns its end token, so the model would never stop",
         "raise max_length, or use the chat template that the model came with"),
        (ledger.bos_missing > 0, f"{ledger.bos_missing} rows lack the begin token that this model expects", "use the model's own chat template"),
        (ledger.bos_doubled > 0, f"{ledger.bos_doubled} rows have two begin tokens", "remove the begin token from the rows or the template"),
        (masked > MAX_MASKED, f"{ledger.masked} of {ledger.rows} rows ({masked:.1%}) have nothing to learn",
         "raise max_length, or remove rows without an answer"),
        (lost > MAX_CUT, f"{ledger.cut_answer_tokens} of {ledger.answer_tokens} answer tokens ({lost:.1%}) are cut off",
         f"raise max_length (the longest row has {ledger.longest} tokens), or shorten the rows"),
        (template_hash != model_template_hash, f"the rows were rendered with template {template_hash}, the model's is {model_template_hash}",
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


def _noted(row: Row, seen: set[int], length: Callable[[Row], int]) -> int:
    seen.add(content_key(row))
    return length(row)


def _lengths(sizes: np.ndarray, max_length: int) -> Lengths:
    if not len(sizes):
        return Lengths(0, 0, 0, 0, (), 0.0)
    median, p90, p99 = (int(np.percentile(sizes, q, method="higher")) for q in (50, 90, 99))
    bins = Counter(1 << int(size - 1).bit_length() if size > 0 else 0 for size in sizes.tolist())
    return Lengths(median, p90, p99, int(sizes.max()), tuple(sorted(bins.items())), float((sizes > max_length).mean()))


def _size_advice(rows: int) -> list[Finding]:
    if rows < FEW:
        return [Finding("warning", f"{rows} rows are learned by heart", f"{FEW} is the least; 500 to 1,000 varied rows are recommended")]
    if rows < RECOMMENDED:
        return [Finding("advice", f"{rows} rows are few", "500 to 1,000 are recommended; ten varied rows beat a hundred alike")]
    if rows < PLENTY:
        return [Finding("advice", f"{rows} rows are a good size", "5,000 to 10,000 are best for a new skill")]
    return []


def _fault_advice(counts: Counter[str], rows: int, duplicates: int) -> list[Finding]:
    unusable = counts["unparsable"] + counts["empty"] + counts["missing"]
    found = [Finding("warning", f"{unusable} rows cannot be used", "repair or remove the lines named in the faults")] if unusable else []
    if duplicates > rows * 0.01:
        found.append(Finding("warning", f"{duplicates} of {rows} rows repeat an earlier one", "remove the copies: they only add weight"))
    return found


def _length_advice(lengths: Lengths, max_length: int) -> list[Finding]:
    if lengths.over == 0:
        return []
    message = f"{lengths.over:.1%} of the rows are longer than {max_length} tokens and would be cut"
    return [Finding("warning", message, f"raise max_length (90 % of the rows fit into {lengths.p90} tokens), or split the long rows")]
