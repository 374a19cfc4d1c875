"""Checkpoints in bitsandbytes' NF4: held code for code, the forward is its own, adapters go on them, and what is not read is named.

Rows are multiples of 64 long: on a CPU bitsandbytes 0.50 widens other matrices wrongly (relative error 0.2 to 0.4 where ours has 0.09).
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from garage.core.errors import UserError
from garage.models.adapters import adapt, merge
from garage.models.batch import pack
from garage.models.config import refuse_method
from garage.models.quantize import HeldNf4, QuantLinear, widen
from garage.models.start import begin
from garage.models.weights import load_model, save_model

bnb = pytest.importorskip("bitsandbytes")
TOKENS = torch.arange(1, 40)
STATE = ".quant_state.bitsandbytes__nf4"
UP = "model.layers.1.mlp.up_proj.weight"


def outputs(model):
    batch = pack([TOKENS.tolist()])
    with torch.no_grad():
        return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))


def edit(directory: Path, change) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    directory = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=96, num_hidden_layers=3, initializer_range=0.15, **shape))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def quantised(dense, tmp_path):
    """quantised(double, kind) -> (their model, the directory it was saved in)."""
    import transformers

    def make(double: bool, kind: str = "nf4", **saving):
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.Qwen3ForCausalLM.from_pretrained(dense, quantization_config=config, device_map="cpu", dtype=torch.float32)
            model.save_pretrained(tmp_path / "bnb", **saving)
        return model.eval(), tmp_path / "bnb"

    return make


@pytest.mark.parametrize("double", [True, False])
def test_codes_are_held_as_they_are_and_the_forward_is_theirs(quantised, dense, double):
    theirs, directory = quantised(double)
    ours, files = load_model(directory), load_file(directory / "model.safetensors")
    linears = {name: module for name, module in ours.named_modules() if isinstance(module, QuantLinear)}
    assert len(linears) == 3 * 7
    for name, linear in linears.items():
        held, weight = linear.weight, theirs.get_submodule(name).weight
        assert isinstance(held, HeldNf4) and held.shape == linear.dense(torch.float32).shape
        codes = files[f"{name}.weight"].flatten()
        assert torch.equal(held.get_buffer("codes")[: len(codes)], codes)
        wide = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert (linear.dense(torch.float32) - wide).abs().max() < 1e-6
        theirs.set_submodule(name, torch.nn.Linear(linear.in_features, linear.out_features, bias=False))
        theirs.get_submodule(name).weight.data = wide.float()
    with torch.no_grad():
        assert (outputs(ours) - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5
    assert (outputs(ours) - outputs(load_model(dense))).abs().max() > 1e-2, "it was rounded"
    if double:
        again = load_model(dense, quantize="nf4")
        assert (outputs(ours) - outputs(again)).abs().max() < 1e-3, "our own rounding is theirs"


def test_parts_may_lie_in_several_files(quantised):
    _, directory = quantised(True, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    assert sum(isinstance(module, QuantLinear) for module in load_model(directory, dtype=torch.bfloat16).modules()) == 21


def test_adapters_go_on_it_and_merging_widens(quantised, tmp_path):
    _, directory = quantised(True)
    model = adapt(load_model(directory), rank=3, alpha=6.0, targets=["q_proj"], seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1)
    with pytest.raises(UserError, match="few bits"):
        begin(model, directory, start="pissa", bits="", iterations=None, seed=0)
    wrapped = outputs(model)
    (tmp_path / "out").mkdir()
    save_model(widen(merge(model)), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (outputs(load_model(tmp_path / "out")) - wrapped).abs().max() < 1e-5
    with pytest.raises(UserError, match="in NF4 already"):
        load_model(directory, quantize="int8")
    assert torch.equal(outputs(load_model(directory, quantize="nf4")), outputs(load_model(directory)))


def without(part):
    return lambda tensors: tensors.pop(UP + part)


def state(**keys):
    def change(tensors):
        said = json.loads(bytes(tensors[UP + STATE].tolist())) | keys
        tensors[UP + STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


def halved(part):
    return lambda tensors: tensors.update({UP + part: tensors[UP + part][: len(tensors[UP + part]) // 2].clone()})


def other_book(tensors):
    tensors[UP + ".quant_map"] = tensors[UP + ".quant_map"] * 0.9


DAMAGE = {
    "no scales": without(".absmax"), "no state": without(STATE), "no codes": without(""), "no nested": without(".nested_absmax"),
    "blocks": state(blocksize=128), "shape": state(shape=[3, 4]), "no shape": state(shape=None), "dtype": state(dtype="none"),
    "words for a shape": state(shape=["a", 2]), "infinite mean": state(nested_offset=float("inf")),
    "half the scales": halved(".absmax"), "half the codes": halved(""), "other levels": other_book,
    "infinite": lambda tensors: tensors[UP + ".nested_absmax"].fill_(float("inf")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(quantised, damage):
    _, directory = quantised(True)
    assert load_model(directory) is not None
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(edit(directory, DAMAGE[damage]))


METHODS = {
    "bitsandbytes fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bitsandbytes LLM.int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4}, "awq": {"quant_method": "awq"}, "fp8": {"quant_method": "fp8"},
    "bnb_4bit_quant_storage": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(method):
    with pytest.raises(UserError, match=method):
        refuse_method(METHODS[method])


def test_fp4_files_are_refused_before_they_are_read(quantised):
    _, directory = quantised(False, "fp4")
    with pytest.raises(UserError, match="fp4"):
        load_model(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(UserError, match="bitsandbytes__fp4"):
        load_model(directory)
