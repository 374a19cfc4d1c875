"""How long a run is, and the learning rate over it, as a factor of its peak.

A pure function of the optimizer step: it ticks once per update, its length is in updates, and a resumed run needs nothing but the step.
Warm-up rises over the first `warmup` share of the steps; its first step is 1/w of the peak, not 0, which would be a step without effect.
For the same reason the floor is what step `total`, the one after the last, would get.

    constant   1
    linear     1 - (1 - floor) p
    cosine     floor + (1 - floor) (1 + cos(pi p)) / 2          (Loshchilov & Hutter, arXiv 1608.03983)
    wsd        1, then linear to floor over the last `decay` share    (Hu et al., arXiv 2404.06395)

where p runs from 0 after warm-up to 1 at `total`.
"""

import math
from dataclasses import dataclass

from garage.specs.train import FitSpec, ScheduleSpec


@dataclass(frozen=True)
class Amount:
    """What a run reads; `overridden` is what its epochs would have come to, in steps, where max_steps decides."""

    steps: int
    epochs: float
    rows: int
    overridden: int | None = None

    def __str__(self) -> str:
        said = "" if self.overridden is None else f"; max_steps overrides epochs, which would be {self.overridden:,} steps"
        return f"{self.steps:,} steps, {self.epochs:.3g} epochs, {self.rows:,} rows read{said}"


def amount(spec: FitSpec, steps_per_epoch: int, num_rows: int) -> Amount:
    """The length of a run over `num_rows` rows that make `steps_per_epoch` steps."""
    by_epochs = max(1, round((spec.epochs or 0) * steps_per_epoch))
    steps = spec.max_steps or by_epochs
    epochs = steps / steps_per_epoch
    return Amount(steps, epochs, round(epochs * num_rows), by_epochs if spec.max_steps and spec.epochs else None)


def factor(step: int, total: int, spec: ScheduleSpec) -> float:
    """The factor of update `step` (counted from 0) in a run of `total` updates."""
    warmup = round(spec.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, total - round(spec.decay * total)) if spec.kind == "wsd" else warmup
    if spec.kind == "constant" or step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, total - start))
    fall = (1 + math.cos(math.pi * progress)) / 2 if spec.kind == "cosine" else 1 - progress
    return spec.floor + (1 - spec.floor) * fall
