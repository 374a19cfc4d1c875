"""Rows become batches without loss, without mixing, and without depending on how memory is divided."""

import numpy as np
import pytest
import torch

from garage.core.errors import UserError
from garage.kernels.loss import IGNORED
from garage.train.batches import MULTIPLE, Batches, Cursor, fingerprint, spread, survey

CPU = torch.device("cpu")


def batches(data, **changes):
    sizes = {"max_length": 32, "batch_tokens": 256, "micro_tokens": 128, "device": CPU} | changes
    return Batches(data, **sizes)


def documents(step):
    """(inputs, positions, targets) of every document of a step, fill apart, as comparable tuples."""
    out = []
    for micro in step.micros:
        for first, last in zip(micro.packed.bounds[:-1], micro.packed.bounds[1:], strict=True):
            parts = [t[first:last].tolist() for t in (micro.packed.tokens_T, micro.packed.positions_T, micro.targets_T)]
            if any(target != IGNORED for target in parts[2]):
                out.append(tuple(map(tuple, parts)))
    return sorted(out)


def by_definition(data, max_length):
    out = []
    for index in range(len(data)):
        tokens, learned = (a[:max_length].tolist() for a in data.row(index))
        last = max((i for i in range(1, len(tokens)) if learned[i]), default=0)
        if last:
            targets = [tokens[i + 1] if learned[i + 1] else IGNORED for i in range(last)]
            out.append((tuple(tokens[:last]), tuple(range(last)), tuple(targets)))
    return sorted(out)


def mixed(world):
    """Rows with a prompt, a learned middle and an unlearned end; some too long, one of one token, one with nothing to learn."""
    draw = np.random.default_rng(3)
    rows = [draw.integers(0, 61, length) for length in [*draw.integers(4, 60, 80), 1, 9]]
    learned = [(np.arange(len(row)) > 2) & (np.arange(len(row)) < max(4, len(row) - 2)) for row in rows]
    learned[-1] = np.zeros(9, bool)
    return world.encoded(rows, learned)


def test_an_epoch_holds_every_document_once_cut_and_masked_as_defined(world):
    data = mixed(world)
    b = batches(data)
    steps = b.steps(0, Cursor())
    epoch = [document for _ in range(b.steps_per_epoch) for document in documents(next(steps))]
    assert sorted(epoch) == by_definition(data, 32)
    assert sorted(d for step in b.in_order() for d in documents(step)) == by_definition(data, 32)


def test_the_ledger_counts_what_is_lost(world):
    data = mixed(world)
    inputs, ledger = survey(data, 32)
    lengths = data.lengths
    expected = by_definition(data, 32)
    assert ledger.rows == 82 and ledger.empty_rows == 2 and ledger.longest == lengths.max()
    assert ledger.truncated_rows == (lengths > 32).sum() and ledger.truncated_tokens == (lengths - 32).clip(0).sum()
    assert ledger.truncated_learned == sum(int(data.row(i)[1][32:].sum()) for i in range(82))
    assert ledger.input_tokens == inputs.sum() == sum(len(d[0]) for d in expected)
    assert ledger.learned_tokens == sum(t != IGNORED for d in expected for t in d[2])


def test_survey_in_small_blocks_is_the_same(world, monkeypatch):
    data = mixed(world)
    whole = survey(data, 32)
    monkeypatch.setattr("garage.train.batches.BLOCK", 7)
    parts = survey(data, 32)
    assert np.array_equal(whole[0], parts[0]) and whole[1] == parts[1]


def test_micro_tokens_never_changes_which_rows_meet(world):
    data = mixed(world)
    views = [batches(data, micro_tokens=size).steps(5, Cursor()) for size in (32, 64, 128, 256)]
    for _ in range(9):
        steps = [next(view) for view in views]
        assert all(documents(step) == documents(steps[0]) for step in steps)
        assert len({(step.tokens, step.learned) for step in steps}) == 1
        assert len(steps[0].micros) > len(steps[-1].micros)


def test_budgets_hold(world):
    data = world.rows(300)
    b = batches(data, micro_tokens=96)
    steps = b.steps(0, Cursor())
    for _ in range(b.steps_per_epoch):
        step = next(steps)
        assert abs(step.tokens - 256) < 64
        assert all(len(m.packed.tokens_T) <= 96 + MULTIPLE and len(m.packed.tokens_T) % MULTIPLE == 0 for m in step.micros)


def test_order_depends_on_seed_and_epoch_and_a_cursor_continues_it(world):
    b = batches(world.rows(100))
    steps = b.steps(0, Cursor())
    seen, cursor = [], Cursor()
    for _ in range(2 * b.steps_per_epoch + 1):
        again = next(b.steps(0, cursor))
        seen.append(documents(next(steps)))
        assert documents(again) == seen[-1]
        cursor = b.after(cursor)
    assert cursor == Cursor(2, 1)
    assert seen[0] != seen[b.steps_per_epoch]
    assert documents(next(b.steps(1, Cursor()))) != seen[0]


def test_one_row_per_step_leaves_no_step_empty(world):
    b = batches(world.rows(7, shortest=2, longest=30), batch_tokens=1, micro_tokens=32)
    steps = b.steps(0, Cursor())
    assert b.steps_per_epoch == 7 and [len(documents(next(steps))) for _ in range(7)] == [1] * 7


def test_spread_uses_as_few_passes_as_fit():
    lengths = np.array([50, 50, 50, 50, 30, 30, 20, 20])
    groups = spread(np.arange(8), lengths, 100)
    assert len(groups) == 3 and sorted(np.concatenate(groups)) == list(range(8))
    assert max(lengths[g].sum() for g in groups) <= 100


def test_nothing_to_learn_is_said(world):
    with pytest.raises(UserError, match="token to learn"):
        batches(world.rows(5, prompt=99))


def test_fingerprint_sees_every_array(world):
    data, other = world.rows(10), world.rows(10, prompt=1)
    assert fingerprint(data) == fingerprint(world.rows(10))
    assert len({fingerprint(data), fingerprint(other), fingerprint(world.rows(10, seed=1))}) == 3
