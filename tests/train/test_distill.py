"""Distillation in the loop: a copy has nothing to learn, a student comes nearer on rows it never saw, and a wrong teacher shows."""

from pathlib import Path

import pytest
import torch

from garage.core.events import EventLog
from garage.kernels.distill import Match
from garage.train.batches import Batches, Cursor
from garage.train.loop import fit, prepare
from garage.train.objectives.distill import Distillation
from garage.train.objectives.likelihood import Likelihood

CPU = torch.device("cpu")


@pytest.fixture
def teacher(world, tmp_path: Path):
    model = world.model(seed=5)
    world.fit(tmp_path / "teacher", model, world.rows(300), None, world.spec(max_steps=60))
    world.events.clear()
    return model


def one_step(data, **sizes):
    return next(Batches(data, max_length=32, batch_tokens=9999, micro_tokens=9999, device=CPU, **sizes).steps(0, Cursor()))


def test_a_copy_of_the_teacher_gets_no_gradient_from_it(world, teacher) -> None:
    student, data = world.model(seed=5), world.rows(20, prompt=2)
    student.load_state_dict(teacher.state_dict())
    student.train()
    prepare(student, world.spec())
    for kind in ("forward", "reverse", "js"):
        objective = Distillation(teacher, Match(kind, 2.0, 1.0), None)
        student.zero_grad()
        objective.loss(student, one_step(data).micros[0]).backward()
        assert max(weight.grad.abs().max() for weight in student.parameters()) < 1e-4
        seen = objective.metrics()
        assert abs(seen["divergence"]) < 1e-6 and seen["agreement"] == 1.0
    plain = Likelihood(None).loss(student, one_step(data).micros[0]).item() / one_step(data).learned
    assert seen["cross_entropy"] == pytest.approx(plain, rel=1e-5)


@torch.no_grad()
def divergence(student, teacher, data) -> float:
    """Nats per learned place, all softmaxes whole."""
    total = 0.0
    for micro in one_step(data).micros:
        batch, keep = micro.packed, micro.targets_T >= 0
        states = [model(batch.tokens_T, batch.positions_T, batch.attend()) for model in (teacher, student)]
        logs = [torch.log_softmax(model.logits(x)[keep], -1) for model, x in zip((teacher, student), states, strict=True)]
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
    return total / one_step(data).learned


def run(world, place: Path, teacher, match: Match, **changes) -> torch.nn.Module:
    student = world.model(seed=1)
    events = EventLog(None, lambda event: world.events.append(dict(event)))
    spec = world.spec(max_steps=25, **changes)
    fit(student, train=world.rows(150), held=world.rows(20, seed=9), spec=spec, run=place, events=events,
        objective=Distillation(teacher, match, None))  # fmt: skip
    return student


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_it_brings_the_student_nearer_on_rows_it_never_saw(world, teacher, tmp_path: Path, kind) -> None:
    held = world.rows(30, seed=7)
    before = divergence(world.model(seed=1), teacher, held)
    student = run(world, tmp_path / "run", teacher, Match(kind, 1.0, 1.0))
    assert divergence(student, teacher, held) < 0.5 * before
    seen = world.losses("divergence")
    assert seen[25] < 0.6 * seen[1] and world.losses("agreement")[25] > world.losses("agreement")[1] + 0.3
    assert set(world.losses("cross_entropy")) == set(range(1, 26)) and world.losses("held_loss")[25] > 0


def test_a_teacher_that_knows_something_else_is_not_reached_by_the_rows_alone(world, teacher, tmp_path: Path) -> None:
    """The broken twin: with the teacher's weight at 0 its distribution, made unlike the rows', is not learned."""
    torch.manual_seed(0)
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.data.roll(3, 0))  # it says three more than is right
    held, found = world.rows(30, seed=7), {}
    for mix in (0.0, 1.0):
        found[mix] = divergence(run(world, tmp_path / str(mix), teacher, Match("forward", 1.0, mix)), teacher, held)
    assert found[1.0] < 0.7 * found[0.0]


def test_the_teacher_is_not_changed_and_a_run_twice_is_the_same(world, teacher, tmp_path: Path) -> None:
    before = [weight.clone() for weight in teacher.parameters()]
    run(world, tmp_path / "a", teacher, Match())
    first = world.losses()
    world.events.clear()
    run(world, tmp_path / "b", teacher, Match())
    assert world.losses() == first
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters(), strict=True))
