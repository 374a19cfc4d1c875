"""Structured output: answers of a random model always have the form asked for; hostile structures are bounded; drafts are followed back."""

import json
import random
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from garage.core.errors import UserError
from garage.core.types import Completion, Request, Sampling, Structure
from garage.engine import constrain
from garage.engine.constrain import Constraint, Grammars
from garage.engine.engine import Engine
from garage.engine.request import Sequence
from garage.engine.sampler import sample
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

SPEC = EngineSpec(page_size=16, num_pages=1024, max_num_seqs=16, device="cpu", max_model_len=1024)


@pytest.fixture(scope="module")
def model(lab: SimpleNamespace) -> Model:
    found: Model = lab.tiny("qwen3", vocab_size=268, positions=1024)
    return found


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def allowed(constraint: Constraint, tokens: list[int], tokenizer: Tokenizer, length: int | None = None) -> set[int]:
    mask = np.full(-(-tokenizer.vocab_size // 32), -1, np.int32)
    assert constraint.write_mask(tokens, len(tokens) if length is None else length, mask.ctypes.data, mask.nbytes) == ""
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little")[: tokenizer.vocab_size].nonzero()[0].tolist())


def answers(
    model: Model, tokenizer: Tokenizer, structures: list[Structure], sampling: Sampling, spec: EngineSpec = SPEC
) -> list[Completion]:
    engine = Engine(model, tokenizer, None, spec)
    plans = [Request(str(n), (n % 256, 7), Sampling(**{**vars(sampling), "seed": n}), structure=s) for n, s in enumerate(structures)]
    done = engine.generate(plans)
    engine.check_books()
    return done


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(["object", "array", "anyOf"] if depth and rng.random() < 0.7 else ["string", "integer", "enum", "boolean", "null"])
    if kind == "object":
        names = rng.sample(["name", "age", "tags", "x y", "é"], rng.randint(0, 3))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": rng.sample(names, len(names) // 2), "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    plain: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 6)}, "enum": {"enum": ["a", 1, None, "b\n"]},
        "integer": {"type": "integer", "minimum": -rng.randint(0, 50), "maximum": rng.randint(1, 2000)},
    }  # fmt: skip
    return plain.get(kind, {"type": kind})


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """What the keywords of `random_schema` mean."""
    if "anyOf" in schema:
        return any(is_valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    if type(value) is not kinds[schema["type"]]:
        return False
    if schema["type"] == "object":
        known = schema["properties"]
        return set(schema["required"]) <= set(value) <= set(known) and all(is_valid(v, known[k]) for k, v in value.items())
    if schema["type"] == "array":
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(is_valid(v, schema["items"]) for v in value)
    low, high = {"string": ("minLength", "maxLength"), "integer": ("minimum", "maximum")}.get(schema["type"], ("", ""))
    size = len(value) if isinstance(value, str) else value
    return not low or schema[low] <= size <= schema[high]


def test_json_of_a_random_model_always_parses_and_validates(model: Model, tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(50)]
    structures, sampling = [Structure("json", json.dumps(s)) for s in schemas], Sampling(temperature=1.0, max_tokens=700)
    done = answers(model, tokenizer, structures, sampling)
    for schema, answer in zip(schemas, done, strict=True):
        assert answer.finish_reason == "stop", (answer.finish_reason, answer.error, schema)
        assert is_valid(json.loads(answer.text), schema), (answer.text, schema)
    twin = answers(model, tokenizer, structures[1:] + structures[:1], sampling)
    assert not all(is_valid(json.loads(a.text), s) for a, s in zip(twin, schemas, strict=True)), "the check can tell"


REGEXES = [r"[a-z]{3,9}", r"^\d{4}-\d{2}-\d{2}$", r"(foo|bar)+baz{2}", r"[ -~]{0,12}", "日本|語{1,4}", r"(?i:yes|no)", r"a*b?"]


@pytest.mark.parametrize("extra", [{}, {"temperature": 0.0}, {"frequency_penalty": 1.5, "repetition_penalty": 1.2, "top_p": 0.9}])
def test_regex_answers_match_in_full(model: Model, tokenizer: Tokenizer, extra: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, "max_tokens": 400, **extra})
    done = answers(model, tokenizer, [Structure("regex", r) for r in REGEXES * 3], sampling)
    for regex, answer in zip(REGEXES * 3, done, strict=True):
        assert answer.finish_reason == "stop" or (answer.finish_reason == "length" and regex in ("a*b?", r"(foo|bar)+baz{2}")), answer
        assert answer.finish_reason == "length" or re.fullmatch(regex, answer.text), (regex, answer.text)
        assert answer.text.isascii() or "\\d" not in regex


