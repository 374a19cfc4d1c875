"""A layer that keeps its input alone: the same gradients as the plain one, far fewer bytes, and the memory that is promised for 12B."""

from functools import partial

import pytest
import torch
from torch import nn

from garage.models import recompute
from garage.models.adapters import DoRA, adapt, norms_held
from garage.models.batch import pack
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Block
from garage.models.recompute import Thrift, recomputed
from garage.specs.train import LINEARS

SHAPE = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def made(family, **kind):
    config = from_architecture(
        family, vocab_size=64, rope_theta=1e4, sliding_window=5 if family == "gemma3" else None, max_position_embeddings=64, **SHAPE
    )
    model = build(config)
    init_weights(model, 0)
    if kind:
        adapt(model, rank=4, alpha=8.0, targets=LINEARS, seed=0, **{key: value for key, value in kind.items() if key != "lora"})
        for weight in model.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.2)
    return model.train()


def gradients(model):
    """Of every trained weight, for three documents."""
    torch.manual_seed(3)
    batch = pack([[i % 60 for i in range(start, start + n)] for start, n in ((3, 20), (9, 7), (30, 13))])
    with norms_held(model):
        hidden = model(batch.tokens_T, batch.positions_T, batch.attend())
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    out = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


KINDS = [{}, {"lora": True}, {"dora": True, "rslora": True}, {"lora": True, "dropout": 0.3}, {"dora": True, "dropout": 0.3}]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind) or "full")
@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_are_the_same_bits(family, kind, layers):
    model = made(family, **kind)
    plain = gradients(model)
    with recomputed(list(model.model.layers)[:layers], Thrift()):
        again = gradients(model)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: " ".join(kind) or "full")
@pytest.mark.parametrize("tile", [1, 7, 16])
def test_tiles_change_gradients_by_rounding_alone(family, kind, tile):
    model = made(family, **kind).double()
    plain = gradients(model)
    with recomputed(list(model.model.layers), Thrift(tile=tile)):
        again = gradients(model)
    assert all((plain[n] - again[n]).abs().max() <= 1e-12 * plain[n].abs().max() for n in plain)


def test_a_tile_that_loses_its_last_tokens_is_noticed(monkeypatch):
    model = made("qwen3", lora=True)
    plain = gradients(model)
    tiles = recompute._tiles
    monkeypatch.setattr(recompute, "_tiles", lambda x, tile: tiles(x, tile)[:-1])
    with recomputed(list(model.model.layers), Thrift(tile=16)):
        again = gradients(model)
    assert max(float((plain[n] - again[n]).abs().max() / plain[n].abs().max()) for n in plain) > 1e-3


def test_a_random_state_that_is_not_kept_is_noticed(monkeypatch):
    model = made("qwen3", lora=True, dropout=0.3)
    plain = gradients(model)
    monkeypatch.setattr(recompute, "_random_state", lambda block, device: None)
    with recomputed(list(model.model.layers), Thrift()):
        again = gradients(model)
    assert not all(torch.equal(plain[name], again[name]) for name in plain)


def test_nothing_is_left_behind_and_without_gradients_nothing_is_wrapped():
    model = made("gemma3")
    batch = pack([[1, 2, 3]])
    with torch.no_grad():
        plain = model(batch.tokens_T, batch.positions_T, batch.attend())
        with recomputed(list(model.model.layers), Thrift(tile=2)):
            assert torch.equal(plain, model(batch.tokens_T, batch.positions_T, batch.attend()))
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_both_halves_are_the_layer():
    """A family whose `forward` does more than its halves would train something else than it serves."""
    model = made("gemma3")
    assert all(type(block).forward is Block.forward for block in model.model.layers)


def test_norms_follow_the_adapter():
    """Held inside one step; a changed A gives new norms as soon as the step is over."""
    model = made("qwen3", dora=True)
    dora = next(module for module in model.modules() if isinstance(module, DoRA))
    before = dora.row_norms()
    with norms_held(model):
        held = dora.row_norms()
        with torch.no_grad():
            dora.lora_A.mul_(3)
        assert torch.equal(held, before) and dora.row_norms() is held
    after = dora.row_norms()
    definition = (dora.base.weight + dora.scale * dora.lora_B @ dora.lora_A).norm(dim=1)
    assert (after - definition).abs().max() < 1e-5 and (after - held).abs().max() > 1e-3


def test_dora_gradients_are_those_of_the_paper_with_the_norm_held_constant():
    torch.manual_seed(0)
    base = made("qwen3", dora=True).double()
    dora = next(module for module in base.modules() if isinstance(module, DoRA))
    dora.squares_O = dora.base.weight.square().sum(1)  # it was made in float32
    x = torch.randn(9, dora.base.in_features, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, dora.base.out_features, dtype=torch.float64)
    trained = (x, dora.lora_A, dora.lora_B, dora.lora_magnitude_vector)

    def definition(norm):
        turned = dora.base.weight + dora.scale * dora.lora_B @ dora.lora_A
        return x @ (turned * (dora.lora_magnitude_vector / norm(turned))[:, None]).T

    ours = torch.autograd.grad(dora(x), trained, upstream)
    right = torch.autograd.grad(definition(lambda v: v.norm(dim=1).detach()), trained, upstream)
    wrong = torch.autograd.grad(definition(partial(torch.linalg.vector_norm, dim=1)), trained, upstream)
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(ours, right, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(ours, wrong, strict=True))


