"""Encoding without surprises, directories of every vintage, damaged files, and streaming decode."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, trainers
from tokenizers import Tokenizer as Backend

from garage.core.errors import UserError
from garage.tokens.tokenizer import Detokenizer, Tokenizer


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    """A Llama-2-like tokenizer: word marks, byte fallback, one leading space stripped."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(["the cat sat on the mat  and on 12 hats"] * 9, trainer)
    raw = json.loads(backend.to_str())
    raw["model"]["vocab"] |= {f"<0x{b:02X}>": len(raw["model"]["vocab"]) + b for b in range(256)}
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


@pytest.mark.parametrize("kind", ["chatml", "sentencepiece"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_streamed_pieces_equal_the_whole(kind, skip_special, tokenizers, sentencepiece):
    tokenizer = sentencepiece if kind == "sentencepiece" else tokenizers[kind]
    ids_of = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40) | st.text(max_size=30).map(tokenizer.encode)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(ids_of, st.integers(1, 5))
    def check(ids, step):
        stream = Detokenizer(tokenizer, skip_special=skip_special)
        pieces = [stream.push(ids[k:k + step]) for k in range(0, len(ids), step)]
        assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_special=skip_special)

    check()


def test_text_streams_as_soon_as_it_is_whole(tokenizers, sentencepiece):
    """Nothing is held back that could be shown: at most three bytes, or a run of byte tokens."""
    for tokenizer in (tokenizers["chatml"], sentencepiece):
        stream, ids = Detokenizer(tokenizer), tokenizer.encode("the cat 🙂 sat")
        pieces = [stream.push([i]) for i in ids]
        assert "".join(pieces) == "the cat 🙂 sat" and stream.flush() == ""
        assert "\ufffd" not in "".join(pieces) and len([p for p in pieces if p]) > 4


def test_naive_streaming_is_noticed(tokenizers):
    """Broken twin: decoding token by token breaks characters apart."""
    tokenizer = tokenizers["chatml"]
    assert "".join(tokenizer.decode([i]) for i in tokenizer.encode("🙂")) != "🙂"


@pytest.mark.parametrize("kind", ["chatml", "gemma3"])
def test_text_comes_back_and_control_tokens_stay_text(kind, tokenizers):
    tokenizer = tokenizers[kind]

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from([*tokenizer.specials, "a", " ", "12", "é"]) | st.text(max_size=5), max_size=8).map("".join))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert tokenizer.special_ids.isdisjoint(ids)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()

    check()
    control, control_id = next(iter(tokenizer.specials.items()))
    assert tokenizer.encode(f"a{control}", allow_special=True)[-1] == control_id


def test_encode_adds_nothing_though_the_file_says_so(smollm, tmp_path):
    raw = json.loads((smollm / "tokenizer.json").read_text())
    start = "<|im_start|>"
    raw["post_processor"] = {"type": "TemplateProcessing", "pair": [],
                             "single": [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                             "special_tokens": {start: {"id": start, "ids": [1], "tokens": [start]}}}
    raw |= {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_bytes((smollm / "tokenizer_config.json").read_bytes())
    doubled, plain = Tokenizer.load(tmp_path), Tokenizer.load(smollm)
    assert doubled.adds_bos and not plain.adds_bos
    text = "A sentence that is longer than four tokens: naïve 東京 123."
    assert doubled.encode(text) == plain.encode(text) and doubled.bos_id not in doubled.encode(text)
    assert doubled.encode_spans(text)[1][-1][1] == len(text)


def test_end_ids_are_the_union_of_all_places(directories, tmp_path):
    Tokenizer.load(directories["chatml"]).save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": [9, 2]}}))
    assert Tokenizer.load(tmp_path).eos_ids == (2, 0, 7, 9)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 10**6}))
    with pytest.raises(UserError, match="not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_older_directories(directories, tmp_path):
    """special_tokens_map.json and added_tokens.json instead of the newer fields."""
    Tokenizer.load(directories["chatml"]).save(tmp_path)
    size = Tokenizer.load(tmp_path).vocab_size
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size, "<other>": size + 1}))
    old = Tokenizer.load(tmp_path)
    assert (old.eos_ids, old.pad_id, old.bos_id, old.vocab_size) == ((2,), 0, None, size + 2)
    assert old.encode("a<new>b")[1] == size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size + 5}))
    with pytest.raises(UserError, match="has not the id"):
        Tokenizer.load(tmp_path)


def test_hash_is_of_the_content_not_the_vintage(directories, tmp_path):
    Tokenizer.load(directories["chatml"]).save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    before = Tokenizer.load(tmp_path).hash
    raw["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in raw["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(raw.items())), indent=2))
    assert Tokenizer.load(tmp_path).hash == before
    raw["model"]["merges"] = raw["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.load(tmp_path).hash != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"added_tokens_decoder": {"x": 1}, "x": "y"}'])
def test_damage_is_said_in_words(name, data, directories, tmp_path):
    Tokenizer.load(directories["chatml"]).save(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="damaged") as error:
        Tokenizer.load(tmp_path)
    assert error.value.remedy


def test_missing_and_huge_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b" " * 2000)
    monkeypatch.setattr("garage.core.files.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        Tokenizer.load(tmp_path)


def test_lone_surrogates_are_refused(tokenizers):
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizers["chatml"].encode("a\ud800")


def test_a_tokenizer_that_reads_control_tokens_from_plain_text_is_refused(tmp_path):
    backend = Backend(models.WordLevel({"<end>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken("<end>")])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(UserError, match="cannot write control tokens"):
        Tokenizer.load(tmp_path).encode("<end>")
