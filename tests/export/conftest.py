"""Tiny models of both families with all weights random, and adapters that change what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from garage.core.artifact import writing
from garage.models.adapters import adapt, adapter_tensors
from garage.models.batch import pack
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.models.weights import load_model, save_model
from garage.store.adapter import AdapterConfig, write_adapter
from garage.store.locate import Located
from garage.tokens.bpe import train_bpe

torch.set_num_threads(1)
TEXTS = ["What is 3 plus 11? List 4 things one needs to bake bread.\nuser model assistant system Which way? Northwards."] * 20
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def stir(model: torch.nn.Module, seed: int, size: float) -> None:
    """Add noise to every parameter that is not frozen, norms included."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of each family, in float32."""
    out = {}
    for family, window in (("qwen3", None), ("gemma3", 8)):
        directory = tmp_path_factory.mktemp(family)
        tokenizer = train_bpe(TEXTS, vocab_size=330, tags=("<think>", "</think>"), family=family)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "max_position_embeddings": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": tokenizer.eos_ids}
        config = from_architecture(family, vocab_size=tokenizer.vocab_size, rope_theta=10_000.0, sliding_window=window, **shape, **heads)
        model = build(config)
        init_weights(model, 1)
        stir(model, 2, 0.15)
        save_model(model, directory)
        tokenizer.save(directory)
        (directory / "README.md").write_text("---\nlicense: gemma\ntags: [a]\n---\n# Base\n")
        out[family] = directory
    return out


Train = Callable[..., Located]


@pytest.fixture
def trained(bases: dict[str, Path], tmp_path: Path) -> Train:
    """Makes an adapter artifact as a run leaves it: `trained("qwen3", dora=True)`."""

    def make(family: str, *, rslora=False, dora=False, rank=4, size=0.1, targets: tuple[str, ...] = TARGETS, bits="") -> Located:
        model = load_model(bases[family], quantize=bits)
        adapt(model, rank=rank, alpha=8.0, targets=targets, rslora=rslora, dora=dora, seed=0)
        stir(model, 3, size)
        place = tmp_path / "run" / "artifacts" / "adapter"
        config = AdapterConfig(base=str(bases[family]), rank=rank, alpha=8.0, targets=targets, is_rslora=rslora, is_dora=dora)
        spec = {"model": str(bases[family]), "data": ["/home/someone/rows.jsonl"], "fit": {"learning_rate": 0.001, "max_steps": None}}
        with writing(place, kind="adapter", parents=(str(bases[family]),), spec=spec) as draft:
            write_adapter(draft.path, adapter_tensors(model), config)
            draft.facts.update(quantize=bits)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                (draft.path / name).write_bytes((bases[family] / name).read_bytes())
        return Located("run", bases[family], place)

    return make


@pytest.fixture
def logits() -> Callable[[Model, list[int]], torch.Tensor]:
    """Scores of one text under one of our models."""
    def run(model: Model, ids: list[int]) -> torch.Tensor:
        batch = pack([ids])
        with torch.no_grad():
            return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))

    return run
