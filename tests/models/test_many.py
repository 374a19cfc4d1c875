"""Many adapters over one base: each row its own, the base's rows untouched to the bit, slots reused; an average is the sum."""

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt, adapter_tensors, adapters_of, attach
from garage.models.average import average
from garage.models.batch import pack
from garage.models.many import Many
from garage.models.weights import load_model
from garage.store.adapter import AdapterConfig, read_adapter, write_adapter

TOKENS = torch.arange(1, 40)
TEXT = TOKENS.tolist()
KINDS = {
    "lora": {"targets": ("q_proj", "up_proj")}, "rslora": {"targets": ("q_proj", "down_proj"), "rslora": True, "rank": 5},
    "dora": {"targets": ("q_proj", "o_proj"), "dora": True},
}  # fmt: skip


def outputs(model, tokens=(TEXT,)):
    batch = pack(list(tokens))
    with torch.no_grad():
        return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))


def bits_of(model):
    """The bytes of every tensor that is no adapter's."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {name.replace(".base.", "."): tensor for name, tensor in state.items() if "lora" not in name and "squares" not in name}
    return {name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in kept.items()}


def off(found, expected):
    """The largest difference, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


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


def loaded(model, saved, kinds=tuple(KINDS), **settings):
    """The model with these adapters over it, and the slot of each."""
    many = Many(model, max_loras=4, **settings)
    return many, {kind: many.add(many.read(saved[kind])) for kind in kinds}


@pytest.mark.parametrize("bits", ["", "nf4", "int8"])
def test_switching_gives_each_adapter_alone_and_touches_no_bit_of_the_base(pair, saved, bits):
    directory = pair("qwen3-tied").directory
    model = load_model(directory, quantize=bits)
    before, base = bits_of(model), outputs(model)
    many, slots = loaded(model, saved)
    assert torch.equal(outputs(model), base), "none counts yet"
    alone = {kind: outputs(attach(load_model(directory, quantize=bits), place).eval()) for kind, place in saved.items()}
    for kind in ("lora", "dora", "lora", "rslora"):
        many.use({slots[kind]: 1.0})
        assert off(outputs(model), alone[kind]) < 1e-6
        many.use({slot: float(other == kind) for other, slot in slots.items()})
        assert off(outputs(model), alone[kind]) < 1e-6, "weight 0 is no weight"
        many.use({})
        assert torch.equal(outputs(model), base) and off(alone[kind], base) > 0.01
    after = bits_of(model)
    assert before == after and len(before) > 20
    model.model.norm.weight.data[0] += 1e-3
    assert bits_of(model) != before, "the comparison can tell"


@pytest.mark.parametrize(("lengths", "num_pieces"), [((1, 2, 1, 3, 1, 2, 1, 1), 1), ((200, 150, 1, 200, 90, 120, 300, 100), 6)])
def test_each_row_of_a_batch_is_what_its_adapter_gives_alone(pair, saved, lengths, num_pieces):
    directory = pair("qwen3-tied").directory
    model = load_model(directory)
    base = outputs(model, texts := [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths])
    many, slots = loaded(model, saved)
    alone = {kind: outputs(attach(load_model(directory), place).eval(), texts) for kind, place in saved.items()} | {None: base}
    kinds = ("lora", None, "dora", "dora", "rslora", "lora", "dora", "rslora")
    many.tell([slots.get(kind) for kind in kinds], lengths)
    assert len(many.rows.pieces) == num_pieces, "the way of computing that this batch is to try"
    found = outputs(model, texts)
    wanted = torch.cat([alone[kind].split(lengths)[i] for i, kind in enumerate(kinds)])
    assert off(found, wanted) < 1e-6 and torch.equal(found.split(lengths)[1], base.split(lengths)[1])
    many.tell([slots.get(kind) for kind in (*kinds[1:], kinds[0])], lengths)
    assert off(outputs(model, texts), wanted) > 0.01, "the twin: rows under their neighbours' adapters"
    many.tell([None] * len(lengths), lengths)
    assert torch.equal(outputs(model, texts), base)


