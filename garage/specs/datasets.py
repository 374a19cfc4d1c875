"""Settings of `dataset ...`: the tools that look at a dataset, and those that write a new version of it."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec


class ColumnsSpec(Spec):
    """Which column holds which part of a row, for datasets in no known format."""

    prompt: str | None = Field(None, description="column of the question or instruction")
    input: str | None = Field(None, description="column of a second part of the question")
    answer: str | None = Field(None, description="column of the answer")
    system: str | None = Field(None, description="column of the system prompt")
    messages: str | None = Field(None, description="column of a list of turns")
    tools: str | None = Field(None, description="column of the tools the conversation may call")
    pairs: str | None = Field(None, description="column of a list of question/answer pairs")
    summary: str | None = Field(None, description="column of a summary, kept beside the pairs")
    chosen: str | None = Field(None, description="column of the better answer")
    rejected: str | None = Field(None, description="column of the worse answer")
    text: str | None = Field(None, description="column of plain text")


class SourceSpec(Spec):
    """A dataset of any kind."""

    positional: ClassVar[tuple[str, ...]] = ("data",)
    data: str = Field(description="JSONL, JSON, CSV, Parquet, a dataset or corpus artifact, or the id of a Hub dataset (org/name)")
    split: str = Field("train", description="split of an artifact or a Hub dataset")
    columns: ColumnsSpec = Field(ColumnsSpec(), description="part -> column, where the format is not recognised")
    config: str = Field("", description="configuration of a Hub dataset")
    revision: str = Field("", description="revision of a Hub dataset: a branch, a tag or a commit")
    limit: int | None = Field(None, ge=1, description="read only the first n rows")


class ValidateSpec(SourceSpec):
    """Which rows of a dataset cannot be used, and whether a run on the others may start."""

    model: str = Field("nano", description="model whose tokenizer and chat template render the rows")
    max_length: int = Field(1024, ge=2, description="length at which rows would be cut, in tokens")


class StatsSpec(ValidateSpec):
    """Lengths, copies, languages, topics and what would be cut off."""

    html: Path | None = Field(None, description="also write a page with plots")


class PreviewSpec(ValidateSpec):
    """The rows as the model sees them, each token marked as learned, masked, special, template or cut."""

    rows: int = Field(3, ge=1, le=1000, description="rows to show")
    thinking: bool | None = Field(None, description="render with or without thinking, for models that have it; none = the model's default")
    html: Path | None = Field(None, description="also write a page")


class MapSpec(SourceSpec):
    """Bring any dataset into the canonical form, as an artifact."""

    out: Path | None = Field(None, description="directory of the dataset to write; none = only say what was recognised")
    marks: Literal["keep", "strip", "brackets"] = Field(
        "keep", description="calculator marks such as <<48/2=24>> in answers: keep them, strip them, or write (48/2=24)"
    )
    form: Literal["as_is", "tags"] = Field(
        "as_is", description="tags: solutions that end in '#### 24' become <reasoning> and <answer> blocks, asked for as task gsm8k does"
    )
    rows: int = Field(2, ge=0, le=100, description="rows to show")


class SplitSpec(SourceSpec):
    """Part a dataset by document, so that no document stands on two sides."""

    out: Path = Field(description="directory of the dataset to write")
    eval_share: float = Field(0.05, ge=0, le=0.5, description="share of the rows that watch over training")
    test_share: float = Field(0.1, ge=0, le=0.5, description="share of the rows kept for the test")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the order in which documents are held out")


class EditSpec(Spec):
    """Write a new version of a dataset: rows added, changed, deleted, rated again. The old version stays as it is."""

    positional: ClassVar[tuple[str, ...]] = ("data", "changes")
    data: Path = Field(description="dataset artifact")
    split: str = Field("train", description="split whose rows are changed; the others are kept as they are")
    changes: Path | None = Field(
        None, description='JSONL of {"add": ROW}, {"change": ID, "answer": TEXT}, {"delete": ID} or {"rate": ID, "rating": N}'
    )
    delete: tuple[str, ...] = Field((), description="ids of rows to delete")
    author: str = Field("", description="who made the change, kept in the manifest")
    out: Path = Field(description="directory of the new version")

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.changes is None and not self.delete:
            raise ValueError("nothing is to be changed: give CHANGES or --delete ID")
        return self


class DatasetExportSpec(SourceSpec):
    """Write a dataset in the form other programs read."""

    out: Path = Field(description="file to write; with --push a folder")
    format: str = Field("messages", description="messages, alpaca, sharegpt, question/answer, preference, text or another known format")
    kind: Literal["auto", "jsonl", "parquet"] = Field("auto", description="kind of file; auto = by the ending of --out")
    push: str = Field("", description="also upload it to this Hub dataset (org/name)")
    private: bool = Field(True, description="make a new Hub dataset private")


class RecommendSpec(Spec):
    """Public datasets to start from, by use: size, licence, what is gated, and how their columns map."""

    positional: ClassVar[tuple[str, ...]] = ("use",)
    use: Literal["all", "code", "chat", "domain", "creative", "reasoning"] = Field("all", description="what the model is to do better")
