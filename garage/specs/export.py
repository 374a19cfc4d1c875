"""Settings of `export`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from garage.specs.base import Spec


class ExportSpec(Spec):
    """Write a trained model in a form other tools read, read it back and certify it."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="run or model to export")
    out: Path = Field(description="directory to write")
    format: Literal["adapter", "merged"] = Field("merged", description="adapter: PEFT files; merged: a whole model in the Hub's layout")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="precision of merged weights")
    prompts: int = Field(8, ge=1, le=1000, description="prompts replayed on the exported model for its certificate")
    reports: tuple[Path, ...] = Field((), description="reports of `garage evaluate` whose scores go on the model card")
    max_shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest safetensors file")
