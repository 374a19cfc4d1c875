"""Adapters that do not start from zero: what they take over, that the sum is the model, the file over the unchanged base, and resume."""

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt, adapters_of, attach
from garage.models.batch import pack
from garage.models.start import begin, plain
from garage.models.weights import load_model
from garage.specs.train import LoRASpec
from garage.store.adapter import AdapterConfig, write_adapter

TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")
PATTERNS = {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"o_proj": 3.0}}


TOKENS = torch.arange(1, 40)


def outputs(model):
    batch = pack([TOKENS.tolist()])
    return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))


def shake(model):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def started(directory, start, bits="", *, rslora=False, iterations=None, seed=0):
    model = adapt(load_model(directory, quantize=bits), rank=4, alpha=6.0, targets=TARGETS, seed=seed, rslora=rslora, **PATTERNS)
    return model, begin(model, directory, start=start, bits=bits, iterations=iterations, seed=seed)


def test_pissa_is_the_best_product_and_the_rest(pair):
    directory = pair("qwen3-tied").directory
    whole = dict(load_model(directory).named_parameters())
    model, left = started(directory, "pissa")
    assert left < 1e-6
    for name, lora in adapters_of(model):
        w = whole[f"{name}.weight"].double()
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        rank = 7 if name.endswith("up_proj") else 4
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        assert lora.scale == (3.0 if name.endswith("o_proj") else 6.0) / rank
        assert (lora.scale * lora.lora_B @ lora.lora_A - best).abs().max() < 1e-5
        assert (lora.base.weight - (w - best)).abs().max() < 1e-5 and best.abs().max() > 0.1
        assert torch.allclose(lora.lora_A.norm(dim=1), lora.lora_B.norm(dim=0), rtol=1e-4), "shared evenly"
    with torch.no_grad():
        assert (outputs(model) - outputs(load_model(directory))).abs().max() < 1e-4


def test_the_randomised_factors_of_large_matrices(pair, monkeypatch):
    from garage.models import start

    monkeypatch.setattr(start, "_EXACT", 8)
    directory = pair("qwen3-tied").directory
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model, left = started(directory, "pissa")
    assert torch.equal(torch.get_rng_state(), before), "its draws are its own"
    torch.manual_seed(2)
    again, _ = started(directory, "pissa")
    assert left < 1e-6 and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for name, lora in adapters_of(model):
        w = load_model(directory).get_submodule(name).weight
        best = torch.linalg.svdvals(w)[len(lora.lora_A) :].norm()
        assert best <= lora.base.weight.norm() * (1 + 1e-5) and lora.base.weight.norm() < 1.02 * best


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantising_loses_less_and_loftq_the_least(pair, bits):
    """Relative error of the matrices at the start: plain quantising, LoftQ after one round and after four."""
    directory = pair("qwen3-tied").directory
    held, dense = load_model(directory, quantize=bits), load_model(directory)
    names = [name for name, _ in adapters_of(started(directory, "pissa")[0])]
    pairs = [(dense.get_submodule(n).weight.detach(), held.get_submodule(n).dense(torch.float32)) for n in names]
    lost = sum(float((w - q).norm() / w.norm()) for w, q in pairs) / len(pairs)
    one, four = (started(directory, "loftq", bits, iterations=n)[1] for n in (None, 4))
    assert four < one < 0.9 * lost
    assert started(directory, "pissa", bits)[1] < 0.95 * lost


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("start", "bits"), [("pissa", ""), ("pissa", "nf4"), ("loftq", "nf4"), ("loftq", "int8")])
def test_the_file_does_over_the_unchanged_base_what_was_trained(pair, tmp_path, start, bits, rslora):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    directory = pair("qwen3-tied").directory
    model, left = started(directory, start, bits, rslora=rslora)
    config = AdapterConfig(base="tiny", rank=4, alpha=6.0, targets=TARGETS, is_rslora=rslora, **PATTERNS)
    untrained, _ = plain(model, config)
    write_adapter(tmp_path, untrained, plain(model, config)[1])
    with torch.no_grad():
        assert (outputs(attach(load_model(directory), tmp_path)) - outputs(load_model(directory))).abs().max() < 1e-4, "not trained yet"
    shake(model)
    write_adapter(tmp_path, *plain(model, config))
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(directory), tmp_path).eval()
    with torch.no_grad():
        ours, before = attach(load_model(directory), tmp_path), outputs(load_model(directory))
        assert (outputs(ours) - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5
        away = (outputs(ours) - outputs(model)).abs().max()
        assert (outputs(ours) - before).abs().max() > 0.1
        assert away < 1e-4 if not bits else away > 1e-4
        for name, lora in adapters_of(model):
            w = ours.get_submodule(name)
            lost = (w.merged() - lora.merged()).norm() / w.base.weight.norm()
            assert lost < 1e-6 if not bits else lost < 2 * left, "what quantising lost and no more"
            assert len(w.lora_A) == 2 * len(lora.lora_A) and abs(w.scale - lora.scale) < 1e-12
            w.lora_B.data[:, len(lora.lora_A) :] *= -1
            assert (w.merged() - lora.merged()).norm() / w.base.weight.norm() > 1.3 * lost, "B0 has its sign"


def test_a_start_from_zero_is_written_as_it_is(pair):
    model = adapt(load_model(pair("qwen3-tied").directory), rank=4, alpha=6.0, targets=TARGETS, seed=0)
    config = AdapterConfig(base="tiny", rank=4, alpha=6.0, targets=TARGETS)
    tensors, same = plain(model, config)
    assert same == config and all(min(tensor.shape) == 4 for tensor in tensors.values())


WRONG = [{"dora": True, "start": "pissa"}, {"start": "loftq"}, {"loftq_iterations": 2}, {"rank_pattern": {"q_proj": 0}}]


@pytest.mark.parametrize("settings", WRONG)
def test_what_does_not_go_together_is_refused(settings):
    with pytest.raises(UserError):
        LoRASpec.parse(settings)


@pytest.mark.parametrize(("start", "bits"), [("pissa", ""), ("loftq", "nf4")])
def test_an_adapter_in_bfloat16_still_adds_up_to_the_model(pair, tmp_path, start, bits):
    """Its factors are rounded before the rest is taken, so the rounding is in the rest."""
    directory = pair("qwen3-tied").directory
    settings = {"rank": 4, "alpha": 6.0, "targets": TARGETS, "seed": 0}
    model = adapt(load_model(directory, quantize=bits), dtype=torch.bfloat16, **settings)
    left = begin(model, directory, start=start, bits=bits, iterations=None, seed=0)
    wide = begin(adapt(load_model(directory, quantize=bits), **settings), directory, start=start, bits=bits, iterations=None, seed=0)
    assert left < 1e-6 if not bits else left < 1.01 * wide
    assert {lora.lora_A.dtype for _, lora in adapters_of(model)} == {torch.bfloat16}
    write_adapter(tmp_path, *plain(model, AdapterConfig(base="tiny", rank=4, alpha=6.0, targets=TARGETS)))
    with torch.no_grad():
        assert (outputs(attach(load_model(directory), tmp_path)) - outputs(load_model(directory))).abs().max() < 1e-4
