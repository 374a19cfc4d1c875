"""Where answers end and which text may be shown: every cut of the ids into steps shows the same text."""

import random

import pytest

from garage.core.types import Sampling
from garage.engine import stops
from garage.engine.request import Sequence
from garage.engine.stops import Answer, first_stop, open_tail
from garage.tokens.tokenizer import Tokenizer

TEXT = "Straße 🚂 the thin man\n\nin the END of 日本語 text"


def answer_to(tokenizer: Tokenizer, text: str, sampling: Sampling, *, is_read: bool = True) -> tuple[Answer, list[str]]:
    """Feed the bytes of `text` one token at a time, until the answer ends."""
    ids = [*tokenizer.encode(text), *tokenizer.eos_ids]
    answer = Answer(Sequence("a", [0], 1, 1 + sampling.max_tokens, sampling, 0), tokenizer, frozenset(tokenizer.eos_ids), is_read=is_read)
    shown = []
    for token in ids:
        shown.append(answer.add(token, None))
        if answer.finish_reason is not None:
            break
    return answer, shown


def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer) -> None:
    answer, shown = answer_to(tokenizer, TEXT, Sampling(max_tokens=999))
    assert "".join(shown) == answer.text == TEXT and answer.finish_reason == "stop"
    assert "�" not in "".join(shown), "no half character was shown"
    assert answer_to(tokenizer, TEXT, Sampling(max_tokens=999), is_read=False)[0].text == TEXT
    assert answer.token_ids[-1] in tokenizer.eos_ids


def test_the_limit_shows_what_was_held(tokenizer: Tokenizer) -> None:
    for limit in range(1, 40):
        sampling = Sampling(max_tokens=limit, stop=("ma man", "ENDLESS"))
        answer, shown = answer_to(tokenizer, TEXT, sampling)
        ids = tokenizer.encode(TEXT)[:limit]
        assert "".join(shown) == answer.text == tokenizer.decode(ids) and answer.finish_reason == "length"


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("stop", ["the", "n", "\n\n", "END", "🚂", "日本", "語 text", "ß", "e t"])
def test_stop_strings_cut_before_themselves(tokenizer: Tokenizer, stop: str, is_read: bool) -> None:
    answer, shown = answer_to(tokenizer, TEXT, Sampling(max_tokens=999, stop=("zzz", stop)), is_read=is_read)
    assert answer.text == TEXT[: TEXT.index(stop)] and answer.finish_reason == "stop"
    assert "".join(shown) == answer.text


def test_random_stops_match_a_search_in_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab ") for _ in range(30))
        stop = "".join(rng.choice("ab ") for _ in range(rng.randint(1, 5)))
        answer, shown = answer_to(tokenizer, text, Sampling(max_tokens=999, stop=(stop,)))
        assert "".join(shown) == answer.text == text.split(stop)[0]


def test_a_twin_that_holds_nothing_back_shows_the_stop_string(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "open_tail", lambda text, stops: 0)
    _, shown = answer_to(tokenizer, TEXT, Sampling(max_tokens=999, stop=("END",)))
    assert "".join(shown) != TEXT[: TEXT.index("END")]


def test_stop_ids_end_the_answer_and_eos_can_be_ignored(tokenizer: Tokenizer) -> None:
    space = tokenizer.encode(" ")[0]
    answer, _ = answer_to(tokenizer, TEXT, Sampling(max_tokens=999, stop_token_ids=(space,)))
    assert answer.text == "Straße" and answer.finish_reason == "stop" and answer.token_ids[-1] == space
    answer, _ = answer_to(tokenizer, TEXT, Sampling(max_tokens=999, ignore_eos=True))
    assert answer.finish_reason is None


def test_the_pieces() -> None:
    assert first_stop("abcabc", ("ca", "b")) == (1, 2) and first_stop("abcd", ("abcd", "bc")) == (1, 3)
    assert first_stop("abc", ("x",)) is None and first_stop("abc", ()) is None
    assert open_tail("aab", ("abc", "bd")) == 2 and open_tail("abc", ("abc",)) == 0 and open_tail("ab", ()) == 0


@pytest.mark.parametrize("is_read", [True, False])
def test_the_stop_can_be_part_of_the_text(tokenizer: Tokenizer, is_read: bool) -> None:
    answer, shown = answer_to(tokenizer, TEXT, Sampling(max_tokens=999, stop=("END",), include_stop=True), is_read=is_read)
    assert answer.text == "".join(shown) == TEXT[: TEXT.index("END") + 3]
    space = tokenizer.encode(" ")[0]
    answer, _ = answer_to(tokenizer, TEXT, Sampling(max_tokens=999, stop_token_ids=(space,), include_stop=True), is_read=is_read)
    assert answer.text == "Straße "
    answer, _ = answer_to(tokenizer, "ab", Sampling(max_tokens=999, include_stop=True, skip_special=False), is_read=is_read)
    assert answer.text == "ab<|im_end|>"


@pytest.mark.parametrize("is_read", [True, False])
def test_control_tokens_are_shown_when_asked_for(tokenizer: Tokenizer, is_read: bool) -> None:
    start = tokenizer.specials["<|im_start|>"]
    for skip, want in ((True, "ab"), (False, "a<|im_start|>b")):
        sequence = Sequence("a", [0], 1, 4, Sampling(max_tokens=3, skip_special=skip), 0)
        answer = Answer(sequence, tokenizer, frozenset(tokenizer.eos_ids), is_read=is_read)
        for token in (*tokenizer.encode("a"), start, *tokenizer.encode("b")):
            answer.add(token, None)
        assert answer.text == want and answer.finish_reason == "length"


def test_no_stop_string_counts_that_is_complete_too_early(tokenizer: Tokenizer) -> None:
    for least in range(8):
        answer, shown = answer_to(tokenizer, "xaxbxaxb", Sampling(max_tokens=999, stop=("xa", "bx"), min_tokens=least))
        want = next((at for at in range(least + 1, 9) if "xaxbxaxb"[:at].endswith(("xa", "bx"))), None)
        assert answer.text == "".join(shown) == ("xaxbxaxb" if want is None else "xaxbxaxb"[: want - 2])


def test_which_stop_string_ends_does_not_depend_on_the_tokens(tokenizer: Tokenizer) -> None:
    """"the" is t, he or th, e or one by one: whatever completes first ends, the longest of those that end together."""
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice(("the", "he", "in", "an", "t", "h")) for _ in range(8))
        stops_ = tuple("".join(rng.choice("thein") for _ in range(rng.randint(1, 4))) for _ in range(3))
        ends = [(at, -len(s)) for at in range(len(text) + 1) for s in stops_ if text[:at].endswith(s)]
        want = text if not ends else text[: min(ends)[0] + min(ends)[1]]
        assert answer_to(tokenizer, text, Sampling(max_tokens=999, stop=stops_))[0].text == want
