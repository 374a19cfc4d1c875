"""Groups of layers with page tables of their own: answers, memory, the prefix cache, and twins that read what was given back."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from garage.core.types import Completion, Request, Sampling
from garage.engine.engine import Engine
from garage.engine.layout import Layout
from garage.engine.pages import Group, PagePool
from garage.engine.request import Sequence
from garage.engine.scheduler import Limits, Scheduler
from garage.models.families import build, from_architecture, init_weights, named
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

WINDOW, PATTERN = 6, ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention")


@pytest.fixture(scope="module")
def model() -> Model:
    """Four layers with a window of six, one without: pages of four units."""
    config = from_architecture(
        "gemma3", vocab_size=268, rope_theta=10_000.0, sliding_window=WINDOW, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = build(replace(config, layer_types=PATTERN), dtype=torch.float64)
    init_weights(model, 0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(noise, alpha=0.2 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def poison(engine: Engine) -> None:
    """NaN in free pages, those behind a window among them."""
    count = engine._runner.layout.units
    units = [page * count + unit for page in engine._scheduler.pool._free for unit in range(count)]
    for cache in {id(cache): cache for cache in (*engine._runner._keys, *engine._runner._values)}.values():
        cache[units] = torch.nan


def run(engine: Engine, requests: list[Request]) -> list[Completion]:
    ended: dict[str, Completion] = {}
    poison(engine)
    for request in requests:
        engine.submit(request, lambda delta: ended.update({delta.id: delta.completion} if delta.completion else {}))
        engine.step()
        poison(engine)
    while engine.has_work:
        engine.step()
        engine.check_books()
        poison(engine)
    return [ended[r.id] for r in requests]


def requests_of(seed: int) -> list[Request]:
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(60)]
    prompts = [(*shared[: rng.choice([3, 16, 33, 50])], rng.randrange(9)) for _ in range(6)]
    return [Request(str(n), prompt, Sampling(max_tokens=rng.randint(1, 30), ignore_eos=True)) for n, prompt in enumerate(prompts)]


def wrong(model: Model, tokenizer: Tokenizer, lab: SimpleNamespace, seeds: range) -> tuple[int, list[Engine]]:
    count, engines = 0, []
    for seed in seeds:
        rng = random.Random(seed)
        page_size = rng.choice([1, 2, 4])
        spec = EngineSpec(
            page_size=page_size, num_pages=-(-rng.randint(40, 48) // page_size), max_num_seqs=rng.randint(4, 6), max_model_len=82,
            max_num_batched_tokens=rng.choice([4, 8, 16]), enable_prefix_caching=rng.random() < 0.7, device="cpu",
        )  # fmt: skip
        engines.append(Engine(model, tokenizer, None, spec))
        for request, answer in zip(requests := requests_of(seed), run(engines[-1], requests), strict=True):
            tokens = [*request.prompt, *answer.token_ids]
            logits = lab.naive_logits(model, tokens)[len(request.prompt) - 1 : -1, : tokenizer.vocab_size]
            count += answer.finish_reason != "length" or logits.argmax(-1).tolist() != list(answer.token_ids)
    return count, engines


def test_answers_equal_a_full_forward(model: Model, tokenizer: Tokenizer, lab: SimpleNamespace) -> None:
    count, engines = wrong(model, tokenizer, lab, range(40))
    assert count == 0
    layouts = {e._runner.layout.groups for e in engines}
    assert layouts == {(Group(size, WINDOW), Group(4 * size)) for size in (1, 2, 4)}
    assert sum(e.stats().prefix_hits for e in engines) > 500 and sum(e.stats().num_preemptions for e in engines) > 8


@pytest.mark.parametrize("twin", ["sheds too early", "trusts a short tail", "one table for all"])
def test_broken_twins_change_answers(
    model: Model, tokenizer: Tokenizer, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, twin: str
) -> None:
    if twin == "sheds too early":
        first = Group.first
        monkeypatch.setattr(Group, "first", lambda self, start: first(replace(self, window=self.window and self.window - 3), start))
    elif twin == "trusts a short tail":
        monkeypatch.setattr(Scheduler, "_gap", lambda self, group, table, known: 0)
    else:
        of = Layout.of
        monkeypatch.setattr(Layout, "of", lambda *a: (made := of(*a), replace(made, tables=made.tables[:1] * len(made.tables)))[1])
    with pytest.raises((AssertionError, IndexError)):
        assert wrong(model, tokenizer, lab, range(12))[0] == 0


@pytest.mark.parametrize(("size", "want"), [("gemma3-270m", 0), ("gemma3-1b", 2 / 24), ("gemma3-4b", 1 / 30), ("gemma3-12b", 0)])
def test_the_published_sizes_waste_little(size: str, want: float) -> None:
    config = named(size)
    layout = Layout.of(config, 16, config.max_position_embeddings)
    used = sum(config.window(i) is not None for i in range(config.num_hidden_layers)) / (layout.num_lanes * layout.units)
    assert used == pytest.approx(1 - want)
    assert len({(lane, table) for lane, table in zip(layout.lanes, layout.tables, strict=True)}) == config.num_hidden_layers


def held_bytes(size: str, length: int) -> int:
    """Bytes of keys and values of one running sequence, by the books alone."""
    config = named(size)
    layout = Layout.of(config, 16, config.max_position_embeddings)
    limits = Limits(max_num_seqs=2, max_num_batched_tokens=1024, max_waiting=2, max_waiting_tokens=1 << 20, max_model_len=32_768)
    scheduler = Scheduler(PagePool(4096, 16), limits, layout.groups)
    sequence = Sequence("a", [0] * length, length, length + 99, Sampling(), 0)
    scheduler.add(sequence)
    while len(sequence.tokens) < length + 32:
        scheduler.computed(slices := scheduler.plan())
        sequence.tokens += [1] * slices[0].is_last
        scheduler.check_books()
    return scheduler.pool.num_used * layout.page_bytes(config, 2)


def test_gemma_12b_at_8k_keeps_a_quarter_of_one_table_for_all() -> None:
    """3.2 GB with one table for all layers; 8 x 8,192 + 40 x 1,024 tokens are 0.87 GB, 3.7 times less (performance.md, 4.2)."""
    config = named("gemma3-12b")
    whole = 2 * 48 * 8192 * config.num_key_value_heads * config.head_dim * 2
    held = held_bytes("gemma3-12b", 8192)
    assert whole == pytest.approx(3.22e9, rel=0.01)
    assert 0.87e9 < held < 0.90e9 and whole / held > 3.6
    assert held_bytes("gemma3-12b", 512) < 1.05 * whole * (512 + 32) / 8192, "short texts fill both kinds, no more than before"


def test_one_group_where_no_text_can_exceed_the_window_and_for_qwen() -> None:
    for config, longest in ((named("gemma3-1b"), 512), (named("qwen3-0.6b"), 40_960)):
        layout = Layout.of(config, 16, longest)
        assert layout.groups == (Group(16),) and layout.units == 1 and len(set(layout.tables)) == 1
        assert layout.lanes == tuple(range(config.num_hidden_layers))


def test_a_hit_needs_only_the_pages_of_the_window(model: Model, tokenizer: Tokenizer) -> None:
    """After pages of the window's group are taken for others, the prefix is still found as long as its tail is there."""
    engine = Engine(model, tokenizer, None, EngineSpec(page_size=2, num_pages=100, device="cpu", max_num_batched_tokens=8))
    prompt = tuple(range(64))
    ask = Request("a", prompt, Sampling(max_tokens=3, ignore_eos=True))
    want = run(engine, [ask])[0].token_ids
    table_keys = engine._scheduler.pool._page_of
    assert len(table_keys) == 33 + 8
    pool = engine._scheduler.pool
    for _ in range(20):
        pool._free.append(pool._evict())
    poison(engine)
    again = run(engine, [replace(ask, id="b", prompt=(*prompt, 9))])[0]
    assert again.cached_tokens == 64
    assert run(engine, [replace(ask, id="c")])[0].token_ids == want
