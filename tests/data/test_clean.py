"""Bytes to text."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garage.core.errors import UserError
from garage.data.clean import clean_text, decode, drop_running_lines


@pytest.mark.parametrize(
    ("mark", "codec"),
    [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")],
)
def test_known_encodings_are_read(mark, codec):
    assert decode(mark + "Käse €".encode(codec), "a.txt") == "Käse €"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        ("Käse".encode("cp1252"), "byte 0xe4 at position 1"),
        (b"MZ\x90\x00\x03", "zero byte at position 3"),
        ("Käse".encode("utf-16-le"), "zero byte at position 1"),
        (codecs.BOM_UTF16_LE + b"a", "UTF-16"),
    ],
)
def test_other_bytes_are_refused_by_place(data, says):
    with pytest.raises(UserError, match=says):
        decode(data, "a.txt")


def test_cleaning_keeps_what_the_text_says():
    assert clean_text("\ufeffA\r\nB\rC  \n\n\n\n\n\nD\x00\x07 e\u0301 so\u00adft\u200b\u00a0x\n\n") == "A\nB\nC\n\n\nD \u00e9 soft x"


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_cleaning_twice_is_cleaning_once(text):
    assert clean_text(clean_text(text)) == clean_text(text)


def test_running_lines_of_pages_are_dropped_and_the_text_stays():
    pages = [f"ACME\n\nText {n}.\n\nPage {n} of 9" for n in range(1, 10)]
    assert drop_running_lines(pages) == [f"Text {n}." for n in range(1, 10)]
    assert drop_running_lines(pages[:3]) == pages[:3], "three pages are too few to tell"
    alone = [f"Chapter {name}\n\nText." for name in ("one", "two", "three", "four", "five")]
    assert drop_running_lines([page + f"\n\nEnd {page[8:11]}" for page in alone]) == [page + f"\n\nEnd {page[8:11]}" for page in alone]


def test_rows_of_a_table_that_goes_on_over_pages_are_no_running_lines():
    rows = [[f"Part {n} costs {n} EUR" for n in range(start, start + 5)] for start in range(0, 30, 5)]
    pages = ["\n".join(["ACME", *page, f"Page {n}"]) for n, page in enumerate(rows)]
    assert drop_running_lines(pages) == ["\n".join(page) for page in rows]
    bare = ["\n".join(page) for page in rows]
    assert drop_running_lines(bare) == bare
