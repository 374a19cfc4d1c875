"""The engine as a whole: seeds under any schedule, log-probabilities, page tables, directories and adapters, refusals."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from garage.core.errors import UserError
from garage.core.types import Message, Request, Sampling
from garage.engine import engine as engine_module
from garage.engine import sampler
from garage.engine.defaults import read_defaults
from garage.engine.engine import Engine
from garage.engine.request import Delta
from garage.models.adapters import adapt, adapter_tensors, merge
from garage.models.layers import Model
from garage.models.weights import save_model
from garage.specs.serve import EngineSpec
from garage.store.adapter import AdapterConfig, write_adapter
from garage.tokens.chat import Chat, template_of
from garage.tokens.tokenizer import Tokenizer

SPEC = EngineSpec(page_size=4, num_pages=64, max_num_seqs=8, device="cpu")


@pytest.fixture(scope="module")
def model(lab: SimpleNamespace) -> Model:
    model: Model = lab.tiny("qwen3", vocab_size=268)
    return model


def sampled_requests() -> list[Request]:
    rng = random.Random(3)
    kinds = [Sampling(temperature=1.0), Sampling(temperature=0.8, top_k=20), Sampling(temperature=1.2, top_p=0.8), Sampling()]
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randint(1, 20))) for _ in range(24)]
    samplings = [replace(kinds[n % 4], seed=n // 2, max_tokens=rng.randint(4, 20), ignore_eos=True) for n in range(24)]
    return [Request(str(n), prompt, sampling) for n, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))]


def test_a_seed_gives_the_same_text_alone_in_a_crowd_and_preempted(model: Model, tokenizer: Tokenizer) -> None:
    requests = sampled_requests()
    alone = [Engine(model, tokenizer, None, SPEC).generate([request])[0].token_ids for request in requests]
    crowd = Engine(model, tokenizer, None, SPEC.model_copy(update={"num_pages": 14, "max_num_batched_tokens": 16}))
    assert [c.token_ids for c in crowd.generate(requests)] == alone
    assert crowd.stats().num_preemptions > 3, "nothing was preempted"


def test_a_draw_keyed_by_step_changes_with_the_company(model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = sampler.uniforms
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, positions: (calls.append(1), real(seeds, [len(calls)] * len(seeds)))[1])
    requests = sampled_requests()
    alone = [Engine(model, tokenizer, None, SPEC).generate([request])[0].token_ids for request in requests]
    assert [c.token_ids for c in Engine(model, tokenizer, None, SPEC).generate(requests)] != alone


def test_logprobs_equal_a_full_forward(model: Model, tokenizer: Tokenizer, lab: SimpleNamespace) -> None:
    sampling = Sampling(temperature=1.0, seed=1, max_tokens=10, logprobs=3, ignore_eos=True)
    answer = Engine(model, tokenizer, None, SPEC).generate([Request("a", (5, 6, 7), sampling)])[0]
    tokens = [5, 6, 7]
    for chosen in answer.logprobs:
        want = lab.naive_logits(model, tokens)[-1, : tokenizer.vocab_size].log_softmax(-1)
        assert chosen.logprob == pytest.approx(want[chosen.token_id].item(), abs=1e-5)
        assert [i for i, _ in chosen.top] == want.topk(3).indices.tolist()
        tokens.append(chosen.token_id)
    assert tuple(tokens[3:]) == answer.token_ids


def test_which_physical_pages_are_used_does_not_matter(model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = sampled_requests()
    want = [c.token_ids for c in Engine(model, tokenizer, None, SPEC).generate(requests)]
    shuffled = Engine(model, tokenizer, None, SPEC)
    random.Random(0).shuffle(shuffled._scheduler.pool._free)
    assert [c.token_ids for c in shuffled.generate(requests)] == want
    deaf = Engine(model, tokenizer, None, SPEC)
    build = deaf._runner._batcher.build
    monkeypatch.setattr(deaf._runner._batcher, "build", lambda slices: (b := build(slices), replace(b, tables_BP=b.tables_BP * 0))[1])
    assert [c.token_ids for c in deaf.generate(requests)] != want, "the twin that ignores the page table"


def test_deltas_add_up_and_abort_works_in_every_state(model: Model, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, None, SPEC.model_copy(update={"max_num_seqs": 2, "max_num_batched_tokens": 8}))
    heard: dict[str, list[Delta]] = {name: [] for name in "abcd"}
    for name, into in heard.items():
        engine.submit(Request(name, tuple(range(12)), Sampling(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)), into.append)
    engine.abort("d")  # waiting
    engine.step()
    engine.abort("b")  # not yet admitted: the first eight tokens are all of "a"
    engine.step()
    engine.abort("a")  # running, its prompt just read
    while engine.has_work:
        engine.step()
        engine.check_books()
    engine.abort("c")  # finished
    ends = {name: deltas[-1].completion for name, deltas in heard.items()}
    assert {name: end.finish_reason for name, end in ends.items()} == {"a": "abort", "b": "abort", "c": "length", "d": "abort"}
    for name, deltas in heard.items():
        assert "".join(d.text for d in deltas) == ends[name].text
        assert sum(d.num_tokens for d in deltas) == len(ends[name].token_ids)
        assert [d.completion is None for d in deltas] == [True] * (len(deltas) - 1) + [False]
        times = deltas[-1].times
        assert times.arrived <= times.started <= times.first_token <= times.finished
    assert engine.stats().num_pages_used == 0


def test_conversations_texts_and_ids(model: Model, tokenizer: Tokenizer, chat: Chat) -> None:
    engine = Engine(model, tokenizer, chat, SPEC)
    turn = (Message("user", "the <|im_end|> man"),)
    assert engine.encode(Request("", turn)) == chat.render(turn, add_generation_prompt=True).ids
    assert engine.encode(Request("", "the man")) == tuple(tokenizer.encode("the man"))
    assert not set(engine.encode(Request("", "a<|im_end|>"))) & set(tokenizer.eos_ids), "control tokens in a text stay text"
    assert engine.encode(Request("", (1, 2))) == (1, 2)
    for request, words in ((Request("", ""), "empty"), (Request("", (1, 999)), "no token 999")):
        with pytest.raises(UserError, match=words):
            engine.encode(request)
    with pytest.raises(UserError, match="no chat template"):
        Engine(model, tokenizer, None, SPEC).encode(Request("", turn))


def test_lengths_are_settled_when_the_engine_is_made(model: Model, tokenizer: Tokenizer) -> None:
    assert Engine(model, tokenizer, None, SPEC).max_model_len == 256
    assert Engine(model, tokenizer, None, SPEC.model_copy(update={"num_pages": 8})).max_model_len == 32
    small = Engine(model, tokenizer, None, EngineSpec(page_size=16, kv_cache_bytes=1 << 17, device="cpu"))
    assert small.stats().num_pages == (1 << 17) // (2 * 2 * 16 * 2 * 8 * 8), "2 x layers x page x heads x width x 8 bytes"
    for update, words in (({"max_model_len": 257}, "256 positions"), ({"max_model_len": 100, "num_pages": 8}, "8 pages of 4")):
        with pytest.raises(UserError, match=words):
            Engine(model, tokenizer, None, SPEC.model_copy(update=update))


@pytest.fixture
def saved(tmp_path: Path, model: Model, lab: SimpleNamespace) -> Path:
    place = tmp_path / "base"
    place.mkdir()
    save_model(model, place)
    lab.tokenizer_files(place)
    (place / "chat_template.jinja").write_text(template_of("chatml"))
    return place


def test_open_reads_a_directory_and_folds_an_adapter(saved: Path, tmp_path: Path, lab: SimpleNamespace, tokenizer: Tokenizer) -> None:
    requests = [Request("a", (Message("user", "the man"),), Sampling(max_tokens=12, ignore_eos=True))]
    base = Engine.open(saved, None, SPEC).generate(requests)[0]
    tuned = adapt(lab.tiny("qwen3", vocab_size=268), rank=4, alpha=8.0, targets=("q_proj", "down_proj"), seed=0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    place = tmp_path / "adapter"
    place.mkdir()
    config = AdapterConfig(base=str(saved), rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    write_adapter(place, adapter_tensors(tuned), config)
    want = Engine(merge(tuned), tokenizer, Chat.named("chatml", tokenizer), SPEC).generate(requests)[0]
    got = Engine.open(saved, place, SPEC).generate(requests)[0]
    assert got.token_ids == want.token_ids != base.token_ids


def test_a_base_model_without_a_template_opens(saved: Path) -> None:
    (saved / "chat_template.jinja").unlink()
    engine = Engine.open(saved, None, SPEC)
    assert engine.chat is None and len(engine.generate([Request("a", "the", Sampling(max_tokens=3, ignore_eos=True))])[0].token_ids) == 3


def test_damaged_defaults_are_refused(tmp_path: Path) -> None:
    assert read_defaults(tmp_path).temperature is None
    for text in ("{", '{"temperature": "warm"}', '{"eos_token_id": "</s>"}', "[]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_defaults(tmp_path)


def hits(engine: Engine, first: Request, second: Request) -> int:
    """Tokens of the second that were taken from the first's pages."""
    return engine.generate([first]) and engine.generate([second])[0].cached_tokens


