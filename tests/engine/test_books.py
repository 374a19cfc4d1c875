"""The books of pages and queues: 1,000 random traces of arrive, step and abort, without a model.

A fake step samples random tokens. After every action the books must balance, and at the end every accepted request has its answer,
no page is used, and everything cached is reachable. Each broken twin below must be caught by the same traces.
"""

import random
from functools import partial

import pytest

from garage.core.errors import UserError
from garage.core.types import Sampling
from garage.engine import scheduler as scheduler_module
from garage.engine.pages import PagePool, chain
from garage.engine.request import QueueFull, Sequence, State
from garage.engine.scheduler import HEAD_START, Scheduler
from garage.engine.scheduler import Limits as engine_limits

TRACES = 1_000
Limits = partial(engine_limits, max_waiting_tokens=1_000)


def make(rng: random.Random, pool_class: type[PagePool] = PagePool) -> Scheduler:
    pool = pool_class(rng.randint(2, 24), rng.choice([1, 2, 4]), keep=rng.random() < 0.8)
    sizes = {"max_num_seqs": rng.randint(1, 6), "max_num_batched_tokens": rng.randint(1, 24), "max_waiting": rng.randint(1, 8)}
    return Scheduler(pool, engine_limits(**sizes, max_waiting_tokens=rng.randint(10, 90), max_model_len=40))


def arrive(rng: random.Random, scheduler: Scheduler, number: int) -> Sequence | None:
    """A prompt over two tokens, so that prefixes are often shared."""
    prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
    sequence = Sequence(str(number), list(prompt), len(prompt), len(prompt) + rng.randint(1, 12), Sampling(), 0)
    try:
        scheduler.add(sequence, rng.randint(-1, 1))
    except UserError as error:
        longest = min(40, scheduler.pool.num_pages * scheduler.pool.page_size + 1)
        assert isinstance(error, QueueFull) == (sequence.limit <= longest), str(error)
        return None
    return sequence


