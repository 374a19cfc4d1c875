"""The dataset artifact: rows that people read, and the same rows as tokens that training reads.

    {split}.jsonl           canonical rows, one a line; splits are "train", "eval", "test" and "rejected"
    {split}.tokens.u32      token ids of all rows of the split, end to end, little-endian
    {split}.learned.u8      1 where the token is learned, 0 where it is masked
    {split}.bounds.i64      n + 1 offsets: row i is tokens[bounds[i]:bounds[i + 1]]

A dataset without tokens is written by `data`; `data.encode` writes one with tokens, whose manifest facts carry `template_hash`,
`tokenizer_hash` and the truncation ledger. Token files are memory-mapped: a dataset larger than memory trains as well.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from garage.core.errors import UserError
from garage.core.types import Message, Row, ToolCall

SPLITS = ("train", "eval", "test", "rejected")


@dataclass(frozen=True)
class Encoded:
    """One split as tokens. Arrays may be memory-mapped and are never written to."""

    tokens: np.ndarray
    learned: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (uint32) and learned flags (uint8) of one row."""
        start, end = int(self.bounds[index]), int(self.bounds[index + 1])
        return self.tokens[start:end], self.learned[start:end]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def encode_row(row: Row) -> str:
    """One line of a rows file; empty fields are left out."""
    raw = asdict(row)
    raw["messages"] = [{k: v for k, v in message.items() if v} | {"content": message["content"]} for message in raw["messages"]]
    return json.dumps({k: v for k, v in raw.items() if v or k == "id"}, ensure_ascii=False)


def decode_row(raw: Mapping[str, object]) -> Row:
    """The inverse of `encode_row`."""
    messages = tuple(_message(m) for m in raw.get("messages", ()))  # type: ignore[attr-defined]
    rest = {k: v for k, v in raw.items() if k not in ("messages", "tools")}
    return Row(messages=messages, tools=tuple(raw.get("tools", ())), **rest)  # type: ignore[arg-type]


def write_rows(directory: Path, split: str, rows: Iterable[Row]) -> int:
    """Write one split of rows into an artifact being written; returns how many."""
    count = 0
    with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(encode_row(row) + "\n")
            count += 1
    return count


def read_rows(place: Path, split: str) -> Iterator[Row]:
    """The rows of one split; none if the dataset does not have it."""
    path = place / f"{split}.jsonl"
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield decode_row(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number}: {error}", remedy="write the dataset again") from error


def write_encoded(directory: Path, split: str, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """Write one split as tokens, streaming; each row is (ids, learned). Returns the number of tokens."""
    bounds = [0]
    with open(directory / f"{split}.tokens.u32", "wb") as tokens, open(directory / f"{split}.learned.u8", "wb") as learned:
        for ids, flags in rows:
            if len(ids) != len(flags):
                raise AssertionError(f"{len(ids)} ids but {len(flags)} flags")
            tokens.write(np.asarray(ids, dtype="<u4").tobytes())
            learned.write(np.asarray(flags, dtype="u1").tobytes())
            bounds.append(bounds[-1] + len(ids))
    (directory / f"{split}.bounds.i64").write_bytes(np.asarray(bounds, dtype="<i8").tobytes())
    return bounds[-1]


def read_encoded(place: Path, split: str) -> Encoded | None:
    """One split as memory-mapped tokens, or None if the dataset does not have it.

    Raises:
        UserError: the three files do not belong together.
    """
    path = place / f"{split}.bounds.i64"
    if not path.exists():
        return None
    bounds = np.fromfile(path, dtype="<i8")
    tokens, learned = _mapped(place / f"{split}.tokens.u32", "<u4"), _mapped(place / f"{split}.learned.u8", "u1")
    if len(bounds) == 0 or bounds[0] != 0 or np.any(np.diff(bounds) < 0) or not len(tokens) == len(learned) == bounds[-1]:
        raise UserError(f"{place}: the token files of split {split} do not fit together", remedy="encode the dataset again")
    return Encoded(tokens, learned, bounds)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _message(raw: Mapping[str, object]) -> Message:
    calls = tuple(ToolCall(**call) for call in raw.get("tool_calls", ()))  # type: ignore[attr-defined]
    return Message(**{**raw, "tool_calls": calls})  # type: ignore[arg-type]
