"""What is read off a prompt: equal to one plain forward, whatever the pieces, the cache and the company."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from garage.core.errors import UserError
from garage.core.types import Completion, Request, Sampling
from garage.engine import reading
from garage.engine.engine import Engine
from garage.models.attend import PackedAttend
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

SPEC = EngineSpec(page_size=4, num_pages=64, max_num_seqs=8, max_num_batched_tokens=7, device="cpu")
IDS = tuple((7 * n * n + 3) % 256 for n in range(33))
SCORE = Request("score", IDS, Sampling(max_tokens=0, prompt_logprobs=3))
EMBED = Request("embed", IDS, wants_embedding=True)


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def model(request: pytest.FixtureRequest, lab: SimpleNamespace) -> Model:
    model: Model = lab.tiny(request.param, vocab_size=268)
    return model


def agrees(answer: Completion, logits: torch.Tensor, vocab_size: int, num_top: int) -> bool:
    """Every entry is that of a full forward, the first is None."""
    want = logits[:, :vocab_size].log_softmax(-1)
    first, *rest = answer.prompt_logprobs
    close = all(e.logprob == pytest.approx(want[n, e.token_id].item(), abs=1e-4) for n, e in enumerate(rest))
    tops = all([i for i, _ in e.top] == want[n].topk(num_top).indices.tolist() for n, e in enumerate(rest))
    return first is None and close and tops and [e.token_id for e in rest] == list(IDS[1:])


def test_prompt_logprobs_equal_a_full_forward(
    model: Model, tokenizer: Tokenizer, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE", 3 * 268)  # three rows of logits at once
    engine = Engine(model, tokenizer, None, SPEC)
    logits = lab.naive_logits(model, list(IDS))
    both = replace(SCORE, sampling=Sampling(max_tokens=5, prompt_logprobs=3, ignore_eos=True))
    plain = replace(SCORE, sampling=Sampling(max_tokens=5, ignore_eos=True))
    crowd = [Request("", IDS[:n], Sampling(max_tokens=4)) for n in (5, 17)]
    score, generate, *_, text = engine.generate([SCORE, both, *crowd, plain])
    assert agrees(score, logits, tokenizer.vocab_size, 3) and agrees(generate, logits, tokenizer.vocab_size, 3)
    assert (score.token_ids, score.text, score.finish_reason) == ((), "", "length") and generate.token_ids == text.token_ids
    again = engine.generate([SCORE])[0]
    assert again.cached_tokens == 0 and agrees(again, logits, tokenizer.vocab_size, 3), "a cached prefix has no logits"
    assert engine.generate([plain])[0].cached_tokens == 32, "what was scored is cached for others"
    assert not agrees(again, logits.roll(1, 0), tokenizer.vocab_size, 3), "the twin that is off by one"


def test_logits_are_never_whole(model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 3 * 268)
    rows: list[int] = []
    real = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), real(hidden))[1])
    Engine(model, tokenizer, None, SPEC.model_copy(update={"max_num_batched_tokens": 64})).generate([SCORE])
    assert max(rows) == 3 and sum(rows) >= len(IDS) - 1


def test_embeddings_are_the_mean_of_a_full_forward(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, None, SPEC)
    hidden = model(torch.tensor(IDS), torch.arange(len(IDS)), PackedAttend((0, len(IDS)))).mean(0)
    want = hidden / hidden.norm()
    for request in (EMBED, replace(EMBED, sampling=Sampling(max_tokens=9))):
        answer = engine.generate([Request("", IDS, Sampling(max_tokens=2)), request])[1]
        assert torch.tensor(answer.embedding).double().sub(want).abs().max() < 1e-6
        assert (answer.finish_reason, answer.token_ids, answer.prompt_tokens) == ("stop", (), len(IDS))
    assert engine.stats().num_pages_used == 0


def test_a_prompt_that_is_preempted_while_it_is_read_is_read_once(
    model: Model, tokenizer: Tokenizer, lab: SimpleNamespace
) -> None:
    spec = SPEC.model_copy(update={"num_pages": 12, "enable_prefix_caching": False})
    engine = Engine(model, tokenizer, None, spec)
    ends: list[Completion] = []
    for name in ("first", "second"):  # two, because windows let pages go
        engine.submit(Request(name, IDS[:8], Sampling(max_tokens=40, ignore_eos=True)))
    for request in (SCORE, EMBED):
        engine.submit(request, lambda delta: ends.append(delta.completion) if delta.completion else None)
    while engine.has_work:
        engine.step()
        engine.check_books()
    assert engine.stats().num_preemptions > 0, "nothing was preempted"
    assert agrees(ends[0], lab.naive_logits(model, list(IDS)), tokenizer.vocab_size, 3)
    assert ends[1].embedding == pytest.approx(Engine(model, tokenizer, None, SPEC).generate([EMBED])[0].embedding, abs=1e-6)


def test_what_is_not_finite_is_an_error_of_its_own(model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, *a: real(tokens, *a).masked_fill((tokens == IDS[3])[:, None], torch.nan))
    answers = Engine(model, tokenizer, None, SPEC).generate([SCORE, EMBED, replace(SCORE, prompt=IDS[4:9])])
    assert [a.finish_reason for a in answers] == ["error", "error", "length"]
    assert not answers[0].prompt_logprobs and not answers[1].embedding


def test_bad_wishes_are_refused_by_name(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, None, SPEC)
    for sampling, words in (
        (Sampling(max_tokens=0), "max_tokens is 0"), (Sampling(max_tokens=-1, prompt_logprobs=1), "max_tokens is -1"),
        (Sampling(prompt_logprobs=21), "prompt_logprobs is 21"), (Sampling(prompt_logprobs=-1), "prompt_logprobs is -1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            engine.submit(Request("a", IDS, sampling))
    assert not engine.has_work
