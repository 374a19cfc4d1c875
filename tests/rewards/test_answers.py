"""The number parser, the two readings of a completion, and the calculator marks, against tables and the GSM8K files."""

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from garage.rewards.answers import calculate, check_marks, extract, grade_number, grade_text, number, numbers_in, quantity, same_number

SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).parents[2] / "../shared")).resolve()

NUMBERS = {
    "18": 18, "18.0": 18, "18.00": 18, "18.": 18, "$18": 18, "18%": 18, "18 dollars": 18, "18 €": 18, "£18": 18, "USD 18": 18, "**18**": 18,
    "-10": -10, "\u221210": -10, "-$10": -10, "$-10": -10, "+10": 10, "2,125": 2125, "$1,080.50": Fraction(2161, 2), "1 080": 1080,
    "1\u202f080": 1080, "1_000_000": 10**6, "2{,}125": 2125, ".5": Fraction(1, 2), "3/4": Fraction(3, 4), "-1/2": Fraction(-1, 2),
    "1 1/2": Fraction(3, 2), "\\frac{3}{4}": Fraction(3, 4), "\\$18": 18, "2 million": 2 * 10**6, "60 km/h": 60, "0.0": 0, "-0": 0,
}
NOT_NUMBERS = [
    "", "...", "eighteen", "about 3 to 5: 5", "5</answer><answer>7", "1/0", "--5", "1,23,456", "12,34", "0,125", "2,5",
    "1,000 000", "18-20", "18 = x", "18.5.2", "5 m2", "2^3", "9" * 101, "18 " + "x" * 300, "\u0663", "nan", "1e5",
]


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_one_number_whatever_it_wears(text: str, value: Fraction) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_not_one_number_is_none(text: str) -> None:
    assert number(text) is None


def test_sign_and_separator_are_not_dropped() -> None:
    digits_and_dots = re.compile(r"[0-9.]+")  # the broken twin: it reads 2,999 as 2 and -10 as 10
    assert digits_and_dots.search("2,999")[0] == "2" and digits_and_dots.search("-10")[0] == "10"
    assert not same_number("2,999", "2") and not same_number("-10", "10") and same_number("2,125", "2125")


def test_the_unit_is_told() -> None:
    assert quantity("18 dollars") == (18, "dollars") and quantity("18") == (18, "") and quantity("$18.50") == (Fraction(37, 2), "")


@given(st.fractions(max_denominator=10**6), st.integers(0, 3))
def test_written_numbers_read_back(value: Fraction, style: int) -> None:
    whole = round(value)
    written = [f"{value.numerator}/{value.denominator}", f"{whole:,}", f"{whole:_} apples", f"${whole:,}.00"][style]
    assert number(written) == (value if style == 0 else whole)


@example("0 0/", "18")
@settings(max_examples=300)
@given(st.text(alphabet="0123456789.,-+$%/ <>answerboxd\\{}#=\n", max_size=80), st.sampled_from(["18", "-10", "0", "2,125", "1/2"]))
def test_no_text_breaks_a_grade_and_strict_implies_lenient(text: str, gold: str) -> None:
    grade = grade_number(text, gold)
    assert grade.lenient >= grade.strict and grade.partial >= grade.lenient
    assert all(number(found) is not None for found in numbers_in(text))


CASCADE = {
    "<answer>18</answer> or 7": ("18", "answer tag"),
    "<answer>40</answer> no: <answer>18</answer>": ("18", "answer tag"),
    "<answer>9 * 2 = 18</answer>": ("18", "answer tag"),
    "<answer>eighteen</answer> \\boxed{18} 7": ("18", "boxed"),
    "so \\boxed{\\frac{1}{2}} of 7": ("1/2", "boxed"),
    "It is 9.\n#### 18\n(7 left)": ("18", "hashes"),
    "The final answer is $18 because 9 * 2. Check 7": ("$18", "answer phrase"),
    "Answer: **18** (7)": ("18", "answer phrase"),
    "16 - 3 - 4 = 9 and 9 * 2 = 18.": ("18", "last number"),
    "16-3": ("3", "last number"),
    "it costs $-5.": ("$-5", "last number"),
    "is...5": ("5", "last number"),
    "none": (None, "no number"),
}


@pytest.mark.parametrize(("text", "found"), CASCADE.items())
def test_the_lenient_cascade_names_its_rule(text: str, found: tuple[str | None, str]) -> None:
    answer = extract(text, strict=False)
    assert (answer.text, answer.rule) == found


