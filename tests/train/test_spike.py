"""A loss that leaves and stays away ends the run, and what is named is from before; ordinary and noisy runs are left alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from garage.train import loop
from garage.train.resume import Progress
from garage.train.spike import PATIENCE, LossSpike, watched


def rises(losses, factor=3.0):
    """The longest row of high steps."""
    progress, longest = Progress(), 0
    for loss in losses:
        progress = watched(progress, float(loss), factor)
        longest = max(longest, progress.rises)
    return longest


def test_what_counts_as_high() -> None:
    flat = [2.0] * 60
    assert rises([*flat, 6.1] * 3) == 1 and rises([*flat, *[6.1] * 9, 2.0, *[6.1] * 9]) == 9, "a step back below begins anew"
    assert rises([*flat, *[5.9] * 30]) == 0 and rises([*flat, *[6.1] * 30]) == 30
    assert rises([0.01] * 60 + [0.9] * 30) == 0, "small losses may multiply"
    assert rises([0.5] + [3.0] * 30) == 0 and rises([0.5] + [3.6] * 12) == 12, "three nats at the beginning"
    assert rises([*flat, *[100.0] * 30], factor=None) == 0


def test_steps_of_one_row_each_raise_no_alarm() -> None:
    """Twenty runs of 3,000 steps whose losses vary with a standard deviation of 0.7 in their logarithm."""
    draw = np.random.default_rng(0)
    falling = 1 + 3 * np.exp(-np.arange(3000) / 300)
    assert max(rises(falling * draw.lognormal(0, 0.7, 3000)) for _ in range(20)) < PATIENCE - 2


def test_rows_of_two_kinds_raise_no_alarm() -> None:
    """Known rows at 0.03 and new ones at 4, one a step; without the nine in ten such a run would be stopped within a few thousand steps."""
    draw = np.random.default_rng(1)
    for share in (0.1, 0.3, 0.45):
        losses = np.where(draw.random(20_000) < share, 4.0, 0.03) * draw.lognormal(0, 0.3, 20_000)
        assert rises(losses) < PATIENCE - 1
    in_a_row = np.convolve(losses > 1.03, np.ones(PATIENCE), "valid").max()
    assert in_a_row == PATIENCE, "the broken twin: the median alone"


def explode(monkeypatch, at: int) -> None:
    """The update of step `at` ruins the weights."""
    real = loop.make_optimizer

    def make(tensors, spec):
        optimizer, calls = real(tensors, spec), []
        step = optimizer.step

        def ruinous(factor: float) -> None:
            step(factor)
            calls.append(factor)
            if len(calls) == at:
                for tensor in tensors.values():
                    tensor.data.mul_(20)

        optimizer.step = ruinous
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make)


@pytest.mark.parametrize(("at", "good", "left"), [(23, 20, [15, 20]), (20, 15, [15, 20])])
def test_the_checkpoint_that_is_named_is_from_before_the_rise(world, tmp_path: Path, monkeypatch, at, good, left) -> None:
    explode(monkeypatch, at)
    spec = world.spec(max_steps=60, save_every=5, optimizer={"kind": "adamw", "lr": 1e-3})
    with pytest.raises(LossSpike) as caught:
        world.fit(tmp_path, world.model(), world.rows(300), None, spec)
    losses = world.losses()
    assert caught.value.step == at + PATIENCE == max(losses) + 1 and min(losses[s] for s in losses if s > at) > 3 * losses[at]
    assert caught.value.checkpoint.name == f"step-{good:08d}" and str(caught.value.checkpoint) in str(caught.value)
    assert [int(path.name[5:]) for path in sorted((tmp_path / "checkpoints").iterdir())] == left, "none was written while it was high"
    alarms = [event for event in world.events if event.get("alarm")]
    assert [(event["alarm"], event["step"]) for event in alarms] == [("loss_spike", at + PATIENCE)] and "lr" in alarms[0]["remedy"]


def test_it_can_be_switched_off(world, tmp_path: Path, monkeypatch) -> None:
    explode(monkeypatch, 8)
    spec = world.spec(max_steps=30, spike=None, optimizer={"kind": "adamw", "lr": 1e-3})
    assert world.fit(tmp_path, world.model(), world.rows(300), None, spec).steps == 30


def test_a_rate_far_too_high_is_stopped_and_a_usual_one_is_not(world, tmp_path: Path) -> None:
    """A model that has learned the rows, tuned on at a hundred times the rate and without warm-up."""
    model, train = world.model(), world.rows(300)
    world.fit(tmp_path / "first", model, train, None, world.spec(max_steps=60))
    learned = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = {"max_steps": 40, "schedule": {"kind": "constant", "warmup": 0.0}}
    world.fit(tmp_path / "usual", model, train, None, world.spec(**settings))
    model.load_state_dict(learned)
    with pytest.raises(LossSpike):
        world.fit(tmp_path / "high", model, train, None, world.spec(**settings, optimizer={"kind": "adamw", "lr": 1.0}))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_a_restart_in_the_middle_of_a_rise_changes_nothing(world, tmp_path: Path, monkeypatch) -> None:
    explode(monkeypatch, 23)
    spec = world.spec(max_steps=60, save_every=5, optimizer={"kind": "adamw", "lr": 1e-3})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Trainer, "_tell", lambda self, *_: self._cancel() if self.progress.step == 27 else None)
        world.fit(tmp_path, world.model(), world.rows(300), None, spec)
    with pytest.raises(LossSpike) as caught:
        world.fit(tmp_path, world.model(), world.rows(300), None, spec)
    assert caught.value.step == 23 + PATIENCE and "step-00000020" in str(caught.value.checkpoint)
