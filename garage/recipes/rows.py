"""From the datasets a person names to the tokens a run trains on: read, split by document, rendered, checked, written once.

The tokens lie in `RUN/data`, an artifact like any other. A resumed run finds them there and does not read the datasets again.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from garage.core.artifact import read_manifest
from garage.core.types import Row
from garage.data.encode import Encoding, Ledger, Split, encode_row, split_rows, write_dataset
from garage.data.read import Reading, read_dataset
from garage.data.stops import hard_stops, require_fit
from garage.recipes.run import Run
from garage.specs.train import StopName, TrainSpec
from garage.store.dataset import Encoded, read_encoded
from garage.train.schedule import amount

COUNTED, MEASURED = 100_000, 500  # rows looked at before a run starts: counted, and of these as tokens


class Chain:
    """The rows of several datasets, one after the other, as often as wanted."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.readings = readings

    def __iter__(self) -> Iterator[Row]:
        for reading in self.readings:
            yield from reading

    def report_faults(self, run: Run) -> None:
        """Say which rows of the latest pass could not be used."""
        for reading in self.readings:
            if lost := sum(n for kind, n in reading.counts.items() if kind not in ("rows", "blank")):
                lines = "; ".join(f"line {fault.line}: {fault.message}" for fault in reading.faults[:5])
                message = f"{reading.path}: {lost} rows cannot be used ({lines})"
                run.events.emit("warning", message=message, remedy="repair or remove these lines")


def split_of(paths: Sequence[Path], share: float, seed: int) -> tuple[Chain, Split]:
    """Training and held-out rows: the datasets' own eval splits where there are any, else about `share` of their documents."""
    train, held = Chain([read_dataset(path) for path in paths]), Chain([_eval_split(path) for path in paths if _has_eval(path)])
    if not held.readings:
        return train, split_rows(train, share, seed=seed)
    return train, Split(train, held, sum(1 for _ in train), sum(1 for _ in held), 0)


def estimate(spec: TrainSpec, paths: Sequence[Path], how: Encoding) -> dict[str, object]:
    """About how long a run would be: all rows counted, the first of them measured as tokens; steps alone where there are too many. What
    is read are pairs where rows are pairs, and windows where they are long texts."""
    rows, parts, inputs = 0, 0, 0
    for rows, row in enumerate(islice(Chain([read_dataset(path) for path in paths]), COUNTED + 1), start=1):
        made = encode_row(row, how)[0] if rows <= MEASURED else []
        parts += len(made) // (1 + how.pairs)
        inputs += sum(int(learned.nonzero()[0][-1]) for _, learned in made)
    if rows > COUNTED:
        return {"rows": f"more than {COUNTED:,}", "steps": spec.fit.max_steps}
    if not parts:
        return {"rows": rows, "length": "none of the first rows can be used: see garage dataset validate"}
    measured, share = min(rows, MEASURED), 0.0 if any(map(_has_eval, paths)) else spec.eval_share
    used = max(1, round(rows * (1 - share) * parts / measured))
    length = amount(spec.fit, min(used, -(-used * inputs // (parts * spec.fit.batch_tokens))), used)
    return {"rows": rows, "steps": length.steps, "epochs": round(length.epochs, 4), "length": f"about {length}"}


def encode(
    run: Run, rows: Split, how: Encoding, *, chain: Chain, trained_with: str = "", allowed: Collection[StopName] = ()
) -> tuple[Encoded, Encoded | None]:
    """Write the tokens of both sides, or find them, and refuse what must not be trained on.

    Args:
        trained_with: the template hash the model states, if it states one.
        allowed: stops that are said and not obeyed.

    Raises:
        UserError: a hard stop of `data.validate`, or no row is left.
    """
    place = run.path / "data"
    if not (place / "manifest.json").exists():
        run.events.emit("stage", name="encoding")
        splits: dict[str, Iterable[Row]] = {"train": rows.train} | ({"eval": rows.eval} if rows.num_eval else {})
        parents = [read_manifest(reading.path).id for reading in chain.readings if reading.path.is_dir()]
        ledgers = write_dataset(place, splits, how, parents=parents)
        chain.report_faults(run)
        _tell(run, rows, ledgers["train"])
        run.events.emit("artifact", path=str(place), kind_of="dataset", detail=f"{rows.num_train} rows, {ledgers['train'].tokens:,} tokens")
    if not how.learn_all:  # asked of the stored ledger, so that resuming is no way around a stop
        facts: dict[str, Any] = dict(read_manifest(place, "dataset").facts)
        ledger = Ledger(**facts["ledger"]["train"])
        stops = hard_stops(ledger, template_hash=facts["template_hash"], model_template_hash=trained_with or how.chat.hash)
        for stop in require_fit(stops, allowed):
            run.events.emit("warning", message=f"{stop.message} (allowed by --allow {stop.name})", remedy=stop.remedy)
    train = read_encoded(place, "train")
    assert train is not None, f"{place} has no train split"
    return train, read_encoded(place, "eval")


def _tell(run: Run, rows: Split, ledger: Ledger) -> None:
    if rows.dropped:
        run.events.emit("warning", message=f"{rows.dropped} training rows repeat held-out ones and are left out")
    if ledger.refused:
        message = f"{ledger.refused} rows cannot be rendered ({'; '.join(ledger.reasons)})"
        run.events.emit("warning", message=message, remedy="repair these rows")
    if ledger.cut_rows:
        lost = f"{ledger.cut_tokens} tokens, {ledger.cut_answer_tokens} of them of answers"
        message = f"{ledger.cut_rows} of {ledger.rows} rows are cut: {lost}"
        run.events.emit("warning", message=message, remedy=f"--fit.max_length {ledger.longest} keeps all of them")


def _has_eval(path: Path) -> bool:
    return path.is_dir() and (path / "eval.jsonl").exists()


def _eval_split(path: Path) -> Reading:
    return read_dataset(path, split="eval")
