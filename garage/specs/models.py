"""Settings of `models list`, `models pull` and `models rm`."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from garage.specs.base import Spec


class ModelsListSpec(Spec):
    """List the models that are here: nano, runs and exports, and the Hub's own cache."""

    positional: ClassVar[tuple[str, ...]] = ("places",)
    places: tuple[Path, ...] = Field((Path("runs"), Path()), description="directories whose runs and models are listed")


class ModelsPullSpec(Spec):
    """Take a model from the Hub into the Hub's own cache; safetensors, JSON and tokenizer files only."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="Hub id: org/name, or org/name@revision")


class ModelsRmSpec(Spec):
    """Delete a model from the Hub's own cache."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="Hub id: org/name for all revisions, org/name@revision for one")
    yes: bool = Field(False, description="do not ask")
