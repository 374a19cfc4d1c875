"""Linears in few bits: exactly the widened matrix, forward, backward, under every adapter; and never a wide copy kept."""

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt, merge
from garage.models.batch import pack
from garage.models.layers import Linear
from garage.models.quantize import QuantLinear, quantised
from garage.models.weights import load_model, save_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = pack([list(range(1, 40)), list(range(3, 20))])


def logits(model):
    return model.logits(model(BATCH.tokens_T, BATCH.positions_T, BATCH.attend()))


def widened(model):
    """The same numbers in ordinary linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, Linear.holding(module.dense(torch.float32)))
    return model


def moved(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["qwen3-tied", "gemma3"])
def test_the_forward_is_that_of_the_widened_matrix(pair, kind, bits):
    directory = pair(kind).directory
    held = load_model(directory, quantize=bits)
    assert sum(isinstance(module, QuantLinear) for module in held.modules()) == 7 * held.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(logits(held), logits(widened(load_model(directory, quantize=bits))))
        assert not torch.allclose(logits(held), logits(load_model(directory)), atol=1e-3), "something was rounded"


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_and_merging_are_those_over_the_widened_matrix(pair, bits, dora):
    directory = pair("qwen3-tied").directory
    results = []
    for base in (load_model(directory, quantize=bits), widened(load_model(directory, quantize=bits))):
        model = moved(adapt(base, rank=4, alpha=6.0, targets=ALL, seed=1, dora=dora, rslora=True)).train()
        out = logits(model)
        out.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
        with torch.no_grad():
            results.append((out.detach(), gradients, logits(merge(model.eval()))))
    (out, gradients, merged), (want, expected, also) = results
    assert torch.equal(out, want) and all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert torch.equal(merged, also) and (merged - out).abs().max() < 1e-4


def test_no_wide_copy_is_kept(pair):
    held, dense = (load_model(pair("qwen3-tied").directory, quantize=bits) for bits in ("nf4", ""))
    size = lambda model: sum(t.nbytes for m in model.model.layers.modules() for t in (*m.parameters(False), *m.buffers(False)))  # noqa: E731
    assert size(held) < 0.16 * size(dense), "4 of 32 bits, norms beside"
    model, kept = moved(adapt(held, rank=4, alpha=6.0, targets=ALL, seed=1)), list[torch.Size]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        loss = logits(model).sum()
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, QuantLinear)}
    assert not shapes & set(map(tuple, kept)), "the graph holds no matrix of the base"
    loss.backward()


def test_a_held_model_is_not_saved_as_if_it_were_whole(pair, tmp_path):
    held = load_model(pair("qwen3-tied").directory, quantize="nf4")
    with pytest.raises(UserError, match="few bits"):
        save_model(held, tmp_path)
    model = moved(adapt(held, rank=4, alpha=6.0, targets=ALL, seed=1))
    save_model(merge(model), tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_a_trained_matrix_is_not_quantised_behind_ones_back():
    linear = quantised(torch.randn(8, 64), "nf4")
    assert not list(linear.parameters()) and linear.weight.shape == (8, 64)
