"""Evaluation questions in training rows: every rule by hand, what must not be rejected, and the asset that holds hashes only."""

import json
import random
from importlib.resources import files

import pytest

from garage.core.types import Message, Row
from garage.data import decontaminate
from garage.data.decontaminate import RULES, built_in, contamination, fingerprint, pack, unpack, words

ASKED = ("A farmer sells 16 eggs a day at $2.50 each and keeps three for breakfast, while her neighbour Olga sells jam. "
         "How much does the farmer make in a week of 7 days?")  # fmt: skip


def row(question, answer="yes"):
    return Row("x", (Message("user", question), Message("assistant", answer)))


@pytest.fixture(scope="module")
def exam():
    return [fingerprint("exam", [row(ASKED, "Some answer")])]


def test_each_rule_by_hand(exam):
    changed = ASKED.upper().replace(",", " -").replace("?", " ???")
    numbers = ASKED.replace("16", "twenty-five").replace("2.50", "31").replace("three", "8")
    embedded = f"Solve this for me. {' '.join(ASKED.split()[:20])} And so on."
    assert contamination(row(ASKED), exam) == contamination(row(changed), exam) == "question in exam"
    assert contamination(row(numbers), exam) == "template in exam"
    assert contamination(row(embedded), exam) == "ngram in exam"
    assert contamination(row("Tell me something.", f"They ask: {ASKED}"), exam) == "ngram in exam"
    assert contamination(Row("x", text=f"A page of a book. {ASKED} Next page."), exam) == "ngram in exam"
    assert contamination(Row("x", text=ASKED), exam) == "question in exam"


def test_only_the_rules_asked_for(exam):
    numbers = ASKED.replace("16", "25")
    assert [contamination(row(numbers), exam, (rule,)) for rule in RULES] == ["", "template in exam", "ngram in exam"]
    assert contamination(row(numbers), exam, ("question",)) == ""


def test_twelve_words_together_are_not_enough_and_thirteen_are(exam):
    masked = words("her neighbour olga sells jam how much does the farmer make in a week")
    assert len(masked) == 14
    assert contamination(row(" ".join(masked[:12])), exam) == "" and contamination(row(" ".join(masked[:13])), exam) == "ngram in exam"


def test_short_and_trivial_overlaps_are_no_contamination():
    exam = [fingerprint("chat", [row("Hello!", "Hi, how can I help?"), row("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"), row("la " * 30)])]
    assert contamination(row("Hello!", "Good morning."), exam) == ""
    assert contamination(row("Count: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"), exam) == ""
    assert contamination(row("Sing la la la la la la la la la la la la la la"), exam) == ""
    assert contamination(row("hello", "hi how can I help"), exam) == "question in chat"  # the same row is the same row


def test_wording_that_three_questions_share_does_not_count():
    form = "You are given a problem. Think about it carefully step by step and then state the final answer after four hashes."
    exam = [fingerprint("formed", [row(f"{form} {' '.join(random.Random(n).sample(WORDS, 20))}") for n in range(3)])]
    assert contamination(row(f"{form} What is the capital of France and why?"), exam) == ""
    two = [fingerprint("formed", [row(f"{form} {' '.join(random.Random(n).sample(WORDS, 20))}") for n in range(2)])]
    assert contamination(row(f"{form} What is the capital of France and why?"), two) == "ngram in formed"


WORDS = [f"{a}{b}" for a in "blue red long cold odd".split() for b in "house tree lake road stone bird cloud".split()]  # noqa: SIM905


def test_words_and_numbers_in_a_row_are_one_mask():
    assert decontaminate._masked(words("Twenty-five of 1,000 and 3/4")) == ["0", "of", "0", "and", "0"]
    assert decontaminate._masked(words("one hundred eighteen, forty four; often, tone")) == ["0", "often", "tone"]
    assert words("It’s “FINE” — naïve ﬁne") == ["it", "s", "fine", "naïve", "fine"]


def test_pack_and_unpack_are_inverse(exam):
    both = (exam[0], fingerprint("other", [row("q " * 20), row(ASKED + " Else?")], about="two rows"))
    assert unpack(pack(both)) == both


def test_the_asset_says_what_it_holds_and_holds_no_text():
    data = (files("garage") / "assets" / "fingerprints.bin").read_bytes()
    head = json.loads(data.partition(b"\n")[0])
    assert len(data) <= 400_000 and "no text" in head["form"]
    gsm8k, aime = head["sets"]
    assert gsm8k["about"] == "1,000 of the 1,319 questions of gsm8k-test" and (gsm8k["rows"], aime["rows"]) == (1000, 30)
    assert [len(each.ngram) for each in built_in()] == [gsm8k["ngram"], aime["ngram"]]
    assert b"ducks" not in data and b"eggs" not in data


def test_the_asset_is_that_of_the_files_and_finds_all_of_them(shared):
    rows = [json.loads(line) for line in (shared / "gsm8k" / "test.jsonl").open()]
    sums = [json.loads(line)["problem"] for line in (shared / "aime" / "aime24.jsonl").open()]
    prints = built_in()
    assert {contamination(row(each["question"]), prints) for each in rows} == {"question in gsm8k-test"}
    assert {contamination(row(each), prints) for each in sums} == {"question in aime-2024"}


def test_rows_of_the_training_split_are_hardly_touched(shared):
    rows = [json.loads(line)["question"] for line in (shared / "gsm8k" / "train.jsonl").open()]
    assert sum(bool(contamination(row(each), built_in())) for each in rows[:2000]) <= 4


def test_without_masks_a_changed_number_is_missed(monkeypatch):
    asked = "Ann has 5 red apples, 7 green pears and 9 plums. In all, how many fruits does Ann now have?"
    changed = asked.replace("5", "15").replace("7", "71").replace("9", "93")
    assert contamination(row(changed), [fingerprint("exam", [row(asked)])]) == "template in exam"
    monkeypatch.setattr(decontaminate, "_masked", list)
    assert contamination(row(changed), [fingerprint("exam", [row(asked)])]) == ""
