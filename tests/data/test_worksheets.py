"""Word problems: every solution is recomputed, the two splits share nothing, and the text reads as English."""

import re
from itertools import islice

import pytest

from garage.core.errors import UserError
from garage.data import worksheets
from garage.data.worksheets import LEVELS, Step, answer_of, problems, row_of

MARK = re.compile(r"(\d+) ([-+*/]) (\d+) = \$?<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def recomputed(left, op, right):
    """An independent calculator: rational arithmetic by repeated addition for *, and multiplication back for /."""
    if op == "*":
        return sum(left for _ in range(right))
    if op == "/":
        return next((q for q in range(left + 1) if q * right == left), None)
    return left + right if op == "+" else left - right


def whole(template):
    return template.told[max(template.told)]


def faults(problem):
    """What is wrong with a solution as text: marks that do not verify, numbers from nowhere, an answer that is not the last result."""
    text = answer_of(problem)
    marks = MARK.findall(text)
    wrong = [m for m in marks if m[:3] != m[3:6] or recomputed(int(m[0]), m[1], int(m[2])) != int(m[6]) or m[6] != m[7]]
    known, unknown = {int(n) for n in re.findall(r"\d+", problem.question)} | {2, 3, 5}, []
    for left, _, right, *_, result in marks:
        unknown += [n for n in (int(left), int(right)) if n not in known]
        known.add(int(result))
    shape = re.fullmatch(r"<reasoning>(.+)</reasoning><answer>(\d+)</answer>", text, re.DOTALL)
    ends = shape is not None and shape.group(2) == marks[-1][6] == str(problem.answer) and problem.answer >= 2
    return wrong + unknown + ([] if ends and len(marks) == problem.level == len(problem.lines) else ["answer"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_thousand_solutions_verify(split):
    sample = list(islice(problems(7, split=split), 2000))
    assert [problem.id for problem in sample if faults(problem)] == []
    assert {problem.level for problem in sample} == set(LEVELS)
    assert len({problem.question for problem in sample}) > 1800


def test_a_wrong_step_is_caught():
    problem = next(p for p in problems(1) if p.level == 2)
    last = problem.steps[-1]
    broken = Step(last.left, last.op, last.right, last.result + 1)
    lines = (problem.lines[0], problem.lines[1].replace(last.marked(), broken.marked()).replace(last.marked("$"), broken.marked("$")))
    assert faults(problem) == []
    assert faults(worksheets.Problem("x", problem.question, lines, (problem.steps[0], broken), "t")) != []


def test_the_same_seed_tells_the_same_problems_and_another_does_not():
    first, again, other = (list(islice(problems(seed, (1, 2)), 50)) for seed in (5, 5, 6))
    assert first == again and first[0].question != other[0].question
    assert all(problem.level in (1, 2) for problem in first)


def test_the_splits_share_no_template_no_name_and_no_thing():
    def used(split):
        templates = worksheets._templates(split)
        things = {word for t in templates for choices in t.picks.values() for word in choices}
        return {t.name for t in templates}, {p.split()[0] for p in worksheets._file()["people"][split]}, things

    train, test = used("train"), used("test")
    assert all(not left & right for left, right in zip(train, test, strict=True))
    assert len(train[0]) >= 20 and len(test[0]) >= 8
    said = {split: {stage.say for t in worksheets._templates(split) for stage in whole(t)} - {""} for split in ("train", "test")}
    assert len(said["train"]) > 70 and not said["train"] & said["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_level_has_several_templates_and_every_number_is_used(split):
    templates = worksheets._templates(split)
    assert all(sum(level in t.told for t in templates) >= 3 for level in LEVELS)
    for template in templates:
        words = " ".join(stage.say + stage.ask for stage in whole(template))
        formulas = " ".join(step for stage in whole(template) for step in stage.steps)
        for letter in template.ranges:
            assert f"{{{letter}}}" in words and re.search(rf"\b{letter}\b", formulas), (template.name, letter)
        for pick in template.picks:
            assert f"{{{pick}}}" in words


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_text_is_whole_english(split):
    for problem in islice(problems(3, split=split), 500):
        text = problem.question + " ".join(problem.lines)
        assert not re.search(r"[{}]|  | \.|\b1 \w+s\b|\ba [aeio]", text), text
        assert problem.question.endswith("?") and all(line.endswith(".") and line[0].isupper() for line in problem.lines)
        assert all(part[0].isupper() or part[0].isdigit() for part in re.split(r"(?<=[.?]) ", problem.question)), text


def test_a_row_is_a_conversation_with_what_grading_needs():
    problem = next(problems(1, (3,)))
    row = row_of(problem)
    assert [m.role for m in row.messages] == ["user", "assistant"] and row.messages[1].content == answer_of(problem)
    assert row.meta == {"answer": str(problem.answer), "level": "3", "template": problem.template} and row.source == problem.id


@pytest.mark.parametrize("levels", [(), (0,), (1, 6)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(UserError, match="levels"):
        next(problems(0, levels))
