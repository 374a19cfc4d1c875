"""Opening whatever a person names as a dataset: a file, an artifact, or a dataset of the Hub."""

from collections.abc import Iterator
from pathlib import Path

from garage.core.errors import UserError
from garage.data.hub import open_hub
from garage.data.read import SUFFIXES, Item, Reading, read_dataset, read_items
from garage.specs.datasets import SourceSpec
from garage.store.locate import HUB_ID


def open_source(spec: SourceSpec) -> Reading:
    """The rows of the dataset that a spec names; what is a path, or ends like a file, is no Hub id.

    Raises:
        UserError: there is no such dataset, or its columns fit no known format.
    """
    path, columns = Path(spec.data), {part: column for part, column in spec.columns.model_dump().items() if column}
    if path.exists() or path.suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(spec.data):
        if spec.config or spec.revision or (columns and path.is_dir()):
            message = f"{spec.data} takes no --config and --revision, which are the Hub's, and an artifact no --columns"
            raise UserError(message, remedy="leave these options out")
        reading = read_dataset(path, columns=columns, split=spec.split)
    else:
        reading = read_items(lambda: _hub_items(spec), path, columns=columns)
    reading.limit = spec.limit
    return reading


def _hub_items(spec: SourceSpec) -> Iterator[Item]:
    return open_hub(spec.data, config=spec.config or None, split=spec.split, revision=spec.revision or None, limit=spec.limit)
