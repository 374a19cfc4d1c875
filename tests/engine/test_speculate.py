"""Guesses change how many steps an answer takes, and nothing else."""

import random
from dataclasses import replace

import pytest
import torch

from garage.core.types import Request, Sampling, Structure
from garage.engine.engine import Engine
from garage.engine.request import Sequence
from garage.engine.speculate import Ngram, Pace
from garage.engine.task import Task
from garage.specs.serve import EngineSpec, NgramSpec

VOCAB = 268
SPEC = {"page_size": 4, "num_pages": 60, "max_num_seqs": 6, "max_num_batched_tokens": 48, "max_model_len": 120, "device": "cpu"}
NGRAM = {"kind": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 3, "adaptive": False}


def engine_of(lab, tokenizer, family="qwen3", speculation=None, draft=None, **settings):
    spec = EngineSpec.parse(SPEC | settings | {"speculation": speculation or {"kind": "off"}})
    return Engine(lab.tiny(family, vocab_size=VOCAB), tokenizer, None, spec, draft=draft)


def requests_of(seed, count=8):
    """Prompts that repeat themselves; greedy and drawn, with penalties, stops, end ids and forms."""
    rng = random.Random(seed)
    motif = tuple(rng.randrange(256) for _ in range(4))
    kinds = [
        {"ignore_eos": True}, {"temperature": 0.8, "seed": 1, "ignore_eos": True},
        {"temperature": 1.2, "seed": 2, "top_k": 5, "logprobs": 2},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3, "temperature": 0.5, "seed": 3}, {"stop": ("e", "th"), "min_tokens": 3},
        {"bad_words": ("a", "in"), "min_tokens": 5, "logprobs": 0}, {"repetition_penalty": 1.3, "ignore_eos": True},
    ]  # fmt: skip
    out = []
    for n in range(count):
        sampling = Sampling(max_tokens=rng.randint(1, 40), **kinds[n % len(kinds)])
        out.append(Request(str(n), motif * rng.randint(1, 6) + (rng.randrange(256),), sampling))
    form = Structure("regex", "(ab|cd)+[0-9]{4,30}")
    return [*out, Request("form", motif, Sampling(max_tokens=25, temperature=0.9, seed=5), structure=form)]


def said(engine, requests):
    done = engine.generate(requests)
    engine.check_books()
    assert engine.stats().num_pages_used == 0
    return [(d.token_ids, d.text, d.finish_reason, [(t.token_id, round(t.logprob, 9)) for t in d.logprobs], d.error) for d in done]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_the_text_with_guesses_is_the_text_without(lab, tokenizer, family):
    kept = 0
    for seed in range(6):
        want = said(engine_of(lab, tokenizer, family), requests_of(seed))
        engine = engine_of(lab, tokenizer, family, NGRAM)
        assert said(engine, requests_of(seed)) == want
        kept += engine.stats().accepted_tokens
    assert kept > 20


def test_a_draft_model_agrees_where_it_can(lab, tokenizer):
    """With itself as the draft nearly all is kept, drawn or greedy; with another model the text is still the same."""
    spec = {"kind": "draft", "model": "given", "num_speculative_tokens": 3, "adaptive": False, "kv_cache_bytes": 1 << 20}
    for draft, least in ((lab.tiny("qwen3", vocab_size=VOCAB), 0.6), (lab.tiny("gemma3", vocab_size=VOCAB, seed=3), 0.0)):
        want = said(engine_of(lab, tokenizer), requests_of(1))
        engine = engine_of(lab, tokenizer, speculation=spec, draft=draft)
        assert said(engine, requests_of(1)) == want
        stats = engine.stats()
        assert stats.draft_tokens > 0 and stats.accepted_tokens >= least * stats.draft_tokens
        engine._speculation._proposer.propose([], 1)
        engine._speculation._proposer._books.check_books()
        assert engine._speculation._proposer._books.pool.num_used == 0, "the draft's pages are given back"


