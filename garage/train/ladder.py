"""What is given up when memory runs out, one rung at a time, in the order of `fit.on_oom`.

The first four rungs change no result: smaller passes (the step stays as large), layers that keep their input alone, their MLP in tiles, and
their inputs in the host's memory. Each is taken as often as it still wins something. The others change what is trained (shorter rows, a
smaller rank, no magnitudes, fewer targets); a recipe takes them, and the run goes on from the weights it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from garage.core.errors import UserError
from garage.models.recompute import Thrift
from garage.specs.train import FitSpec, Rung
from garage.train.batches import MULTIPLE
from garage.train.resume import Progress

SMALLEST_TILE, FIRST_TILE = 128, 1024


class OutOfMemory(UserError):
    """Nothing that changes no result is left to give up; `progress` is how far the run came, `share` how far into its epoch."""

    def __init__(self, progress: Progress, lean: "Lean", share: float, detail: str) -> None:
        super().__init__(
            f"step {progress.step + 1}: out of memory ({detail}), and fit.on_oom leaves nothing more to give up",
            remedy="lower --fit.max_length or --adapter.rank, give --adapter.quantize nf4, or ask garage plan for what fits",
        )
        self.progress, self.lean, self.share = progress, lean, share


@dataclass(frozen=True)
class Lean:
    """How a step is computed; whatever it is, the gradient is the same. `layers` of them keep their input alone."""

    micro_tokens: int
    layers: int
    thrift: Thrift

    @property
    def words(self) -> str:
        tile = "" if self.thrift.tile is None else f", MLP in tiles of {self.thrift.tile}"
        host = ", their inputs in the host's memory" if self.thrift.is_offloaded else ""
        return f"passes of {self.micro_tokens} tokens, {self.layers} layers computed again{tile}{host}"

    def settings(self, spec: FitSpec) -> FitSpec:
        """The same as settings of a run."""
        computed: dict[str, object] = {"micro_tokens": self.micro_tokens, "tile": self.thrift.tile, "offload": self.thrift.is_offloaded}
        computed |= {"checkpointing": "all"} if self.layers else {}
        return spec.model_copy(update=computed)


def first(spec: FitSpec, layers: int) -> Lean:
    """What the settings ask for."""
    return Lean(spec.micro_tokens, layers, Thrift(spec.tile, spec.offload))


def lighter(lean: Lean, rungs: tuple[Rung, ...], *, longest: int, layers: int, device: str) -> tuple[Rung, Lean] | None:
    """The next rung that changes no result, and what it leads to; None if none is left."""
    return next(((rung, other) for rung in rungs for other in _below(lean, rung, longest, layers, device)), None)


def _below(lean: Lean, rung: Rung, longest: int, layers: int, device: str) -> Iterator[Lean]:
    tile = lean.thrift.tile
    smaller = max(longest, lean.micro_tokens // 2)
    if rung == "micro" and -(-smaller // MULTIPLE) < -(-lean.micro_tokens // MULTIPLE):
        yield replace(lean, micro_tokens=smaller)
    if rung == "checkpointing" and lean.layers < layers:
        yield replace(lean, layers=layers)
    if rung == "tile" and lean.layers and (tile or 2 * FIRST_TILE) > SMALLEST_TILE and lean.micro_tokens > SMALLEST_TILE:
        yield replace(lean, thrift=replace(lean.thrift, tile=max(SMALLEST_TILE, min(tile or lean.micro_tokens, 2 * FIRST_TILE) // 2)))
    if rung == "offload" and lean.layers and device == "cuda" and not lean.thrift.is_offloaded:
        yield replace(lean, thrift=replace(lean.thrift, is_offloaded=True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, could not get memory."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
