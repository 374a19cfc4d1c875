"""The strict parser, the worked table of the reference mix, and the ways to game a reward."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garage.core.errors import UserError
from garage.rewards.format import REFERENCE_RANGE, TAGS, Weights, default_reward, parse, reference_reward, tag_share


def blocks(answer: str, reasoning: str = "r") -> str:
    return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"


TABLE = [  # completion, gold, the reference's (exact, approximate, answer, number), is it right?
    (blocks("18"), "18", (3, 2, 3, 1.5), True),
    (blocks(" 18\n"), "18", (3, 2, 1.5, 1.5), True),
    (blocks("18.00"), "18", (3, 2, 0.5, 1.5), True),
    (blocks("$18"), "18", (3, 2, -0.5, 1.5), True),
    (blocks("18%"), "18", (3, 2, -0.5, 1.5), True),
    (blocks("18 dollars"), "18", (3, 2, -0.5, 1.5), True),
    (blocks("19"), "18", (3, 2, 0.5, 0), False),
    (blocks("21"), "18", (3, 2, 0.25, 0), False),
    (blocks("eighteen"), "18", (3, 2, -0.5, 0), False),
    (blocks("40"), "18", (3, 2, -1, 0), False),
    ("Okay. " + blocks("18"), "18", (0, 2, 0, 1.5), True),
    ("<answer>18</answer><reasoning>r</reasoning>", "18", (0, 2, 0, 1.5), True),
    ("<reasoning>r</reasoning><answer>18", "18", (0, 1, 0, 1.5), True),
    ("<answer>18</answer>", "18", (0, 0, 0, 1.5), True),
    (blocks("40") * 2, "18", (3, -2, -0.5, 0), False),
    ("The answer is 18", "18", (0, -2, 0, 0), False),
    ("", "18", (0, -2, 0, 0), False),
    (blocks("-10"), "-10", (3, 2, 3, 0), True),
    (blocks("2,125"), "2,125", (3, 2, 3, 0), True),
    (blocks("2125"), "2,125", (3, 2, -0.5, 0), True),
    (blocks("2,999"), "2", (3, 2, -0.5, 1.5), False),
    (blocks("0.0"), "0", (3, 2, -0.5, 1.5), True),
]


@pytest.mark.parametrize(("text", "gold", "four", "right"), TABLE)
def test_the_worked_table(text: str, gold: str, four: tuple[float, ...], right: bool) -> None:
    assert tuple(reference_reward(text, gold).parts.values()) == four and reference_reward(text, gold).value == sum(four)
    ours = default_reward(text, gold)
    assert (ours.parts["correct"] == 1.0) == right
    assert ours.value >= 1.0 if right else ours.value <= 0.3 + 1e-12


STRICT = {
    blocks("5"): True, f" {blocks('5')}\n": True, blocks("5") + "<end_of_turn>\n": True, blocks("5") + "<|im_end|>": True,
    "Sure. " + blocks("5"): False, blocks("5") + " Done.": False, blocks(""): False, blocks("5", " "): False,
    blocks("5", "<reasoning>r"): False, blocks("5</answer><answer>7"): False,
    "<answer>5</answer><reasoning>r</reasoning>": False, "<reasoning>r</reasoning>\n\n<answer>5</answer>": True, "": False,
}


@pytest.mark.parametrize(("text", "ok"), STRICT.items())
def test_the_strict_parser(text: str, ok: bool) -> None:
    assert (parse(text) is not None) == ok


def test_parse_gives_both_blocks() -> None:
    parsed = parse(blocks(" 5\n", " a < b "))
    assert parsed is not None and (parsed.reasoning, parsed.answer) == ("a < b", "5")


pieces = st.lists(st.sampled_from([*TAGS, "18", "40", " ", "\n", "r", "-", ",", "<end_of_turn>"]), max_size=12).map("".join)


@given(pieces, st.sampled_from(["18", "-10", "0", "2,125"]))
def test_no_text_leaves_the_declared_ranges(text: str, gold: str) -> None:
    low, high = Weights().range
    ours, theirs = default_reward(text, gold), reference_reward(text, gold)
    assert low <= ours.value <= high + 1e-12 and REFERENCE_RANGE[0] <= theirs.value <= REFERENCE_RANGE[1]
    assert ours.value >= 1.0 or ours.value <= 0.3 + 1e-12
    assert 0 <= tag_share(text) <= 1


SLIPS = ["Okay. " + blocks("10"), blocks("$10.00"), "<answer>10", "<answer>10</answer>", blocks(" 10 apples "), blocks("10") + " Bye."]
WRONG = [
    blocks("11"), blocks("11", "7 + 5 = 12, so " * 200), blocks("10.4"), blocks("10") * 2, blocks("10 or 11"), blocks("", "10"),
    blocks("5</answer><answer>10"),
]


@pytest.mark.parametrize("weights", [Weights(), Weights(1, 0.5, 0.49), Weights(0.5, 0.2, 0.2)])
def test_no_wrong_answer_earns_what_a_right_one_does(weights: Weights) -> None:
    worst_right = min(default_reward(text, "10", weights).value for text in SLIPS)
    assert max(default_reward(text, "10", weights).value for text in WRONG) < worst_right
    longer = default_reward(blocks("10", "step by step 1 + 1 = 2 " * 100), "10", weights)
    assert longer == default_reward(blocks("10"), "10", weights), "length earns nothing"


def test_the_reference_mix_is_the_broken_twin() -> None:
    slip = reference_reward("Okay. " + blocks("10"), "10").value
    assert reference_reward(blocks("40"), "10").value > slip, "a well-formed wrong answer wins"
    assert reference_reward(blocks("11"), "10").value > slip, "a near miss wins"


@pytest.mark.parametrize("values", [(0.3, 0.2, 0.1), (1.0, -0.1, 0.1), (0.0, 0.0, 0.0)])
def test_weights_that_reward_form_over_truth_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="form outweigh correctness"):
        Weights(*values)
