"""Exact resume: what is saved so that a killed run and an undisturbed one give the same losses, bit for bit (on one CPU, same threads).

Saved are the trained weights (float32), the optimizer's state, the random generators, the place in the data and the figures so far.
The learning rate and the order of the data are functions of the step, the seed and the epoch, and need no state of their own. A run is
resumed only with the settings, the rows and the tensors it was started with; anything else is refused and listed.

A kill costs at most the steps since the last checkpoint. They are run again, with the same results, and their events are written again:
readers of `events.jsonl` lay the metric events of one step over each other, field by field, and the last one wins.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.core.events import EventLog
from garage.specs.train import FitSpec
from garage.store.checkpoint import Checkpoint, latest, prune, read_checkpoint, write_checkpoint
from garage.train.batches import Cursor
from garage.train.optim import Optimizer


@dataclass(frozen=True)
class Progress:
    """How far a run is. `stale` counts evaluations since the best; `is_stopped` says that it stopped early."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    is_stopped: bool = False


@dataclass(frozen=True)
class Keeper:
    """Saves and restores one run. `identity` is what must not change between its lives."""

    run: Path
    keep: int
    identity: Mapping[str, str]
    trained: Mapping[str, Tensor]
    optimizer: Optimizer

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; when it is on the disk, remove the ones no longer needed, but never the best."""
        tensors = {"weights": self.trained, "optimizer": self.optimizer.state(), "rng": random_state()}
        write_checkpoint(self.run, Checkpoint(progress.step, tensors, {"progress": asdict(progress), "identity": dict(self.identity)}))
        prune(self.run, self.keep, marked=() if progress.best_step is None else (progress.best_step,))

    def restore(self, events: EventLog) -> Progress:
        """Go back to the newest usable checkpoint; to the beginning if there is none.

        Raises:
            UserError: the run was started with other settings, data or tensors.
        """
        found = latest(self.run)
        for reason in found.damaged:
            events.emit("warning", message=f"{reason}; it is passed over")
        if found.checkpoint is None:
            return Progress()
        check_identity(found.checkpoint, self.identity)
        self._take(found.checkpoint)
        if found.checkpoint.tensors["optimizer"]:
            self.optimizer.load(found.checkpoint.tensors["optimizer"])
        set_random_state(found.checkpoint.tensors["rng"])
        return _progress(found.checkpoint.state["progress"])

    def load_weights(self, place: Path) -> None:
        """Only the trained weights of one checkpoint."""
        self._take(read_checkpoint(place))

    def _take(self, checkpoint: Checkpoint) -> None:
        weights = checkpoint.tensors["weights"]
        if missing := [name for name in self.trained if name not in weights]:
            lacks = f"the checkpoint of step {checkpoint.step} lacks {missing[0]} ({len(missing)} of {len(self.trained)} tensors)"
            raise UserError(lacks, remedy="train again, with another --out")
        for name, tensor in self.trained.items():
            tensor.data.copy_(weights[name])


def carry_over(run: Path, spec: FitSpec, progress: Progress, trained: Mapping[str, Tensor], *, has_new: bool) -> None:
    """Make the newest checkpoint one of other settings; if tensors are new, with their weights and an optimizer that starts anew."""
    found = latest(run).checkpoint
    assert found is not None, f"{run} has no checkpoint"
    was = found.state["identity"]
    assert isinstance(was, dict)
    data = {key.removeprefix("data "): str(value) for key, value in was.items() if key.startswith("data ")}
    tensors = {**found.tensors, "weights": trained, "optimizer": {}} if has_new else found.tensors
    state = {"progress": asdict(progress), "identity": identity_of(spec, trained, data)}
    write_checkpoint(run, Checkpoint(found.step, tensors, state))


def identity_of(spec: FitSpec, trained: Mapping[str, Tensor], data: Mapping[str, str]) -> dict[str, str]:
    """What a run is started with, as flat text: each setting, each split's fingerprint, the trained tensors."""
    shapes = str([(name, tuple(tensor.shape)) for name, tensor in trained.items()])
    tensors = f"{len(trained)}, {hashlib.blake2b(shapes.encode(), digest_size=8).hexdigest()}"
    return _flat(spec.resolved(), "fit.") | {f"data {name}": value for name, value in data.items()} | {"trained tensors": tensors}


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, str]) -> None:
    """Refuse to go on with something else, listing it."""
    was = checkpoint.state["identity"]
    assert isinstance(was, dict)
    keys = [key for key in was | dict(identity) if was.get(key) != identity.get(key)]
    if keys:
        listed = "; ".join(f"{key}: {was.get(key, 'absent')} -> {identity.get(key, 'absent')}" for key in keys[:8])
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        remedy = "resume with the same settings and data, or choose another --out"
        raise UserError(f"this run was started differently: {listed}{more}", remedy=remedy)


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, as bytes."""
    cuda = {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([states[f"cuda{i}"] for i in range(torch.cuda.device_count()) if f"cuda{i}" in states])


def _progress(raw: object) -> Progress:
    assert isinstance(raw, dict)
    return Progress(**{**raw, "cursor": Cursor(**raw["cursor"])})


def _flat(values: Mapping[str, object], prefix: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: str(value)}
    return out
