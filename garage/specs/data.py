"""Settings of the data verbs: `ingest`, `synthesize` and `dataset ...`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

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
    """Write a dataset: questions about a corpus, or arithmetic worksheets."""

    positional: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Path | None = Field(None, description="directory of the corpus to read (extractive)")
    out: Path = Field(description="directory of the dataset to write")
    teacher: Literal["extractive", "worksheets"] = Field(
        "extractive",
        description="extractive: facts stated in the corpus, asked in several ways, no model needed; "
        "worksheets: word problems with checked solutions",
    )
    rows: int | None = Field(None, ge=1, le=10_000_000, description="rows; none = all or 1000")
    test_rows: int | None = Field(None, ge=0, description="test rows, in words or templates that training never sees; none = all or 200")
    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field((1, 2, 3), min_length=1, description="steps of the worksheets, 1 to 5")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything that is drawn")

    @model_validator(mode="after")
    def _fits_teacher(self) -> Self:
        if self.teacher == "extractive" and self.corpus is None:
            raise ValueError("teacher extractive reads a corpus: give --corpus DIR (write one with `garage ingest`)")
        if self.teacher == "worksheets" and self.corpus is not None:
            raise ValueError("teacher worksheets reads no corpus: leave --corpus out")
        return self


class DatasetSpec(Spec):
    """Look at, check or convert a dataset."""

    positional: ClassVar[tuple[str, ...]] = ("action", "data")
    action: Literal["validate", "stats", "preview"] = Field(description="what to do")
    data: Path = Field(description="JSONL, JSON, CSV or a dataset artifact")
    model: str = Field("nano", description="model whose tokenizer and chat template render the rows (stats, preview)")
    rows: int = Field(3, ge=1, le=1000, description="rows to show (preview)")
    max_length: int = Field(1024, ge=2, description="length at which rows would be cut (stats, preview)")
