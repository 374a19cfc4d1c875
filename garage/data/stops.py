"""What keeps a run from starting: the ways in which it is lost before its first step.

The end of an answer is never learned (the model never stops), the begin token is missing or doubled, rows in which nothing is learned,
answers cut away, and a chat template that is not the model's own. Each has a name by which a person may go on all the same.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from garage.core.errors import UserError
from garage.data.encode import Ledger
from garage.specs.train import StopName

MAX_MASKED, MAX_CUT = 0.01, 0.05


@dataclass(frozen=True)
class Finding:
    """Something to know about a dataset; a "stop" has a name and keeps a run from starting unless the name is allowed."""

    severity: Literal["advice", "warning", "stop"]
    message: str
    remedy: str
    name: str = ""


def hard_stops(ledger: Ledger, *, template_hash: str = "", model_template_hash: str = "") -> tuple[Finding, ...]:
    """The reasons not to start a run on this split; none if it may start."""
    lost = ledger.cut_answer_tokens / max(1, ledger.answer_tokens)
    masked = ledger.masked / max(1, ledger.rows)
    checks: tuple[tuple[StopName, bool, str, str], ...] = (
        ("end", ledger.pieces > 0 and ledger.ended == 0, "no row learns its end token, so the model would never stop",
         "raise max_length, or use the chat template that the model came with"),
        ("begin", ledger.bos_missing > 0, f"{ledger.bos_missing} rows lack the begin token of this model",
         "use the model's own chat template"),
        ("begin_twice", ledger.bos_doubled > 0, f"{ledger.bos_doubled} rows have two begin tokens",
         "remove it from the rows or from the template"),
        ("masked", masked > MAX_MASKED, f"{ledger.masked} of {ledger.rows} rows ({masked:.1%}) have nothing to learn",
         "raise max_length, or remove rows without an answer"),
        ("cut", lost > MAX_CUT, f"{ledger.cut_answer_tokens} of {ledger.answer_tokens} answer tokens ({lost:.1%}) are cut off",
         f"raise max_length (the longest row has {ledger.longest} tokens), or shorten the rows"),
        ("template", template_hash != model_template_hash, f"the rows' template is {template_hash}, the model's is {model_template_hash}",
         "encode the dataset again for this model"),
    )  # fmt: skip
    return tuple(Finding("stop", message, remedy, name) for name, wrong, message, remedy in checks if wrong)


def require_fit(findings: Sequence[Finding], allowed: Collection[StopName] = ()) -> tuple[Finding, ...]:
    """Refuse to go on if any finding is a stop that is not allowed; returns the stops that are.

    Raises:
        UserError: with every stop, the first remedy of each, and how to go on in spite of them.
    """
    stops = [finding for finding in findings if finding.severity == "stop" and finding.name not in allowed]
    if stops:
        remedy = f"{'; '.join(stop.remedy for stop in stops)}; or go on all the same with --allow {','.join(stop.name for stop in stops)}"
        raise UserError("; ".join(stop.message for stop in stops), remedy=remedy)
    return tuple(finding for finding in findings if finding.severity == "stop")
