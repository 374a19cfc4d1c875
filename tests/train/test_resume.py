"""k steps, a kill, and the rest equal an undisturbed run bit for bit; broken twins of the product are caught; changes are refused."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt
from garage.store.checkpoint import Checkpoint, place_of, read_checkpoint, saved_steps, write_checkpoint
from garage.train import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def killed():
    """The kill test of the bench, small: 22 kills over all phases, and every twin."""
    program = [sys.executable, str(ROOT / "bench" / "resume_kill.py"), "--small"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kill test forks")
def test_killed_anywhere_it_resumes_bit_for_bit(killed):
    good = killed["results"]["good"]
    assert good["ok"], good
    assert good["kills"] == 22 and good["redone"] > 0 and good["differ"] == 0 and good["most_lost"] <= good["every"]
    assert len(good["phases"]) == 11


TWINS = ("no_rng", "no_optimizer", "no_scheduler", "no_cursor", "no_weights", "no_rename", "prune_first", "no_fsync", "startup_only")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kill test forks")
@pytest.mark.parametrize("twin", TWINS)
def test_the_kill_test_sees_the_broken_twin(killed, twin):
    assert killed["caught"][twin], killed["results"][twin]


class Crash(Exception):
    """Stands for a kill where a fork would only cost time."""


def crash_at(monkeypatch, step):
    real = loop._Trainer._tell

    def tell(self, *args):
        real(self, *args)
        if self.progress.step == step:
            raise Crash

    monkeypatch.setattr(loop._Trainer, "_tell", tell)


OPTIMIZERS = ({"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1}, {"kind": "muon", "adamw": {"lr": 1e-2}})
CASES = product(("full", "lora"), ("float32", "bfloat16"), (0, 1), ("off", "all"))
CASES = [case for case in CASES if not (case[0] == "lora" and case[2])]


@pytest.mark.parametrize(("kind", "dtype", "optimizer", "checkpointing"), CASES)
def test_resume_matrix(world, tmp_path, monkeypatch, kind, dtype, optimizer, checkpointing):
    settings = {"max_steps": 6, "save_every": 3, "eval_every": 2, "dtype": dtype, "optimizer": OPTIMIZERS[optimizer]}
    spec, train, held = world.spec(**settings, checkpointing=checkpointing), world.rows(40), world.rows(8, seed=1)

    def model():
        made = world.model()
        return adapt(made, rank=4, alpha=8, targets=("q_proj", "up_proj"), dropout=0.2, seed=0) if kind == "lora" else made

    straight = model()
    world.fit(tmp_path / "straight", straight, train, held, spec)
    want = world.losses(), world.losses("held_loss")
    world.events.clear()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 5)
        world.fit(tmp_path / "broken", model(), train, held, spec)
    resumed = model()
    world.fit(tmp_path / "broken", resumed, train, held, spec)
    assert (world.losses(), world.losses("held_loss")) == want
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_damaged_newest_checkpoint_costs_one_interval_and_a_warning(world, tmp_path, monkeypatch):
    spec, train = world.spec(max_steps=9, save_every=2), world.rows(60)
    world.fit(tmp_path / "straight", world.model(), train, None, spec)
    want = world.losses()
    world.events.clear()
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, 7)
        world.fit(tmp_path / "run", world.model(), train, None, spec)
    weights = place_of(tmp_path / "run", 6) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    world.fit(tmp_path / "run", world.model(), train, None, spec)
    assert world.losses() == want
    assert any("step-00000006 is damaged" in event.get("message", "") for event in world.events)
    assert [e["step"] for e in world.events if e.get("name") == "training"] == [0, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob("damaged-*"))


def test_a_changed_spec_is_refused_and_every_change_listed(world, tmp_path):
    train = world.rows(60)
    world.fit(tmp_path, world.model(), train, None, world.spec(max_steps=5))
    with pytest.raises(UserError) as caught:
        world.fit(tmp_path, world.model(), train, None, world.spec(max_steps=5, clip=2.0, optimizer={"kind": "adamw", "lr": 0.5}))
    assert "fit.clip: 1.0 -> 2.0" in str(caught.value) and "fit.optimizer.lr: 0.01 -> 0.5" in str(caught.value)
    assert "max_steps" not in str(caught.value)


def test_other_rows_and_other_tensors_are_refused(world, tmp_path):
    train, spec = world.rows(60), world.spec(max_steps=5)
    world.fit(tmp_path, world.model(), train, None, spec)
    with pytest.raises(UserError, match="data train"):
        world.fit(tmp_path, world.model(), world.rows(60, seed=1), None, spec)
    with pytest.raises(UserError, match="data held: absent"):
        world.fit(tmp_path, world.model(), train, world.rows(5, seed=1), spec)
    model = world.model()
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(UserError, match="trained tensors"):
        world.fit(tmp_path, model, train, None, spec)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(world, tmp_path):
    train, spec = world.rows(60), world.spec(max_steps=5)
    world.fit(tmp_path, world.model(), train, None, spec)
    kept = read_checkpoint(place_of(tmp_path, 5))
    weights = {name: tensor for name, tensor in kept.tensors["weights"].items() if "layers.1.mlp.up_proj" not in name}
    write_checkpoint(tmp_path, Checkpoint(5, {**kept.tensors, "weights": weights}, kept.state))
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj"):
        world.fit(tmp_path, world.model(), train, None, spec)


def test_a_finished_run_is_read_not_trained(world, tmp_path):
    train, spec, first = world.rows(60), world.spec(max_steps=5), world.model()
    done = world.fit(tmp_path, first, train, None, spec)
    world.events.clear()
    again = world.model(seed=9)
    assert world.fit(tmp_path, again, train, None, spec).loss == done.loss and not world.losses()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_newest_and_the_best_are_kept(world, tmp_path):
    spec = world.spec(max_steps=20, save_every=2, eval_every=20, keep=3)
    world.fit(tmp_path, world.model(), world.rows(60), world.rows(9, seed=1), spec)
    assert saved_steps(tmp_path) == [16, 18, 20]
