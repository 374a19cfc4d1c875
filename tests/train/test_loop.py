"""The loop learns, counts, stops and restores as it says; splitting, packing and recomputing change nothing."""

import os
import signal

import numpy as np
import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt
from garage.models.batch import pack
from garage.models.recompute import Thrift, recomputed
from garage.train import loop
from garage.train.batches import Batches, Cursor
from garage.train.loop import NotFinite
from garage.train.objectives.likelihood import Likelihood

CPU = torch.device("cpu")


def gradient(model, data, **sizes):
    """Loss and gradients of one whole step."""
    settings = {"max_length": 32, "batch_tokens": 10_000, "micro_tokens": 10_000, "device": CPU} | sizes
    step = next(Batches(data, **settings).steps(0, Cursor()))
    model.zero_grad()
    loss = 0.0
    for micro in step.micros:
        part = Likelihood(None).loss(model, micro) / step.learned
        part.backward()
        loss += part.item()
    return loss, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same(a, b, rtol=1e-4):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("micro", [32, 100, 500])
def test_many_micro_batches_are_one_batch(world, micro):
    model, data = world.model(), world.rows(60, prompt=3)
    assert_same(gradient(model, data), gradient(model, data, micro_tokens=micro))


def test_a_mean_of_means_would_be_seen(world):
    """The classic accumulation mistake: each micro-batch divided by its own count."""
    model, rows = world.model(), world.rows(60)
    learned = [np.arange(length) > index % 17 for index, length in enumerate(rows.lengths)]
    data = world.encoded([rows.row(index)[0] for index in range(60)], learned)
    step = next(Batches(data, max_length=32, batch_tokens=10_000, micro_tokens=100, device=CPU).steps(0, Cursor()))
    wrong = sum(Likelihood(None).loss(model, m).item() / m.learned for m in step.micros) / len(step.micros)
    assert wrong != pytest.approx(gradient(model, data)[0], rel=1e-4)


def test_packed_equals_each_row_alone(world):
    model, data = world.model(), world.rows(20, prompt=2)
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for index in range(len(data)):
        tokens, learned = (torch.from_numpy(a.astype(np.int64)) for a in data.row(index))
        alone = pack([tokens.numpy()])
        logits = model.logits(model(alone.tokens_T, alone.positions_T, alone.attend()))
        nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        total, count = total + (nll * learned[1:]).sum(), count + int(learned[1:].sum())
    (total / count).backward()
    alone_all = (total.item() / count, {name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert_same(gradient(model, data), alone_all)


def test_recomputing_changes_no_gradient(world):
    model, data = world.model(), world.rows(30)
    plain = gradient(model, data)
    with recomputed(list(model.model.layers), Thrift()):
        again = gradient(model, data)
    assert plain[0] == again[0] and all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])
    assert "forward" not in vars(model.model.layers[0])


def test_a_masked_target_has_no_influence_and_a_learned_one_has(world):
    model, data = world.model(), world.rows(1, prompt=4, shortest=10, longest=10)
    loss = gradient(model, data)[0]
    for place, changes in ((9, True), (4, True)):
        tokens = data.tokens.copy()
        tokens[place] = (tokens[place] + 7) % 61
        other = gradient(model, world.encoded([tokens], [data.learned]))[0]
        assert (other != loss) == changes
    last_masked = world.encoded([np.append(data.tokens, 3)], [np.append(data.learned, 0)])
    assert gradient(model, last_masked)[0] == loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fine_tuning_lowers_the_held_out_loss_below_the_committed_figure(world, tmp_path, dtype):
    """From ln 64 = 4.16 to below .95."""
    spec = world.spec(max_steps=90, dtype=dtype, eval_every=30, save_every=100, schedule={"kind": "linear", "floor": 0.1})
    fitted = world.fit(tmp_path, world.model(), world.rows(300, prompt=2), world.rows(60, seed=9, prompt=2), spec)
    assert fitted.best_loss is not None and fitted.best_loss < 0.95
    assert world.losses("held_accuracy")[90] > 0.7 and fitted.steps == 90
    assert world.losses()[1] == pytest.approx(np.log(64), rel=0.05)


