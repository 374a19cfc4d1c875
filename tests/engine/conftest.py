"""Tiny random models, a tokenizer over single characters and the naive forward that everything is compared with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from garage.models.attend import PackedAttend
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer_files(directory: Path) -> None:
    """A byte-level tokenizer with a few merges: 256 bytes, 4 pairs and the control tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("h", "e"), ("i", "n"), ("a", "n")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS[:3]))
    backend.add_tokens(list(SPECIALS[3:]))
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer_files(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> Chat:
    return Chat.named("chatml", tokenizer)


def tiny(family: str, *, vocab_size: int, dtype: torch.dtype = torch.float64, seed: int = 0, positions: int = 256) -> Model:
    """All weights random and large enough that greedy answers wander."""
    config = from_architecture(
        family, vocab_size=vocab_size, rope_theta=10_000.0, sliding_window=6 if family == "gemma3" else None, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=positions, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "gemma3":
        config = replace(config, layer_types=("sliding_attention", "full_attention"))
    model = build(config, dtype=dtype)
    init_weights(model, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
            parameter.add_(noise, alpha=0.2 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def naive_logits(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits after every token, by a full forward."""
    return model.logits(model(torch.tensor(tokens), torch.arange(len(tokens)), PackedAttend((0, len(tokens)))))


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """What the tests build with."""
    make: Callable[..., Model] = tiny
    return SimpleNamespace(tiny=make, naive_logits=naive_logits, tokenizer_files=byte_tokenizer_files, specials=SPECIALS)
