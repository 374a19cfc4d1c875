"""Rows as a file for other programs: JSON Lines, or Parquet through pyarrow (extra `data`). Streamed; whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from garage.core.errors import UserError, needs_extra

BATCH = 1000
Object = Mapping[str, object]


def write_objects(objects: Iterable[Object], path: Path, kind: Literal["jsonl", "parquet"]) -> int:
    """Write a file that is there only once it is complete; returns the number of rows.

    Raises:
        UserError: the file exists, or the rows of a Parquet file have different columns.
    """
    if path.exists():
        raise UserError(f"{path} exists already", remedy="give another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        count = (_write_lines if kind == "jsonl" else _write_parquet)(objects, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _write_lines(objects: Iterable[Object], path: Path) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for each in objects:
            file.write(json.dumps(each, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _write_parquet(objects: Iterable[Object], path: Path) -> int:
    try:
        import pyarrow  # an extra, and slow to import
        import pyarrow.parquet
    except ImportError as error:
        raise needs_extra("pyarrow", "data") from error
    batches, count, writer = _batches(objects), 0, None
    try:
        for batch in batches:
            table = pyarrow.Table.from_pylist(batch, schema=writer.schema if writer else None)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(batch)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        remedy = "write JSON Lines, which needs no common columns"
        raise UserError(f"the rows do not fit into one table: {str(error)[:200]}", remedy=remedy) from error
    finally:
        if writer:
            writer.close()
    return count


def _batches(objects: Iterable[Object]) -> Iterator[list[dict[str, object]]]:
    batch: list[dict[str, object]] = []
    for each in objects:
        batch.append(dict(each))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
