"""Settings of `demo`, `runs` and `doctor`."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from garage.specs.base import Spec


class RunsSpec(Spec):
    """Look at run directories, with or without a platform."""

    positional: ClassVar[tuple[str, ...]] = ("action", "place")
    action: Literal["list", "show", "follow"] = Field("list", description="list runs, show one, or follow one while it runs")
    place: Path = Field(Path("runs"), description="directory of a run, or of runs (list)")


class DoctorSpec(Spec):
    """Check the install, the processor, the memory and the disk."""

    place: Path = Field(Path(), description="directory whose disk is checked")
    math: bool = Field(False, description="also check that the ways of computing a gradient agree on this machine")


class DemoSpec(Spec):
    """Run the whole road on the embedded model and sample documents."""

    out: Path = Field(Path("garage-demo"), description="directory of everything the demo writes")
    resume: bool = Field(False, description="go on where an interrupted demo stopped")
    open: bool = Field(False, description="open the report in a browser at the end")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the whole demo")
