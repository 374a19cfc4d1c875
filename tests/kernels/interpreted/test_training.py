"""Whole models and the optimizer on the kernels, through the one place that chooses them, beside the torch path."""

import pytest
import torch
from cases import DEVICE, draw

from garage.kernels import dispatch, paths
from garage.kernels import loss as kernels_loss
from garage.kernels.loss import linear_cross_entropy
from garage.models import families
from garage.models.adapters import adapt
from garage.models.batch import pack
from garage.models.layers import Linear
from garage.models.quantize import quantised
from garage.specs.train import AdamW8Spec
from garage.train.optim import AdamW8

SHAPE = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
RAW = {"qwen3": {"num_hidden_layers": 2}, "gemma3_text": {"num_hidden_layers": 2, "sliding_window": 8, "query_pre_attn_scalar": 24}}


def build(family, bits):
    model = families.build(families.read_config({"model_type": family, **SHAPE, **RAW[family]}), dtype=torch.float32)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=i, scale=0.2)
    if bits:
        linears = [name for name, module in model.model.layers.named_modules() if isinstance(module, Linear)]
        for name in linears:
            model.model.layers.set_submodule(name, quantised(model.model.layers.get_submodule(name).weight, bits))
        adapt(model, rank=2, alpha=4.0, targets=["q_proj", "down_proj"], seed=0)
    return model.to(DEVICE)


def slopes(model, batch):
    hidden = model(batch.tokens_T, batch.positions_T, batch.attend())
    loss = linear_cross_entropy(hidden, model.lm_head.weight, batch.tokens_T.roll(-1)).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss, dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


@pytest.mark.parametrize("bits", ["", "nf4", "int8"])
@pytest.mark.parametrize("family", RAW)
def test_a_model_is_the_same_on_both_paths(family, bits, monkeypatch):
    model, batch = build(family, bits), pack([range(11), range(40, 63), [5]], DEVICE)
    found, asked, real = [], [], paths._twin
    monkeypatch.setattr(paths, "_twin", lambda name: asked.append(name.rpartition(".")[2]) or real(name))
    for fused in (False, True):
        for module in (paths, dispatch, kernels_loss):
            monkeypatch.setattr(module, "is_fused", lambda x, fused=fused: fused)
        found.append(slopes(model, batch))
    assert set(asked) == {"norm", "rope", "mlp", "logits"} | ({"quant"} if bits else set())
    (loss, expected), (ours, got) = found
    assert abs(ours - loss) < 1e-5 * loss
    for name, slope in expected.items():
        assert (got[name] - slope).norm() < 1e-4 * slope.norm() + 1e-6, name


def test_the_optimizer_is_the_same_on_both_paths(monkeypatch):
    spec, ends = AdamW8Spec(lr=1e-2, weight_decay=0.1), []
    for fused in (False, True):
        for module in (paths, dispatch, kernels_loss):
            monkeypatch.setattr(module, "is_fused", lambda x, fused=fused: fused)
        tensors = {"w": draw(66, 65), "small": draw(8, 8)}
        optimizer = AdamW8(tensors, spec)
        for step in range(4):
            for i, tensor in enumerate(tensors.values()):
                tensor.grad = draw(*tensor.shape, seed=10 * step + i)
            optimizer.step(1.0)
        ends.append((tensors["w"], optimizer.state()))
    (weight, state), (ours, got) = ends
    off = (weight - ours).abs()
    # A code that falls to the other side of a middle moves one weight by a part of a step of 0.01.
    assert off.max() < 2e-3 and (off > 1e-5).float().mean() < 0.01 and got.keys() == state.keys()
    assert all(part.dtype == got[name].dtype and part.shape == got[name].shape for name, part in state.items())
