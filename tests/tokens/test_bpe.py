"""A tokenizer of our own: deterministic, digits apart, and the same in transformers."""

import pytest

from garage.core.errors import UserError
from garage.tokens.bpe import train_bpe
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer

TEXTS = ["Tom has 12 apples and buys 345 more.", "naïve café, 東京 🙂", "    indented\n\n\tcode = [1, 2]"] * 20


def test_training_twice_gives_the_same_file():
    a, b = (train_bpe(iter(TEXTS), vocab_size=400, tags=("<think>",)) for _ in range(2))
    assert a.hash == b.hash and a._files == b._files
    assert a.vocab_size <= 400 and train_bpe(TEXTS[:1], vocab_size=400).hash != a.hash


def test_digits_are_single_and_ids_of_specials_are_fixed():
    tokenizer = train_bpe(["12345 1234 123 12 " * 50], vocab_size=300, specials=("<extra>",), tags=("<think>", "</think>"))
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("12345")] == list("12345")
    assert tokenizer.specials == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<extra>": 3}
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id) == ((2,), 0, None)
    think = tokenizer.encode("<think>")
    assert len(think) == 1 and tokenizer.decode(think) == "<think>" and tokenizer.encode("<extra>") != [3]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "gemma3"])
def test_transformers_reads_the_directory_and_encodes_identically(family, tmp_path, conversations):
    transformers = pytest.importorskip("transformers")
    train_bpe(TEXTS, vocab_size=450, family=family, tags=("<think>", "</think>")).save(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    make = conversations(1, tools=False, reasoning=False)
    for text in [make.text() for _ in range(200)]:
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (ours.eos_ids[0], ours.pad_id, ours.bos_id)
    assert len(theirs) == ours.vocab_size
    case = make.case()
    turns = [{"role": m.role, "content": m.content} for m in case.messages]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == Chat.load(tmp_path, ours).render(case.messages, add_generation_prompt=True).ids


def test_impossible_requests_are_refused():
    with pytest.raises(UserError, match="cannot hold 256 bytes"):
        train_bpe(TEXTS, vocab_size=256)
    with pytest.raises(UserError, match="no chat template"):
        train_bpe(TEXTS, vocab_size=400, family="alpaca")