def step(rng: random.Random, scheduler: Scheduler) -> list[Sequence]:
    """Plan, check the plan's own laws, pretend to compute it; returns what finished."""
    slices = scheduler.plan()
    limits, size = scheduler.limits, scheduler.pool.page_size
    assert sum(s.stop - s.start for s in slices) <= limits.max_num_batched_tokens
    assert len({s.sequence.id for s in slices}) == len(slices) <= limits.max_num_seqs
    written = set()
    for part in slices:
        assert part.start < part.stop <= len(part.sequence.pages) * size, "a token has no page"
        places = {(part.sequence.pages[p // size], p % size) for p in range(part.start, part.stop)}
        assert not places & written, "two rows write the same slot"
        written |= places
    scheduler.computed(slices)
    finished = []
    for sequence in [s.sequence for s in slices if s.is_last]:
        sequence.tokens.append(rng.randint(0, 1))
        if len(sequence.tokens) >= sequence.limit:
            scheduler.finish(sequence)
            finished.append(sequence)
    return finished


def trace(seed: int, pool_class: type[PagePool] = PagePool) -> Scheduler:
    rng = random.Random(seed)
    scheduler, live, served = make(rng, pool_class), {}, 0
    for number in range(rng.randint(5, 40)):
        action = rng.random()
        if action < 0.4:
            sequence = arrive(rng, scheduler, number)
            live.update({sequence.id: sequence} if sequence else {})
        elif action < 0.9:
            for sequence in step(rng, scheduler):
                del live[sequence.id]
                served += 1
        elif live:
            scheduler.finish(live.pop(rng.choice(sorted(live))))
        scheduler.check_books()
    for _ in range(3_000):
        if not live:
            break
        for sequence in step(rng, scheduler):
            del live[sequence.id]
        scheduler.check_books()
    assert not live, f"starved: {sorted(live)}"
    assert scheduler.pool.num_used == 0
    return scheduler


def test_a_thousand_traces_keep_the_books() -> None:
    ended = [trace(seed) for seed in range(TRACES)]
    assert sum(s.num_preemptions for s in ended) > TRACES / 4, "too few preemptions to prove anything"
    assert sum(s.prefix_hits for s in ended) > TRACES, "too few prefix hits to prove anything"


class Leaks(PagePool):
    """Broken twin: the last page of a sequence is not given back."""

    def release(self, pages: list[int]) -> None:
        super().release(pages[:-1])


class ForgetsReaders(PagePool):
    """Broken twin: a shared page is given back when its first reader leaves."""

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self._refs[page] = 0
            self._put_back(page)


class KeepsEvictedKeys(PagePool):
    """Broken twin: the key of a page that was reused still finds it."""

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        return page


@pytest.mark.parametrize("twin", [Leaks, ForgetsReaders, KeepsEvictedKeys])
def test_broken_pools_are_caught(twin: type[PagePool]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(200):
            trace(seed, twin)


def test_a_pool_without_work_but_with_a_lost_page_is_caught() -> None:
    pool = PagePool(4, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="counted and held"):
        pool.check_books([])
    pool = PagePool(4, 2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="leaked"):
        pool.check_books([])


def run_alone(scheduler: Scheduler, tokens: list[int]) -> Sequence:
    """Run one sequence to its end; returns it, its pages' keys still cached."""
    sequence = Sequence(str(tokens), list(tokens), len(tokens), len(tokens) + 1, Sampling(), 0)
    scheduler.add(sequence)
    while sequence.state is not State.FINISHED:
        step(random.Random(0), scheduler)
    return sequence


def shared_after(first: list[int], second: list[int]) -> int | None:
    scheduler = Scheduler(PagePool(32, 4), Limits(max_num_seqs=4, max_num_batched_tokens=64, max_waiting=8, max_model_len=64))
    run_alone(scheduler, first)
    return run_alone(scheduler, second).num_cached


def test_prefix_hits_count_equal_full_pages_only() -> None:
    base = list(range(12))
    assert shared_after(base, [*base, 50]) == 12
    assert shared_after(base, base) == 8, "the last token is always computed"
    assert shared_after(base, [*base[:7], 99, *base[8:], 50]) == 4
    assert shared_after(base, [99, *base[1:], 50]) == 0, "the same tokens after another beginning are another prefix"


def test_a_hash_that_ignores_its_parent_shares_wrong_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "chain", lambda parent, tokens: chain(b"", tokens))
    base = list(range(12))
    moved = [*base[4:8], *base[:4], 50]
    assert shared_after(base, moved) == 8, "the twin finds pages that belong to other positions"
    monkeypatch.undo()
    assert shared_after(base, moved) == 0


def test_equal_prompts_in_one_step_are_computed_once() -> None:
    scheduler = Scheduler(PagePool(64, 4), Limits(max_num_seqs=8, max_num_batched_tokens=256, max_waiting=8, max_model_len=64))
    for number in range(8):
        scheduler.add(Sequence(str(number), list(range(33)), 33, 40, Sampling(), 0))
    slices = scheduler.plan()
    assert [s.stop - s.start for s in slices] == [33, *[1] * 7]
    scheduler.check_books()


def test_the_newest_is_preempted_and_the_oldest_finishes_first() -> None:
    scheduler = Scheduler(PagePool(8, 2, keep=False), Limits(max_num_seqs=4, max_num_batched_tokens=64, max_waiting=8, max_model_len=64))
    sequences = [Sequence(str(n), [n] * 4, 4, 16, Sampling(), 0) for n in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    order: list[str] = []
    while len(order) < 3:
        order += [s.id for s in step(random.Random(0), scheduler)]
    assert order == ["0", "1", "2"]
    assert scheduler.num_preemptions > 0


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(PagePool(4, 4), Limits(max_num_seqs=2, max_num_batched_tokens=8, max_waiting=1, max_model_len=100))
    with pytest.raises(UserError, match="10 prompt tokens and up to 8 new ones make 18, but this model is served with at most 17"):
        scheduler.add(Sequence("a", [0] * 10, 10, 18, Sampling(), 0))
    scheduler.add(Sequence("b", [0] * 10, 10, 17, Sampling(), 0))
    with pytest.raises(QueueFull):
        scheduler.add(Sequence("c", [0], 1, 2, Sampling(), 0))


def order_of(scheduler: Scheduler, priorities: list[int]) -> list[int]:
    """Indices in the order in which they end, all waiting at once and one running at a time."""
    for number, priority in enumerate(priorities):
        scheduler.add(Sequence(str(number), [0], 1, 2, Sampling(), 0), priority)
    return [int(s.id) for _ in priorities for s in step(random.Random(0), scheduler)]


def one_at_a_time(max_waiting: int = 2_000) -> Scheduler:
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=8, max_waiting=max_waiting, max_waiting_tokens=50, max_model_len=64)
    return Scheduler(PagePool(32, 4), limits)


def test_lower_priority_runs_first_and_equal_ones_in_the_order_of_arrival() -> None:
    assert order_of(one_at_a_time(), [0, 1, -1, 0, -1, 1]) == [2, 4, 0, 3, 1, 5]


def test_priority_lets_only_so_many_pass() -> None:
    scheduler = one_at_a_time()
    scheduler.add(Sequence("low", [0], 1, 2, Sampling(), 0), 1)
    for number in range(HEAD_START + 5):
        scheduler.add(Sequence(f"high {number}", [0], 1, 2, Sampling(), 0), 0)
        if "low" in [s.id for s in step(random.Random(0), scheduler)]:
            break
    assert number == HEAD_START - 1


def test_a_preempted_sequence_keeps_its_place() -> None:
    scheduler = Scheduler(PagePool(6, 2, keep=False), Limits(max_num_seqs=4, max_num_batched_tokens=64, max_waiting=8, max_model_len=64))
    for name, priority in (("late", 0), ("first", -1), ("second", 0)):
        scheduler.add(Sequence(name, [0] * 3, 3, 11, Sampling(), 0), priority)
    order: list[str] = []
    while len(order) < 3:
        order += [s.id for s in step(random.Random(0), scheduler)]
    assert order == ["first", "late", "second"] and scheduler.num_preemptions > 0


def test_the_queue_is_bounded_by_tokens_too_but_never_refuses_the_only_one() -> None:
    scheduler = one_at_a_time()
    scheduler.add(Sequence("long", [0] * 60, 60, 61, Sampling(), 0))
    with pytest.raises(QueueFull, match="60 tokens wait"):
        scheduler.add(Sequence("next", [0], 1, 2, Sampling(), 0))
