"""Settings of `dataset dedup`, `dataset decontaminate` and `dataset curate`: tools that write a new dataset without some of the rows."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec
from garage.specs.datasets import ColumnsSpec

RuleName = Literal["question", "template", "ngram"]
LanguageName = Literal["en", "de", "fr", "es", "it", "pt", "nl", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "tamil",
                       "thai", "georgian", "armenian", "japanese", "chinese", "korean"]  # fmt: skip


class SiftSpec(Spec):
    """What goes in, and where the rows that stay and those that go are written."""

    positional: ClassVar[tuple[str, ...]] = ("data",)
    data: str = Field(description="JSONL, JSON, CSV, Parquet, a dataset or corpus artifact (all its splits), or a Hub dataset (org/name)")
    out: Path = Field(description="directory of the dataset to write; rejected rows are kept there with their reasons")
    columns: ColumnsSpec = Field(ColumnsSpec(), description="part -> column, where the format is not recognised")

    @model_validator(mode="after")
    def _leaves_the_old(self) -> Self:
        if self.out.resolve() == Path(self.data).resolve():
            raise ValueError("out is the dataset itself: a new version needs a new place")
        return self


class DedupSpec(SiftSpec):
    """Drop copies and near copies; a training row that repeats a held-out one goes, else the best rated or first of each group stays."""

    threshold: float = Field(0.7, gt=0, le=1, description="likeness (Jaccard of word runs) from which two rows are near copies")
    shingle: int = Field(5, ge=1, le=13, description="words in a run; fewer find copies with more words changed")


class DecontaminateSpec(SiftSpec):
    """Drop training rows that hold questions of an evaluation set. GSM8K's test and AIME 2024 are always among the sets."""

    against: tuple[Path, ...] = Field((), description="further evaluation sets: files, or artifacts (their test and eval splits)")
    rules: tuple[RuleName, ...] = Field(
        ("question", "template", "ngram"), min_length=1,
        description="question: the same words; template: the same but for its numbers; ngram: 13 words in a row, numbers masked",
    )  # fmt: skip


class CurateSpec(SiftSpec):
    """Keep rows that are complete, stand alone, follow from their source and are rated well."""

    corpus: Path | None = Field(None, description="corpus the rows were made from; rows that name a chunk are checked against it")
    judge: str = Field("", description="model that rates the rows: MODEL or http://host/v1#model; empty = a heuristic that needs no model")
    threshold: float = Field(7.0, ge=0, le=10, description="lowest rating of a row that stays, of ten")
    support: float = Field(0.6, ge=0, le=1, description="lowest share of an answer's words that its chunk has")
    min_words: int = Field(1, ge=0, description="shortest answer, in words")
    max_words: int = Field(2000, ge=1, description="longest answer, in words")
    languages: tuple[LanguageName, ...] = Field((), description="languages or scripts that stay; none = any, and unknown ones always stay")
    private: Literal["flag", "drop"] = Field("flag", description="rows with e-mail, phone, IBAN, card, key or IP: mark in meta, or drop")
    batch: int = Field(32, ge=1, le=256, description="rows the judge rates at once")
    concurrency: int = Field(8, ge=1, le=256, description="questions to a remote judge at once")
    temperature: float = Field(0.1, ge=0, le=2, description="temperature of the judge")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the judge's sampling")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}")
        return self
