"""A two-layer model, and rows whose next token can be worked out: arithmetic sequences modulo 61."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from garage.core.events import EventLog
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.specs.train import FitSpec
from garage.store.dataset import Encoded
from garage.train.loop import Fitted, fit

VOCAB = 64


@dataclass
class World:
    """What the tests of this folder need to make a run of their own."""

    events: list[dict]

    def model(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        config = from_architecture("qwen3", vocab_size=VOCAB, rope_theta=1e4, sliding_window=None, max_position_embeddings=128, **shape)
        model = build(config, dtype=dtype)
        init_weights(model, seed)
        return model

    def rows(self, count: int, *, seed: int = 0, prompt: int = 0, shortest: int = 5, longest: int = 30) -> Encoded:
        """`count` sequences; their first `prompt` tokens are not learned."""
        draw = np.random.default_rng(seed)
        rows = [(draw.integers(61) + draw.integers(1, 5) * np.arange(draw.integers(shortest, longest + 1))) % 61 for _ in range(count)]
        return self.encoded(rows, [np.arange(len(row)) >= prompt for row in rows])

    def encoded(self, rows: list, learned: list) -> Encoded:
        bounds = np.cumsum([0, *map(len, rows)])
        return Encoded(np.concatenate(rows).astype("<u4"), np.concatenate(learned).astype("u1"), bounds)

    def spec(self, **changes: object) -> FitSpec:
        """Small and float32, so that figures are exact."""
        values = {"max_steps": 12, "batch_tokens": 256, "micro_tokens": 128, "max_length": 32, "dtype": "float32", "threads": 1}
        values |= {"eval_every": 0, "save_every": 5, "optimizer": {"kind": "adamw", "lr": 1e-2}}
        return FitSpec.parse(values | changes)

    def fit(self, run: Path, model: Model, train: Encoded, held: Encoded | None, spec: FitSpec) -> Fitted:
        return fit(model, train=train, held=held, spec=spec, run=run, events=EventLog(None, lambda event: self.events.append(dict(event))))

    def losses(self, field: str = "loss") -> dict[int, float]:
        return {event["step"]: event[field] for event in self.events if event["kind"] == "metric" and field in event}


@pytest.fixture
def world() -> World:
    torch.set_num_threads(1)
    return World([])
