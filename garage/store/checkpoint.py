"""Training checkpoints: everything a killed run needs to go on as if nothing had happened.

    run/checkpoints/step-00000100/
        weights.safetensors     the trained tensors, float32
        optimizer.safetensors   the optimizer's state, by name
        rng.safetensors         the states of the random generators, as bytes
        state.json              step, data position, figures so far, and what the run was started with
        manifest.json           kind "checkpoint"; its id is the hash of the files above

Safetensors and JSON only, nothing that could run code when it is read. A checkpoint is an artifact, so it is flushed and renamed
into place whole; older ones are removed only after that. The newest one that is complete, unharmed and finite is read; a damaged one is
set aside under a name that starts with `damaged-`, named to the caller, and the one before it is used.

Limits: hashes find damage, not malice. What the tensors mean is the trainer's business (`train.resume`).
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from garage.core.artifact import disk_error, hash_tree, read_manifest, writing
from garage.core.errors import UserError

GROUPS = ("weights", "optimizer", "rng")
_NAME = re.compile(r"step-(\d{8,})")

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors by group (one of GROUPS) and name."""


@dataclass(frozen=True)
class Checkpoint:
    """One training state. `state` is plain JSON."""

    step: int
    tensors: Tensors
    state: Mapping[str, object]


@dataclass(frozen=True)
class Found:
    """The newest usable checkpoint, if any, and why newer ones were passed over."""

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...]


def place_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    names = [_NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*")]
    return sorted(int(match[1]) for match in names if match)


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint; returns its place once it is on the disk. Earlier checkpoints are untouched.

    Raises:
        UserError: the disk is full or not writable, or a weight is not finite; what was there before is still valid.
    """
    lost = _not_finite(checkpoint.tensors["weights"])
    if lost:
        raise UserError(f"step {checkpoint.step} is not saved: {lost} holds NaN or infinity", remedy="lower the learning rate and resume")
    place = place_of(run, checkpoint.step)
    with writing(place, kind="checkpoint") as draft:
        for group in GROUPS:
            _write_tensors(draft.path / f"{group}.safetensors", checkpoint.tensors.get(group, {}), place)
        _write_state(draft.path / "state.json", {"step": checkpoint.step, **checkpoint.state})
        draft.facts.update(step=checkpoint.step)
    return place


def read_checkpoint(place: Path) -> Checkpoint:
    """One checkpoint, verified.

    Raises:
        UserError: a file is missing, changed since it was written, or holds a weight that is not finite.
    """
    manifest = read_manifest(place, "checkpoint")
    try:
        intact = manifest.id == f"checkpoint-{hash_tree(place)[:12]}"
        tensors = {group: load_file(place / f"{group}.safetensors") for group in GROUPS} if intact else {}
        state = json.loads((place / "state.json").read_text(encoding="utf-8")) if intact else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(place, str(error)) from error
    if not intact:
        raise _damaged(place, "its files are not the ones that were written")
    if lost := _not_finite(tensors["weights"]):
        raise _damaged(place, f"{lost} holds NaN or infinity")
    return Checkpoint(int(state.pop("step")), cast(Tensors, tensors), state)


def latest(run: Path) -> Found:
    """The newest usable checkpoint of a run. Damaged ones are set aside, so that their places can be written again."""
    damaged: list[str] = []
    for step in reversed(saved_steps(run)):
        place = place_of(run, step)
        try:
            return Found(read_checkpoint(place), tuple(damaged))
        except UserError as error:
            damaged.append(error.args[0])
            _set_aside(place)
    return Found(None, tuple(damaged))


def prune(run: Path, keep: int, marked: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and the `marked` ones, and what crashes left behind.

    Call it after `write_checkpoint` returned, never before: that order is what a kill cannot break.
    """
    root = run / "checkpoints"
    for step in saved_steps(run)[:-keep]:
        if step not in marked:
            place_of(run, step).rename(root / f".tmp-pruned-{step}")  # never half a checkpoint under its name
    for left in [*root.glob(".tmp-*"), *root.glob("damaged-*")]:
        shutil.rmtree(left, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], place: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # it hides the system's error in its text
        raise disk_error(OSError(str(error)), place) from error


def _write_state(path: Path, state: Mapping[str, object]) -> None:
    path.write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; the sum of squares would overflow, the extremes do not."""
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            return name
    return None


def _damaged(place: Path, reason: str) -> UserError:
    return UserError(f"checkpoint {place} is damaged: {reason}", remedy="resume from an earlier checkpoint, or train again")


def _set_aside(place: Path) -> None:
    aside = place.with_name(f"damaged-{place.name}")
    shutil.rmtree(aside, ignore_errors=True)
    place.rename(aside)
