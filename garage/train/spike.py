"""A loss that has left where it was and does not come back: the run is stopped, and the last checkpoint from before is named.

A step is high if its loss exceeds the median of the last 50 steps that were not high, by the factor `fit.spike` and by 1 nat (3 while there
are fewer than 5). Ten high steps in a row end the run before the tenth changes the weights; a single bad batch, or a few, end nothing. The
nats keep small losses out: a model that knows its rows by heart may well go from 0.01 to 0.1 for a while.

No checkpoint is written while the loss is high. One written just before the first high step may hold the weights that made it, so the one
that is named is older than that.

Limits: a rise slower than a factor of 3 in 50 steps is not seen here, but by the held-out loss (`fit.patience`); nor is a new model that
starts at the loss of guessing and never leaves it.
"""

from dataclasses import replace
from pathlib import Path
from statistics import median

from garage.core.errors import UserError
from garage.store.checkpoint import place_of, saved_steps
from garage.train.resume import Progress

WINDOW, PATIENCE = 50, 10
FEW, NATS, EARLY_NATS = 5, 1.0, 3.0


class LossSpike(UserError):
    """The loss has been high for `PATIENCE` steps, up to `step`; `checkpoint` is the newest from before, if there is one."""

    def __init__(self, run: Path, progress: Progress, loss: float) -> None:
        good = [step for step in saved_steps(run) if step <= progress.step - PATIENCE]
        self.step, self.name = progress.step + 1, "loss_spike"
        self.checkpoint = place_of(run, good[-1]) if good else None
        kept = f"the weights of step {good[-1]} in {self.checkpoint} are from before" if good else "no checkpoint is from before it"
        was = median(progress.recent)
        super().__init__(
            f"step {self.step}: the loss is {loss:.4g} and has been high for {PATIENCE} steps; it was {was:.4g}; {kept}",
            remedy="start again with a lower --fit.optimizer.lr or a longer --fit.schedule.warmup; or --fit.spike none to go on regardless",
        )


def watched(progress: Progress, loss: float, factor: float | None) -> Progress:
    """`progress` with one more loss held against the earlier ones."""
    known = progress.recent
    level, nats = median(known or [loss]), NATS if len(known) >= FEW else EARLY_NATS
    if factor is not None and loss > max(factor * level, level + nats):
        return replace(progress, rises=progress.rises + 1)
    return replace(progress, rises=0, recent=(*progress.recent, loss)[-WINDOW:])
