"""Several adapters over one base: switching is exact both ways, weights add up, an average is the sum, and what does not fit is refused."""

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt, adapter_tensors, adapters_of, attach
from garage.models.average import average
from garage.models.batch import pack
from garage.models.stack import names, stack, use
from garage.models.weights import load_model
from garage.store.adapter import AdapterConfig, read_adapter, write_adapter

TOKENS = torch.arange(1, 40)
KINDS = {
    "lora": {"targets": ("q_proj", "up_proj")}, "rslora": {"targets": ("q_proj", "down_proj"), "rslora": True, "rank": 5},
    "dora": {"targets": ("q_proj", "o_proj"), "dora": True},
}  # fmt: skip


def outputs(model):
    batch = pack([TOKENS.tolist()])
    with torch.no_grad():
        return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))


def bits_of(model):
    """The bytes of every tensor that is no adapter's."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name.replace(".base.", "."): tensor for name, tensor in state.items() if "lora" not in name and "squares" not in name}
    return {name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in kept.items()}


@pytest.fixture(scope="session")
def saved(pair, tmp_path_factory):
    """An adapter of each kind on disk, for the same base, each with random numbers."""
    places = {}
    for seed, (kind, settings) in enumerate(KINDS.items()):
        made = {"rank": 4, "alpha": 6.0, **settings}
        model = adapt(load_model(pair("qwen3-tied").directory), seed=seed, **made)
        draw = torch.Generator().manual_seed(seed)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        places[kind] = tmp_path_factory.mktemp(kind)
        flags = {"is_rslora": made.pop("rslora", False), "is_dora": made.pop("dora", False)}
        write_adapter(places[kind], adapter_tensors(model), AdapterConfig(base="tiny", **made, **flags))
    return places


@pytest.mark.parametrize("bits", ["", "nf4", "int8"])
def test_switching_is_exact_and_touches_no_bit_of_the_base(pair, saved, bits):
    directory = pair("qwen3-tied").directory
    model = load_model(directory, quantize=bits)
    before, base = bits_of(model), outputs(model)
    stack(model, saved)
    assert torch.equal(outputs(model), base), "none counts yet"
    alone = {kind: outputs(attach(load_model(directory, quantize=bits), place).eval()) for kind, place in saved.items()}
    for kind in ("lora", "dora", "lora", "rslora"):
        assert torch.equal(outputs(use(model, kind)), alone[kind])
        others = {other: 0.0 for other in saved if other != kind}
        assert torch.equal(outputs(use(model, {kind: 1.0, **others})), alone[kind]), "weight 0 is no weight"
        assert torch.equal(outputs(use(model, None)), base) and (alone[kind] - base).abs().max() > 0.01
    assert not torch.equal(alone["lora"], alone["rslora"]) and names(model) == sorted(saved)
    after = bits_of(model)
    assert before == after and len(before) > 20
    model.model.norm.weight.data[0] += 1e-3
    assert bits_of(model) != before, "the comparison can tell"


def test_weights_add_up_in_every_kind(pair, saved):
    """The stacked forward is that of the matrix W + sum of w (W_a - W)."""
    directory = pair("qwen3-tied").directory
    weights = {"lora": 0.7, "rslora": -0.4, "dora": 1.5}
    model = use(stack(load_model(directory), saved), weights)
    dense, merged = load_model(directory), {kind: dict(adapters_of(attach(load_model(directory), place))) for kind, place in saved.items()}
    with torch.no_grad():
        for kind, loras in merged.items():
            for name, lora in loras.items():
                dense.get_submodule(name).weight += weights[kind] * (lora.merged() - lora.base.weight)
    assert (outputs(model) - outputs(dense)).abs().max() < 1e-5
    assert (outputs(use(model, {**weights, "lora": 0.6})) - outputs(dense)).abs().max() > 1e-3


def test_what_cannot_be_stacked_leaves_the_model_as_it_was(pair, saved, tmp_path):
    model = stack(load_model(pair("qwen3-tied").directory), {"lora": saved["lora"]})
    expected = outputs(use(model, "lora"))
    config, tensors = read_adapter(saved["rslora"])
    write_adapter(tmp_path, {name: tensor[:-1] if "lora_B" in name else tensor for name, tensor in tensors.items()}, config)
    for name, place, says in (("bad", tmp_path, "lora_B"), ("lora", saved["dora"], "already")):
        with pytest.raises(UserError, match=says):
            stack(model, {name: place})
    assert torch.equal(outputs(model), expected) and names(model) == ["lora"]
    assert names(stack(model, {"train.1": saved["rslora"]})) == ["lora", "train.1"] and torch.equal(outputs(model), expected)
    with pytest.raises(UserError, match="'dora'"):
        use(model, "dora")


def averaged(saved, config, weights, rank=None, kinds=("lora", "rslora")):
    return average([read_adapter(saved[kind]) for kind in kinds], weights, config, rank=rank)


def test_an_average_is_the_sum_and_peft_applies_it(pair, saved, tmp_path):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    directory = pair("qwen3-tied").directory
    model = load_model(directory)
    made = averaged(saved, model.config, (0.25, 0.75))
    write_adapter(tmp_path, made.tensors, made.config)
    assert made.lost == 0 and {made.config.rank_of(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.up_proj")} == {9, 4}
    expected = outputs(use(stack(model, {kind: saved[kind] for kind in ("lora", "rslora")}), {"lora": 0.25, "rslora": 0.75}))
    ours = outputs(attach(load_model(directory), tmp_path))
    assert (ours - expected).abs().max() < 1e-5 and (ours - outputs(use(model, "lora"))).abs().max() > 0.01
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(directory), tmp_path).eval()
    with torch.no_grad():
        assert (ours - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5
    alone = averaged(saved, model.config, (1.0, 0.0))
    write_adapter(tmp_path, alone.tensors, alone.config)
    assert (outputs(attach(load_model(directory), tmp_path)) - outputs(use(model, "lora"))).abs().max() < 1e-5
    assert not any("down_proj" in name for name in alone.tensors)


def test_a_smaller_rank_keeps_the_strongest_directions(pair, saved, tmp_path):
    directory, worst = pair("qwen3-tied").directory, 0.0
    config = load_model(directory).config
    whole, cut = averaged(saved, config, (0.5, 0.5)), averaged(saved, config, (0.5, 0.5), rank=3)
    products = []
    for made in (whole, cut):
        write_adapter(tmp_path, made.tensors, made.config)
        attached = adapters_of(attach(load_model(directory), tmp_path))
        products.append({name: lora.scale * (lora.lora_B @ lora.lora_A).detach() for name, lora in attached})
    for name, product in products[0].items():
        u, s, vt = torch.linalg.svd(product)
        assert (products[1][name] - u[:, :3] * s[:3] @ vt[:3]).abs().max() < 1e-5
        worst = max(worst, float(s[3:].norm() / s.norm()))
    assert cut.config.rank == 3 and not cut.config.rank_pattern and cut.lost == pytest.approx(worst, rel=1e-3) and worst > 0.05
    assert averaged(saved, config, (0.5, 0.5), rank=9).lost == 0


def test_what_cannot_be_averaged_is_refused(pair, saved):
    config = load_model(pair("qwen3-tied").directory).config
    with pytest.raises(UserError, match="DoRA"):
        averaged(saved, config, (0.5, 0.5), kinds=("lora", "dora"))
    with pytest.raises(UserError, match="every weight is 0"):
        averaged(saved, config, (0.0, 0.0))
    theirs, tensors = read_adapter(saved["rslora"])
    narrow = {name: tensor[:, :-2] if "lora_A" in name else tensor for name, tensor in tensors.items()}
    with pytest.raises(UserError, match="different shapes"):
        average([read_adapter(saved["lora"]), (theirs, narrow)], (0.5, 0.5), config)
