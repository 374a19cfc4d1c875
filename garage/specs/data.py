"""Settings of the data verbs: `ingest`, `synthesize`, `worksheets` and `dataset ...`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from garage.specs.base import Spec


class IngestSpec(Spec):
    """Read documents into a corpus of chunks that know where they came from."""

    positional: ClassVar[tuple[str, ...]] = ("paths",)
    paths: tuple[Path, ...] = Field(min_length=1, description="files and folders to read")
    out: Path = Field(description="directory of the corpus to write")
    chunk_tokens: int = Field(256, ge=16, le=8192, description="largest chunk, in tokens of the tokenizer")
    overlap_tokens: int = Field(0, ge=0, description="tokens repeated from the end of the chunk before; less than chunk_tokens")
    tokenizer: str = Field("nano", description="model whose tokenizer counts the tokens")
    seconds_per_file: float = Field(60.0, gt=0, description="a file that takes longer is given up and reported")
    memory_per_file: int = Field(1 << 30, ge=1 << 26, description="bytes of memory one file may use before it is given up and reported")


class SynthesizeSpec(Spec):
    """Turn a corpus into question/answer rows."""

    positional: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Path = Field(description="directory of the corpus to read")
    out: Path = Field(description="directory of the dataset to write")
    teacher: Literal["extractive"] = Field("extractive", description="extractive: facts stated in tables, lists and sentences, asked in several ways, no model needed")
    rows: int | None = Field(None, ge=1, description="rows wanted; none = all that the corpus supports")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the choice of phrasings")


class WorksheetsSpec(Spec):
    """Write arithmetic word problems with checked solutions."""

    out: Path = Field(description="directory of the dataset to write")
    rows: int = Field(1000, ge=1, le=10_000_000, description="problems to write")
    test_rows: int = Field(200, ge=0, description="problems of the test split, from templates that training never sees")
    levels: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="difficulty levels to draw from, 1 to 5: the number of steps")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the generator")


class DatasetSpec(Spec):
    """Look at, check or convert a dataset."""

    positional: ClassVar[tuple[str, ...]] = ("action", "data")
    action: Literal["validate", "stats", "preview"] = Field(description="what to do")
    data: Path = Field(description="JSONL, JSON, CSV or a dataset artifact")
    model: str = Field("nano", description="model whose tokenizer and chat template render the rows (stats, preview)")
    rows: int = Field(3, ge=1, le=1000, description="rows to show (preview)")
    max_length: int = Field(1024, ge=2, description="length at which rows would be cut (stats, preview)")
