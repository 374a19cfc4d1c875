"""The one training loop: pretraining, fine-tuning, whole models and adapters.

    for each step:  forward and backward over its micro-batches, one clip, one update, one metric event
    now and then:   evaluate on the held-out rows; write a checkpoint
    at the end:     go back to the weights of the best evaluation

What is learned from a batch is the `objective`'s business and which weights move is said by `requires_grad`; the loop knows neither. The
loss of a step is the sum over its learned tokens divided by their number, over all its micro-batches together, so that splitting a step
changes nothing.

A run continues from its newest checkpoint if it has one (`train.resume`). SIGINT and SIGTERM finish the step, save, and raise
KeyboardInterrupt; a second one is obeyed at once. A loss or gradient that is not finite ends the run before it reaches the weights,
and so does a loss that stays far above what it was (`train.spike`).
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
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from garage.core.errors import UserError
from garage.core.events import EventLog
from garage.core.seeds import derive
from garage.models.adapters import norms_held
from garage.models.layers import Model
from garage.models.recompute import recomputed
from garage.specs.train import FitSpec
from garage.store.checkpoint import place_of
from garage.store.dataset import Encoded
from garage.train.batches import Batches, Ledger, Step, fingerprint, read_batches
from garage.train.budget import layers_to_recompute, step_budget
from garage.train.ladder import Lean, OutOfMemory, first, is_out_of_memory, lighter
from garage.train.memory import free_bytes, peak_bytes, release, threads_or_cores, used_bytes
from garage.train.noise import noised
from garage.train.objectives.likelihood import Likelihood, Objective
from garage.train.optim import make_optimizer, shares
from garage.train.parallel import add_gradients, assemble, is_orphan, rank, shard, totals, whole
from garage.train.resume import Keeper, identity_of, own_state, set_own_state
from garage.train.schedule import amount, factor
from garage.train.spike import PATIENCE, LossSpike, watched


class NotFinite(UserError):
    """The loss or the gradient of `step` is NaN or infinite."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {norm}; training stopped before the update",
            remedy="lower the learning rate or the clip, or look for damaged rows; the last checkpoint is good",
        )
        self.step, self.name = step, "not_finite"


@dataclass(frozen=True)
class Fitted:
    """What a run came to. `loss` is the last step's; the model has the weights of `restored_step`; speed counts input tokens."""

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
    torch.manual_seed(derive(spec.seed, "fit", *((rank(),) if rank() else ())))
    objective, device = objective or Likelihood(spec.loss_chunk), next(model.parameters()).device
    if spec.offload and device.type != "cuda":
        raise UserError("fit.offload brings the inputs of layers from a GPU to the host, and this is no GPU", remedy="leave it out")
    batches = read_batches(train, spec, device, batch_tokens=spec.batch_tokens, group=objective.group)
    held_batches = None
    if held is not None and len(held):
        held_batches = read_batches(held, spec, device, batch_tokens=spec.micro_tokens, group=objective.group)
    trained = prepare(model, spec)
    optimizer = make_optimizer(trained, spec.optimizer)
    events.emit("stage", name=shares(trained, spec.optimizer))
    data = {name: fingerprint(split) for name, split in (("train", train), ("held", held)) if split is not None}
    keeper = Keeper(run, spec.keep, identity_of(spec, trained, data), trained, optimizer)
    trainer = _Trainer(model, spec, batches=batches, held=held_batches, keeper=keeper, events=events, objective=objective)
    with noised(model, spec.neftune), _stop_requests() as stop:
        trainer.train(stop)
    fitted = trainer.finish()
    assemble(model, trained)
    return fitted


def prepare(model: Model, spec: FitSpec, device: str | None = None) -> dict[str, Tensor]:
    """Set the precision of training, share the weights out if so wanted, and return the trained ones by name: they become float32,
    because an update is often smaller than half a bfloat16 step of its weight; frozen ones and the activations get `spec.dtype`, and
    adapters have theirs already. `device` is where a model goes that is shared out; none = where it is. A second call changes nothing."""
    model.compute_dtype = dtype = getattr(torch, spec.dtype)
    for name, weight in model.named_parameters():
        wanted = torch.float32 if weight.requires_grad else dtype
        if weight.is_floating_point() and weight.dtype != wanted and ".lora_" not in name:
            weight.data = weight.data.to(wanted)
    if spec.sharding == "full":
        shard(model, torch.device(device) if device else next(model.parameters()).device)
    trained: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise UserError("no weight of the model is trainable", remedy="add an adapter, or train every weight")
    return trained