def test_without_room_for_all(lab, tokenizer):
    """Preempted and aborted while guesses stand behind their tokens: the books hold, and what is left says the same."""
    want = dict(zip("01234567", said(engine_of(lab, tokenizer), requests_of(2)), strict=False))
    engine = engine_of(lab, tokenizer, speculation=NGRAM, num_pages=31)
    ended = {}
    for request in requests_of(2)[:8]:
        engine.submit(request, lambda delta: ended.update({delta.id: delta.completion} if delta.completion else {}))
    for step in range(400):
        if step == 9:
            engine.abort("3")
        engine.step()
        engine.check_books()
    assert not engine.has_work and engine.stats().num_preemptions > 0 and engine.stats().accepted_tokens > 0
    assert all(ended[name].token_ids == want[name][0] for name in "0124567")


def test_a_sampler_that_forgets_its_place_is_seen(lab, tokenizer, monkeypatch):
    """The broken twin: one guess too many is kept."""
    want = said(engine_of(lab, tokenizer), requests_of(0))
    add = Task.add

    def trusting(self, rows, guesses, chosen):
        ids = list(chosen.ids)
        if guesses:
            ids[rows.start] = guesses[0]
        return add(self, rows, guesses, replace(chosen, ids=ids))

    monkeypatch.setattr(Task, "add", trusting)
    assert said(engine_of(lab, tokenizer, speculation=NGRAM), requests_of(0)) != want


def test_a_failing_step_leaves_no_guess_in_an_answer(lab, tokenizer, monkeypatch):
    engine = engine_of(lab, tokenizer, speculation=NGRAM)
    heard = []
    engine.submit(Request("a", (1, 2, 3, 1, 2, 3, 1, 2), Sampling(max_tokens=20, ignore_eos=True)), heard.append)
    engine.step()
    monkeypatch.setattr(engine._runner, "run", lambda slices: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert heard[-1].completion.finish_reason == "error" and len(heard[-1].completion.token_ids) == 1


def test_lookup():
    sequence = Sequence("a", [1, 256, 3, 4, 5, 9, 256, 3], 4, 99, Sampling(), 0)
    assert Ngram(NgramSpec(prompt_lookup_min=1)).propose([sequence], 3) == [[4, 5, 9]]
    plain = [1, 2, 3, 1, 2, 7, 1, 2]
    assert Ngram(NgramSpec()).propose([Sequence("b", plain, 4, 99, Sampling(), 0)], 2) == [[7, 1]], "the last place counts"
    assert Ngram(NgramSpec()).propose([Sequence("c", [1, 2, 3, 4], 4, 99, Sampling(), 0)], 2) == [[]]
    slow = random.Random(0)
    for _ in range(200):
        tokens = [slow.choice([0, 1, 256, 65536]) for _ in range(30)]
        found = Ngram(NgramSpec(prompt_lookup_min=2, prompt_lookup_max=2)).propose([Sequence("d", tokens, 4, 99, Sampling(), 0)], 4)[0]
        places = [i for i in range(len(tokens) - 2) if tokens[i : i + 2] == tokens[-2:]]
        assert found == (tokens[places[-1] + 2 : places[-1] + 6] if places else [])


def test_pace_takes_the_quicker_way_and_asks_the_other_again():
    pace = Pace(True)
    assert pace.wants(1)
    pace.note(1, True, 2.0)
    assert not pace.wants(1)
    pace.note(1, False, 1.0)
    assert sum(pace.wants(1) for _ in range(160)) == 10
    for _ in range(30):
        pace.note(1, True, 0.5)
    assert sum(pace.wants(1) for _ in range(160)) == 150 and pace.wants(2), "every number of requests for itself"


def test_drafts_are_dropped():
    sequence = Sequence("a", [1, 2, 3], 1, 9, Sampling(), 0, num_drafts=2)
    sequence.settle()
    assert sequence.tokens == [1] and sequence.num_drafts == 0
    assert torch.tensor(sequence.tokens).tolist() == [1]
