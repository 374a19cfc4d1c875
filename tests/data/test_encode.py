"""Rows to tokens: what is learned, what is cut and counted, and a split that leaks nothing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.data.encode import Ledger, content_key, document_of, encode_row, split_rows, write_dataset
from garage.store.dataset import read_encoded, read_rows


def qa(number, question="What is it?", answer="Paris is.", **rest):
    return Row(f"r{number}", (Message("user", question), Message("assistant", answer)), **rest)


@pytest.mark.parametrize("family", ["chatml", "gemma3"])
def test_the_learned_tokens_are_the_answers_and_their_ends(encoding, family):
    how = encoding(family)
    turns = (Message("user", "Hi"), Message("assistant", "Paris is."), Message("user", "And?"), Message("assistant", "12 apples"))
    ((ids, flags),), ledger = encode_row(Row("1", turns), how)
    said = how.tokenizer.decode(ids[flags > 0].tolist(), skip_special=False)
    end = how.tokenizer.id_to_token(how.chat.stop_ids[0])
    assert said == f"Paris is.{end}12 apples{end}"
    assert (ledger.rows, ledger.pieces, ledger.tokens, ledger.ended, ledger.cut_rows) == (1, 1, len(ids), 1, 0)
    assert ledger.learned == ledger.answer_tokens == flags.sum()
    assert (ledger.bos_missing, ledger.bos_doubled) == (0, 0)


def test_the_system_prompt_stands_before_rows_that_have_none(encoding):
    how = encoding(system="Be brief.")
    with_own = Row("1", (Message("system", "Sing."), *qa(1).messages))
    texts = [how.tokenizer.decode(encode_row(row, how)[0][0][0].tolist()) for row in (qa(1), with_own)]
    assert "Be brief." in texts[0] and "Be brief." not in texts[1] and "Sing." in texts[1]


def test_what_max_length_cuts_is_counted(encoding):
    full = encode_row(qa(1, answer="apples " * 50), encoding(max_length=1000))[1]
    ((ids, flags),), ledger = encode_row(qa(1, answer="apples " * 50), encoding(max_length=40))
    assert len(ids) == 40 and ledger.cut_rows == 1 and ledger.cut_tokens == full.tokens - 40 and ledger.longest == full.tokens
    assert ledger.answer_tokens == full.learned and ledger.cut_answer_tokens == full.learned - flags.sum() and ledger.ended == 0


def test_a_row_with_nothing_left_to_learn_is_left_out_and_counted(encoding):
    pieces, ledger = encode_row(qa(1, question="apples " * 50), encoding(max_length=20))
    assert pieces == [] and (ledger.rows, ledger.masked, ledger.pieces) == (1, 1, 0)
    assert ledger.cut_answer_tokens == ledger.answer_tokens > 0


def test_a_row_that_the_template_refuses_is_counted_with_its_reason(encoding, tmp_path):
    bad = Row("b", (Message("user", "a"), Message("user", "b"), Message("assistant", "c")), source="file:7")
    ledger = write_dataset(tmp_path / "d", {"train": [qa(1), bad]}, encoding("gemma3"))["train"]
    assert (ledger.rows, ledger.pieces, ledger.refused) == (2, 1, 1) and ledger.reasons[0].startswith("file:7: ")
    with pytest.raises(UserError, match="no row of the train split"):
        write_dataset(tmp_path / "e", {"train": [bad]}, encoding("gemma3"))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("family", ["chatml", "gemma3"])
@given(text=st.text(min_size=1, max_size=300), max_length=st.integers(2, 64))
@settings(max_examples=40, deadline=None)
def test_every_token_of_a_text_is_a_target_once(chats, family, text, max_length):
    from garage.data.encode import Encoding

    how = Encoding(*chats[family], max_length)
    pieces, ledger = encode_row(Row("1", text=text), how)
    whole = [*how.begin, *how.tokenizer.encode(text), how.tokenizer.eos_ids[0]]
    assert [int(i) for ids, flags in pieces for i in ids[flags > 0]] == whole
    assert max(len(ids) for ids, _ in pieces) <= max_length and ledger.learned == len(whole) and ledger.ended == 1
    assert all(int(second[0][0]) == int(first[0][-1]) for first, second in pairwise(pieces))
    assert how.begin == (() if family == "chatml" else (how.tokenizer.bos_id,))


def test_the_artifact_holds_rows_tokens_and_their_books(encoding, tmp_path):
    how, rows = encoding(), [qa(n, answer="apples " * n) for n in range(1, 30)]
    ledger = write_dataset(tmp_path / "d", {"train": rows, "eval": rows[:3]}, how, parents=["corpus-1"], spec={"a": 1})["train"]
    encoded, manifest = read_encoded(tmp_path / "d", "train"), read_manifest(tmp_path / "d", "dataset")
    assert list(read_rows(tmp_path / "d", "train")) == rows and len(read_encoded(tmp_path / "d", "eval")) == 3
    assert len(encoded) == ledger.pieces == 29 and len(encoded.tokens) == ledger.tokens and encoded.learned.sum() == ledger.learned
    for index, row in enumerate(rows):
        ids, flags = encode_row(row, how)[0][0]
        assert np.array_equal(encoded.row(index)[0], ids) and np.array_equal(encoded.row(index)[1], flags)
    assert manifest.facts["template_hash"] == how.chat.hash and manifest.facts["tokenizer_hash"] == how.tokenizer.hash
    assert manifest.facts["ledger"]["train"]["tokens"] == ledger.tokens and manifest.parents == ("corpus-1",)


def test_rows_alone_make_a_dataset_without_tokens(tmp_path):
    assert write_dataset(tmp_path / "d", {"train": [qa(1)], "test": [qa(2)]}, None) == {}
    assert read_encoded(tmp_path / "d", "train") is None and read_manifest(tmp_path / "d").facts == {"train_rows": 1, "test_rows": 1}


def corpus_rows(documents=40, each=5):
    return [qa(f"{d}-{n}", f"Question {n} about {d}?", f"Answer {d}.{n}", source=f"doc{d}") for d in range(documents) for n in range(each)]


def leaks(train, held):
    """Documents and contents that stand on both sides."""
    sides = [({document_of(row) for row in rows}, {content_key(row) for row in rows}) for rows in (train, held)]
    return sum(len(one & other) for one, other in zip(*sides, strict=True))


def test_no_document_stands_on_both_sides():
    rows = corpus_rows()
    split = split_rows(rows, 0.1, seed=3)
    assert leaks(split.train, split.eval) == 0 and split.dropped == 0
    assert (split.num_train, split.num_eval) == (180, 20) == (len(list(split.train)), len(list(split.eval)))
    assert [row.id for row in split_rows(rows, 0.1, seed=3).eval] == [row.id for row in split.eval]
    assert [row.id for row in split_rows(rows, 0.1, seed=4).eval] != [row.id for row in split.eval]


def test_a_split_by_row_would_leak():
    rows = [Row(r.id, r.messages) for r in corpus_rows()]  # the broken twin: the source is forgotten, so each row is a document
    split = split_rows(rows, 0.1, seed=3)
    named = {r.id: r for r in corpus_rows()}
    assert leaks([named[r.id] for r in split.train], [named[r.id] for r in split.eval]) > 0


def test_copies_of_held_out_rows_leave_the_training_rows():
    rows = corpus_rows() + [qa(f"copy{d}", f"question  1 ABOUT {d}?", f"Answer {d}.1", source=f"copy{d}") for d in range(40)]
    split = split_rows(rows, 0.2, seed=1)
    assert split.dropped > 0 and leaks(split.train, split.eval) == 0
    assert split.num_train + split.num_eval + split.dropped == len(rows)


@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=20), share=st.floats(0.01, 0.9), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_both_sides_get_a_document_whatever_the_sizes(sizes, share, seed):
    rows = [qa(f"{d}-{n}", f"{d}-{n}", source=f"doc{d}") for d, size in enumerate(sizes) for n in range(size)]
    split = split_rows(rows, share, seed=seed)
    assert split.num_train > 0 and split.num_eval > 0 and leaks(split.train, split.eval) == 0
    assert abs(split.num_eval - share * len(rows)) <= max(sizes)


def test_the_edges_of_a_split():
    rows = corpus_rows(1)
    assert split_rows(rows, 0.5, seed=0).num_eval == 0, "one document cannot be split"
    assert split_rows(corpus_rows(3), 0.0, seed=0).num_eval == 0
    assert split_rows([], 0.5, seed=0).num_train == 0
    with pytest.raises(AssertionError):
        split_rows(iter(rows), 0.5, seed=0)


def test_ledgers_add_up():
    one, two = Ledger(1, 1, longest=5, reasons=("a", "b", "c")), Ledger(2, 1, longest=9, reasons=("d", "e", "f"))
    assert one + two == Ledger(3, 2, longest=9, reasons=("a", "b", "c", "d", "e"))
