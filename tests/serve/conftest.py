"""A tiny random model in a Hub directory, served for real on a free loopback port."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from garage.engine import sampler
from garage.engine.engine import Engine
from garage.models.families import build, from_architecture, init_weights
from garage.models.weights import save_model
from garage.serve import server as server_module
from garage.serve.server import running
from garage.specs.serve import EngineSpec, ServeSpec
from garage.tokens.chat import Chat, template_of
from garage.tokens.tokenizer import _BYTE_OF

ENGINE = EngineSpec(page_size=4, num_pages=512, max_num_seqs=8, max_num_batched_tokens=64, max_waiting=32, device="cpu")


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {byte: ALPHABET.index(char) for char in ALPHABET for byte in [_BYTE_OF[char]]}
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>"]
SERVER = server_module._Server
REAL_SAMPLE = sampler.sample
SPECIALS = {token: 256 + n for n, token in enumerate(CONTROLS)}


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with the control tokens of every family."""
    vocab = {token: i for i, token in enumerate(ALPHABET)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    backend.add_special_tokens(CONTROLS)
    backend.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<bos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text(template_of("chatml"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights random, so that answers wander over bytes of every kind."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    config = from_architecture(
        "qwen3", vocab_size=264, rope_theta=10_000.0, sliding_window=None, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = build(config)
    init_weights(model, 0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.2 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=size)
    save_model(model, directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def engine_of(model_dir: Path) -> Callable[..., Engine]:
    """A new engine over the tiny model; keywords change the engine's settings."""
    return lambda **settings: Engine.open(model_dir, None, ENGINE.model_copy(update=settings))


@pytest.fixture(scope="session")
def serving(model_dir: Path, engine_of: Callable[..., Engine]) -> Callable[..., AbstractContextManager[SimpleNamespace]]:
    """Start a server of one's own: `with serving(engine={...}, api_key="k") as s: s.client, s.url, s.engine`."""

    @contextmanager
    def start(engine: dict[str, object] | None = None, template: str = "", **spec: object) -> Iterator[SimpleNamespace]:
        made = engine_of(**(engine or {}))
        if template:
            made.chat = Chat.named(template, made.tokenizer)
            made._eos_ids |= frozenset(made.chat.stop_ids)
        settings = ServeSpec(model=str(model_dir), port=0, **spec)
        uvicorns: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module, "_Server", lambda *given: uvicorns.append(SERVER(*given)) or uvicorns[0])
            server = running(made, settings)
            url = server.__enter__()
        with closing_of(server):
            key = settings.api_key[0].get_secret_value() if settings.api_key else "none"
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client:
                yield SimpleNamespace(url=url, client=client, engine=made, stop=lambda: setattr(uvicorns[0], "should_exit", True))

    return start


@contextmanager
def closing_of(entered: AbstractContextManager[str]) -> Iterator[None]:
    try:
        yield
    finally:
        entered.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(serving: Callable[..., AbstractContextManager[SimpleNamespace]]) -> Iterator[SimpleNamespace]:
    with serving() as started:
        yield started


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make every model say this text, then end: its logits are replaced, all that follows them is real."""

    def say(text: str, ending: str = "<|im_end|>") -> None:
        def sample(logits: torch.Tensor, rows: list[tuple[Any, int]], vocab_size: int, *more: Any) -> Any:
            logits = torch.full_like(logits, -1e9)
            for row, (sequence, length) in enumerate(rows):
                place, said = length - sequence.num_prompt, text.encode()
                logits[row, BYTES[said[place]] if place < len(said) else SPECIALS[ending]] = 0.0
            return REAL_SAMPLE(logits, rows, vocab_size, *more)

        for module in [m for name, m in sys.modules.items() if name.startswith("garage.engine.") and hasattr(m, "sample")]:
            monkeypatch.setattr(module, "sample", sample)

    return say


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], bool]:
    """Wait up to twenty seconds for something to become true."""

    def wait(claim: Callable[[], bool]) -> bool:
        end = time.monotonic() + 20
        while not claim() and time.monotonic() < end:
            time.sleep(0.01)
        return claim()

    return wait
