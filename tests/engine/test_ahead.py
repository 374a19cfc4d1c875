"""Steps that begin before the tokens of the one before are read: the same answers, one step later."""

from types import SimpleNamespace

import pytest

from garage.core.types import Completion, Request, Sampling
from garage.engine.engine import Engine
from garage.engine.request import PENDING, Delta
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

VOCAB = 268
SPEC = EngineSpec(page_size=4, num_pages=64, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)


@pytest.fixture(scope="module")
def model(lab: SimpleNamespace) -> Model:
    return lab.tiny("gemma3", vocab_size=VOCAB)


def engine_of(model: Model, tokenizer: Tokenizer, is_ahead: bool, **changes: object) -> Engine:
    return Engine(model, tokenizer, None, SPEC.model_copy(update={"async_scheduling": is_ahead, **changes}))


def requests() -> list[Request]:
    """Of every kind: drawn, greedy, with filters, rules, log-probabilities, stops; some are only read."""
    kinds = [
        {"temperature": 1.0, "seed": 3}, {"temperature": 0.0}, {"temperature": 1.0, "seed": 4, "top_k": 5, "logprobs": 2},
        {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3}, {"temperature": 1.2, "seed": 6, "stop": ("a", "th")},
        {"temperature": 0.0, "prompt_logprobs": 1, "max_tokens": 0}, {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 1.0, "seed": 8, "min_tokens": 4, "ignore_eos": False}, {"temperature": 1.0, "seed": 9, "bad_words": ("e",)},
    ]  # fmt: skip
    made = [Sampling(**({"max_tokens": 4 + 3 * n, "ignore_eos": True} | kind)) for n, kind in enumerate(kinds)]
    return [Request(str(n), tuple(range(n, 3 * n + 5)), sampling) for n, sampling in enumerate(made)]


def told(answers: list[Completion]) -> list[object]:
    return [(a.token_ids, a.text, a.finish_reason, a.error, [t.token_id for t in a.logprobs], a.prompt_tokens) for a in answers]


@pytest.mark.parametrize("changes", [{}, {"num_pages": 22}, {"max_num_batched_tokens": 5}, {"enable_prefix_caching": False}])
def test_the_answers_are_the_same(model: Model, tokenizer: Tokenizer, changes: dict[str, object]) -> None:
    plain, ahead = (engine_of(model, tokenizer, is_ahead, **changes) for is_ahead in (False, True))
    assert told(ahead.generate(requests())) == told(plain.generate(requests()))
    ahead.check_books()
    assert ahead.stats().num_pages_used == 0 and ahead.stats().generation_tokens == plain.stats().generation_tokens


def test_a_step_begins_before_the_last_one_is_read(model: Model, tokenizer: Tokenizer) -> None:
    engine, order = engine_of(model, tokenizer, True), list[str]()
    step = engine._runner.step
    engine._runner.step = lambda slices, rows: (order.append("begin"), step(slices, rows))[1]  # type: ignore[method-assign]
    engine.submit(Request("a", (1, 2, 3), Sampling(max_tokens=4, ignore_eos=True)), lambda delta: order.append("tell"))
    while engine.has_work:
        engine.step()
    assert order == ["begin", "begin", "tell", "begin", "tell", "begin", "tell", "tell"]


def test_ending_at_every_moment_leaves_nothing_behind(model: Model, tokenizer: Tokenizer) -> None:
    for moment in range(12):
        engine, heard = engine_of(model, tokenizer, True), dict[str, Completion]()
        hear = lambda delta, heard=heard: delta.completion and heard.update({delta.id: delta.completion})  # noqa: E731
        for request in requests():
            engine.submit(request, hear)
        for _ in range(moment):
            engine.step()
        for request in requests():
            engine.abort(request.id)
            engine.check_books()
        assert not engine.has_work and engine.stats().num_pages_used == 0 and len(heard) == len(requests())
        assert all(PENDING not in answer.token_ids for answer in heard.values())
        again = engine.generate(requests())
        assert told(again) == told(engine_of(model, tokenizer, False).generate(requests()))


def test_a_step_that_fails_after_one_that_did_not(model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, heard = engine_of(model, tokenizer, True), list[Delta]()
    for name in "ab":
        engine.submit(Request(name, (1, 2, 3), Sampling(max_tokens=9, ignore_eos=True)), heard.append)
    engine.step()
    monkeypatch.setattr(engine._runner, "run", lambda slices: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.undo()
    ends = [delta.completion for delta in heard if delta.completion]
    assert [(end.finish_reason, PENDING in end.token_ids) for end in ends] == [("error", False)] * 2 and not engine.has_work
    engine.check_books()
    assert told(engine.generate(requests())) == told(engine_of(model, tokenizer, False).generate(requests()))
