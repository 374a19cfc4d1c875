"""Adapters on disk: the same back, PEFT's own files in old and new spellings, and what is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from garage.core.errors import UserError
from garage.store.adapter import AdapterConfig, read_adapter, write_adapter

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = AdapterConfig(
    base="owner/name", rank=8, alpha=16.0, targets=("k_proj", "q_proj"), dropout=0.1, is_rslora=True, is_dora=True, revision="abc",
    rank_pattern={"q_proj": 4}, alpha_pattern={"layers.0.self_attn.q_proj": 2.0},
)  # fmt: skip


def tensors():
    return {NAME: torch.randn(8, 16), NAME.replace("lora_A", "lora_B"): torch.randn(16, 8).bfloat16()}


def edit(directory, **keys):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_round_trip(tmp_path):
    written = tensors()
    write_adapter(tmp_path, written, CONFIG)
    config, read = read_adapter(tmp_path)
    assert config == CONFIG and read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) and read[name].dtype == written[name].dtype for name in written)


def test_patterns_go_by_name_or_suffix():
    module = "model.layers.0.self_attn.q_proj"
    assert CONFIG.rank_of(module) == 4 and CONFIG.alpha_of(module) == 2.0
    assert CONFIG.rank_of("model.layers.1.self_attn.k_proj") == 8 and CONFIG.alpha_of("model.layers.10.self_attn.q_proj") == 16.0
    assert CONFIG.rank_of("model.layers.0.self_attn.xq_proj") == 8


def test_peft_parses_what_we_write(tmp_path):
    from peft import LoraConfig

    write_adapter(tmp_path, tensors(), CONFIG)
    theirs = LoraConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.use_rslora, theirs.use_dora) == (8, 16.0, 0.1, True, True)
    assert theirs.target_modules == {"q_proj", "k_proj"} and theirs.rank_pattern == {"q_proj": 4} and theirs.bias == "none"
    known = set(LoraConfig().to_dict())
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= known


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["model.layers.0.self_attn.q_proj"], r".*\.q_proj", None])
def test_spellings_of_targets_and_unknown_keys(tmp_path, targets):
    write_adapter(tmp_path, tensors(), CONFIG)
    edit(tmp_path, target_modules=targets, some_new_key=None, eva_config=None, megatron_core="megatron.core", layers_pattern=None)
    assert read_adapter(tmp_path)[0].rank == 8


REFUSED = {
    "peft_type": "IA3", "bias": "all", "modules_to_save": ["lm_head"], "fan_in_fan_out": True, "layer_replication": [[0, 2]],
    "lora_bias": True, "init_lora_weights": "pissa", "rank_pattern": {".*q_proj": 3}, "target_parameters": ["x"], "r": 0,
    "lora_dropout": 1.0, "kasa_config": {"a": 1},
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_name(tmp_path, key):
    write_adapter(tmp_path, tensors(), CONFIG)
    edit(tmp_path, **{key: REFUSED[key]})
    with pytest.raises(UserError, match=key):
        read_adapter(tmp_path)


def test_damage(tmp_path):
    with pytest.raises(UserError, match="not an adapter"):
        read_adapter(tmp_path)
    write_adapter(tmp_path, tensors(), CONFIG)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(tmp_path)
    save_file({NAME: torch.tensor([[1.0, torch.nan]])}, weights)
    with pytest.raises(UserError, match=NAME):
        read_adapter(tmp_path)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match="pickle"):
        read_adapter(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_adapter(tmp_path)
