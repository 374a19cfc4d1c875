"""`garage dataset map|split|edit|export|recommend`: new versions and other forms of a dataset. What is there is never changed."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from garage.core.artifact import MANIFEST, read_manifest
from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.core.types import Row
from garage.data.encode import split_rows, write_dataset
from garage.data.formats import from_rows
from garage.data.read import json_objects
from garage.data.versions import apply_changes
from garage.data.write import write_objects
from garage.export.hub import push
from garage.recipes.solutions import Solutions
from garage.recipes.sources import open_source
from garage.specs.base import Spec
from garage.specs.datasets import DatasetExportSpec, EditSpec, MapSpec, RecommendSpec, SplitSpec
from garage.store.dataset import SPLITS, read_rows

FLAGS = {"first": "try this first", "gated": "accept its terms on the Hub first", "script": "needs a loading script"}


@dataclass(frozen=True)
class Written:
    """A dataset that was written: rows by split, and what a tool counted on the way."""

    dataset: Path | None
    format: str
    confidence: float
    rows: dict[str, int]
    counts: dict[str, int]


@dataclass(frozen=True)
class ExportedRows:
    """What `garage dataset export` returns."""

    path: Path
    rows: int
    format: str
    url: str


def map_rows(spec: MapSpec, *listeners: Listener) -> Written:
    """Say what format a dataset has, show rows of it, and with `out` write them in the canonical form.

    Raises:
        UserError: there is no such dataset, or its columns fit no known format.
    """
    reading = open_source(spec)
    print(f"{spec.data}: format {reading.format}, fitted by {reading.confidence:.0%} of the first rows")
    rows = Solutions(reading, spec)
    for row in islice(rows, spec.rows):
        print("\n".join(f"  {message.role}: {message.content[:200]}" for message in row.messages) or f"  text: {row.text[:200]}", "\n")
    if spec.out is None:
        return Written(None, reading.format, reading.confidence, {}, {})
    name = spec.split if spec.split in SPLITS else "train"  # the Hub has others, such as "validation" or "train[:1%]"
    counts = _write(spec.out, {name: rows}, spec, spec.data)
    lost = {kind: n for kind, n in (reading.counts | rows.counts).items() if n and kind not in ("rows", "blank")}
    if rows.wrong:
        wrong = f"{spec.data}: {len(rows.wrong)} rows have a calculator mark whose two sides differ ({', '.join(rows.wrong[:5])})"
        EventLog(None, *listeners).emit("warning", message=wrong, remedy="they are kept; look at them with `garage dataset preview`")
    print(f"{spec.out}: {_listed(counts)} rows" + f"; {_listed(lost)}" * bool(lost))
    for fault in reading.faults[:5]:
        EventLog(None, *listeners).emit("warning", message=f"{spec.data}, line {fault.line}: {fault.message}")
    return Written(spec.out, reading.format, reading.confidence, counts, lost)


def split(spec: SplitSpec, *_: Listener) -> Written:
    """Hold out whole documents for the test, then for watching over training."""
    reading = open_source(spec)
    first = split_rows(reading, spec.test_share, seed=spec.seed)
    second = split_rows(first.train, spec.eval_share / max(1e-9, 1 - spec.test_share), seed=spec.seed + 1)
    counts = _write(spec.out, {"train": second.train, "eval": second.eval, "test": first.eval}, spec, spec.data)
    copies = first.dropped + second.dropped
    print(f"{spec.out}: {_listed(counts)} rows; {copies} training rows repeat held-out ones and are left out")
    return Written(spec.out, reading.format, reading.confidence, counts, {"copies": copies})


def edit(spec: EditSpec, *_: Listener) -> Written:
    """Write the next version of a dataset.

    Raises:
        UserError: a change is malformed or names no row; nothing is written then.
    """
    read_manifest(spec.data, "dataset")
    changes = [(line, item) for line, item in json_objects(spec.changes) if item != ""] if spec.changes else []
    for line, item in changes:
        if isinstance(item, str):
            raise UserError(f"{spec.changes}, line {line}: {item}", remedy="write one JSON object a line")
    wanted = [(line, item) for line, item in changes if not isinstance(item, str)] + [(0, {"delete": id}) for id in spec.delete]
    edited = apply_changes(read_rows(spec.data, spec.split), wanted)
    splits: dict[str, Iterable[Row]] = {name: read_rows(spec.data, name) for name in SPLITS if (spec.data / f"{name}.jsonl").exists()}
    facts = {"edited": dict(edited.counts), "author": spec.author}
    counts = _write(spec.out, splits | {spec.split: edited.rows}, spec, str(spec.data), facts)
    print(f"{spec.out}: {_listed(edited.counts)} rows; the old version stays at {spec.data}")
    return Written(spec.out, "dataset", 1.0, counts, dict(edited.counts))


def export(spec: DatasetExportSpec, *_: Listener) -> ExportedRows:
    """Write one split as other programs read it, and with `push` upload it.

    Raises:
        UserError: a row does not fit into the format, the file exists, or the Hub refuses.
    """
    if spec.push and spec.out.exists():
        raise UserError(f"{spec.out} exists already, and all that is in it would be uploaded", remedy="give --out a new folder")
    kind = spec.kind if spec.kind != "auto" else "parquet" if spec.out.suffix == ".parquet" else "jsonl"
    path = spec.out / f"{spec.split}.{kind}" if spec.push else spec.out
    count = write_objects(from_rows(open_source(spec), spec.format), path, kind)
    url = push(spec.out, spec.push, kind="dataset", private=spec.private) if spec.push else ""
    print(f"{count} rows as {spec.format}: {url or path}")
    return ExportedRows(path, count, spec.format, url)


def recommend(spec: RecommendSpec, *_: Listener) -> dict[str, Any]:
    """Print the public datasets for a use, and return them."""
    chosen = {use: entry for use, entry in recommended().items() if spec.use in ("all", use)}
    for use, entry in chosen.items():
        print(f"{use}: {entry['gain']}; it may lose {entry['loss']}")
        for each in entry["sets"]:
            flags = "".join(f" ({words})" for flag, words in FLAGS.items() if each.get(flag))
            columns = "".join(f" --columns.{part} {name}" for part, name in each.get("columns", {}).items())
            print(f"  {each['id']}{flags}: {each['about']}; licence: {each['licence']}")
            print(f"    garage dataset map {each['id']}{columns} --out data")
    return chosen


def recommended() -> dict[str, Any]:
    """The catalogue by use."""
    return tomllib.loads((files("garage") / "assets" / "recommended.toml").read_text(encoding="utf-8"))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items())


def _write(
    out: Path, splits: Mapping[str, Iterable[Row]], spec: Spec, source: str, facts: Mapping[str, object] | None = None
) -> dict[str, int]:
    parents = [read_manifest(Path(source)).id] if (Path(source) / MANIFEST).exists() else [source]
    write_dataset(out, splits, None, parents=parents, spec=spec.resolved(), facts=facts)
    written = read_manifest(out, "dataset").facts
    return {name: int(str(written[f"{name}_rows"])) for name in splits}
