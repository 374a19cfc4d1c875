"""A model made ready to answer gives the same logits: exactly laid out in bf16, near in few bits; adapters' linears keep their names."""

from itertools import pairwise

import pytest
import torch

from garage.core.errors import UserError
from garage.kernels import compiled, quant
from garage.kernels.paths import plainly
from garage.models import fuse as fusing
from garage.models.attend import PagedAttend, PageTable
from garage.models.batch import pack
from garage.models.families import build, from_architecture, init_weights
from garage.models.fuse import FusedAttention, FusedMLP, WholeBlock, check_fp8, fuse, lay_out
from garage.models.layers import Linear
from garage.models.quantize import DirectLinear, QuantEmbedding, TiledLinear

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
    for mix in (module for module in model.modules() if isinstance(module, FusedAttention)):
        mix.heads, mix.q_norm, mix.k_norm = [2, 2, 4], mix.k_norm, mix.q_norm
    with pytest.raises((RuntimeError, AssertionError)):
        assert off(logits(model), exact) < 3 * good


def test_without_fusing_every_linear_keeps_its_name() -> None:
    model = lay_out(made("qwen3"), "int8")
    names = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert names == {name for name, module in made("qwen3").named_modules() if isinstance(module, Linear)}


PAGE = 4


@torch.inference_mode()
def stepped(model) -> torch.Tensor:
    """Logits of three requests read in pieces, then a token at a time, over shuffled pages whose other slots are NaN."""
    c = model.config
    shape = (40, PAGE, c.num_key_value_heads, c.head_dim)
    keys, values = ([torch.full(shape, torch.nan, dtype=torch.bfloat16) for _ in range(c.num_hidden_layers)] for _ in range(2))
    pages_BP = torch.randperm(39, generator=torch.Generator().manual_seed(0)).view(3, 13)
    out, done = [], [0, 0, 0]
    for rows in ((5, 1, 17), (3, 1, 1), (1, 1, 1), (1, 4, 2)):
        spans = [range(start, start + count) for start, count in zip(done, rows, strict=True)]
        owners = torch.tensor([i for i, span in enumerate(spans) for _ in span])
        places = torch.tensor([p for span in spans for p in span])
        done = [span.stop for span in spans]
        table = PageTable(pages_BP[owners, places // PAGE] * PAGE + places % PAGE, pages_BP)
        attend = PagedAttend(keys, values, [table] * c.num_hidden_layers, rows, tuple(done))
        out.append(model.logits(model((places * 7 + owners) % 300, places, attend)))
    return torch.cat(out)


@pytest.mark.skipif(not compiled.has_products(), reason="products are not compiled here")
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("bits", ["none", "int8", "int4"])
def test_a_layer_in_one_call_is_its_parts_bit_for_bit(family, bits, monkeypatch) -> None:
    model = fuse(lay_out(made(family), bits))
    assert sum(isinstance(module, WholeBlock) for module in model.modules()) == 2
    runs: list[int] = []
    real = fusing.Whole.run
    monkeypatch.setattr(fusing.Whole, "run", lambda self, *a: runs.append(1) or real(self, *a))
    whole = stepped(model)
    monkeypatch.setattr(fusing, "can_run", lambda *a: False)
    assert torch.equal(whole, stepped(model)) and len(runs) == 2 * 4 and whole.isfinite().all()


@pytest.mark.skipif(not compiled.has_products(), reason="products are not compiled here")
def test_a_layer_with_its_norms_mixed_up_is_another(monkeypatch) -> None:
    model = made("gemma3")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.add_(0.3)
    want = stepped(fuse(lay_out(model, "none")))
    norms = type(model.model.layers[0].block).norms
    turned = property(lambda self: tuple(reversed(norms.fget(self))))
    monkeypatch.setattr(type(model.model.layers[0].block), "norms", turned)
    again = made("gemma3")
    with torch.no_grad():
        again.model.layers[0].input_layernorm.weight.add_(0.3)
    assert not torch.equal(want, stepped(fuse(lay_out(again, "none"))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_fp8(dtype) -> None:
    """Near the model; each product is that of the rounded numbers; a matrix whose sides do not fit stays as it is."""
    plain = made("qwen3", dtype)
    model = lay_out(made("qwen3", dtype), "fp8")
    assert type(model.model.layers[0].mlp.down_proj) is DirectLinear and type(model.lm_head) is Linear, "300 is no multiple of 16"
    assert 1e-4 < off(logits(model), logits(plain)) < 0.2
    x_TI, linear = torch.randn(7, 96, generator=torch.Generator().manual_seed(2)), model.model.layers[0].self_attn.q_proj
    codes, scale = quant.fp8(x_TI)
    exact = (codes.float() * scale[:, None]) @ linear.dense(torch.float32).T
    assert off(linear(x_TI), exact) < 0.01, "bf16's rounding of the sums"
    assert linear(torch.zeros(2, 96)).eq(0).all(), "rows of zeros have no scale"


def test_a_gpu_without_fp8_is_told(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match="fp8"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(torch.device("cuda"))
