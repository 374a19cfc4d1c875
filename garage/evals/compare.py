"""Before against after, item by item, on reports made under one protocol.

The difference is tested exactly on the items whose answer changed (McNemar); its interval is Newcombe's for paired shares. A gain of the
strict score without a shown gain of the lenient score is a gain of form, and is said to be one.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

from garage.core.errors import UserError
from garage.evals.stats import mcnemar, paired_interval
from garage.store.report import EvalProtocol, Report

ALPHA = 0.05

Verdict = Literal["better", "worse", "better in form, not shown in ability", "no change shown"]


@dataclass(frozen=True)
class Comparison:
    """`base` and `tuned` are strict scores, `delta` their difference with interval `ci95` and exact two-sided `p`.

    `gained` and `lost` are the ids of items that only the tuned or only the base model got right.
    """

    n: int
    base: float
    tuned: float
    delta: float
    ci95: tuple[float, float]
    p: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    lenient_delta: float
    lenient_p: float
    format_delta: float | None
    verdict: Verdict


def compare(base: Report, tuned: Report) -> Comparison:
    """Compare two reports of the same items.

    Raises:
        UserError: the reports were made under different protocols; the difference is named.
    """
    _same_protocol(base.protocol, tuned.protocol)
    before, after = {item.id: item for item in base.items}, {item.id: item for item in tuned.items}
    if before.keys() != after.keys():
        raise UserError("the two reports hold different items", remedy="evaluate both models on the same items")
    gained = tuple(id for id in before if after[id].strict and not before[id].strict)
    lost = tuple(id for id in before if before[id].strict and not after[id].strict)
    both = sum(before[id].strict and after[id].strict for id in before)
    p = mcnemar(len(gained), len(lost))
    lenient_up = sum(after[id].lenient and not before[id].lenient for id in before)
    lenient_down = sum(before[id].lenient and not after[id].lenient for id in before)
    lenient_p = mcnemar(lenient_up, lenient_down)
    formats = None if base.format_rate is None or tuned.format_rate is None else tuned.format_rate - base.format_rate
    return Comparison(
        n=base.n,
        base=base.accuracy,
        tuned=tuned.accuracy,
        delta=(len(gained) - len(lost)) / base.n,
        ci95=paired_interval(both, len(gained), len(lost), base.n - both - len(gained) - len(lost)),
        p=p,
        gained=gained,
        lost=lost,
        lenient_delta=(lenient_up - lenient_down) / base.n,
        lenient_p=lenient_p,
        format_delta=formats,
        verdict=_verdict(len(gained) - len(lost), p, lenient_up > lenient_down and lenient_p < ALPHA),
    )


def _verdict(change: int, p: float, lenient_better: bool) -> Verdict:
    if p >= ALPHA:
        return "no change shown"
    if change < 0:
        return "worse"
    return "better" if lenient_better else "better in form, not shown in ability"


def _same_protocol(base: EvalProtocol, tuned: EvalProtocol) -> None:
    a, b = asdict(base), asdict(tuned)
    faults = [f"{f.name}: {a[f.name]!r} and {b[f.name]!r}" for f in fields(base) if a[f.name] != b[f.name]]
    if faults:
        raise UserError(f"the reports were not made alike ({'; '.join(faults)})", remedy="evaluate both models with the same settings")
