"""Bias, penalties and forbidden tokens: against slow definitions on random logits, by position, and through the engine."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from garage.core.errors import UserError
from garage.core.types import Request, Sampling
from garage.engine import constrain, rules
from garage.engine.engine import Engine
from garage.engine.request import Sequence
from garage.engine.rules import apply_rules, make_rules
from garage.engine.sampler import NOTHING_LEFT, sample
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

V = 264
SPEC = EngineSpec(page_size=4, num_pages=96, max_num_seqs=8, device="cpu")


def sequence(tokenizer: Tokenizer, sampling: Sampling, prompt: list[int], answer: list[int], ends: tuple[int, ...] = (260,)) -> Sequence:
    found = Sequence("s", prompt + answer, len(prompt), 999, sampling, 0)
    found.rules = make_rules(sampling, prompt, ends, tokenizer, V)
    return found


def definition(logits: list[float], s: Sampling, prompt: list[int], answer: list[int], tokenizer: Tokenizer) -> list[float]:
    """vLLM's order, one token at a time."""
    out = []
    banned = {260} if len(answer) < s.min_tokens else set()
    for text in [form for word in s.bad_words for form in (word, " " + word)]:
        word = tokenizer.encode(text)
        if len(word) <= len(answer) + 1 and answer[len(answer) - len(word) + 1 :] == word[:-1]:
            banned.add(word[-1])
    for token, x in enumerate(logits):
        x += dict(s.logit_bias).get(token, 0.0)
        if token in prompt or token in answer:
            x = x / s.repetition_penalty if x > 0 else x * s.repetition_penalty
        x -= s.frequency_penalty * answer.count(token) + s.presence_penalty * (token in answer)
        out.append(-float("inf") if token in banned or (s.allowed_token_ids and token not in s.allowed_token_ids) else x)
    return out


CASES = [
    Sampling(presence_penalty=0.7), Sampling(frequency_penalty=0.4), Sampling(repetition_penalty=1.3), Sampling(repetition_penalty=0.8),
    Sampling(logit_bias=((3, 5.0), (260, -100.0))), Sampling(allowed_token_ids=(1, 2, 3, 70, 71)), Sampling(min_tokens=6),
    Sampling(bad_words=("the", "a", "in t")),
    Sampling(presence_penalty=-0.5, frequency_penalty=0.2, repetition_penalty=1.2, logit_bias=((5, -2.0), (6, 3.0)), bad_words=("he",),
             min_tokens=3, allowed_token_ids=tuple(range(0, 262, 2)), temperature=0.8),
]  # fmt: skip


@pytest.mark.parametrize("s", CASES)
def test_rules_do_what_their_definition_does(s: Sampling, tokenizer: Tokenizer) -> None:
    rng, letters = random.Random(0), tokenizer.encode("the an in")
    jobs, logits = [], torch.randn(8, V, generator=torch.Generator().manual_seed(1)) * 3
    for _ in range(8):
        prompt, answer = [rng.choice(letters) for _ in range(5)], [rng.choice(letters) for _ in range(rng.randint(0, 9))]
        jobs.append((sequence(tokenizer, s, prompt, answer), prompt, answer))
    got = logits.clone()
    apply_rules(got, [(job, len(job.tokens)) for job, _, _ in jobs])
    want = torch.tensor([definition(row.tolist(), s, p, a, tokenizer) for row, (_, p, a) in zip(logits, jobs, strict=True)])
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(got, logits)


