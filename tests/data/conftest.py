"""A tokenizer and chats trained on the spot, a scripted hostile program for the jail, and where the shared data lies."""

import os
from pathlib import Path

import pytest

from garage.data.encode import Encoding
from garage.data.jail import Limits
from garage.tokens.bpe import train_bpe
from garage.tokens.chat import Chat

os.environ["TOKENIZERS_PARALLELISM"] = "false"
WORDS = ["What is the capital of France? Paris is. Tom has 12 apples and 3 = <<12*3=36>>36 pears.\n\n# The bakery opens at nine."] * 20


@pytest.fixture(scope="session")
def chats():
    made = {}
    for family in ("chatml", "gemma3"):
        tokenizer = train_bpe(WORDS, vocab_size=400, family=family)
        made[family] = (tokenizer, Chat.named(family, tokenizer))
    return made


@pytest.fixture
def encoding(chats):
    def make(family="chatml", max_length=128, **rest):
        tokenizer, chat = chats[family]
        return Encoding(tokenizer, chat, max_length, **rest)

    return make


@pytest.fixture(scope="session")
def shared():
    place = Path(os.environ.get("GARAGE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
    if not place.exists():
        pytest.skip("the shared data folder is not there")
    return place


@pytest.fixture
def limits():
    return Limits(seconds=30.0, memory=128 << 20)
