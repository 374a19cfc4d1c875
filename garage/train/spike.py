"""A loss that has left where it was and does not come back: the run is stopped, and the last checkpoint from before is named.

A step is high if its loss exceeds the median of the 50 steps before the rise by the factor `fit.spike` and by 1 nat (3 while there are
fewer than 5), and nine in ten of them. Ten high steps in a row end the run before the tenth changes the weights; a single bad batch, or a
few, end nothing, and count among the 50 afterwards. The nats keep small losses out: a model that knows its rows by heart may well go from
0.01 to 0.1 for a while. The nine in ten keep rows of two kinds out, some known and some new: what one step in ten does, ten in a row do
once in 10^10.

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
        was = median(_known(progress))
        super().__init__(
            f"step {self.step}: the loss is {loss:.4g} and has been high for {PATIENCE} steps; it was {was:.4g}; {kept}",
            remedy="start again with a lower --fit.optimizer.lr or a longer --fit.schedule.warmup; or --fit.spike none to go on regardless",
        )


def watched(progress: Progress, loss: float, factor: float | None) -> Progress:
    """`progress` with one more loss, held against the earlier ones."""
    known = _known(progress)
    is_high = factor is not None and len(known) > 0 and loss > _limit(known, factor)
    return replace(progress, rises=progress.rises + 1 if is_high else 0, recent=(*progress.recent, loss)[-WINDOW - PATIENCE :])


def _known(progress: Progress) -> tuple[float, ...]:
    """The losses before the rise."""
    return progress.recent[: len(progress.recent) - progress.rises][-WINDOW:]


def _limit(known: tuple[float, ...], factor: float) -> float:
    level, nats = median(known), NATS if len(known) >= FEW else EARLY_NATS
    return max(factor * level, level + nats, sorted(known)[9 * len(known) // 10])