def test_a_choice_is_one_of_them_and_each_is_reached(model: Model, tokenizer: Tokenizer) -> None:
    choices = ["a", "ab", "option 1", "option 10", 'quo"te\\', "ü\n"]
    done = answers(model, tokenizer, [Structure("choice", json.dumps(choices))] * 60, Sampling(temperature=2.0, max_tokens=30))
    assert {a.finish_reason for a in done} == {"stop"} and {a.text for a in done} == set(choices)


def test_a_grammar_is_followed(model: Model, tokenizer: Tokenizer) -> None:
    text = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'
    done = answers(model, tokenizer, [Structure("grammar", text)] * 20, Sampling(temperature=1.0, max_tokens=200))
    for answer in done:
        depth = answer.text.count("(")
        assert answer.finish_reason == "stop" and re.fullmatch(rf"\({{{depth}}}[0-9]{{1,3}}\){{{depth}}}", answer.text)


def test_the_limit_cuts_a_form_and_an_end_only_comes_where_it_is_complete(model: Model, tokenizer: Tokenizer) -> None:
    for limit in (1, 3, 7):
        [answer] = answers(model, tokenizer, [Structure("regex", "x{8}")], Sampling(max_tokens=limit))
        assert (answer.text, answer.finish_reason) == ("x" * limit, "length")
    [answer] = answers(model, tokenizer, [Structure("regex", "x{8}")], Sampling(max_tokens=8, ignore_eos=True, min_tokens=3))
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("x" * 8, "stop", 8)
    [answer] = answers(model, tokenizer, [Structure("regex", "x{8}")], Sampling(max_tokens=20, stop=("xxx",)))
    assert (answer.text, answer.finish_reason) == ("", "stop")
    bias = tuple((i, 90.0) for i in tokenizer.eos_ids)
    [answer] = answers(model, tokenizer, [Structure("regex", "x{3,9}")], Sampling(max_tokens=20, logit_bias=bias, ignore_eos=True))
    assert (answer.text, answer.token_ids[-1], answer.finish_reason) == ("xxx", tokenizer.eos_ids[0], "stop")
    [answer] = answers(model, tokenizer, [Structure("regex", "x{3,9}")], Sampling(max_tokens=20, logit_bias=bias, min_tokens=6))
    assert answer.text == "xxxxxx"


def test_seeds_hold_in_company_and_logprobs_are_the_models_own(model: Model, tokenizer: Tokenizer, lab: SimpleNamespace) -> None:
    structures = [Structure("json", '{"type":"object","properties":{"a":{"type":"string","maxLength":9}},"required":["a"]}')] * 12
    sampling = Sampling(temperature=1.0, max_tokens=40, logprobs=2)
    alone = [c for n in range(12) for c in answers(model, tokenizer, structures[: n + 1], sampling)[n:]]
    small = SPEC.model_copy(update={"page_size": 4, "num_pages": 24, "max_model_len": 96, "max_num_batched_tokens": 16})
    crowd = answers(model, tokenizer, structures, sampling, small)
    assert [c.token_ids for c in crowd] == [c.token_ids for c in alone]
    tokens = [3, 7]
    for chosen in alone[3].logprobs:
        want = lab.naive_logits(model, tokens)[-1, : tokenizer.vocab_size].log_softmax(-1)
        assert chosen.logprob == pytest.approx(want[chosen.token_id].item(), abs=1e-4)
        tokens.append(chosen.token_id)


