"""A model made ready to answer gives the same logits: exactly laid out in bf16, near in few bits; adapters' linears keep their names."""

from itertools import pairwise

import pytest
import torch

from garage.kernels import compiled
from garage.kernels.paths import plainly
from garage.models.batch import pack
from garage.models.families import build, from_architecture, init_weights
from garage.models.fuse import FusedAttention, FusedMLP, fuse, lay_out
from garage.models.layers import Linear
from garage.models.quantize import QuantEmbedding, TiledLinear

BATCH = pack([list(range(1, 40)), list(range(3, 20))])


def made(family: str, dtype: torch.dtype = torch.bfloat16, *, tied: bool = True):
    config = from_architecture(
        family, vocab_size=300, rope_theta=10_000.0, sliding_window=6 if family == "gemma3" else None, hidden_size=96,
        intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=256, tie_word_embeddings=tied,
    )  # fmt: skip
    model = build(config, dtype=dtype)
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype), alpha=0.1)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model.logits(model(BATCH.tokens_T, BATCH.positions_T, BATCH.attend())).float()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_laid_out_and_fused_is_the_same_model(family, tied) -> None:
    exact = logits(made(family, torch.float32, tied=tied))
    with plainly():
        plain = off(logits(made(family, tied=tied)), exact)
    model = fuse(lay_out(made(family, tied=tied), "none"))
    assert sum(isinstance(module, FusedAttention | FusedMLP) for module in model.modules()) == 4
    assert off(logits(model), exact) < 1.5 * plain + 1e-3
    if compiled.has_products():
        assert isinstance(model.lm_head, TiledLinear) and isinstance(model.model.embed_tokens, QuantEmbedding) == tied
        assert not tied or model.lm_head.weight is model.model.embed_tokens.weight, "one matrix is held once"
    with plainly():
        assert off(logits(model), exact) < 1.5 * plain + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_bits_are_further_away_but_near(dtype) -> None:
    exact = logits(made("qwen3", torch.float32))
    errors = [off(logits(fuse(lay_out(made("qwen3", dtype), bits))), exact) for bits in ("none", "int8", "int4")]
    assert all(a < b for a, b in pairwise(errors)) and errors[1] < 0.06 and errors[2] < 0.4


def test_a_join_in_the_wrong_order_is_another_model() -> None:
    model, exact = fuse(lay_out(made("qwen3"), "int8")), logits(made("qwen3"))
    good = off(logits(model), exact)
    for block in model.model.layers:
        block.self_attn.heads = [2, 2, 4]
        block.self_attn.q_norm, block.self_attn.k_norm = block.self_attn.k_norm, block.self_attn.q_norm
    with pytest.raises((RuntimeError, AssertionError)):
        assert off(logits(model), exact) < 3 * good


def test_without_fusing_every_linear_keeps_its_name() -> None:
    model = lay_out(made("qwen3"), "int8")
    names = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert names == {name for name, module in made("qwen3").named_modules() if isinstance(module, Linear)}
