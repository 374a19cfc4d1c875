"""Settings of `evaluate` and `compare`."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec

TaskName = Literal["gsm8k", "worksheets", "custom"]


class TaskSpec(Spec):
    """What is asked, and how the answers are sampled; the same for every model that is compared."""

    task: TaskName = Field(description="gsm8k: word problems; worksheets: generated ones; custom: your own questions and answers")
    data: Path | None = Field(None, description="items: JSONL, CSV or a dataset artifact; required for gsm8k and custom")
    split: str = Field("test", description="split of a dataset artifact; of gsm8k: test (all 1,319), reference (400) or dev (any file)")
    limit: int | None = Field(None, ge=1, description="ask only the first n items")
    max_tokens: int = Field(256, ge=1, le=32768, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, le=10, description="0 is greedy, the headline protocol")
    system: str = Field("", description="system prompt put before every question")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of sampling and of generated items")

    @model_validator(mode="after")
    def _has_items(self) -> Self:
        if self.task in ("gsm8k", "custom") and self.data is None:
            raise ValueError(f"task {self.task} needs its items: give --data FILE")
        return self


class EvaluateSpec(TaskSpec):
    """Measure one model on one task."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="model to measure")
    out: Path | None = Field(None, description="directory of the report; none = reports/ in the working directory")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision of the weights; auto = as stored")


class CompareSpec(TaskSpec):
    """Measure two models on the same items and test the difference."""

    positional: ClassVar[tuple[str, ...]] = ("base", "tuned")
    base: str = Field(description="model before")
    tuned: str = Field(description="model after")
    out: Path | None = Field(None, description="directory of the report; none = reports/ in the working directory")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision of the weights; auto = as stored")
