"""`garage dataset dedup|decontaminate|curate`: a new dataset without the rows that should not be learned.

Each tool first decides on every row, then reads the rows again and writes them: those that stay under their split, those that go under
"rejected", with the reason in `meta["rejected"]` and, where it was not training, their split in `meta["split"]`. What earlier tools
rejected is carried along. Memory is one short note a row.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import fmean

from garage.core.artifact import MANIFEST, read_manifest
from garage.core.events import EventLog, Listener
from garage.core.types import Row
from garage.data.curate import curated
from garage.data.decontaminate import built_in, contamination, fingerprint
from garage.data.dedup import deduplicate
from garage.data.encode import write_dataset
from garage.data.read import Reading, read_dataset
from garage.recipes.rows import Chain
from garage.recipes.run import Run
from garage.recipes.sources import open_source
from garage.specs.curate import CurateSpec, DecontaminateSpec, DedupSpec, SiftSpec
from garage.specs.datasets import SourceSpec
from garage.store.corpus import read_chunks
from garage.store.dataset import read_rows

Note = dict[str, str]  # what is added to a row's meta; a row whose note has "rejected" goes


@dataclass(frozen=True)
class Sifted:
    """What became of the rows: `rejected` counts them by kind of reason, `flagged` by kind of private data."""

    dataset: Path
    total: int
    kept: int
    retention: float
    rejected: dict[str, int]
    mean_rating: float | None
    flagged: dict[str, int]


def dedup(spec: DedupSpec, *listeners: Listener) -> Sifted:
    """Drop copies and near copies within and across the splits."""
    splits = _open(spec)
    EventLog(None, *listeners).emit("stage", name="comparing rows")
    found = deduplicate(*splits.values(), threshold=spec.threshold, shingle=spec.shingle)
    return _write(spec, splits, [_note(reason) for _, reason in found], *listeners)


def decontaminate(spec: DecontaminateSpec, *listeners: Listener) -> Sifted:
    """Drop training rows that hold questions of the evaluation sets; held-out rows stay as they are."""
    splits, events, prints = _open(spec), EventLog(None, *listeners), list(built_in())
    for path in spec.against:
        held = [read_dataset(path, split=split) for split in ("test", "eval") if (path / f"{split}.jsonl").exists()]
        prints.append(fingerprint(path.name, chain(*held or [read_dataset(path)])))
    for each in prints:
        events.emit("stage", name=f"against {each.name}", detail=each.about or f"{each.rows:,} rows")
    reasons = (contamination(row, prints, spec.rules) if split == "train" else "" for split, rows in splits.items() for row in rows)
    return _write(spec, splits, [_note(reason) for reason in reasons], *listeners)


def curate(spec: CurateSpec, *listeners: Listener) -> Sifted:
    """Check and rate every row.

    Raises:
        UserError: there is no such corpus or judge, or the judge rates nothing.
    """
    splits, events, judge, notes, unchecked = _open(spec), EventLog(None, *listeners), None, list[Note](), 0
    if spec.judge:
        from garage.recipes.teachers import open_generator  # torch is loaded only when a model is asked

        judge = open_generator(spec.judge, concurrency=spec.concurrency)
    chunks = {chunk.id: "\n".join([*chunk.headings, chunk.text]) for chunk in read_chunks(spec.corpus)} if spec.corpus else {}
    stream = chain(*splits.values())
    while rows := list(islice(stream, spec.batch * spec.concurrency)):
        pairs = [(row, chunks.get(row.meta["chunk"], "") if chunks and "chunk" in row.meta else None) for row in rows]
        notes += curated(pairs, judge, spec)
        unchecked += sum(source is None and bool(spec.corpus or "chunk" in row.meta) for row, source in pairs)
        events.emit("stage", name="rating", step=len(notes), detail=f"{len(notes):,} rows")
    if unchecked:
        remedy = "give --corpus, the corpus they were made from; rows that name no chunk of it cannot be checked"
        events.emit("warning", message=f"{unchecked} rows are not checked against their source", remedy=remedy)
    return _write(spec, splits, notes, *listeners)


def _note(reason: str) -> Note:
    return {"rejected": reason} if reason else {}


def _open(spec: SiftSpec) -> dict[str, Reading]:
    """The splits, by worth."""
    place = Path(spec.data)
    if not (place / MANIFEST).exists() or read_manifest(place).kind != "dataset":
        return {"train": open_source(SourceSpec(data=spec.data, columns=spec.columns))}
    return {split: read_dataset(place, split=split) for split in ("test", "eval", "train") if (place / f"{split}.jsonl").exists()}


def _write(spec: SiftSpec, splits: Mapping[str, Reading], notes: Sequence[Note], *listeners: Listener) -> Sifted:
    """Write the rows, whose notes are in the order of the splits; prints one line."""
    place, later = Path(spec.data), iter(notes)
    rows: dict[str, Iterator[Row]] = {split: _kept(reading, later) for split, reading in splits.items()}
    rows["rejected"] = chain(read_rows(place, "rejected"), _gone(splits, notes))
    parents = [read_manifest(place).id if (place / MANIFEST).exists() else spec.data]
    write_dataset(spec.out, rows, None, parents=parents, spec=spec.resolved())
    Chain([*splits.values()]).report_faults(Run(spec.out, EventLog(None, *listeners)))
    reasons = Counter(re.split(r":| of ", note["rejected"])[0] for note in notes if "rejected" in note)
    flags = Counter(flag for note in notes if "flags" in note for flag in note["flags"].split(", "))
    rated, total, kept = [float(note["rating"]) for note in notes if "rating" in note], len(notes), len(notes) - reasons.total()
    mean, retention = fmean(rated) if rated else None, kept / max(1, total)
    words = [f"{n:,} {kind}" for kind, n in reasons.most_common()]
    print(f"{spec.out}: kept {kept:,} of {total:,} rows ({retention:.1%})", *([f"mean rating {mean:.1f}"] if mean is not None else []),
          *([f"rejected {', '.join(words)}"] if words else []), *([f"flagged {flags.total():,}"] if flags else []), sep="; ")  # fmt: skip
    return Sifted(spec.out, total, kept, retention, dict(reasons), mean, dict(flags))


def _kept(rows: Reading, notes: Iterator[Note]) -> Iterator[Row]:
    return (replace(row, meta={**row.meta, **note}) for row, note in zip(rows, notes, strict=False) if "rejected" not in note)


def _gone(splits: Mapping[str, Reading], notes: Sequence[Note]) -> Iterator[Row]:
    stream = ((split, row) for split, rows in splits.items() for row in rows)
    for (split, row), note in zip(stream, notes, strict=True):
        if "rejected" in note:
            yield replace(row, meta={**row.meta, **note, **({"split": split} if split != "train" else {})})
