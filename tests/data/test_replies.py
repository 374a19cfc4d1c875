"""What is read of a reply and what is kept of it: every check alone, with what slips through without it."""

import json
import random

import pytest

from garage.data.replies import MAX_REPLY, Rejected, Seen, final_answer, is_same_answer, locate, numbers, read_items, turns_of

TEXT = (
    "The **workshop** in Leeds opens at 9:30 on weekdays.\nA basic service costs £45 and takes about two hours.\n"
    "| Bike | Price |\n| Comet | 1,250 |"
)
QA = ("question", "answer", "evidence")
GOOD = {"question": "What does a basic service cost?", "answer": "A basic service costs £45.", "evidence": "A basic service costs £45"}


@pytest.mark.parametrize(
    ("reply", "count", "is_whole"),
    [
        ('[{"a": 1}, {"a": 2}]', 2, True),
        ('Sure! Here it is:\n```json\n[{"a": 1}]\n```\nAnything else? {"b": 2}', 1, True),
        ('{"rows": [{"a": 1}, {"a": 2}]}', 2, True),
        ('{"a": 1}', 1, True),
        ('{"a": 1}\n{"a": 2}\n', 2, True),
        ('```json\n{"a": 1}\n```\nand\n```\n{"a": 2}\n```', 2, True),
        ('In {braces}: [{"a": 1}]', 1, False),
        ('{"turns": [{"a": 1}, {"a": 2}]}', 1, True),
        ('[{"a": 1}, {"a": 2}, {"a": "cut of', 2, False),
        ('[{"a": 1},]', 1, False),
        ('As [1] says: [{"a": "}]"}]', 1, True),
        ('<think>[{"a": 0}]</think>[{"a": 1}]', 1, True),
        ("", 0, False),
        ("I cannot do that.", 0, False),
        ("[" * 100_000, 0, False),
        ('{"a":' * 20_000, 0, False),
        ("[1, 2, 3]", 0, True),
        ("[]", 0, True),
        ('{"a": NaN}', 0, False),
    ],
)
def test_what_is_read_of_a_reply(reply, count, is_whole):
    items, whole = read_items(reply)
    assert (len(items), whole) == (count, is_whole)
    assert all(isinstance(item, dict) for item in items)


def test_a_huge_reply_is_read_up_to_its_limit():
    items, _ = read_items(json.dumps([{"a": "x" * 50}] * 10_000))
    assert 0 < len(items) <= MAX_REPLY // 50


def test_noise_never_raises_anything_but_rejected():
    draw = random.Random(0)
    alphabet = '{}[]":,\\ \n`ab19.%/x-=+$#*|_<>éß\u2019İ'
    for _ in range(2000):
        noise = "".join(draw.choices(alphabet, k=draw.randint(0, 60)))
        read_items(noise)
        try:
            turns_of({"question": noise, "answer": noise, "evidence": noise, "reasoning": noise}, (*QA, "reasoning"), TEXT + noise)
        except Rejected as fault:
            assert str(fault)


@pytest.mark.parametrize(
    ("quote", "found"),
    [
        ("A basic service costs £45", "A basic service costs £45"),
        ("a BASIC   service\ncosts £45", "A basic service costs £45"),
        ("The workshop in Leeds opens", "The **workshop** in Leeds opens"),
        ("Comet 1,250", "Comet | 1,250"),
        ("A basic servce costs £45 and takes abuot two hours.", "A basic service costs £45 and takes about two hours."),
        ("A premium overhaul costs £90 and takes two days.", None),
        ("the moon is made of cheese", None),
        ("two", None),
        ("", None),
    ],
)
def test_where_a_quote_stands(quote, found):
    span = locate(quote, TEXT)
    assert (TEXT[slice(*span)] if span else None) == found


