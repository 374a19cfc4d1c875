"""One harness for every model: the same items, prompts, decoding and extraction, and a report that names all of them.

Answers are paired with their questions by item id, never by position: a generator may finish requests in any order. They are kept as
they arrive, so that an evaluation cut off is taken up where it stopped. A request that fails is asked once more; what fails again counts
as wrong and as failed, and when more than 5 % fail there is no report, because an outage is not a bad model.

Limits: each item is asked once. Sampling above temperature 0 is reproducible only as far as the generator honours a request's seed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from garage.core.errors import UserError
from garage.core.protocols import Generator
from garage.core.seeds import derive
from garage.core.types import Completion, Message, Request, Row, Sampling
from garage.evals.stats import wilson
from garage.evals.task import Item, Task
from garage.specs.evals import TaskSpec
from garage.store.report import Answered, AnswerLog, EvalProtocol, Report, write_report

PROTOCOL = 1
BATCH = 64
MAX_FAILED = 0.05

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """The model under test. `fingerprint` changes whenever its weights do; `template` is the hash of its chat template.

    `parents` are the ids of the artifacts it comes from, for the report's lineage.
    """

    name: str
    fingerprint: str
    template: str = ""
    parents: tuple[str, ...] = ()


def evaluate(
    generator: Generator,
    task: Task,
    rows: Sequence[Row],
    spec: TaskSpec,
    *,
    subject: Subject,
    place: Path | None,
    progress: Progress | None = None,
) -> Report:
    """Ask every item, judge every answer, and write the report artifact to `place` (None: keep nothing on disk).

    Args:
        progress: told (answered, total) after every batch.

    Raises:
        UserError: the items cannot be asked, or too many requests failed; what was answered is kept for the next attempt.
    """
    items = _items(task, rows, spec)
    asked = _hash([asdict(item) for item in items])
    decoding = (spec.max_tokens, spec.temperature, spec.seed)
    protocol = EvalProtocol(PROTOCOL, task.name, asked, subject.template, task.extraction, *decoding)
    log = AnswerLog(place, _hash([asdict(protocol), subject.name, subject.fingerprint]))
    tell = progress or (lambda done, total: None)
    failed = _ask_all(generator, task, spec, items, log=log, tell=lambda: tell(len(log.answered), len(items)))
    if len(failed) > MAX_FAILED * len(items):
        first = next(iter(failed.values()))
        message = f"{len(failed)} of {len(items)} requests failed, the first with: {first.reason}"
        raise UserError(message, remedy="run it again: the answers so far are kept")
    answers = {**log.answered, **failed}
    report = summarise(subject.name, protocol, [answers[item.id] for item in items])
    if place is not None:
        write_report(place, report, parents=subject.parents, spec=spec.resolved())
        log.remove()
    return report


def summarise(model: str, protocol: EvalProtocol, answers: Sequence[Answered]) -> Report:
    """Add up judged answers."""
    n, strict, lenient = len(answers), sum(a.strict for a in answers), sum(a.lenient for a in answers)
    formats = [a.format for a in answers if a.format is not None]
    return Report(
        task=protocol.task,
        model=model,
        n=n,
        accuracy=strict / n,
        ci95=wilson(strict, n),
        lenient=lenient / n,
        lenient_ci95=wilson(lenient, n),
        partial=sum(a.partial for a in answers) / n,
        format_rate=sum(formats) / n if formats else None,
        truncated=sum(a.finish == "length" for a in answers) / n,
        failed=sum(a.finish == "error" for a in answers),
        mean_tokens=sum(a.tokens for a in answers) / n,
        protocol=protocol,
        items=tuple(answers),
    )


def _items(task: Task, rows: Sequence[Row], spec: TaskSpec) -> list[Item]:
    items = [_with_system(item, spec.system) for item in list(task.items(rows, spec))[: spec.limit]]
    if not items:
        raise UserError(f"task {task.name} has no items", remedy="give --data a file with questions and answers")
    if len({item.id for item in items}) < len(items):
        raise UserError(f"task {task.name} has items with the same id", remedy="give every row an id of its own")
    return items


def _with_system(item: Item, system: str) -> Item:
    if not system:
        return item
    if item.messages[0].role == "system":
        raise UserError(f"item {item.id} has a system prompt of its own", remedy="leave --system out")
    return Item(item.id, (Message("system", system), *item.messages), item.gold)


def _ask_all(
    generator: Generator, task: Task, spec: TaskSpec, items: Sequence[Item], *, log: AnswerLog, tell: Callable[[], None]
) -> dict[str, Answered]:
    """Ask what is not yet answered, then what failed once more; returns what failed twice."""
    todo = [item for item in items if item.id not in log.answered]
    failed: dict[str, Answered] = {}
    tell()
    for _attempt in range(2):
        failed = {}
        for start in range(0, len(todo), BATCH):
            answers = _ask(generator, task, spec, todo[start : start + BATCH])
            failed.update({a.id: a for a in answers if a.finish == "error"})
            log.add([a for a in answers if a.finish != "error"])
            tell()
        todo = [item for item in todo if item.id in failed]
    return failed


def _ask(generator: Generator, task: Task, spec: TaskSpec, items: Sequence[Item]) -> list[Answered]:
    requests = [Request(item.id, item.messages, _sampling(spec, item.id)) for item in items]
    answered = generator.generate(requests)
    by_id = {completion.id: completion for completion in answered}
    if len(answered) != len(items) or by_id.keys() != {item.id for item in items}:
        raise RuntimeError(f"the generator was asked {len(items)} items and answered {sorted(by_id)[:8]}...")
    return [_judge(task, item, by_id[item.id]) for item in items]


def _sampling(spec: TaskSpec, item: str) -> Sampling:
    return Sampling(max_tokens=spec.max_tokens, temperature=spec.temperature, seed=derive(spec.seed, "evaluate", item))


def _judge(task: Task, item: Item, completion: Completion) -> Answered:
    if completion.finish_reason == "error":
        grade = replace(task.score("", item.gold), rule="no completion", reason=completion.error)
    else:
        grade = task.score(completion.text, item.gold)
    return Answered(
        id=item.id,
        question=item.question,
        gold=item.gold,
        output=completion.text,
        extracted=grade.extracted,
        rule=grade.rule,
        strict=grade.strict,
        lenient=grade.lenient,
        partial=grade.partial,
        format=grade.format_ok,
        tokens=len(completion.token_ids),
        finish=completion.finish_reason,
        reason=grade.reason,
    )


def _hash(value: Sequence[object] | Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, ensure_ascii=True).encode(), digest_size=16).hexdigest()