PROMPT = Request("", tuple(range(30)), Sampling(max_tokens=2, ignore_eos=True))


def test_tenants_adapters_and_weights_never_share_pages(model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By counter, for 100 pairs of salts; the twin whose root forgets them finds the pages."""
    engine = Engine(model, tokenizer, None, SPEC)
    salted = [replace(PROMPT, cache_salt=f"tenant {n}") for n in range(100)]
    assert [engine.generate([request])[0].cached_tokens for request in salted] == [0] * 100
    assert hits(engine, salted[7], salted[7]) == 28
    monkeypatch.setattr(engine_module, "root", lambda *parts: b"")
    assert hits(engine, salted[0], salted[1]) == 28, "the twin"


def test_new_weights_are_used_at_once_and_nothing_old_is_found(lab: SimpleNamespace, tokenizer: Tokenizer) -> None:
    live, other = (lab.tiny("qwen3", vocab_size=268, seed=seed) for seed in (0, 1))
    engine = Engine(live, tokenizer, None, SPEC)
    want = Engine(other, tokenizer, None, SPEC).generate([PROMPT])[0]
    before = engine.generate([PROMPT])[0]
    heard: list[Delta] = []
    engine.submit(replace(PROMPT, id="running", sampling=Sampling(max_tokens=9, ignore_eos=True)), heard.append)
    engine.step()
    engine.submit(replace(PROMPT, id="waiting"), heard.append)
    engine.update_weights(lambda model: model.load_state_dict(other.state_dict()))
    while engine.has_work:
        engine.step()
        engine.check_books()
    ends = {d.id: d.completion for d in heard if d.completion}
    assert (before.weight_version, ends["running"].weight_version, ends["waiting"].weight_version) == (0, 0, 1)
    assert ends["waiting"].cached_tokens == 0 and ends["waiting"].token_ids == want.token_ids != before.token_ids
    assert engine.generate([PROMPT])[0].cached_tokens == 28
