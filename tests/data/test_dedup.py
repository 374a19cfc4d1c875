"""Copies and near copies: hand-computed cases, invariants on random rows, and what a weaker method would miss."""

import random
import re

import pytest

from garage.core.types import Message, Row, ToolCall
from garage.data import dedup
from garage.data.dedup import deduplicate, num_bands

pytest.importorskip("rensa")
WORDS = [f"word{n}" for n in range(2000)]


def text(seed, size=100):
    return " ".join(random.Random(seed).choices(WORDS, k=size))


def row(id, question, answer="", **meta):
    return Row(id, (Message("user", question), Message("assistant", answer)) if answer else (), "" if answer else question, meta=meta)


def reasons(*parts, **how):
    return {each.id: reason for each, reason in deduplicate(*parts, **how) if reason}


def test_a_copy_differs_in_case_and_space_only_and_punctuation_makes_it_a_near_copy():
    rows = [row("a", "What is Rust?", "A language."), row("b", "what is  rust?", "a LANGUAGE."), row("c", "What is Rust", "A language")]
    assert reasons(rows) == {"b": "copy of a", "c": "near copy of a (1.00)"}


def test_one_word_of_a_hundred_is_a_near_copy_of_known_likeness():
    words = text(1).split()
    changed = [*words[:50], "other", *words[51:]]  # 96 runs of five words, five of them broken: 91 / 101
    (reason,) = reasons([row("a", " ".join(words)), row("b", " ".join(changed))]).values()
    assert reason.startswith("near copy of a (") and float(reason[-5:-1]) == pytest.approx(91 / 101, abs=0.1)


def test_different_words_are_no_copies():
    assert reasons([row(str(n), text(n)) for n in range(200)]) == {}


def test_the_best_rated_stays_else_the_first():
    ratings = {"a": {"rating": "5"}, "b": {"rating": "9"}, "c": {}, "d": {"rating": "good"}}
    rows = [row(id, "q", "same", **rating) for id, rating in ratings.items()]
    assert reasons(rows) == {"a": "copy of b", "c": "copy of b", "d": "copy of b"}
    assert reasons(rows[2:]) == {"d": "copy of c"}


def test_a_training_row_never_survives_its_held_out_twin():
    said = text(2)
    test, held = [row("t", said)], [row("e", said + " more")]
    train = [row("x", said, rating="10"), row("y", said + " more", rating="10")]
    found = reasons(test, held, train)
    assert set(found) == {"e", "x", "y"} and all(" of t" in reason for reason in found.values())
    assert set(reasons(train)) == {"y"}


def test_questions_about_one_long_text_are_told_apart_by_their_answers():
    said = text(3, 200)
    built, paid = "In 1871, after two years.", "The mayor paid for it."
    assert reasons([row("a", f"{said} When was it built?", built), row("b", f"{said} Who built it?", paid)]) == {}
    limit = [row("a", f"{said} When was it built?", built), row("c", f"{said} When was it opened?", built)]
    assert set(reasons(limit)) == {"c"}  # as the header says


def test_a_shared_system_prompt_makes_no_copies():
    rows = [Row(str(n), (Message("system", text(4)), Message("user", f"q{n}"), Message("assistant", f"a{n}"))) for n in range(3)]
    assert reasons(rows) == {}


def test_different_tool_calls_and_different_worse_answers_are_different_rows():
    call = [Row(str(n), (Message("user", "weather?"), Message("assistant", "", tool_calls=(ToolCall("1", "get", f'{{"city": {n}}}'),))))
            for n in range(2)]  # fmt: skip
    turns = (Message("user", "q"), Message("assistant", "good"))
    pair = [Row("a", turns, rejected="bad one"), Row("b", turns, rejected="worse two")]
    assert reasons(call) == {} and reasons(pair) == {}


def test_rows_without_words_and_no_rows_at_all():
    assert reasons([row("a", "😀"), row("b", "😂"), row("c", "😀")]) == {"c": "copy of a"}
    assert reasons([]) == {} and reasons([row("a", "x")]) == {}


def test_chinese_is_compared_by_character():
    said = "".join(chr(0x4E00 + n) for n in random.Random(5).choices(range(3000), k=100))
    assert set(reasons([row("a", said), row("b", said[:50] + "中" + said[51:])])) == {"b"}


def some_rows(seed):
    """Rows of which many repeat one another more or less, rated at random."""
    rng = random.Random(seed)
    texts = [text(n, 60).split() for n in range(20)]
    rows = []
    for n in range(120):
        share = rng.choice((0, 0, 0.01, 0.05, 0.3))
        words = [word if rng.random() >= share else "new" for word in rng.choice(texts)]
        rows.append(row(f"r{n}", " ".join(words), **({"rating": str(rng.randrange(10))} if rng.random() < 0.5 else {})))
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
def test_invariants(seed, threshold):
    rows = some_rows(seed)
    found = list(deduplicate(rows, threshold=threshold))
    assert [each for each, _ in found] == rows
    kept, rating = {each.id for each, reason in found if not reason}, {each.id: float(each.meta.get("rating", -1)) for each in rows}
    for each, reason in found:
        if named := re.search(r"of (r\d+)", reason):
            assert named[1] in kept and rating[named[1]] >= rating[each.id]
        if score := re.search(r"\((.*)\)", reason):
            assert threshold <= float(score[1]) + 0.005
    assert reasons([each for each in rows if each.id in kept], threshold=threshold) == {}
    assert 20 <= len(kept) < 120


def test_bands_follow_the_threshold():
    assert [num_bands(t) for t in (0.3, 0.5, 0.7, 0.9, 1.0)] == [64, 32, 16, 8, 1]


def test_a_lower_threshold_finds_what_the_default_does_not():
    words = text(6, 200).split()
    changed = [word if n % 12 else "new" for n, word in enumerate(words)]  # about 7 of 12 runs are whole: 0.41
    rows = [row("a", " ".join(words)), row("b", " ".join(changed))]
    assert reasons(rows) == {} and set(reasons(rows, threshold=0.3)) == {"b"} and set(reasons(rows, shingle=1)) == {"b"}


def test_without_normalisation_a_changed_copy_is_missed(monkeypatch):
    said = text(7)
    rows = [row("a", said), row("b", said.upper().replace(" ", ", "))]
    assert set(reasons(rows)) == {"b"}
    monkeypatch.setattr(dedup, "words", str.split)
    assert reasons(rows) == {}
