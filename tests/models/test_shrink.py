"""Adapters made smaller: the nearest of the lower rank, exactly where nothing is lost, and what is given up is what is said."""

import pytest
import torch

from garage.models.adapters import DoRA, LoRA, adapt
from garage.models.layers import Linear
from garage.models.shrink import shrink
from garage.specs.train import LINEARS


def adapted(tiny, **kind):
    model = adapt(tiny("qwen3"), rank=8, alpha=16.0, targets=LINEARS, seed=0, **kind)
    for module in model.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    return model


def updates(model):
    return {n: m.merged() - m.base.weight for n, m in model.named_modules() if isinstance(m, LoRA)}


@pytest.fixture
def tiny():
    from garage.models.families import build, from_architecture, init_weights

    def make(family):
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        model = build(from_architecture(family, vocab_size=64, rope_theta=1e4, sliding_window=None, max_position_embeddings=64, **shape))
        init_weights(model, 0)
        return model

    return make


def test_a_lower_rank_is_the_nearest_one(tiny):
    model = adapted(tiny)
    before = updates(model)
    shrink(model, rank=3, dora=False, targets=LINEARS)
    for name, after in updates(model).items():
        left, values, right = torch.linalg.svd(before[name])
        nearest = left[:, :3] * values[:3] @ right[:3]
        assert (after - nearest).abs().max() < 1e-5 < (after - before[name]).abs().max()
        assert model.get_submodule(name).lora_A.shape[0] == 3


def test_a_rank_that_was_not_used_costs_nothing(tiny):
    model = adapted(tiny)
    for module in model.modules():
        if isinstance(module, LoRA):
            module.lora_B.data[:, 4:] = 0
    before = updates(model)
    shrink(model, rank=4, dora=False, targets=LINEARS)
    assert all((after - before[name]).abs().max() < 1e-5 for name, after in updates(model).items())


def test_an_adapter_that_has_not_moved_starts_smaller(tiny):
    model = adapt(tiny("qwen3"), rank=8, alpha=16.0, targets=LINEARS, seed=0)
    shrink(model, rank=4, dora=False, targets=LINEARS)
    lora = next(module for module in model.modules() if isinstance(module, LoRA))
    assert bool(lora.lora_A.any()) and not bool(lora.lora_B.any()) and lora.lora_A.requires_grad and not lora.base.weight.requires_grad


def test_magnitudes_and_targets_go(tiny):
    model = adapted(tiny, dora=True)
    dora = next(module for module in model.modules() if isinstance(module, DoRA))
    gain = (dora.lora_magnitude_vector / dora.row_norms())[:, None]
    turned = gain * dora.scale * (dora.lora_B @ dora.lora_A)
    shrink(model, rank=8, dora=False, targets=("q_proj", "v_proj"))
    kept = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA)]
    assert {name.rpartition(".")[2] for name, _ in kept} == {"q_proj", "v_proj"} and not any(isinstance(m, DoRA) for _, m in kept)
    assert (kept[0][1].merged() - kept[0][1].base.weight - turned).abs().max() < 1e-5
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is Linear


def test_targets_may_be_presets(tiny):
    model = adapt(tiny("qwen3"), rank=4, alpha=8.0, targets=["all-linear"], seed=0)
    shrink(model, rank=4, dora=True, targets=["attention"])
    assert {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoRA)} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
