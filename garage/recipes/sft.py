"""`garage sft`: a model and conversations -> an adapter, or the whole model tuned."""

from garage.core.events import Listener
from garage.recipes.trained import Trained
from garage.recipes.tune import plan, tune
from garage.specs.train import SFTSpec

__all__ = ["plan", "sft"]


def sft(spec: SFTSpec, *listeners: Listener) -> Trained:
    """Fine-tune `spec.model` on `spec.data`; only what the assistant says is learned.

    Raises:
        UserError: a missing model or dataset, rows that must not be trained on, a loss that is not finite, a full disk.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """
    return tune("sft", spec, listeners, lambda run, model, train, held: None)
