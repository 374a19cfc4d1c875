"""Settings of `plan`: those of a fine-tuning or of a server, and the memory there is for it."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from garage.specs.base import Spec
from garage.specs.train import FitSpec, TuneSpec

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def size_in_bytes(text: str) -> int:
    """"16GB" or "14.7 GiB" in bytes.

    Raises:
        ValueError: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size; write 16GB or 14.7GiB")
    number, unit, binary = found.groups()
    powers = "kmgt".find(unit.lower()) + 1 if unit else 0
    return int(float(number) * (1024**powers if binary else _UNITS[unit.lower()]))


def _checked(text: str | None) -> str | None:
    if text is not None:
        size_in_bytes(text)
    return text


class ServingSpec(Spec):
    """What a server would hold."""

    requests: int = Field(8, ge=1, description="requests at the same time")
    context: int = Field(4096, ge=1, description="tokens of each, prompt and answer")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision of the weights; auto = as published")
    quantization: Literal["none", "int8", "int4", "fp8"] = Field("none", description="bits of the matrices, as serve's "
                                                                  "engine.quantization")  # fmt: skip
    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="numbers of the cache, as serve's engine.kv_cache_dtype")
    max_loras: int = Field(0, ge=0, le=256, description="adapters loaded at once")
    max_lora_rank: int = Field(64, ge=1, le=1024, description="largest rank of an adapter")


class PlanSpec(TuneSpec):
    """Say what a fine-tuning or a server takes, item by item, before it starts; what to change where it does not fit."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="a model, or a published size such as gemma3-12b or qwen3-0.6b, which need not be here")
    out: Path = Field(Path("runs/plan"), description="not written; here so that the spec of a run can be given")
    data: tuple[Path, ...] = Field((), description="not read; here so that the spec of a run can be given")
    fit: FitSpec = Field(FitSpec(max_steps=1), description="the training loop")
    verb: Literal["train", "serve"] = Field("train", description="what is planned")
    serving: ServingSpec = Field(ServingSpec(), description="what a server would hold (verb serve)")
    budget: Annotated[str | None, AfterValidator(_checked)] = Field(None, description="memory there is: 16GB; none = what is free here")
    fill: bool = Field(False, description="if it fits with room to spare, also look for the largest rank and the fastest step that fit")

    @model_validator(mode="before")
    @classmethod
    def _of_a_run(cls, values: object) -> object:
        """The spec of `sft` or `dpo` may be given: what changes no memory is left out."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in ("adapters", "preference")}
