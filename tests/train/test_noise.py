"""NEFTune: the noise has the paper's bound and shape in each document, is there in training only, and a resumed run draws the same."""

from pathlib import Path

import pytest
import torch

from garage.models.adapters import adapt
from garage.models.batch import pack
from garage.models.recompute import Thrift, recomputed
from garage.train import loop
from garage.train.noise import noise_like, noised


def test_each_document_has_the_bound_of_its_own_length() -> None:
    torch.manual_seed(0)
    bounds, width, alpha = (0, 4, 104, 2104), 64, 5.0
    noise = noise_like(torch.zeros(2104, width), bounds, alpha)
    for first, last in ((0, 4), (4, 104), (104, 2104)):
        bound = alpha / ((last - first) * width) ** 0.5
        part = noise[first:last]
        assert 0.95 * bound < part.abs().max() <= bound * 1.000001
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.1) and abs(part.mean()) < 0.1 * bound
    whole = alpha / (2104 * width) ** 0.5
    assert noise[:4].abs().max() > 10 * whole, "the broken twin: the length of the pack in place of the document's"


def states(model, batch):
    return model(batch.tokens_T, batch.positions_T, batch.attend())


def test_only_training_is_disturbed_and_only_inside(world) -> None:
    model, batch = world.model(), pack([[1, 2, 3, 4], [5, 6, 7]])
    model.train()
    plain = states(model, batch)
    with noised(model, 5.0):
        assert not torch.equal(states(model, batch), plain) and not torch.equal(states(model, batch), states(model, batch))
        model.eval()
        assert torch.equal(states(model, batch), plain)
    model.train()
    assert torch.equal(states(model, batch), plain)
    with noised(model, 0.0):
        assert torch.equal(states(model, batch), plain)


def test_recomputing_sees_the_same_noise(world) -> None:
    found = []
    for wanted in (False, True):
        model, batch = world.model().train(), pack([[1, 2, 3, 4], [5, 6, 7]])
        torch.manual_seed(1)
        with recomputed(list(model.model.layers) if wanted else [], Thrift()), noised(model, 5.0):
            states(model, batch).square().sum().backward()
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Crash(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_draws_the_same_noise(world, tmp_path: Path, monkeypatch, kind) -> None:
    train, held = world.rows(40), world.rows(8, seed=1)
    spec = world.spec(max_steps=6, save_every=3, eval_every=2, neftune=5.0)

    def model():
        return adapt(world.model(), rank=4, alpha=8, targets=("q_proj",), seed=0) if kind == "lora" else world.model()

    world.fit(tmp_path / "whole", model(), train, held, spec)
    want = world.losses(), world.losses("held_loss")
    world.events.clear()
    real = loop._Trainer._tell

    def tell(self, *args):
        real(self, *args)
        if self.progress.step == 5:
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop._Trainer, "_tell", tell)
        world.fit(tmp_path / "parted", model(), train, held, spec)
    world.fit(tmp_path / "parted", model(), train, held, spec)
    assert (world.losses(), world.losses("held_loss")) == want
    world.events.clear()
    world.fit(tmp_path / "plain", model(), train, held, world.spec(max_steps=6, save_every=3, eval_every=2))
    assert world.losses()[1] != want[0][1] and world.losses()[1] == pytest.approx(want[0][1], rel=0.05)
