"""The extractive teacher: what it finds, that it invents nothing, and that the test split asks known facts in new words."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from garage.data.phrasings import Words, frames, named, questions
from garage.data.synthesize import Fact, facts, synthesize
from garage.store.corpus import Chunk

ROOT = Path(__file__).parents[2]

TEXT = """# Birch Bakery

Phone: 555 0199

Owner: Nora Finch

## Bread

| Loaf | Price | Weight |
| --- | --- | --- |
| Rye loaf | 6 EUR | 900 g |
| Oat loaf | 5 EUR | - |

A starter is a paste of flour and water. It is a secret. The oven temperature of the rye loaf is 230 degrees. The rye loaf costs 6 EUR.
Leftovers must be given away before closing time. The oven is cleaned every Sunday.

## Opening the bakery

1. Light the oven

2. Unlock the front door

## Can I bring my own bag?

Yes, we like that. It saves paper.

## Today's cakes

- plum cake
- nut cake
"""


def chunk(text: str, name: str = "doc", headings: tuple[str, ...] = ()) -> Chunk:
    return Chunk(f"{name}-0", name, text, 0, len(text), len(text) // 4, headings)


def found(text: str, **more: object) -> dict[tuple[str, str], str]:
    return {(fact.subject, fact.attribute): fact.value for fact in facts([chunk(text, **more)])}  # type: ignore[arg-type]


def unsupported(some: list[Fact], chunks: list[Chunk]) -> list[Fact]:
    """Facts whose value does not stand at its offsets and inside its supporting span: must be none."""
    texts = {c.id: c.text for c in chunks}
    return [f for f in some if texts[f.chunk][f.start:f.end] != f.value or f.value not in f.support or f.support not in texts[f.chunk]]


def test_finds_each_form_and_nothing_else() -> None:
    assert found(TEXT) == {
        ("Birch Bakery", "Phone"): "555 0199",
        ("Birch Bakery", "Owner"): "Nora Finch",
        ("Rye loaf", "Price"): "6 EUR",
        ("Rye loaf", "Weight"): "900 g",
        ("Oat loaf", "Price"): "5 EUR",
        ("A starter", "meaning"): "a paste of flour and water",
        ("the rye loaf", "oven temperature"): "230 degrees",
        ("The rye loaf", "price"): "6 EUR",
        ("Leftovers", "be given away"): "before closing time",
        ("The oven", "is|cleaned"): "every Sunday",
        ("Opening the bakery", "step 1"): "Light the oven",
        ("Opening the bakery", "step 2"): "Unlock the front door",
        ("Can I bring my own bag?", "answer"): "Yes, we like that.",
        ("Today's cakes", "points"): "- plum cake\n- nut cake",
    }


def test_json_paths_take_their_subject_from_the_name_beside_them() -> None:
    paths = "boats[0].name: Tern\nboats[0].crew_size: 4\nboats[1].name: Kite\nboats[1].crew_size: 6\noffice.room: 12 B"
    assert found(paths) == {("Tern", "crew size"): "4", ("Kite", "crew size"): "6", ("office", "room"): "12 B"}


def test_headings_above_the_chunk_name_the_subject() -> None:
    assert found("Phone: 555 0100", headings=("Lake Hotel", "Contact")) == {("Lake Hotel", "Phone"): "555 0100"}
    assert found("Phone: 555 0100") == {}
    assert found("Monday: closed", headings=("Lake Hotel", "Opening hours")) == {("Monday", "Opening hours"): "closed"}


@pytest.mark.parametrize("junk", [
    "This is a very good idea.", "Note: bring water", "Page: 3", "See also: https://example.org/x", "However, it is the end.",
    "| A | B |\n| --- | --- |\n| 1 | 2 |", "The first reason is a lack of time in summer.", "x = {a: 1}",
    "The goal is clear, we hope: it ends.",
])  # fmt: skip
def test_junk_is_left_out(junk: str) -> None:
    assert found(junk, headings=("Guide",)) == {}


def test_two_values_for_one_question_are_no_fact() -> None:
    made = synthesize([chunk("# Inn\n\nPhone: 12 34"), chunk("# Inn\n\nPhone: 56 78", "other")], rows=None, seed=0)
    assert (made.facts, made.rejected["two different values"]) == (0, 2)


def test_every_answer_is_quoted_from_its_chunk() -> None:
    chunks = [chunk(TEXT)]
    some = list(facts(chunks))
    assert len(some) == 14
    assert unsupported(some, chunks) == []
    made = synthesize(chunks, rows=None, seed=0)
    for row in (*made.train, *made.eval, *made.test):
        answer = row.messages[-1].content
        assert answer in TEXT
        assert answer == TEXT[int(row.meta["start"]):int(row.meta["end"])]
        assert answer in row.meta["support"]


def test_broken_twin_an_invented_value_is_caught() -> None:
    chunks = [chunk(TEXT)]
    some = [replace(fact, value="7 EUR") if fact.value == "6 EUR" else fact for fact in facts(chunks)]
    assert len(unsupported(some, chunks)) == 2


def test_test_questions_are_new_words_for_trained_facts() -> None:
    made = synthesize([chunk(TEXT)], rows=None, seed=3)
    key = lambda row: (row.meta["subject"], row.meta["attribute"])  # noqa: E731
    trained, asked = {key(row) for row in made.train}, [row.messages[0].content for row in made.train]
    assert {key(row) for row in made.test} == trained
    assert len(made.test) == made.facts == len(trained)
    assert made.eval and {key(row) for row in made.eval} <= trained
    assert not {row.messages[0].content for row in (*made.eval, *made.test)} & set(asked)
    assert len(set(asked)) == len(asked)
    assert min(Counter(map(key, made.train)).values()) >= 3


@pytest.mark.parametrize("rows", [1, 2, 7, 20, 60])
def test_exactly_the_rows_wanted(rows: int) -> None:
    made = synthesize([chunk(TEXT)], rows=rows, test_rows=2, seed=0)
    assert (len(made.train), len(made.test), made.missing) == (rows, min(rows, 2), 0)


def test_a_shortfall_is_said() -> None:
    made = synthesize([chunk(TEXT)], rows=5000, seed=0)
    assert made.missing == 5000 - len(made.train) > 4000


def test_few_rows_cover_every_document() -> None:
    made = synthesize([chunk(TEXT), chunk("# Inn\n\nPhone: 12 34", "inn")], rows=4, seed=0)
    assert {row.source for row in made.test} == {"doc", "inn"}


def test_the_seed_decides_all() -> None:
    one, same, other = (synthesize([chunk(TEXT)], rows=40, seed=seed) for seed in (5, 5, 6))
    assert one == same
    assert one.test != other.test


def test_questions_read_well() -> None:
    words = Words.of(["the rye loaf and the price of helmets are fine, we met Nora in Oslo"])
    assert named("Rye loaf", words) == "the rye loaf"
    assert named("Helmets", words) == "helmets"
    assert named("Nora Finch", words) == "Nora Finch"
    assert named("Oslo office", words) == "the Oslo office"
    assert named("Changing a tyre", words) == "changing a tyre"
    assert named("LED light", words) == "the LED light"
    assert questions("price", "Helmets", "Price per day (EUR)", words=words)[0] == "How much do helmets cost per day in EUR?"
    assert questions("plain", "Monday", "Opening hours", words=words)[0] == "What are the opening hours on Monday?"
    assert questions("often", "The oven", "is|cleaned", words=words)[0] == "How often is the oven cleaned?"


def test_every_shape_has_enough_frames_to_hold_some_out() -> None:
    assert min(len(lines) for lines in frames().values()) >= 8
    for shape in frames():
        texts = questions(shape, "Rye loaf", "is|cleaned" if shape == "often" else "Price")
        assert len(set(texts)) >= 7
        assert not any("{" in text or "  " in text for text in texts)


def test_sample_documents_say_what_their_program_says() -> None:
    """The committed files are the program's output (where its libraries are installed) and hold no fact twice."""
    folder = ROOT / "garage/assets/examples/documents"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000
    assert {path.suffix for path in folder.iterdir()} == {".pdf", ".docx", ".pptx", ".html", ".md", ".json"}
    made = synthesize([chunk((folder / "faq.md").read_text(encoding="utf-8"))], rows=None, seed=0)
    assert made.facts >= 20
    for missing in ("docx", "pptx", "reportlab"):
        pytest.importorskip(missing)
    spec = importlib.util.spec_from_file_location("make_documents", ROOT / "bench/samples/make_documents.py")
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert json.loads((folder / "bikes.json").read_text()) == {"fleet": program.FLEET}
    assert (folder / "faq.md").read_bytes() == program.faq()
    assert (folder / "prices.html").read_bytes() == program.prices()
