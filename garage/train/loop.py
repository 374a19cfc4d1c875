"""The one training loop: pretraining, fine-tuning, whole models and adapters.

    for each step:  forward and backward over its micro-batches, one clip, one update, one metric event
    now and then:   evaluate on the held-out rows; write a checkpoint
    at the end:     go back to the weights of the best evaluation

What is learned from a batch is the `objective`'s business and which weights move is said by `requires_grad`; the loop knows neither. The loss of a
step is the sum over its learned tokens divided by their number, over all its micro-batches together, so that splitting a step changes nothing.

A run continues from its newest checkpoint if it has one (`train.resume`). SIGINT and SIGTERM finish the step, save, and raise
KeyboardInterrupt; a second one is obeyed at once. A loss or gradient that is not finite ends the run before it reaches the weights.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch.nn.utils import get_total_norm

from garage.core.errors import UserError
from garage.core.events import EventLog
from garage.core.seeds import derive
from garage.models.families import Model
from garage.specs.train import FitSpec
from garage.store.checkpoint import place_of, saved_steps
from garage.store.dataset import Encoded
from garage.train.batches import Batches, Ledger, Step, fingerprint
from garage.train.memory import peak_bytes, recomputed, threads_or_cores, used_bytes
from garage.train.objectives.likelihood import Likelihood, Objective
from garage.train.optim import make_optimizer
from garage.train.precision import Masters
from garage.train.resume import Keeper, Progress, identity_of
from garage.train.schedule import factor


class NotFinite(UserError):
    """The loss or the gradient of `step` is NaN or infinite."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {norm}; training stopped before the update",
            remedy="lower the learning rate or the clip, or look for damaged rows; the last checkpoint is good",
        )
        self.step = step


@dataclass(frozen=True)
class Fitted:
    """What a run came to. `loss` is the last step's; `restored_step` is the step whose weights the model now has."""

    steps: int
    loss: float
    best_loss: float | None
    best_step: int | None
    restored_step: int
    tokens: int
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    ledger: Ledger


def fit(
    model: Model, *, train: Encoded, held: Encoded | None, spec: FitSpec, run: Path, events: EventLog, objective: Objective | None = None
) -> Fitted:
    """Train the weights of `model` that require gradients, in place; `run` is the run's directory.

    Afterwards the trained weights are float32 and, if there are held-out rows, those of the best evaluation. Frozen weights are cast to
    `spec.dtype`, so load them in it.

    Raises:
        UserError: nothing to train or to learn, a changed spec on resume, a full disk, or a loss that is not finite (NotFinite).
        KeyboardInterrupt: SIGINT or SIGTERM, after a checkpoint.
    """
    torch.set_num_threads(threads_or_cores(spec.threads))
    torch.manual_seed(derive(spec.seed, "fit"))
    trainer = _Trainer(model, train, held, spec, run, events, objective or Likelihood(spec.loss_chunk))
    with recomputed(model.model.layers, spec.checkpointing), _stop_requests() as stop:
        trainer.resume()
        trainer.train(stop)
    return trainer.finish()


class _Trainer:
    def __init__(
        self, model: Model, train: Encoded, held: Encoded | None, spec: FitSpec, run: Path, events: EventLog, objective: Objective
    ) -> None:
        self.model, self.spec, self.run, self.events, self.objective = model, spec, run, events, objective
        self.device = next(model.parameters()).device
        sizes = {"max_length": spec.max_length, "micro_tokens": spec.micro_tokens, "device": self.device}
        self.batches = Batches(train, batch_tokens=spec.batch_tokens, **sizes)
        self.held = Batches(held, batch_tokens=spec.micro_tokens, **sizes) if held is not None and len(held) else None
        self.total = spec.max_steps or max(1, round((spec.epochs or 0) * self.batches.steps_per_epoch))
        self.masters = Masters(model, getattr(torch, spec.dtype))
        if not self.masters.tensors:
            raise UserError("no weight of the model is trainable", remedy="add an adapter, or train every weight")
        self.optimizer = make_optimizer(self.masters.tensors, spec.optimizer)
        data = {"train": fingerprint(train)} | ({"held": fingerprint(held)} if held is not None else {})
        self.keeper = Keeper(run, spec.keep, identity_of(spec, self.masters, data), self.masters, self.optimizer)
        self.progress = Progress()

    def resume(self) -> None:
        """Say what is there, and go to where the last life of this run ended."""
        self._report_rows()
        self.progress = self.keeper.restore(self.events)
        if self.progress.step:
            self.events.emit("stage", name="resumed", step=self.progress.step, total=self.total)

    def train(self, stop: threading.Event) -> None:
        """All steps that are left."""
        self.model.train()
        self.events.emit("stage", name="training", step=self.progress.step, total=self.total)
        steps = self.batches.steps(self.spec.seed, self.progress.cursor)
        while not self._is_done():
            began = time.perf_counter()
            loss, norm = self._update(next(steps_ := steps))
            self._after_update(loss, norm, began)
            if stop.is_set():
                self._cancel()

    def finish(self) -> Fitted:
        """Go back to the best weights, hand the masters to the model and sum up."""
        p = self.progress
        raise NotImplementedError
