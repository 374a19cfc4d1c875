"""The learning rate over a run, as a factor of its peak.

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

from garage.specs.train import ScheduleSpec


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