STRICT = {
    "<answer>18</answer>": "18", "<answer> 18\n": "18", "so <answer>18</answer> done": "18", "18": None, "": None,
    "<answer>1</answer><answer>18</answer>": None, "<answer>18</answer></answer>": None,
}


@pytest.mark.parametrize(("text", "found"), STRICT.items())
def test_strict_reads_the_only_block(text: str, found: str | None) -> None:
    assert extract(text, strict=True).text == found


def test_grades_tell_format_and_ability_apart() -> None:
    texts = ("<answer>20</answer>", "It is 20.", "<answer>40</answer>", "<answer>19</answer>")
    tagged, bare, wrong, near = (grade_number(text, "20") for text in texts)
    assert (tagged.strict, tagged.lenient) == (True, True) and tagged.reason == "right"
    assert (bare.strict, bare.lenient) == (False, True) and "no answer block" in bare.reason
    assert (wrong.strict, wrong.lenient, wrong.partial) == (False, False, False) and "'40' is not 20" in wrong.reason
    assert (near.lenient, near.partial) == (False, True)
    assert not grade_number("<answer>1</answer>", "0").partial and grade_number("<answer>0.0</answer>", "0").strict
    with pytest.raises(ValueError, match="not a number"):
        grade_number("1", "one")


TEXT = [  # completion, gold, strict, lenient
    ("The Paris!", "paris", True, True),
    ("<answer>Paris</answer>", "Paris", True, True),
    ("The capital is Paris.", "Paris", False, True),
    ("Comparison", "Paris", False, False),
    ("France Paris", "Paris France", False, False),
    ("London", "Paris", False, False),
    ("", "Paris", False, False),
    ("?!", "...", False, False),
    ("<answer>Rome</answer><answer>Paris</answer>", "Paris", False, True),
    ("1,000", "1000", True, True),
    ("There are 1,000 of them.", "1000", False, True),
    ("5", "5 members of the council", False, False),
    ("Five members of the council: 5 members of the council", "5 members of the council", False, True),
    ("The", "the", True, True),
]


@pytest.mark.parametrize(("text", "gold", "strict", "lenient"), TEXT)
def test_text_answers(text: str, gold: str, strict: bool, lenient: bool) -> None:
    grade = grade_text(text, gold)
    assert (grade.strict, grade.lenient) == (strict, lenient)


SUMS = {
    "16-3-4": 9, "(1+2)*3": 9, "2+3*4": 14, "8/2/2": 2, "-3+5": 2, "2*-3": -6, "10%*20": 2, "100/5%": 2000, "1,000+1": 1001,
    "560//10": 56, "3/4": Fraction(3, 4), "0.1+0.2": Fraction(3, 10), "2\u00d73\u22121": 5,
}


@pytest.mark.parametrize(("text", "value"), SUMS.items())
def test_sums_are_exact(text: str, value: Fraction) -> None:
    assert calculate(text) == value


NO_SUMS = ["", "1/0", "2**9", "(1", "1)", "1 2", "x+1", "__import__('os')", "1+" * 200 + "1", "9" * 101, "(" * 150, "1..2", "1///2"]


@pytest.mark.parametrize("text", NO_SUMS)
def test_anything_else_is_refused_not_run(text: str) -> None:
    assert calculate(text) is None


def test_a_rounded_result_holds_only_with_decimals() -> None:
    marks = check_marks("<<10/3=3.33>> <<10/3=3.34>> <<7/2=4>> <<7/2=3.5>> <<3/4=3/4>> <<no=1>>")
    assert [mark.holds for mark in marks] == [True, False, False, True, True, False]


@pytest.mark.parametrize(("name", "marks_by_rows"), [("train", {7473: 23716}), ("test", {1319: 4282, 1000: 3212})])
def test_all_gsm8k_marks_verify_and_all_golds_are_numbers(name: str, marks_by_rows: dict[int, int]) -> None:
    path = SHARED / "data" / "gsm8k" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} of GSM8K is not in ../shared/data/gsm8k")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    marks = [mark for answer in answers for mark in check_marks(answer)]
    assert len(marks) == marks_by_rows[len(answers)] and all(mark.holds for mark in marks)
    assert all(number(answer.partition("####")[2]) is not None for answer in answers)
    broken = [check_marks(f"<<{mark.expression}={mark.result}1>>")[0].holds for mark in marks[:500]]
    assert sum(broken) == sum(calculate(mark.result) == calculate(mark.result + "1") for mark in marks[:500])
