"""Tiny models of every kind that the parity tests need: all weights random, norms included; several windows of tokens."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from garage.models import families
from garage.models.config import Config
from garage.models.layers import Model
from garage.models.weights import load_model

SHAPE = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
GEMMA = {**SHAPE, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24}
QWEN = {**SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": True, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 8.0}
KINDS = {
    "gemma3": ("gemma3", GEMMA),
    "gemma3-linear": ("gemma3", {**GEMMA, "rope_scaling": LINEAR}),
    "gemma3-all-full": ("gemma3", {**GEMMA, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
    "qwen3-tied": ("qwen3", QWEN),
    "qwen3-untied": ("qwen3", {**QWEN, "tie_word_embeddings": False}),
    "qwen3-linear": ("qwen3", {**QWEN, "rope_scaling": LINEAR}),
    "qwen3-yarn": ("qwen3", {**QWEN, "rope_scaling": YARN}),
}


@dataclass(frozen=True)
class Pair:
    """The same model in transformers and, loaded from what it saved, in ours."""

    theirs: torch.nn.Module
    ours: Model
    directory: Path


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * (0.4 if parameter.ndim == 1 else 0.15))


def make_theirs(kind: str) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family, raw = KINDS[kind]
    raw = {**raw, "attn_implementation": "eager"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "gemma3":
            model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**raw))
        else:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**raw))
    randomize(model)
    return model.eval()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """pair(kind) -> Pair, made once per kind."""
    made: dict[str, Pair] = {}

    def get(kind: str) -> Pair:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            theirs = make_theirs(kind)
            theirs.save_pretrained(directory)
            made[kind] = Pair(theirs, load_model(directory), directory)
        return made[kind]

    return get


@pytest.fixture
def twin():
    """twin(model, dtype=None, **changes): a copy of our model under a changed config."""

    def make(model: Model, dtype: torch.dtype = torch.float32, **changes: object) -> Model:
        config: Config = replace(model.config, **changes)
        copy = families.build(config, dtype=dtype)
        copy.load_state_dict(model.state_dict())
        return copy

    return make


@pytest.fixture
def fresh():
    """fresh(family, dtype, **changes): a random model of ours that needs no transformers."""

    def make(family: str = "gemma3", dtype: torch.dtype = torch.float64, **changes: object) -> Model:
        raw = {"model_type": {"gemma3": "gemma3_text"}.get(family, family), **(GEMMA if family == "gemma3" else QWEN), **changes}
        model = families.build(families.read_config(raw), dtype=dtype)
        randomize(model)
        return model

    return make
