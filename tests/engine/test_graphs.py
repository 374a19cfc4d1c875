"""Decoding in padded batches on memory that stays, with a stand-in for CUDA's graphs: the answers are those without."""

from functools import partial

import pytest
import torch

from garage.core.types import Request, Sampling
from garage.engine import graphs
from garage.engine.engine import Engine
from garage.specs.serve import EngineSpec

VOCAB = 268


DECODING = graphs.Decoding


class Recorded:
    """Replaying is calling again; what the result's memory held before is gone, as is all that lies in the scratch page."""

    made, replays, pools = [], [], []

    def __init__(self, call, pool):
        self.call, self.out = call, call()
        self.made.append(len(self.out[0]))

    def replay(self):
        for cache in self.pools:
            cache[-1] = torch.nan
        self.replays.append(len(self.out[0]))
        for out, new in zip(self.out, self.call(), strict=True):
            out.copy_(new)


def engine_of(lab, tokenizer, monkeypatch, family, *, is_captured, **settings):
    for log in (Recorded.made, Recorded.replays, Recorded.pools):
        log.clear()
    monkeypatch.setattr(graphs, "can_capture", lambda weight: is_captured)
    monkeypatch.setattr(graphs, "Decoding", partial(DECODING, capture=Recorded))
    spec = {"page_size": 4, "num_pages": 40, "max_num_seqs": 6, "max_num_batched_tokens": 24, "max_model_len": 48} | settings
    engine = Engine(lab.tiny(family, vocab_size=VOCAB), tokenizer, None, EngineSpec(**spec))
    Recorded.pools.extend((*engine._runner._keys, *engine._runner._values) if is_captured else ())
    return engine


def answers(engine):
    """Nine requests of different lengths, greedy and drawn: they end one by one, so that every number of rows is padded."""
    prompts = [tuple(range(5 * i, 5 * i + 3 + i)) for i in range(9)]
    asked = [Sampling(max_tokens=3 + 2 * i, temperature=0.8 * (i % 2), seed=i, logprobs=0) for i in range(9)]
    done = engine.generate([Request(str(i), prompt, sampling) for i, (prompt, sampling) in enumerate(zip(prompts, asked, strict=True))])
    engine.check_books()
    return [each.error or each.token_ids for each in done], [token.logprob for each in done for token in each.logprobs]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_padded_step_is_the_step(lab, tokenizer, monkeypatch, family):
    ids, plain = answers(engine_of(lab, tokenizer, monkeypatch, family, is_captured=False))
    assert not Recorded.made and not any(isinstance(each, str) for each in ids)
    same, captured = answers(engine_of(lab, tokenizer, monkeypatch, family, is_captured=True))
    assert same == ids and max(abs(a - b) for a, b in zip(captured, plain, strict=True)) < 1e-9
    assert set(Recorded.made) <= {1, 2, 4, 6} and len(Recorded.made) <= 2 * len(set(Recorded.made)) >= 6, "greedy and drawn"
    assert len(Recorded.replays) > 2 * len(Recorded.made), "a graph is captured once and replayed"


def test_a_captured_step_that_begins_ahead_is_the_step(lab, tokenizer, monkeypatch):
    """Capturing makes the call more than once: it must not change what it reads."""
    ids, plain = answers(engine_of(lab, tokenizer, monkeypatch, "qwen3", is_captured=False))
    engine = engine_of(lab, tokenizer, monkeypatch, "qwen3", is_captured=True, async_scheduling=True)
    same, captured = answers(engine)
    assert same == ids and max(abs(a - b) for a, b in zip(captured, plain, strict=True)) < 1e-9 and Recorded.replays


def is_seen(lab, tokenizer, monkeypatch):
    ids, plain = answers(engine_of(lab, tokenizer, monkeypatch, "qwen3", is_captured=False))
    same, captured = answers(engine_of(lab, tokenizer, monkeypatch, "qwen3", is_captured=True))
    return same != ids or max(abs(a - b) for a, b in zip(captured, plain, strict=True)) > 1e-6


def test_padding_that_writes_to_a_page_is_seen(lab, tokenizer, monkeypatch):
    """The broken twin: padded rows write where a sequence does."""
    made = graphs.Graphs.__init__
    for line in range(6):
        pads = ((line, 0, 0), (0.0, 0.0))
        monkeypatch.setattr(graphs.Graphs, "__init__", lambda self, a, b, _, pads=pads, **k: made(self, a, b, pads, **k))
        if is_seen(lab, tokenizer, monkeypatch):
            return
    raise AssertionError("nobody saw it")


def test_buffers_that_are_not_refreshed_are_seen(lab, tokenizer, monkeypatch):
    """The broken twin: inputs are copied when a graph is captured and not when it is replayed."""
    run = graphs.Graphs.run

    def stale(self, inputs, is_drawn):
        key = (next(size for size in self._sizes if size >= len(inputs[0])), is_drawn)
        if key not in self._made:
            return run(self, inputs, is_drawn)
        self._made[key].replay()
        return tuple(each[: len(inputs[0])] for each in self._made[key].out)

    monkeypatch.setattr(graphs.Graphs, "run", stale)
    assert is_seen(lab, tokenizer, monkeypatch)


def test_eager_has_no_graphs(lab, tokenizer, monkeypatch):
    answers(engine_of(lab, tokenizer, monkeypatch, "qwen3", is_captured=True, enforce_eager=True))
    assert not Recorded.made


def test_sizes():
    assert graphs.sizes(1) == [1] and graphs.sizes(6) == [1, 2, 4, 6] and graphs.sizes(20) == [1, 2, 4, 8, 16, 20]
    assert graphs.sizes(64)[-2:] == [56, 64]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_cache_of_8_bits(lab, tokenizer, monkeypatch, family):
    """Answers are near the model's own, and not equal: it really is 8 bits."""
    engine = engine_of(lab, tokenizer, monkeypatch, family, is_captured=False, kv_cache_dtype="fp8")
    assert {cache.dtype for cache in engine._runner._keys} == {torch.float8_e4m3fn}
    off, prompt = [], tuple(range(20, 40))
    (answer,) = engine.generate([Request("1", prompt, Sampling(max_tokens=12, temperature=0, logprobs=0))])
    exact = lab.naive_logits(engine._model, [*prompt, *answer.token_ids])[:, : tokenizer.vocab_size].log_softmax(-1)
    for i, (token, said) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        off.append(abs(float(exact[len(prompt) - 1 + i, token]) - said.logprob))
    assert 1e-4 < max(off) < 0.5, off