def test_counts_follow_drafts_back_and_forth(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at rising lengths, drafts taken back and replaced: as if every row were counted anew."""
    s, rng = CASES[-1], random.Random(2)
    prompt, answer = [7, 8, 8], [rng.randrange(20) for _ in range(70)]
    held = sequence(tokenizer, s, prompt, answer)

    def gaps() -> float:
        worst = 0.0
        for _ in range(60):
            del held.tokens[len(held.tokens) - rng.randint(0, 5) :]
            held.tokens += [rng.randrange(20) for _ in range(rng.randint(1, 7))]
            rows = [(held, len(held.tokens) - back) for back in range(3, -1, -1)]
            fresh = [(sequence(tokenizer, s, prompt, held.tokens[3:n]), n) for _, n in rows]
            got, want = torch.zeros(4, V), torch.zeros(4, V)
            apply_rules(got, rows)
            apply_rules(want, fresh)
            worst = max(worst, (got - want).nan_to_num().abs().max().item())
        return worst

    assert gaps() < 1e-5
    real: Callable[..., tuple[int, list[int]]] = constrain.changes
    deaf = lambda seen, tokens, start, n: (k := min(len(seen), n - start), tokens[start + k : n]) if real else None  # noqa: E731
    monkeypatch.setattr(rules, "changes", deaf)
    assert gaps() > 1e-3, "a twin that looks at lengths alone goes wrong"


def test_a_tally_costs_the_new_tokens_only(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    held, added = sequence(tokenizer, Sampling(presence_penalty=1.0), [1], [2] * 5000), []
    real = constrain.changes
    monkeypatch.setattr(rules, "changes", lambda *a: (found := real(*a), added.append(len(found[1])))[0])
    for _ in range(10):
        apply_rules(torch.zeros(1, V), [(held, len(held.tokens))])
        held.tokens.append(3)
    assert added == [5000] + [1] * 9


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, V, 1 << 40])
def test_ids_beyond_the_vocabulary_are_refused_by_name(field: str, token: int, tokenizer: Tokenizer) -> None:
    given = {field: ((token, 1.0),) if field == "logit_bias" else (token,)}
    with pytest.raises(UserError, match=f"{field} names token {token}"):
        make_rules(Sampling(**given), [1], (), tokenizer, V)  # type: ignore[arg-type]


WRONG = [Sampling(temperature=math.nan), Sampling(presence_penalty=math.inf), Sampling(repetition_penalty=0.0),
         Sampling(logit_bias=((1, math.nan),))]  # fmt: skip


@pytest.mark.parametrize("s", WRONG)
def test_numbers_that_are_none_are_refused(s: Sampling, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"temperature is|presence_penalty is|repetition_penalty is|logit_bias is"):
        make_rules(s, [1], (), tokenizer, V)


def test_a_request_without_rules_has_none_and_one_that_forbids_all_says_so(tokenizer: Tokenizer) -> None:
    assert make_rules(Sampling(temperature=1.0, top_p=0.5, stop=("x",), stop_token_ids=(3,)), [1], (), tokenizer, V) is None
    stuck = sequence(tokenizer, Sampling(allowed_token_ids=(260,), min_tokens=2), [1], [])
    found = sample(torch.zeros(2, V), [(sequence(tokenizer, Sampling(), [1], []), 1), (stuck, 1)], V).read()
    assert dict(found.faults) == {1: NOTHING_LEFT}


def test_the_engine_keeps_the_rules_in_any_company(lab: SimpleNamespace, tokenizer: Tokenizer) -> None:
    model: Model = lab.tiny("qwen3", vocab_size=268)
    rng = random.Random(4)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randint(1, 12))) for _ in range(18)]
    kinds = [replace(s, temperature=t, max_tokens=24, seed=n) for n, s in enumerate(CASES) for t in (0.0, 1.0)]
    requests = [Request(str(n), prompt, s) for n, (prompt, s) in enumerate(zip(prompts, kinds, strict=True))]
    alone = [Engine(model, tokenizer, None, SPEC).generate([request])[0] for request in requests]
    crowd = Engine(model, tokenizer, None, SPEC.model_copy(update={"num_pages": 24, "max_num_batched_tokens": 16}))
    assert [c.token_ids for c in crowd.generate(requests)] == [c.token_ids for c in alone]
    assert crowd.stats().num_preemptions > 3, "nothing was preempted"
    for request, answer in zip(requests, alone, strict=True):
        s, ids = request.sampling, answer.token_ids
        assert not s.allowed_token_ids or set(ids) <= set(s.allowed_token_ids)
        assert len(ids) > s.min_tokens or answer.finish_reason != "stop"
        assert not any(word in answer.text for word in s.bad_words)
    plain = [Engine(model, tokenizer, None, SPEC).generate([replace(r, sampling=Sampling(max_tokens=24))])[0] for r in requests[::2]]
    assert sum(a.token_ids != p.token_ids for a, p in zip(alone[::2], plain, strict=True)) >= 6, "rules that change nothing"
    free = sum(len(set(c.token_ids)) for c in plain)
    strict = Sampling(max_tokens=24, frequency_penalty=50.0)
    varied = [Engine(model, tokenizer, None, SPEC).generate([replace(r, sampling=strict)])[0] for r in requests[::2]]
    assert sum(len(set(c.token_ids)) for c in varied) > free and all(len(set(c.token_ids)) == len(c.token_ids) for c in varied)
