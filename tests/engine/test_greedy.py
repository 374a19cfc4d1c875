"""Greedy answers equal a naive full forward, whatever the schedule.

200 random schedules: arrivals between steps, aborts, shared prefixes, tiny page pools (so that preemption happens), page and chunk
sizes of every kind, half of them with steps that begin before the last one is read; Qwen 3 and Gemma 3 with a window shorter than the
texts, float64 and float32, all weights random. Before every run the pages are filled with NaN, and free pages again while it runs: a
read beyond a sequence's own context would show.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from garage.core.types import Completion, Request, Sampling
from garage.engine import scheduler as scheduler_module
from garage.engine.batch import Batcher
from garage.engine.engine import Engine
from garage.engine.pages import chain
from garage.kernels import paged
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

SCHEDULES = 50  # for each family and dtype
VOCAB = 268  # three rows more than the tokenizer has ids


class Case(SimpleNamespace):
    model: Model
    is_greedy: Callable[[Request, Completion], bool]
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=["qwen3-float64", "qwen3-float32", "gemma3-float64", "gemma3-float32"])
def case(request: pytest.FixtureRequest, lab: SimpleNamespace, tokenizer: Tokenizer) -> Case:
    family, dtype = request.param.split("-")
    model = lab.tiny(family, vocab_size=VOCAB, dtype=getattr(torch, dtype))

    def is_greedy(request: Request, answer: Completion) -> bool:
        """Every token is the likeliest after all before it, by one full forward over prompt and answer, and none is missing."""
        tokens = [*request.prompt, *answer.token_ids]
        likeliest = lab.naive_logits(model, tokens)[len(request.prompt) - 1 : -1, : tokenizer.vocab_size].argmax(-1)
        return len(answer.token_ids) == request.sampling.max_tokens and likeliest.tolist() == list(answer.token_ids)

    return Case(model=model, is_greedy=is_greedy, tokenizer=tokenizer)


def fill_free_pages(engine: Engine, value: float) -> None:
    pool, runner = engine._scheduler.pool, engine._runner
    units = [page * runner.layout.units + unit for page in pool._free for unit in range(runner.layout.units)]
    for cache in {id(cache): cache for cache in (*runner._keys, *runner._values)}.values():
        cache[units] = value


def random_engine(case: Case, rng: random.Random, *, is_ahead: bool) -> Engine:
    page_size = rng.choice([1, 3, 4, 16])
    spec = EngineSpec(
        page_size=page_size, num_pages=-(-rng.randint(44, 64) // page_size), max_num_seqs=rng.randint(2, 6), max_model_len=42,
        max_num_batched_tokens=rng.choice([4, 16, 64, 64]), enable_prefix_caching=rng.random() < 0.7, async_scheduling=is_ahead,
    )  # fmt: skip
    engine = Engine(case.model, case.tokenizer, None, spec)
    fill_free_pages(engine, torch.nan)
    return engine


DRAW = random.Random(7)
PROMPTS = [[DRAW.randrange(256) for _ in range(27)] for _ in range(7)]  # few, so that prefixes are shared


def random_request(rng: random.Random, number: int) -> Request:
    prompt = [*PROMPTS[rng.randrange(7)][: rng.choice([2, 3, 9, 17, 27])], rng.randrange(2)]
    return Request(str(number), tuple(prompt), Sampling(max_tokens=rng.randint(1, 14), ignore_eos=True))


def schedule(case: Case, seed: int) -> tuple[Engine, list[tuple[Request, Completion]]]:
    rng = random.Random(seed)
    engine, requests, ended = random_engine(case, rng, is_ahead=seed % 2 == 1), {}, []
    for number in range(rng.randint(2, 9)):
        request = random_request(rng, number)
        engine.submit(request)
        requests[request.id] = request
        for _ in range(rng.choice([0, 0, 1, 4])):
            ended += engine.step()
        if rng.random() < 0.2:
            engine.abort(rng.choice(sorted(requests)))
        fill_free_pages(engine, torch.nan)
        engine.check_books()
    while engine.has_work:
        ended += engine.step()
    engine.check_books()
    return engine, [(requests[c.id], c) for c in ended]


def wrong_answers(case: Case, seeds: range) -> tuple[int, list[Engine], int]:
    engines, wrong, count = [], 0, 0
    for seed in seeds:
        engine, ended = schedule(case, seed)
        engines.append(engine)
        count += len(ended)
        wrong += sum(not case.is_greedy(request, answer) for request, answer in ended)
    return wrong, engines, count


def test_greedy_equals_a_naive_full_forward(case: Case) -> None:
    wrong, engines, count = wrong_answers(case, range(SCHEDULES))
    assert wrong == 0
    stats = [engine.stats() for engine in engines]
    assert count > 3 * SCHEDULES
    assert sum(s.num_preemptions for s in stats) > 3 and sum(s.prefix_hits for s in stats) > 50, "the schedules prove too little"


def test_a_hash_that_ignores_its_parent_changes_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "chain", lambda parent, tokens: chain(b"", tokens[:1]))
    assert wrong_answers(case, range(SCHEDULES // 5))[0] > 0


def test_a_pending_token_that_is_not_looked_up_changes_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batcher, "known", lambda self, tokens, lines: tokens.clamp(min=0))
    assert wrong_answers(case, range(SCHEDULES // 5))[0] > 0


def test_a_window_that_is_off_changes_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, fill = paged.plan_gather, paged.prefill
    monkeypatch.setattr(paged, "plan_gather", lambda *a, window, **k: plan(*a, window=window and window + 1, **k))
    monkeypatch.setattr(paged, "prefill", lambda *a, window, **k: fill(*a, window=window and window + 1, **k))
    is_windowed = any(case.model.config.window(layer) for layer in range(case.model.config.num_hidden_layers))
    assert (wrong_answers(case, range(SCHEDULES // 5))[0] > 0) == is_windowed


def test_generate_keeps_the_order_and_one_failure_to_itself(case: Case) -> None:
    engine = Engine(case.model, case.tokenizer, None, EngineSpec(page_size=4, num_pages=40, max_num_seqs=3, max_waiting=2))
    requests = [random_request(random.Random(n), n) for n in range(9)]
    requests[4] = Request("empty", ())
    requests[6] = Request("long", tuple(range(200)), Sampling(max_tokens=100))
    answers = engine.generate(requests)
    assert [a.id for a in answers] == [r.id for r in requests]
    assert [a.finish_reason for a in answers] == ["length"] * 4 + ["error", "length", "error"] + ["length"] * 2
    assert "empty" in answers[4].error and "at most 160" in answers[6].error
    for request, answer in zip(requests, answers, strict=True):
        if answer.finish_reason == "length":
            assert case.is_greedy(request, answer)


def test_a_failed_step_ends_what_ran_and_leaves_nothing_behind(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(case.model, case.tokenizer, None, EngineSpec(page_size=4, num_pages=40, max_num_seqs=2))
    prompt, heard = tuple(PROMPTS[6]), []
    for name in "abc":
        engine.submit(Request(name, prompt, Sampling(max_tokens=3, ignore_eos=True)), heard.append)
    monkeypatch.setattr(case.model, "forward", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError):
        engine.step()
    monkeypatch.undo()
    assert [(d.id, d.completion.finish_reason) for d in heard] == [("a", "error"), ("b", "error")]
    engine.check_books()
    assert engine.stats().num_pages_cached == 0, "pages that were never written may not be found"
    while engine.has_work:
        engine.step()
    last = heard[-1].completion
    assert last.id == "c" and last.cached_tokens == 0
    assert case.is_greedy(Request("c", prompt, Sampling(max_tokens=3)), last)