def test_quotes_with_slips_are_found_and_others_are_not():
    """200 sentences with one letter in 25 changed, 0.9 or more of it right; and 200 of the same words in another order."""
    draw = random.Random(1)
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("nder", "st", "ling", "ft")]
    sentences = [" ".join(draw.choices(words, k=10)) + "." for _ in range(200)]
    text = " ".join(sentences)
    close = found = shuffled = 0
    for sentence in sentences:
        changed = "".join("x" if draw.random() < 0.04 else char for char in sentence)
        if sum(a != b for a, b in zip(changed, sentence, strict=True)) <= 0.09 * len(sentence):
            close += 1
            found += (span := locate(changed, text)) is not None and abs(span[0] - text.index(sentence)) < 5
        shuffled += locate(" ".join(draw.sample(sentence.split(), 10)), text) is not None
    assert close > 150 and found >= 0.98 * close and shuffled <= 2, (close, found, shuffled)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"question": ""}, "not of the schema"),
        ({"answer": None}, "not of the schema"),
        ({"answer": ["a"]}, "not of the schema"),
        ({"answer": "x" * 9000}, "not of the schema"),
        ({"evidence": "An oil change costs a lot of money"}, "evidence not in the text"),
        ({"answer": "A basic service costs £54."}, "number not in the text"),
        ({"answer": "Mermaids repair everything there, singing happily."}, "answer not supported by the text"),
        ({"question": "What does this text say about a basic service?"}, "question does not stand alone"),
        ({"question": "What does it cost?"}, "question does not stand alone"),
        ({"question": "They charge how much?"}, "question does not stand alone"),
        ({"extra": "ignored", "role": "system"}, None),
    ],
)
def test_every_check_of_a_row(changed, reason):
    item = {name: value for name, value in (GOOD | changed).items() if value is not None}
    if reason is None:
        (turn,) = turns_of(item, QA, TEXT, is_close=True)
        assert TEXT[slice(*turn.span)] == "A basic service costs £45"
        assert set(vars(turn)) == {"question", "answer", "reasoning", "span"}
        return
    with pytest.raises(Rejected, match=reason):
        turns_of(item, QA, TEXT, is_close=True)


def test_without_the_span_check_an_invented_answer_gets_through(monkeypatch):
    """The broken twin: the check believes every quote."""
    invented = GOOD | {"answer": "A basic service costs £45 for members.", "evidence": "Members pay less than all others"}
    with pytest.raises(Rejected, match="evidence"):
        turns_of(invented, QA, TEXT, is_close=True)
    monkeypatch.setattr("garage.data.replies.locate", lambda quote, text: (0, len(text)))
    assert turns_of(invented, QA, TEXT, is_close=True)


REASONED = ("question", "reasoning", "answer", "evidence")


@pytest.mark.parametrize(
    ("reasoning", "answer", "reason"),
    [
        ("Two services: 2 * £45 = £90.", "£90", None),
        ("3 services x 45 pounds = 135 pounds, 135 - 10% * 100 = 125.", "125", None),
        ("2 + 3 * 4 = 14", "14", None),
        ("2 * 45 = 80", "80", "wrong arithmetic"),
        ("It is simply much.", "90", "number not in the text"),
        ("45 / 0 = 45", "45", "wrong arithmetic"),
        ("<answer>9</answer>", "45", "tags inside"),
    ],
)
def test_calculations_are_done_again(reasoning, answer, reason):
    item = GOOD | {"reasoning": reasoning, "answer": answer}
    if reason is None:
        assert turns_of(item, REASONED, TEXT)[0].answer == answer
        return
    with pytest.raises(Rejected, match=reason):
        turns_of(item, REASONED, TEXT)


def test_conversations_have_several_checked_turns():
    first, second = GOOD, GOOD | {"question": "And it takes how long?", "answer": "About two hours.", "evidence": "takes about two hours"}
    turns = turns_of({"turns": [first, second]}, QA, TEXT, has_turns=True)
    assert [turn.question for turn in turns] == [first["question"], second["question"]]
    for broken in ([first], [first] * 9, "turns", [first, "x"], [first, second | {"evidence": "nowhere to be found"}]):
        with pytest.raises(Rejected):
            turns_of({"turns": broken}, QA, TEXT, has_turns=True)


def test_numbers_have_one_spelling():
    assert numbers("1. First\n2) Second\nat 09:30, 1,250.00 and 1250 and 3.50") == {"9", "30", "1250", "3.5"}
    assert is_same_answer("1,250.0", "$1250.") and not is_same_answer("1250", "125")
    assert final_answer("a <answer> 7 </answer>") == "7" and final_answer("so\n#### 42") == "42" and final_answer(" yes ") == "yes"


def test_repeated_questions_are_seen_and_others_are_not():
    seen = Seen()
    assert seen.add("What does the gold plan cost for a family of four in the first year?")
    assert not seen.add("what does the GOLD plan cost, for a family of four in the first year")
    assert not seen.add("What does the gold plan cost for a family of four in the first year, please?")
    assert seen.add("What does the silver plan cost for a family of four in the second year?")
    for n in range(300):  # common words cost nothing and hide nothing
        assert seen.add(f"What is the use of the {'abcdefghij'[n % 10] * 4} {'klmnopqrst'[n // 10 % 10] * 4} {'uvw'[n // 100] * 4}?")
    assert not seen.add("What is the use of the bbbb mmmm vvvv?")
    assert seen.add("What is 3 plus 4 when both are counted on one hand only?")
    assert seen.add("What is 3 plus 5 when both are counted on one hand only?")
