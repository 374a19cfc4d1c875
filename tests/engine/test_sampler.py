"""Sampling: filters against a slow definition, draws against their distribution, seeds against the company they keep."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from garage.core.types import Sampling
from garage.engine import sampler
from garage.engine.request import Sequence
from garage.engine.rules import make_rules
from garage.engine.sampler import Chosen, sample, uniforms
from garage.tokens.tokenizer import Tokenizer

V = 50


def choose(logits: Tensor, sequences: list[Sequence], vocab_size: int) -> Chosen:
    return sample(logits, [(s, len(s.tokens)) for s in sequences], vocab_size).read()


def sequence(sampling: Sampling, seed: int = 0, length: int = 1) -> Sequence:
    return Sequence("s", [0] * length, 1, 100, sampling, seed)


def definition(logits: Tensor, s: Sampling) -> Tensor:
    """Probabilities after temperature, min-p, top-k, top-p and typical-p, one row, as plainly as can be."""
    p = (logits.double() / s.temperature).softmax(-1)
    p = torch.where(p >= s.min_p * p.max(), p, 0.0)
    if s.top_k:
        p = torch.where(p >= p.sort(descending=True).values[min(s.top_k, len(p)) - 1], p, 0.0)
    p = p / p.sum()
    order = p.argsort(descending=True, stable=True)
    before = p[order].cumsum(-1) - p[order]
    p[order[before >= s.top_p]] = 0.0
    p = p / p.sum()
    entropy = -sum(x * math.log(x) for x in p.tolist() if x)
    order = sorted(range(len(p)), key=lambda i: abs(-math.log(p[i]) - entropy) if p[i] else math.inf)
    held = 0.0
    for i in order:
        if held >= s.typical_p:
            p[i] = 0.0
        held += p[i].item()
    return p / p.sum()


def support(logits: Tensor, s: Sampling, monkeypatch: pytest.MonkeyPatch, draws: int = 400) -> set[int]:
    """Every token that some draw on a fine grid can reach."""
    grid = np.arange(draws) / draws
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, positions: grid)
    return set(choose(logits.expand(draws, -1), [sequence(s)] * draws, V).ids)


CASES = [
    Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.3, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.3), Sampling(temperature=2.0, top_k=10, top_p=0.5), Sampling(temperature=1.0, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.0, top_k=1), Sampling(temperature=0.9, top_k=99, top_p=0.99), Sampling(temperature=1.0, top_p=1e-9),
    Sampling(temperature=1.0, typical_p=0.5), Sampling(temperature=1.5, typical_p=0.8, top_k=20, top_p=0.95, min_p=0.01),
    Sampling(temperature=1.0, top_k=7, min_p=0.02),
]  # fmt: skip


@pytest.mark.parametrize("s", CASES)
def test_filters_keep_what_the_definition_keeps(s: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        logits = torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * 3
        p = definition(logits[0], s)
        reached = support(logits, s, monkeypatch)
        assert reached <= set(p.nonzero()[:, 0].tolist())
        assert reached >= set((p > 1 / 200).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("s", CASES)
def test_frequencies_match_the_definition(s: Sampling) -> None:
    """5,000 draws; each frequency within five standard errors: odds of about 1 in 1.7 million for each of 600 cells, 1 in 3,000 for all."""
    logits, draws = torch.randn(1, V, generator=torch.Generator().manual_seed(9)) * 2, 5_000
    ids = choose(logits.expand(draws, -1), [sequence(s, seed) for seed in range(draws)], V).ids
    p = definition(logits[0], s)
    found = torch.bincount(torch.tensor(ids), minlength=V) / draws
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / draws).sqrt() + 1e-12).all())


def test_ties_at_the_edge_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, V), -50.0)
    logits[0, [3, 7, 11]] = torch.tensor([1.0, 0.0, 0.0])
    assert support(logits, Sampling(temperature=1.0, top_k=2), monkeypatch) == {3, 7, 11}


def test_the_whole_vocabulary_is_sorted_when_the_first_look_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, s = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 0.1, Sampling(temperature=1.0, top_p=0.95)
    want = support(logits, s, monkeypatch)
    monkeypatch.setattr(sampler, "FIRST_LOOK", 4)
    assert support(logits, s, monkeypatch) == want and len(want) > 40


@pytest.mark.parametrize("s", CASES)
def test_filters_without_a_sort_keep_the_same(s: Sampling) -> None:
    """What a device runs, on rows of other requests too."""
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(3)) * 3
    mass = (logits / s.temperature).softmax(-1)
    mass = mass / mass.amax(-1, keepdim=True)
    kept = sampler._filtered(mass.repeat(2, 1), [s] * 20 + [Sampling(temperature=1.0, top_k=3, top_p=0.2)] * 20)[:20]
    assert [set(row.nonzero()[:, 0].tolist()) for row in kept] == [set(definition(row, s).nonzero()[:, 0].tolist()) for row in logits]
    if 0.1 < s.top_p < 0.9:
        twin = sampler._is_best(mass.log(), mass, torch.full((20, 1), s.top_p))  # of masses that do not sum to 1
        assert [set(row.nonzero()[:, 0].tolist()) for row in twin] != [set(definition(row, s).nonzero()[:, 0].tolist()) for row in logits]


def test_the_first_look_and_a_whole_sort_agree_on_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(5)
    filters = Sampling(top_p=0.9), Sampling(top_p=0.99, top_k=900), Sampling(top_k=5000), Sampling(min_p=0.01, top_p=0.7)
    for scale, s in zip((0.5, 8.0, 1.0, 3.0), filters, strict=True):
        mass = (torch.randn(20_000, generator=draw) * scale).softmax(-1).numpy()
        mass /= mass.max()
        floors = set()
        for look in (8, 1024, 20_000):
            monkeypatch.setattr(sampler, "FIRST_LOOK", look)
            floors.add(sampler._floor(mass, s))
        assert len(floors) == 1 and 0 < floors.pop() <= 1


class _Copies(TorchDispatchMode):
    """Counts copies to another device that would wait for it."""

    num_waiting = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.num_waiting += str(kwargs.get("device")) == "meta" and "copy" in str(func) and not kwargs.get("non_blocking", False)
        return func(*args, **kwargs)


def test_the_plain_path_never_waits_for_the_device(tokenizer: Tokenizer) -> None:
    """On the device "meta" no value can be read: whatever runs there asks for none."""
    kinds = Sampling(logprobs=2), CASES[0], CASES[4], CASES[5], Sampling(temperature=1.0, typical_p=0.5)
    jobs = [sequence(s) for s in (*kinds, Sampling(logit_bias=((3, 1.0),), presence_penalty=1.0, allowed_token_ids=(1, 2)))]
    jobs[-1].rules = make_rules(jobs[-1].sampling, [0], (), tokenizer, V)
    with _Copies() as copies:
        sampled = sample(torch.empty(len(jobs), V, device="meta"), [(s, 1) for s in jobs], V)
    assert sampled.ids_R.shape == (len(jobs),) and copies.num_waiting == 0
    with pytest.raises(Exception, match="meta"):
        sampled.read()
    with _Copies() as copies:
        torch.zeros(3).to("meta")
    assert copies.num_waiting == 1, "the counter counts"


def test_filters_of_a_device_choose_what_those_of_a_cpu_do(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, logits = [sequence(s, seed) for seed in range(40) for s in CASES], torch.randn(40 * len(CASES), V) * 3
    want = choose(logits, jobs, V).ids
    monkeypatch.setattr(sampler, "_filter", lambda mass, samplings: mass.copy_(sampler._filtered(mass, samplings)))
    assert choose(logits, jobs, V).ids == want


def test_equal_logits_give_the_first_id_and_the_rows_of_a_sequence_their_own_draws() -> None:
    logits = torch.zeros(2, V)
    logits[:, [9, 30]] = 4.0
    assert choose(logits, [sequence(Sampling())] * 2, V).ids == [9, 9]
    s = sequence(Sampling(temperature=1.0), seed=5, length=30)
    drafted = sample(torch.zeros(20, V), [(s, length) for length in range(1, 21)], V).read().ids
    alone = [choose(torch.zeros(1, V), [sequence(s.sampling, 5, length)], V).ids[0] for length in range(1, 21)]
    assert drafted == alone and len(set(drafted)) > 5


def test_a_seed_gives_the_same_token_in_any_company() -> None:
    rng = random.Random(0)
    rows = [torch.randn(V, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    jobs = [sequence(rng.choice([*CASES, Sampling()]), rng.getrandbits(63), rng.randint(1, 50)) for _ in rows]
    alone = [choose(row[None], [job], V).ids[0] for row, job in zip(rows, jobs, strict=True)]
    for _ in range(20):
        pick = rng.sample(range(40), rng.randint(1, 40))
        assert choose(torch.stack([rows[i] for i in pick]), [jobs[i] for i in pick], V).ids == [alone[i] for i in pick]


def test_draws_depend_on_seed_and_position_and_are_uniform() -> None:
    u = np.stack([uniforms([seed] * 500, range(500)) for seed in range(200)])
    assert len(np.unique(u)) == u.size
    deviation = abs(np.histogram(u, 100, (0, 1))[0] - u.size / 100).max() / (u.size / 100) ** 0.5
    assert deviation < 5, "one cell of 100 is off by five standard errors: odds of about 1 in 17,000"
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02, "positions"
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02, "seeds"


def test_cold_is_greedy_and_padded_ids_are_never_chosen() -> None:
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    logits[:, 40:] = 100.0
    for temperature in (0.0, 1e-9):
        assert choose(logits, [sequence(Sampling(temperature=temperature, top_p=0.5))] * 8, 40).ids == logits[:, :40].argmax(-1).tolist()
    warm = choose(logits.repeat(50, 1), [sequence(Sampling(temperature=5.0), seed) for seed in range(400)], 40).ids
    assert max(warm) < 40
    assert max(choose(logits, [sequence(Sampling())] * 8, V).ids) >= 40, "the twin that ignores the tokenizer's size chooses them"


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    jobs = [sequence(Sampling(temperature=2.0, top_k=3, logprobs=n)) for n in (None, 0, 4)]
    out = choose(logits, jobs, V)
    want = logits.double().log_softmax(-1)
    assert out.logprobs[0] is None and out.logprobs[1].top == ()
    for b in (1, 2):
        assert out.logprobs[b].logprob == pytest.approx(want[b, out.ids[b]].item(), abs=1e-5)
    assert [i for i, _ in out.logprobs[2].top] == want[2].topk(4).indices.tolist()


def test_a_row_without_finite_logits_is_named_and_the_others_are_not() -> None:
    logits = torch.zeros(4, V)
    logits[1, 3], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        assert set(choose(logits, [sequence(Sampling(temperature=temperature))] * 4, V).faults) == {1, 2, 3}