def test_state_follows_drafts_that_are_taken_back(grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, rng = Structure("regex", r"(ab|ba|the|an)*[0-9]"), random.Random(0)
    tokens, held = [1, 2, 3], grammars.start(structure, 3)
    for _ in range(150):
        tokens += [rng.choice(sorted(allowed(held, tokens, tokenizer))) for _ in range(1)]
        drafts = [rng.choice(tokenizer.encode("abthen 0")) for _ in range(rng.randint(0, 5))]
        tokens += drafts
        for length in range(len(tokens) - len(drafts), len(tokens) + 1):
            assert allowed(held, tokens, tokenizer, length) == allowed(grammars.start(structure, 3), tokens, tokenizer, length)
        del tokens[len(tokens) - rng.randint(0, len(drafts)) if drafts else len(tokens) :]
        while len(tokens) > 3 and len(allowed(grammars.start(structure, 3), tokens, tokenizer)) in (1, tokenizer.vocab_size):
            tokens.pop()  # over, or broken by a draft
    assert len(tokens) > 30
    deaf = grammars.start(structure, 3)
    monkeypatch.setattr(constrain, "changes", lambda seen, tokens, start, n: (k := min(len(seen), n - start), tokens[start + k : n]))
    a, b = (tokenizer.encode(letter) for letter in "ab")
    assert allowed(deaf, [1, 2, 3, *a], tokenizer) and allowed(deaf, [1, 2, 3, *b], tokenizer) != set(a), "the twin does not notice"


def test_verifying_drafts_gives_the_text_without_them(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Rows of rising length in one call choose what one row after another does; a draft outside the form never survives."""
    rng, V = random.Random(1), tokenizer.vocab_size
    structure, draw = Structure("json", '{"type":"array","items":{"enum":["the","an",1]},"maxItems":4}'), torch.Generator().manual_seed(0)
    table = torch.randn(300, V, generator=draw)

    def grow(num_drafts: int) -> list[int]:
        s = Sequence("s", [5], 1, 999, Sampling(temperature=1.0), 9, constraint=grammars.start(structure, 1))
        while not s.constraint.is_over(s.tokens, len(s.tokens)) and len(s.tokens) < 290:
            done = len(s.tokens)
            s.tokens += [rng.choice([rng.randrange(V), *tokenizer.encode(' "[1')]) for _ in range(num_drafts)]
            rows = [(s, n) for n in range(done, len(s.tokens) + 1)]
            ids = sample(table[[n for _, n in rows]], rows, V).read().ids
            num_right = next((k for k in range(num_drafts) if s.tokens[done + k] != ids[k]), num_drafts)
            s.tokens[done + num_right :] = [ids[num_right]]
            if ids[num_right] in tokenizer.eos_ids:
                break
        return s.tokens

    assert grow(0) == grow(1) == grow(5)


REFUSED = [
    ("json", '{"type":"foo"}', "foo"), ("json", "{bad", "key"), ("json", '{"if":{},"then":{}}', "Unimplemented"),
    ("json", '{"$ref":"#"}', "nothing"), ("json", '{"$ref":"file:///etc/passwd"}', "retriev"), ("json", '"x"', "object"),
    ("regex", "(?=a)b", "look"), ("regex", r"(a)\1", "backref"),
    ("regex", "((((", "unclosed"), ("choice", "[]", "one or more"), ("choice", "[1]", "strings"), ("choice", "x", "Expecting"),
    ("grammar", "start: foo", "foo"), ("grammar", "", "Empty"), ("regex", "(" * 20_000, "regex"), ("regex", "a" * 200_000, "200000"),
    ("json", '{"type":"array","items":' * 4000 + "{}" + "}" * 4000, "recursion"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "why"), REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_reason(grammars: Grammars, kind: Any, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        grammars.start(Structure(kind, text), 0)


def test_bombs_end_within_their_time_and_the_next_structure_works(grammars: Grammars, tokenizer: Tokenizer) -> None:
    patterns = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{i + 5}}}x"} for i in range(20)]}
    for schema in (patterns, {"type": "integer", "multipleOf": 99_999_989, "minimum": 0, "maximum": 10**18}):
        began = time.monotonic()
        with pytest.raises(UserError, match="too much to compile"):
            grammars.start(Structure("json", json.dumps(schema)), 0)
        assert time.monotonic() - began < 20, "two seconds, on a busy machine"
    assert allowed(grammars.start(Structure("regex", "after"), 0), [], tokenizer)


def test_a_form_too_costly_to_follow_is_that_requests_error_alone(model: Model, tokenizer: Tokenizer) -> None:
    structures = [Structure("regex", "(((a{1,100}){1,100}){1,100}){1,100}"), Structure("regex", "[ab]{30}")]
    costly, fine = answers(model, tokenizer, structures, Sampling(max_tokens=60))
    assert costly.finish_reason == "error" and "cannot be followed" in costly.error
    assert fine.finish_reason == "stop" and re.fullmatch("[ab]{30}", fine.text)


def test_compiled_structures_are_kept_within_a_bound_and_found_while_another_compiles(tokenizer: Tokenizer) -> None:
    few = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    known = Structure("regex", "abc")
    few.start(known, 0)

    def bomb() -> None:
        with pytest.raises(UserError, match="too much"):
            few.start(Structure("regex", "(a?){5000}a{5000}"), 0)

    slow = threading.Thread(target=bomb)
    slow.start()
    began = time.monotonic()
    few.start(known, 0)
    assert time.monotonic() - began < 1.0 and slow.is_alive()
    slow.join()
    for n in range(constrain.MAX_KNOWN + 9):
        few.start(Structure("regex", f"a{{{n + 1}}}"), 0)
    assert few._compiled.cache_info().currsize == constrain.MAX_KNOWN


def test_control_tokens_are_never_part_of_a_form(grammars: Grammars, tokenizer: Tokenizer) -> None:
    anything = allowed(grammars.start(Structure("regex", r"(?s:.{5,99})"), 0), [], tokenizer)
    assert anything.isdisjoint(tokenizer.special_ids) and len(anything) > 150
    ends = allowed(grammars.start(Structure("regex", r"(?s:.*)"), 0), [], tokenizer) & tokenizer.special_ids
    assert ends == set(tokenizer.eos_ids)