def test_a_slot_that_is_used_again_holds_nothing_of_the_last_one(pair, saved):
    directory = pair("qwen3-tied").directory
    model = load_model(directory)
    many, slots = loaded(model, saved)
    updates = many.read(saved["lora"])
    for kind in ("dora", "rslora"):
        many.remove(slots[kind])
        assert many.add(updates) == slots[kind], "the lowest free slot"
    alone = outputs(attach(load_model(directory), saved["lora"]).eval())
    for slot in slots.values():
        many.tell([slot], [39])
        assert off(outputs(model), alone) < 1e-6
        many.tell([slot, None], [39, 39])
        assert off(outputs(model, [TEXT] * 2)[:39], alone) < 1e-6


def test_weights_add_up_in_every_kind(pair, saved):
    """The forward is that of the matrix W + sum of w (W_a - W)."""
    directory = pair("qwen3-tied").directory
    weights = {"lora": 0.7, "rslora": -0.4, "dora": 1.5}
    many, slots = loaded(model := load_model(directory), saved)
    many.use({slots[kind]: weight for kind, weight in weights.items()})
    dense, merged = load_model(directory), {kind: dict(adapters_of(attach(load_model(directory), place))) for kind, place in saved.items()}
    with torch.no_grad():
        for kind, loras in merged.items():
            for name, lora in loras.items():
                dense.get_submodule(name).weight += weights[kind] * (lora.merged() - lora.base.weight)
    assert off(outputs(model), outputs(dense)) < 1e-5
    many.use({slots[kind]: weight - 0.1 * (kind == "lora") for kind, weight in weights.items()})
    assert off(outputs(model), outputs(dense)) > 1e-3


def test_what_does_not_fit_leaves_the_model_as_it_was(pair, saved, tmp_path):
    model = load_model(pair("qwen3-tied").directory)
    many, slots = loaded(model, saved, max_lora_rank=5)
    many.use({slots["lora"]: 1.0})
    expected = outputs(model)
    config, tensors = read_adapter(saved["rslora"])
    faults = {
        "narrow": ({name: tensor[:-1] if "lora_B" in name else tensor for name, tensor in tensors.items()}, "lora_B"),
        "other": ({name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()}, r"layers\.7"),
        "head": ({"base_model.model.lm_head.lora_A.weight": torch.zeros(5, 48)}, "lm_head"),
        "none": ({}, "no tensors"),
    }
    for name, (wrong, says) in faults.items():
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, wrong, config)
        with pytest.raises(UserError, match=says):
            many.read(tmp_path / name)
    with pytest.raises(UserError, match="max_lora_rank is 4"):
        Many(load_model(pair("qwen3-tied").directory), max_loras=1, max_lora_rank=4).read(saved["rslora"])
    (tmp_path / "none" / "manifest.json").write_text(
        '{"kind": "adapter", "id": "a", "parents": [], "spec": {}, "facts": {"quantize": "nf4"}, "version": "", "created": ""}'
    )
    write_adapter(tmp_path / "none", tensors, config)
    with pytest.raises(UserError, match="over a base in nf4"):
        many.read(tmp_path / "none")
    assert Many(load_model(pair("qwen3-tied").directory, quantize="nf4"), max_loras=1).read(tmp_path / "none")
    many.add(many.read(saved["rslora"]))
    with pytest.raises(UserError, match="all 4 slots"):
        many.add(many.read(saved["rslora"]))
    assert torch.equal(outputs(model), expected)


def averaged(saved, config, weights, rank=None, kinds=("lora", "rslora")):
    return average([read_adapter(saved[kind]) for kind in kinds], weights, config, rank=rank)


def test_an_average_is_the_sum_and_peft_applies_it(pair, saved, tmp_path):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    directory = pair("qwen3-tied").directory
    many, slots = loaded(model := load_model(directory), saved)
    made = averaged(saved, model.config, (0.25, 0.75))
    write_adapter(tmp_path, made.tensors, made.config)
    assert made.lost == 0 and {made.config.rank_of(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.up_proj")} == {9, 4}
    many.use({slots["lora"]: 0.25, slots["rslora"]: 0.75})
    expected = outputs(model)
    many.use({slots["lora"]: 1.0})
    ours = outputs(attach(load_model(directory), tmp_path))
    assert (ours - expected).abs().max() < 1e-5 and (ours - outputs(model)).abs().max() > 0.01
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(directory), tmp_path).eval()
    with torch.no_grad():
        assert (ours - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5
    alone = averaged(saved, model.config, (1.0, 0.0))
    write_adapter(tmp_path, alone.tensors, alone.config)
    assert (outputs(attach(load_model(directory), tmp_path)) - outputs(model)).abs().max() < 1e-5
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