def test_muon_learns_too(world, tmp_path):
    spec = world.spec(max_steps=60, optimizer={"kind": "muon", "adamw": {"lr": 1e-2}})
    assert world.fit(tmp_path, world.model(), world.rows(300), None, spec).loss < 1.6


def test_an_adapter_trains_through_the_same_loop_and_the_base_stays(world, tmp_path):
    model = adapt(world.model(), rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), seed=0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    fitted = world.fit(tmp_path, model, world.rows(200), None, world.spec(max_steps=20))
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert fitted.loss < world.losses()[1] - 0.05


def test_frozen_weights_take_the_run_s_precision_and_trained_ones_stay_float32(world, tmp_path):
    model = adapt(world.model(), rank=4, alpha=8, targets=("q_proj",), seed=0)
    world.fit(tmp_path, model, world.rows(50), None, world.spec(max_steps=2, dtype="bfloat16"))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}


def test_no_trainable_weight_is_said(world, tmp_path):
    with pytest.raises(UserError, match="trainable"):
        world.fit(tmp_path, world.model().requires_grad_(False), world.rows(10), None, world.spec())


def test_the_best_evaluation_is_what_the_model_ends_with(world, tmp_path):
    """Held-out rows that contradict the training rows: the longer it learns, the worse it gets."""
    train, held = world.rows(100), world.encoded(*contrary(world))
    model, spec = world.model(), world.spec(max_steps=24, eval_every=4, save_every=6, keep=1)
    fitted = world.fit(tmp_path, model, train, held, spec)
    measured = world.losses("held_loss")
    assert fitted.best_step == min(measured, key=measured.__getitem__) == fitted.restored_step < 24
    again = Batches(held, max_length=32, batch_tokens=128, micro_tokens=128, device=CPU)
    with torch.inference_mode():
        parts = [Likelihood(None).score(model, micro) for step in again.in_order() for micro in step.micros]
    assert sum(loss for loss, _ in parts) / again.ledger.learned_tokens == pytest.approx(fitted.best_loss, rel=1e-5)


def contrary(world):
    draw = np.random.default_rng(4)
    rows = [draw.integers(0, 61, 20) for _ in range(30)]
    return rows, [np.ones(20)] * 30


def test_patience_stops_and_a_restart_does_not_go_on(world, tmp_path):
    train, held, spec = world.rows(100), world.encoded(*contrary(world)), world.spec(max_steps=60, eval_every=2, save_every=50, patience=3)
    fitted = world.fit(tmp_path, world.model(), train, held, spec)
    assert fitted.best_step is not None and fitted.steps == fitted.best_step + 6 < 60
    assert any(event.get("name") == "stopped early" for event in world.events)
    assert world.fit(tmp_path, world.model(), train, held, spec).steps == fitted.steps


def test_min_delta_sets_what_counts_as_better(world, tmp_path):
    spec = world.spec(max_steps=40, eval_every=4, min_delta=100.0, patience=2)
    assert world.fit(tmp_path, world.model(), world.rows(100), world.rows(20, seed=5), spec).steps == 12


