"""Preferences: the losses against their formulas written out, pairs kept together, the margin raised, and the alarm's figure."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from garage.core.events import EventLog
from garage.models.batch import pack
from garage.specs.train import PreferenceSpec
from garage.train.batches import Batches, Cursor
from garage.train.loop import fit
from garage.train.objectives.preference import Preference, pair_loss, reference_log_probs, row_log_probs

CPU = torch.device("cpu")


def pairs(world, count: int, *, seed: int = 0):
    """Prompt 2, 4, 6 and the like; the better answer goes on with the sequence, the worse one backwards."""
    draw, rows, learned = np.random.default_rng(seed), [], []
    for _ in range(count):
        start, step, length = draw.integers(61), draw.integers(1, 5), int(draw.integers(2, 6))
        for way in (1, -1):
            tail = [(start + step * (2 + way * k)) % 61 for k in range(1, length + 1 + (way < 0))]
            rows.append(np.array([start, (start + step) % 61, (start + 2 * step) % 61, *tail]))
            learned.append(np.arange(len(rows[-1])) > 2)
    return world.encoded(rows, learned)


def naive(model, data, row: int) -> tuple[torch.Tensor, int]:
    """The summed log-probability of a row's learned tokens, computed alone with a whole softmax."""
    ids, learned = data.row(row)
    batch = pack([ids[:-1].astype(np.int64)])
    logits = model.lm_head(model(batch.tokens_T, batch.positions_T, batch.attend()))
    picked = log_softmax(logits.double(), -1).gather(1, torch.tensor(ids[1:].astype(np.int64))[:, None])[:, 0]
    return picked[torch.tensor(learned[1:]) != 0].sum(), int(learned[1:].sum())


def steps(data, **sizes):
    return Batches(data, **{"max_length": 32, "batch_tokens": 10_000, "micro_tokens": 10_000, "device": CPU, "group": 2} | sizes)


def test_row_sums_are_those_of_each_row_alone(world) -> None:
    model, data = world.model(), pairs(world, 12)
    for micro in next(steps(data, micro_tokens=90).steps(0, Cursor())).micros:
        sums, counts = row_log_probs(model, micro, None)
        for place, row in enumerate(micro.rows):
            want, count = naive(model, data, int(row))
            assert sums[place].item() == pytest.approx(want.item(), abs=1e-4) and counts[place] == count


def test_a_pair_is_never_parted(world) -> None:
    data = pairs(world, 31)
    seen = [micro.rows for step in steps(data, batch_tokens=100, micro_tokens=64).in_order() for micro in step.micros]
    assert all((rows[::2] % 2 == 0).all() and (rows[1::2] == rows[::2] + 1).all() for rows in seen)
    assert sorted(np.concatenate(seen).tolist()) == list(range(62))
    hollow = data.learned.copy()
    hollow[data.bounds[3] : data.bounds[4]] = 0
    data = type(data)(data.tokens, hollow, data.bounds)
    rows = np.concatenate([micro.rows for step in steps(data).in_order() for micro in step.micros])
    assert len(rows) == 60 and not {2, 3} & set(rows.tolist()), "a row without an answer takes its partner with it"


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, lambda m: -np.log(sigmoid(0.1 * m))),
        ({"smoothing": 0.2, "beta": 0.5}, lambda m: -0.8 * np.log(sigmoid(0.5 * m)) - 0.2 * np.log(sigmoid(-0.5 * m))),
        ({"kind": "robust", "smoothing": 0.2}, lambda m: (-0.8 * np.log(sigmoid(0.1 * m)) + 0.2 * np.log(sigmoid(-0.1 * m))) / 0.6),
        ({"kind": "ipo"}, lambda m: (m - 5) ** 2),
        ({"kind": "simpo", "beta": 2.0, "gamma": 0.7}, lambda m: -np.log(sigmoid(2 * m - 0.7))),
        ({"kind": "length", "beta": 2.0}, lambda m: -np.log(sigmoid(2 * m))),
    ],
)
def test_the_losses_are_their_formulas(settings, want) -> None:
    for margin in (-3.0, 0.0, 2.5):
        got = pair_loss(torch.tensor([margin], dtype=torch.float64), PreferenceSpec.parse(settings))
        assert got.item() == pytest.approx(want(margin), rel=1e-9)


