"""A dataset of the Hub, or of a folder laid out like one, as a stream of objects: no more of it in memory than a few rows.

It is read by the `datasets` library (extra `data`), which runs no code of a dataset: those that are a script are refused. What it
says about a dataset that is gated, missing, or of several configurations is said again with what to do.

Limits: pictures and sounds stay encoded bytes; a stored token (`hf auth login`, HF_TOKEN) is used if there is one.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from garage.core.errors import UserError, needs_extra
from garage.data.read import Item

_REMEDIES = (
    ("gated dataset", "ask for access on its page of the Hub, then `hf auth login`, or set HF_TOKEN"),
    ("scripts are no longer supported", "take its Parquet branch (revision refs/convert/parquet), or save it as Parquet and give the file"),
    ("Config name is missing", "name one of these with config"),
    ("BuilderConfig", "name one of these with config"),
    ("Bad split", "name one of these with split"),
    ("reach", "check the connection, or give a local folder of Parquet or JSONL files"),
    ("Offline", "unset HF_HUB_OFFLINE, or give a local folder of Parquet or JSONL files"),
    ("doesn't exist", "check the name org/name, config and revision; if it is private, `hf auth login`"),
    ("", "check the name org/name, config, split and revision, or give a local folder of Parquet or JSONL files"),
)


def open_hub(
    id: str, *, config: str | None = None, split: str = "train", revision: str | None = None, limit: int | None = None
) -> Iterator[Item]:
    """The rows of one split, numbered from 1, at most `limit`; `id` is `org/name` or a folder. A `UserError` comes at the row it stops."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise needs_extra("datasets", "data") from error
    path = str(Path(id).resolve()) if Path(id).is_dir() else id
    try:
        rows: Any = load_dataset(path, config, split=split, revision=revision, streaming=True).decode(False)
        yield from enumerate(islice(rows, limit), start=1)
    except Exception as error:  # whatever this library and those below it raise is a dataset that cannot be read
        said = " ".join(str(error).split()) or type(error).__name__
        remedy = next(remedy for sign, remedy in _REMEDIES if sign in said)
        raise UserError(f"{id}: {said[:400]}", remedy=remedy) from error