def test_steps_follow_epochs(world, tmp_path):
    spec = world.spec(max_steps=None, epochs=1.5)
    data = world.rows(100)
    fitted = world.fit(tmp_path, world.model(), data, None, spec)
    assert fitted.steps == round(1.5 * -(-fitted.ledger.input_tokens // 256))


def test_truncation_is_counted_and_said(world, tmp_path):
    data = world.rows(50)
    fitted = world.fit(tmp_path, world.model(), data, None, world.spec(max_steps=1, max_length=20))
    assert fitted.ledger.truncated_rows == (data.lengths > 20).sum() > 0
    assert fitted.ledger.truncated_tokens == (data.lengths - 20).clip(0).sum()
    warnings = [event["message"] for event in world.events if event["kind"] == "warning"]
    assert len(warnings) == 1 and f"{fitted.ledger.truncated_tokens} tokens cut" in warnings[0]


def test_a_step_record_says_all_that_is_promised(world, tmp_path):
    world.fit(tmp_path, world.model(), world.rows(50), None, world.spec(max_steps=3))
    record = next(event for event in world.events if event["kind"] == "metric")
    promised = {"step", "total", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory", "eta"}
    assert promised <= record.keys() and record["step"] == 1 and record["total"] == 3


def test_gradients_are_clipped_to_the_norm(world, tmp_path, monkeypatch):
    """With plain descent in place of AdamW the first update is as long as the clipped gradient."""
    monkeypatch.setattr(loop, "make_optimizer", lambda tensors, spec: Descent(tensors))
    model = world.model()
    before = [weight.detach().clone() for weight in model.parameters()]
    world.fit(tmp_path, model, world.rows(50), None, world.spec(max_steps=1, clip=0.01))
    assert next(e for e in world.events if e["kind"] == "metric")["grad_norm"] > 0.1
    moved = torch.stack([(w - b).norm() for w, b in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


class Descent:
    def __init__(self, tensors):
        self.tensors = tensors

    @torch.no_grad()
    def step(self, factor):
        for tensor in self.tensors.values():
            tensor -= tensor.grad

    def state(self):
        return {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_alarm_and_the_last_checkpoint_stays(world, tmp_path, monkeypatch, bad):
    real = Likelihood.loss

    def poisoned(self, model, micro):
        return real(self, model, micro) * (bad if len(world.losses()) == 11 else 1.0)

    monkeypatch.setattr(Likelihood, "loss", poisoned)
    with pytest.raises(NotFinite) as caught:
        world.fit(tmp_path, world.model(), world.rows(100), None, world.spec(save_every=5))
    assert caught.value.step == 12
    assert "learning rate" in caught.value.remedy
    assert [e["step"] for e in world.events if e.get("alarm") == "not_finite"] == [caught.value.step]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed(world, tmp_path, monkeypatch, number):
    train, spec = world.rows(100), world.spec(max_steps=9, save_every=50)
    world.fit(tmp_path / "undisturbed", world.model(), train, None, spec)
    want, handlers = world.losses(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    world.events.clear()
    real = loop._Trainer._tell

    def tell(self, *args):
        real(self, *args)
        if self.progress.step == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_tell", tell)
        with pytest.raises(KeyboardInterrupt):
            world.fit(tmp_path / "run", world.model(), train, None, spec)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert list(world.losses()) == [1, 2, 3, 4] and world.events[-1]["name"] == "saving"
    world.fit(tmp_path / "run", world.model(), train, None, spec)
    assert world.losses() == want


def test_a_full_disk_is_a_user_error_and_a_restart_goes_on(world, tmp_path, monkeypatch):
    train, spec = world.rows(100), world.spec(max_steps=9, save_every=3)
    world.fit(tmp_path / "undisturbed", world.model(), train, None, spec)
    want = world.losses()
    world.events.clear()
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            world.fit(tmp_path / "run", world.model(), train, None, spec)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())[0] == "step-00000003"
    world.fit(tmp_path / "run", world.model(), train, None, spec)
    assert world.losses() == want


def test_a_run_twice_is_the_same_run(world, tmp_path):
    first = world.fit(tmp_path / "a", world.model(), world.rows(100), None, world.spec(dtype="bfloat16"))
    losses = world.losses()
    world.events.clear()
    second = world.fit(tmp_path / "b", world.model(), world.rows(100), None, world.spec(dtype="bfloat16"))
    assert losses == world.losses() and first.loss == second.loss
