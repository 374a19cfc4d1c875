"""Many adapters in one engine: each answer is its adapter's own, names and slots are kept straight, and live weights are sampled from."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from garage.core.artifact import writing
from garage.core.errors import UserError
from garage.core.types import Request, Sampling
from garage.engine.engine import Engine
from garage.models.adapters import adapt, adapter_tensors, attach
from garage.models.weights import load_model, save_model
from garage.specs.serve import EngineSpec
from garage.store.adapter import AdapterConfig, write_adapter
from garage.store.fingerprint import FACT, base_hash
from garage.tokens.chat import template_of
from garage.tokens.tokenizer import Tokenizer

SPEC = EngineSpec(page_size=4, num_pages=96, max_num_seqs=8, device="cpu", enable_lora=True, max_loras=4, max_lora_rank=8)
KINDS = {
    "lora": {"targets": ("q_proj", "up_proj", "v_proj")}, "rslora": {"targets": ("q_proj", "down_proj", "k_proj"), "rslora": True},
    "dora": {"targets": ("o_proj", "gate_proj", "q_proj"), "dora": True},
}  # fmt: skip
Places = dict[str, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, lab: SimpleNamespace) -> Places:
    """A base in float32 and an adapter of each kind, as artifacts that name it."""
    base = tmp_path_factory.mktemp("models") / "base"
    base.mkdir()
    save_model(lab.tiny("qwen3", vocab_size=268, dtype=torch.float32), base)
    lab.tokenizer_files(base)
    (base / "chat_template.jinja").write_text(template_of("chatml"))
    return {"base": base} | {kind: adapter(base, base.parent / kind, kind) for kind in KINDS}


def adapter(base: Path, place: Path, kind: str, *, seed: int = 0, rank: int = 4, **facts: object) -> Path:
    settings = {"rank": rank, "alpha": 8.0, **KINDS[kind]}
    model = adapt(load_model(base), seed=seed, **settings)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    flags = {"is_rslora": settings.pop("rslora", False), "is_dora": settings.pop("dora", False)}
    with writing(place, kind="adapter") as made:
        write_adapter(made.path, adapter_tensors(model), AdapterConfig(base=str(base), **settings, **flags))
        made.facts.update({FACT: base_hash(base), **facts})
    return place


def opened(saved: Places, *kinds: str, **settings: object) -> Engine:
    engine = Engine.open(saved["base"], None, SPEC.model_copy(update=settings))
    for kind in kinds:
        engine.load_adapter(kind, saved[kind])
    return engine


def crowd(names: list[str], seed: int = 0, *, most: int = 24) -> list[Request]:
    """Prompts of mixed lengths, shared by neighbours, each under an adapter of its own."""
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randint(1, most))) for _ in names]
    samplings = [Sampling(max_tokens=rng.randint(4, 16), ignore_eos=True) for _ in names]
    return [Request(str(n), prompts[n // 2], samplings[n], adapter=name) for n, name in enumerate(names)]


def test_every_answer_of_a_batch_is_its_adapters_own(saved: Places, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, want = crowd(random.Random(1).choices(["", *KINDS], k=20)), {}
    for kind in ("", *KINDS):
        model = load_model(saved["base"]) if not kind else attach(load_model(saved["base"]), saved[kind]).eval()
        alone = Engine(model, tokenizer, None, SPEC.model_copy(update={"enable_lora": False}))
        want |= {r.id: alone.generate([Request(r.id, r.prompt, r.sampling)])[0].token_ids for r in requests if r.adapter == kind}
    engine = opened(saved, *KINDS, num_pages=24, max_num_batched_tokens=16)
    assert {c.id: c.token_ids for c in engine.generate(requests)} == want and engine.stats().num_preemptions > 2
    assert len({engine.generate([Request("", (1, 2, 3), Sampling(max_tokens=8), adapter=name)])[0].token_ids for name in ("", *KINDS)}) == 4
    engine.check_books()
    tell = engine._adapters.many.tell
    monkeypatch.setattr(engine._adapters.many, "tell", lambda slots, counts: tell(slots[::-1], counts))
    assert {c.id: c.token_ids for c in engine.generate(requests)} != want, "the twin that mixes up the rows"


def test_an_unloaded_name_is_refused_at_once_and_its_requests_end_with_it(saved: Places) -> None:
    engine = opened(saved, "lora", "rslora", max_loras=2)
    prompt, sampling = tuple(range(30)), Sampling(max_tokens=12, ignore_eos=True)
    want = engine.generate([Request("a", prompt, sampling, adapter="lora")])[0].token_ids
    done = []
    for n in range(2):
        engine.submit(Request(f"run-{n}", prompt, sampling, adapter="lora"), lambda d: done.append(d.completion) if d.completion else None)
        engine.step()
    engine.unload_adapter("lora")
    assert engine.adapters == ("rslora",)
    with pytest.raises(UserError, match="no adapter 'lora'"):
        engine.submit(Request("late", prompt, sampling, adapter="lora"))
    with pytest.raises(UserError, match="all 2 slots"):
        engine.load_adapter("other", saved["dora"])
    engine.abort("run-1")
    while engine.has_work:
        engine.step()
        engine.check_books()
    assert [c.finish_reason for c in done] == ["abort", "length"] and done[1].token_ids == want
    engine.load_adapter("lora", saved["dora"])
    fresh = engine.generate([Request("a", prompt, sampling, adapter="lora")])[0]
    assert fresh.cached_tokens == 0, "keys and values of another adapter under the same name are never used"
    assert fresh.token_ids == opened(saved, "dora").generate([Request("a", prompt, sampling, adapter="dora")])[0].token_ids != want
    again = engine.generate([Request("a", prompt, sampling, adapter="lora"), Request("b", prompt, sampling)])
    assert [c.cached_tokens for c in again] == [28, 0] and again[0].token_ids == fresh.token_ids


def test_a_key_by_name_alone_answers_from_the_wrong_pages(saved: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(saved, "lora")
    real = engine._root
    monkeypatch.setattr(engine, "_root", lambda request, adapter: real(request, None))
    prompt, sampling = tuple(range(30)), Sampling(max_tokens=12, ignore_eos=True)
    engine.generate([Request("a", prompt, sampling)])
    got = engine.generate([Request("a", prompt, sampling, adapter="lora")])[0]
    want = opened(saved, "lora").generate([Request("a", prompt, sampling, adapter="lora")])[0]
    assert got.cached_tokens == 28 and got.token_ids != want.token_ids


def test_books_are_kept_whatever_comes(saved: Places) -> None:
    engine, rng, asked = opened(saved, num_pages=24, max_num_batched_tokens=12, max_loras=3), random.Random(5), 0
    ready = {kind: engine.read_adapter(saved[kind]) for kind in KINDS}
    for step in range(400):
        action = rng.random()
        try:
            if action < 0.15:
                engine.load_adapter(rng.choice("abcd"), ready[rng.choice(list(ready))])
            elif action < 0.25:
                engine.unload_adapter(rng.choice("abcd"))
            elif action < 0.5:
                prompt, name = tuple(range(rng.randint(1, 20))), rng.choice(["", *"abcd"])
                engine.submit(Request(str(step), prompt, Sampling(max_tokens=9), adapter=name))
                asked += 1
            elif action < 0.55 and engine.active_ids:
                engine.abort(rng.choice(engine.active_ids))
            else:
                engine.step()
        except UserError:
            pass
        engine.check_books()
    while engine.has_work:
        engine.step()
    for name in engine.adapters:
        engine.unload_adapter(name)
    engine.check_books()
    assert asked > 30 and engine._adapters.many.taken == [] and engine.stats().num_pages_used == 0
    engine.load_adapter("lora", ready["lora"])
    engine._adapters.loaded[0].num_users += 1
    with pytest.raises(AssertionError, match="miscounted"):
        engine.check_books()


def test_what_does_not_fit_is_refused_by_name_and_disturbs_nothing(saved: Places, tmp_path: Path, lab: SimpleNamespace) -> None:
    engine = opened(saved, "lora")
    base, other = saved["base"], tmp_path / "other"
    other.mkdir()
    save_model(lab.tiny("qwen3", vocab_size=268, dtype=torch.float32, seed=1), other)
    wordy = adapter(base, tmp_path / "wordy", "lora")
    (wordy / "chat_template.jinja").write_text(template_of("chatml").replace("user", "human"))
    faults = {
        adapter(other, tmp_path / "elsewhere", "lora"): "belongs to another base",
        adapter(base, tmp_path / "wide", "lora", rank=9): "max_lora_rank is 8",
        adapter(base, tmp_path / "template", "lora", template_hash="f00"): "chat template f00",
        adapter(base, tmp_path / "tokens", "lora", tokenizer_hash="f00"): "another tokenizer",
        adapter(base, tmp_path / "bits", "lora", quantize="nf4"): "over a base in nf4",
        wordy: "another chat template",
        base: "no adapter at",
        tmp_path / "nowhere": "no adapter at",
    }
    whole = json.loads((saved["lora"] / "adapter_config.json").read_text())
    for key, value in (("modules_to_save", ["lm_head"]), ("bias", "all"), ("init_lora_weights", "pissa")):
        place = adapter(base, tmp_path / key, "lora")
        (place / "adapter_config.json").write_text(json.dumps({**whole, key: value}))
        faults[place] = key
    request = Request("a", (1, 2, 3), Sampling(max_tokens=20, ignore_eos=True), adapter="lora")
    want = engine.generate([request])[0].token_ids
    engine.submit(request, lambda delta: ends.append(delta.completion))
    ends: list = []
    for place, says in faults.items():
        engine.step()
        with pytest.raises(UserError, match=says):
            engine.load_adapter("bad", place)
        engine.check_books()
    with pytest.raises(UserError, match="'lora' already"):
        engine.load_adapter("lora", saved["dora"])
    with pytest.raises(UserError, match="no adapter 'bad'"):
        engine.unload_adapter("bad")
    while engine.has_work:
        engine.step()
    assert ends[-1].token_ids == want and engine.adapters == ("lora",)
    with pytest.raises(UserError, match="takes no adapters"):
        opened(saved, enable_lora=False).load_adapter("lora", saved["lora"])
    with pytest.raises(UserError, match="no adapter 'lora'"):
        opened(saved).submit(request)


def test_a_run_stands_for_its_adapter(saved: Places, tmp_path: Path) -> None:
    adapter(saved["base"], tmp_path / "run" / "artifacts" / "adapter", "lora")
    engine = opened(saved, "lora")
    engine.load_adapter("run", tmp_path / "run")
    answers = engine.generate([Request("a", (5, 6, 7), Sampling(max_tokens=9), adapter=name) for name in ("lora", "run", "")])
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids


def test_an_adapter_in_training_is_sampled_live(saved: Places, tokenizer: Tokenizer) -> None:
    """Rollouts: the engine runs the very modules an optimiser moves; old keys and values are not used again."""
    prompt, sampling = tuple(range(30)), Sampling(max_tokens=12, ignore_eos=True)
    for kind in KINDS:
        model = adapt(load_model(saved["base"]), rank=4, alpha=8.0, seed=0, **KINDS[kind])
        engine = Engine(model, tokenizer, None, SPEC)
        first, second = (engine.generate([Request("a", prompt, sampling)])[0] for _ in range(2))
        assert (first.weight_version, first.cached_tokens, second.cached_tokens) == (0, 0, 28) and first.token_ids == second.token_ids

        def learn(model: torch.nn.Module) -> None:
            draw = torch.Generator().manual_seed(1)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)

        engine.update_weights(learn)
        after = engine.generate([Request("a", prompt, sampling)])[0]
        assert (after.weight_version, after.cached_tokens) == (1, 0) and after.token_ids != first.token_ids
        assert after.token_ids == Engine(model, tokenizer, None, SPEC).generate([Request("a", prompt, sampling)])[0].token_ids