@pytest.mark.parametrize("settings", [{}, {"kind": "ipo"}, {"kind": "length"}, {"kind": "simpo", "beta": 2.0}, {"rpo": 1.0}])
def test_loss_of_a_step_written_out(world, settings) -> None:
    """The whole path, packing and splitting included, against row by row arithmetic, and its gradient against one without splitting."""
    spec, model, data = PreferenceSpec.parse(settings), world.model(), pairs(world, 9)
    reference = None if spec.kind == "simpo" else reference_log_probs(world.model(seed=1), data, world.spec())
    base = torch.zeros(len(data)) if reference is None else reference
    is_mean, want = spec.kind in ("ipo", "length", "simpo"), 0.0
    for pair in range(9):
        sums, counts = zip(*(naive(model, data, row) for row in (2 * pair, 2 * pair + 1)), strict=True)
        r = [(s.item() - base[2 * pair + k].item()) / (counts[k] if is_mean else 1) for k, s in enumerate(sums)]
        want += pair_loss(torch.tensor([r[0] - r[1]], dtype=torch.float64), spec).item() - spec.rpo * sums[0].item() / counts[0]
    gradients = []
    for micro_tokens in (48, 10_000):
        objective, step = Preference(spec, None, train=reference), next(steps(data, micro_tokens=micro_tokens).steps(0, Cursor()))
        model.zero_grad()
        parts = [objective.loss(model, micro) for micro in step.micros]
        sum(parts).backward()
        assert step.learned == 9 and sum(part.item() for part in parts) == pytest.approx(want, rel=1e-4)
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def run(world, place, model, data, spec, settings=None):
    settings = PreferenceSpec.parse(settings or {})
    objective = Preference(settings, None, train=reference_log_probs(model, data, spec), held=reference_log_probs(model, data, spec))
    events = EventLog(None, lambda event: world.events.append(dict(event)))
    return fit(model, train=data, held=data, spec=spec, run=place, events=events, objective=objective)


def test_training_raises_the_margin_and_the_better_answer(world, tmp_path) -> None:
    data, spec = pairs(world, 40), world.spec(max_steps=25, optimizer={"kind": "adamw", "lr": 2e-3})
    fitted = run(world, tmp_path, world.model(), data, spec, {"rpo": 1.0})
    margins, preferred = world.losses("margin"), world.losses("preferred")
    assert margins[1] == pytest.approx(0, abs=1e-6) and margins[25] > 0.3 and preferred[25] > 0.95
    assert world.losses("chosen_change")[25] > 0 and fitted.best_loss < world.losses("loss")[1]
    assert world.losses("held_accuracy")[25] > 0.95


def test_pairs_the_wrong_way_round_lower_it(world, tmp_path) -> None:
    """The broken twin: with the answers swapped the same figures say so."""
    data = pairs(world, 40)
    order = np.arange(80).reshape(-1, 2)[:, ::-1].ravel()
    swapped = world.encoded([data.row(row)[0] for row in order], [data.row(row)[1] for row in order])
    model, spec = world.model(), world.spec(max_steps=25, optimizer={"kind": "adamw", "lr": 2e-3})
    before = reference_log_probs(model, data, spec)
    run(world, tmp_path, model, swapped, spec)
    change = reference_log_probs(model, data, spec) - before
    assert (change[::2] - change[1::2]).mean() < -1


def test_a_resumed_run_is_the_same_run(world, tmp_path) -> None:
    data = pairs(world, 40)
    run(world, tmp_path / "a", world.model(), data, world.spec(max_steps=10))
    whole = world.losses()
    world.events.clear()
    run(world, tmp_path / "b", world.model(), data, world.spec(max_steps=10, save_every=5, eval_every=0))
    for place in sorted((tmp_path / "b" / "checkpoints").iterdir())[1:]:  # as if it had been killed after the first checkpoint
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    world.events.clear()
    run(world, tmp_path / "b", world.model(), data, world.spec(max_steps=10, save_every=5, eval_every=0))
    again = world.losses()
    assert again and all(again[step] == whole[step] for step in again)
