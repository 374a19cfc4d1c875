"""Chunks: never too long, exact offsets, and together the document."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from garage.core.errors import UserError
from garage.data.chunk import Budget, chunks_of
from garage.store.corpus import Document

DOCUMENT = Document("d1", "a.md", "md", 0)
MARKDOWN = "Intro.\n\n# One\n\n## Deep\n\nText of deep.\n\n```\n# no heading\n```\n\n## Second ##\n\nMore.\n\n# Two\nLast.\n"


def words(text):
    """Two tokens a word and one for every three characters of it: not additive over pieces, like a real tokenizer."""
    return sum(1 + (len(word) + 2) // 3 for word in text.split()) + text.count("\n")


def cut(text, limit=20, overlap=0, **rest):
    return list(chunks_of(DOCUMENT, text, Budget(words, limit, overlap), **rest))


def without_overlaps(chunks):
    done, parts = 0, []
    for chunk in chunks:
        parts.append(chunk.text[max(0, done - chunk.start) :])
        done = chunk.end
    return "".join(parts)


PIECES = ["word", "# Head", "\n", "\n\n", ". ", " ", "x" * 40, "é", "```\n", "\t", "a.b"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=120).map("".join)


@given(text=TEXTS, limit=st.integers(8, 40), overlap=st.integers(0, 7))
@example(text="x" * 5000, limit=16, overlap=4)
@example(text="one " * 3000, limit=16, overlap=15)
@example(text=" \n" * 500, limit=16, overlap=0)
@settings(max_examples=200, deadline=None)
def test_chunks_are_exact_never_too_long_and_together_the_text(text, limit, overlap):
    chunks = cut(text, limit, overlap)
    assert all(chunk.text == text[chunk.start : chunk.end] and chunk.text for chunk in chunks)
    assert all(chunk.tokens == words(chunk.text) <= limit for chunk in chunks)
    assert without_overlaps(chunks) == text
    assert all(words(text[b.start : a.end]) <= overlap for a, b in pairwise(chunks))
    assert len({chunk.id for chunk in chunks}) == len(chunks)


def test_headings_make_the_path():
    found = [(chunk.headings, chunk.text.split("\n")[0]) for chunk in cut(MARKDOWN, 200)]
    assert found == [((), "Intro."), (("One", "Deep"), "# One"), (("One", "Second"), "## Second ##"), (("Two",), "# Two")]


def test_text_without_markdown_has_no_headings():
    assert [chunk.headings for chunk in cut(MARKDOWN, 200, has_headings=False)] == [()]


def test_the_best_boundary_is_taken():
    sentence = "Six words are in here now. "
    first = cut(sentence * 3 + "\n\n" + sentence * 3, 60)[0]
    assert first.text == sentence * 3 + "\n\n"
    assert all(chunk.text.endswith("now. ") for chunk in cut(sentence * 20, 60)[:-1])


def test_the_overlap_is_applied():
    chunks = cut("one two three four five six seven eight nine ten " * 20, 30, 9)
    shared = [words(a.text[b.start - a.start :]) for a, b in pairwise(chunks)]
    assert len(chunks) > 5 and min(shared) >= 6 and max(shared) <= 9
    assert all(chunk.text[0] != " " for chunk in chunks)


def test_pages_come_from_offsets():
    text = "First page. " * 10 + "Second page. " * 10
    pages = [chunk.page for chunk in cut(text, 30, pages=(0, 120))]
    assert pages[0] == 1 and pages[-1] == 2 and pages == sorted(pages)
    assert cut(text, 30)[0].page is None


def test_ids_are_stable_for_the_same_document_and_budget():
    assert [c.id for c in cut(MARKDOWN)] == [c.id for c in cut(MARKDOWN)] and cut(MARKDOWN)[0].id == "d1-0"


def test_an_overlap_as_long_as_a_chunk_is_refused():
    with pytest.raises(UserError, match="cannot overlap"):
        Budget(words, 16, 16)