class _Trainer:
    """The state of one `fit`, and its steps."""

    def __init__(
        self, model: Model, spec: FitSpec, *, batches: Batches, held: Batches | None, keeper: Keeper, events: EventLog, objective: Objective
    ) -> None:
        self.model, self.spec, self.batches, self.held, self.keeper = model, spec, batches, held, keeper
        self.events, self.objective, self.device = events, objective, next(model.parameters()).device
        length = amount(spec, batches.steps_per_epoch, batches.num_used)
        self.total = length.steps
        _report(events, "train", batches.ledger)
        if held is not None:
            _report(events, "held-out", held.ledger)
        events.emit("stage", name=f"length: {length}")
        self.progress = keeper.restore(events)
        self.lean = first(spec, layers_to_recompute(model, spec, free_bytes(self.device)))
        if self.lean.layers:
            events.emit("stage", name="memory", detail=self.lean.words)

    def train(self, stop: threading.Event) -> None:
        """All steps that are left."""
        self.events.emit("stage", name="training", step=self.progress.step, total=self.total)
        self.model.train()
        steps = self.batches.steps(self.spec.seed, self.progress.cursor)
        while not self._is_done():
            if (trouble := self._update(next(steps))) is not None:
                self._lighten(trouble)
                steps = self.batches.steps(self.spec.seed, self.progress.cursor)
                continue
            is_best = self._is_evaluation_due() and self._evaluate()
            is_due = self.progress.step % self.spec.save_every == 0 and not self.progress.rises  # nothing is saved while the loss is high
            if is_best or self._is_done() or is_due:
                self._save()
            if any(totals(stop.is_set() or is_orphan())) and not self._is_done():
                self._cancel()

    def finish(self) -> Fitted:
        """Go back to the best weights and sum up."""
        p, restored = self.progress, self.progress.step
        if p.best_step is not None and p.best_step != p.step:
            restored = p.best_step
            self.keeper.load_weights(place_of(self.keeper.run, restored))
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        rate = p.tokens / p.seconds if p.seconds else 0.0
        peak, ledger = peak_bytes(self.device), self.batches.ledger
        return Fitted(p.step, p.loss, p.best_loss, p.best_step, restored, p.tokens, rate, peak, p.seconds, ledger)

    def _is_done(self) -> bool:
        return self.progress.step >= self.total or self.progress.is_stopped

    def _is_evaluation_due(self) -> bool:
        every, step = self.spec.eval_every, self.progress.step
        return self.held is not None and (step == self.total or (every > 0 and step % every == 0))

    def _update(self, step: Step) -> str | None:
        """One optimizer step and its metric event; says what went wrong if memory ran out, and then nothing has changed."""
        began, drawn = time.perf_counter(), own_state()
        loss, trouble = self._passes(step)
        if any(totals(trouble is not None)):
            set_own_state(drawn)
            return trouble or "in another process"
        loss, norm = self._summed(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._alarm(NotFinite(self.progress.step + 1, loss, norm))
        self.progress = watched(self.progress, loss, self.spec.spike)
        if self.progress.rises == PATIENCE:
            self._alarm(LossSpike(self.keeper.run, self.progress, loss))
        rate = factor(self.progress.step, self.total, self.spec.schedule)
        if norm > self.spec.clip:
            torch._foreach_mul_(self._gradients(), self.spec.clip / norm)
        self.keeper.optimizer.step(rate)
        self.model.zero_grad(set_to_none=True)
        self._advance(step, loss, time.perf_counter() - began)
        self._tell(step, norm, rate)
        return None

    def _lighten(self, trouble: str) -> None:
        """Give up what comes next on the ladder, and say what that saves."""
        self.model.zero_grad(set_to_none=True)
        release(self.device)
        before, layers = self.lean, len(self.model.model.layers)
        found = lighter(before, self.spec.on_oom, longest=self.batches.longest, layers=layers, device=self.device.type)
        if found is None:
            self._save()
            raise OutOfMemory(self.progress, before, self.progress.cursor.step / self.batches.steps_per_epoch, trouble)
        rung, self.lean = found
        self.batches = self.batches.in_passes_of(self.lean.micro_tokens)
        saved = self._bytes(before) - self._bytes(self.lean)
        message = f"step {self.progress.step + 1}: out of memory ({trouble}); now {self.lean.words}: {saved:,} bytes less"
        self.events.emit("warning", alarm="oom", rung=rung, message=message, saved=saved, remedy="nothing: the results stay the same")

    def _bytes(self, lean: Lean) -> int:
        return step_budget(self.model, lean.settings(self.spec), device=self.device.type, layers=lean.layers).tensors

    def _passes(self, step: Step) -> tuple[float, str | None]:
        """The loss of this process's passes, or why there was no memory for them."""
        try:
            return self._gradient(step), None
        except (RuntimeError, MemoryError) as error:
            if self.spec.sharding == "full" or not is_out_of_memory(error):  # sharded, the others wait in the middle of a pass
                raise
            return math.nan, str(error).splitlines()[0]

    def _gradient(self, step: Step) -> float:
        """Backward over all passes of a step; returns their loss."""
        loss = torch.zeros((), device=self.device)
        with recomputed(list(self.model.model.layers)[: self.lean.layers], self.lean.thrift), norms_held(self.model):
            for micro in step.micros:
                part = self.objective.loss(self.model, micro) / step.learned
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
        return float(loss)

    def _summed(self, loss: float) -> tuple[float, float]:
        """The loss of all processes and the norm of their gradient, which each has then."""
        add_gradients(self.keeper.trained.values())
        return totals(loss)[0], float(whole(get_total_norm(self._gradients())))

    def _gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.keeper.trained.values() if weight.grad is not None]

    def _advance(self, step: Step, loss: float, seconds: float) -> None:
        p = self.progress
        cursor = self.batches.after(p.cursor)
        self.progress = replace(p, step=p.step + 1, cursor=cursor, tokens=p.tokens + step.tokens, seconds=p.seconds + seconds, loss=loss)
        self._step_seconds = seconds

    def _tell(self, step: Step, norm: float, rate: float) -> None:
        p = self.progress
        self.events.emit(
            "metric",
            step=p.step,
            total=self.total,
            epoch=round(p.cursor.epoch + p.cursor.step / self.batches.steps_per_epoch, 4),
            loss=p.loss,
            lr=self.spec.optimizer.lr * rate,
            grad_norm=norm,
            tokens=p.tokens,
            tokens_per_second=round(step.tokens / self._step_seconds, 1),
            memory=used_bytes(self.device),
            eta=round((self.total - p.step) * p.seconds / p.step, 1),
            **self.objective.metrics(),
        )

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Loss and accuracy on the held-out rows; says whether this is the best so far."""
        assert self.held is not None
        self.events.emit("stage", name="evaluating", step=self.progress.step, total=self.total)
        self.model.eval()
        loss, hits, learned = 0.0, 0.0, 0.0
        for micro in (micro for step in self.held.in_order() for micro in step.micros):
            part, right = self.objective.score(self.model, micro)
            loss, hits, learned = loss + part, hits + right, learned + micro.learned
        loss, hits, learned = totals(loss, hits, learned)
        self.model.train()
        p, loss = self.progress, loss / learned
        self.events.emit("metric", step=p.step, held_loss=loss, held_accuracy=hits / learned)
        is_best = p.best_loss is None or loss < p.best_loss - self.spec.min_delta
        self.progress = replace(p, best_loss=loss, best_step=p.step, stale=0) if is_best else replace(p, stale=p.stale + 1)
        if self.spec.patience is not None and self.progress.stale >= self.spec.patience:
            self.progress = replace(self.progress, is_stopped=True)
            self.events.emit("stage", name="stopped early", step=p.step, total=self.total)
        return is_best

    def _save(self) -> None:
        self.events.emit("stage", name="saving", step=self.progress.step, total=self.total)
        self.keeper.save(self.progress)

    def _cancel(self) -> NoReturn:
        self._save()
        raise KeyboardInterrupt

    def _alarm(self, alarm: NotFinite | LossSpike) -> NoReturn:
        self.events.emit("warning", alarm=alarm.name, step=alarm.step, message=alarm.args[0], remedy=alarm.remedy)
        raise alarm


def _report(events: EventLog, name: str, ledger: Ledger) -> None:
    """Say what of the rows is used, and what is lost."""
    events.emit("stage", name=f"{name} rows: {ledger.rows}, input tokens: {ledger.input_tokens}, learned: {ledger.learned_tokens}")
    if ledger.truncated_rows:
        cut = f"{ledger.truncated_tokens} tokens cut, {ledger.truncated_learned} of them learned"
        message = f"{name}: {ledger.truncated_rows} of {ledger.rows} rows are longer than max_length; {cut}"
        events.emit("warning", message=message, remedy=f"raise --fit.max_length; the longest row has {ledger.longest} tokens")
    if ledger.empty_rows:
        events.emit("warning", message=f"{name}: {ledger.empty_rows} of {ledger.rows} rows have no token to learn and are left out")


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one is handled as before. Signals reach the main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    try:
        for number in before:
            signal.signal(number, ask)
        yield stop
    finally:
        restore()
