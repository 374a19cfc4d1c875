"""The report artifact: what a model answered to every item of a task, how that was judged, and what it adds up to.

    report.json    the Report without its items
    items.jsonl    one Answered a line, in the order of the items

While an evaluation runs, its answers are kept beside the place of the report in `<name>.partial.jsonl`, whose first line is the hash
of the settings; an evaluation that was cut off asks only what is missing, and one with other settings starts afresh.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from garage.core.artifact import read_manifest, write_file, writing
from garage.core.errors import UserError


@dataclass(frozen=True)
class EvalProtocol:
    """Everything besides the model that a score depends on; two reports are comparable only if all of it is equal.

    `items` is a hash of ids, prompts and golds in order; `template` the hash of the chat template that rendered the prompts, "" if the
    generator did not say; `extraction` names the rules by which answers were read.
    """

    version: int
    task: str
    items: str
    template: str
    extraction: str
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answered:
    """One item, what the model wrote, and the judgement. `format` is None where the task asks for no format."""

    id: str
    question: str
    gold: str
    output: str
    extracted: str
    rule: str
    strict: bool
    lenient: bool
    partial: bool
    format: bool | None
    tokens: int
    finish: str
    reason: str


@dataclass(frozen=True)
class Report:
    """One model on one task. `accuracy` is the strict score; rates are shares of `n`; intervals are Wilson's at 95 %.

    `truncated` is the share of answers cut by the token limit, `failed` the number of requests that brought no answer (scored wrong).
    """

    task: str
    model: str
    n: int
    accuracy: float
    ci95: tuple[float, float]
    lenient: float
    lenient_ci95: tuple[float, float]
    partial: float
    format_rate: float | None
    truncated: float
    failed: int
    mean_tokens: float
    protocol: EvalProtocol
    items: tuple[Answered, ...]

    def summary(self) -> dict[str, object]:
        """All but the items, as plain values."""
        return {**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "items"}, "protocol": asdict(self.protocol)}


class AnswerLog:
    """The answers of an evaluation under way. With `place` None nothing is kept.

    Args:
        place: where the report will be.
        settings: a hash of everything the answers depend on, the model included.
    """

    def __init__(self, place: Path | None, settings: str) -> None:
        self.path = place.with_name(f"{place.name}.partial.jsonl") if place is not None else None
        self.answered: dict[str, Answered] = {}
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        if lines and lines[0] == settings:
            self.answered = {found.id: found for line in lines[1:] if (found := _whole_line(line)) is not None}
        write_file(self.path, "\n".join([settings, *map(_line, self.answered.values()), ""]))

    def add(self, answers: Sequence[Answered]) -> None:
        """Keep some more answers."""
        self.answered.update({answer.id: answer for answer in answers})
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(_line(answer) + "\n" for answer in answers))

    def remove(self) -> None:
        """Forget them: the report is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def write_report(place: Path, report: Report, *, parents: Sequence[str] = (), spec: Mapping[str, object] | None = None) -> None:
    """Write a report artifact; its manifest's facts are the report's summary."""
    with writing(place, kind="report", parents=parents, spec=spec) as draft:
        summary = report.summary()
        (draft.path / "report.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (draft.path / "items.jsonl").write_text("".join(_line(item) + "\n" for item in report.items), encoding="utf-8")
        draft.facts.update(summary)


def read_report(place: Path) -> Report:
    """The report at `place`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    read_manifest(place, "report")
    try:
        raw = json.loads((place / "report.json").read_text(encoding="utf-8"))
        items = tuple(Answered(**json.loads(line)) for line in (place / "items.jsonl").read_text(encoding="utf-8").split("\n") if line)
        intervals = {name: (float(raw[name][0]), float(raw[name][1])) for name in ("ci95", "lenient_ci95")}
        report = Report(**{**raw, **intervals, "protocol": EvalProtocol(**raw["protocol"]), "items": items})
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"the report {place} is damaged: {error}", remedy="evaluate again") from error
    if len(items) != report.n:
        raise UserError(f"the report {place} counts {report.n} items but holds {len(items)}", remedy="evaluate again")
    return report


def _line(answer: Answered) -> str:
    return json.dumps(asdict(answer), ensure_ascii=True)


def _whole_line(line: str) -> Answered | None:
    """An answer, or None for a line that a crash cut short."""
    try:
        raw: Any = json.loads(line)
        return Answered(**raw)
    except (ValueError, TypeError):
        return None
