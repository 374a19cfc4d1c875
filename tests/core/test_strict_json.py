"""JSON by the standard, and nothing else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garage.core.strict_json import parse_json


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[1e999]", "1e999 is not a JSON number"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('"\\ud83d"', "surrogate"),
        ("[" * 200_000, "deeply"),
        ("9" * 5000, "digits"),
        ("{} {}", "text after"),
        ("{", "line 1"),
    ],
)
def test_json_that_is_not_standard_is_a_value_error(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)


LEAVES = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20)


@given(st.recursive(LEAVES, lambda x: st.lists(x, max_size=5) | st.dictionaries(st.text(max_size=5), x, max_size=5), max_leaves=20))
@settings(max_examples=100, deadline=None)
def test_standard_json_is_read_as_it_is(value):
    assert parse_json(json.dumps(value)) == value and parse_json(f" {json.dumps(value, ensure_ascii=False)}\n") == value
