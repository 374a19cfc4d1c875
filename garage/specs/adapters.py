"""Settings of `adapters average`."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec


class AverageSpec(Spec):
    """Make one adapter of several over the same base: the weighted sum of their updates."""

    positional: ClassVar[tuple[str, ...]] = ("adapters",)
    adapters: tuple[str, ...] = Field(min_length=2, description="runs or adapters to add up, all over one base")
    weights: tuple[float, ...] = Field((), description="one weight each; none = equal shares")
    out: Path = Field(description="directory to write")
    rank: int | None = Field(None, ge=1, description="largest rank of the result; none = all ranks together, which loses nothing")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.weights and len(self.weights) != len(self.adapters):
            raise ValueError(f"there are {len(self.adapters)} adapters and {len(self.weights)} weights")
        return self
