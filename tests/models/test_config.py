"""Configurations: sizes against the tables, three vintages of keys, what is written against transformers, what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from garage.core.errors import UserError
from garage.models import families
from garage.models.config import Rope

# name: (parameters, linear parameters in layers, norm parameters), counted in transformers
SIZES = {
    "gemma3-270m": (268_098_176, 100_270_080, 55_936),
    "gemma3-1b": (999_885_952, 697_761_792, 134_272),
    "gemma3-4b": (3_880_263_168, 3_208_642_560, 368_128),
    "gemma3-12b": (11_766_034_176, 10_758_389_760, 765_696),
    "gemma3-27b": (27_009_346_304, 25_598_361_600, 1_354_496),
    "qwen3-0.6b": (596_049_920, 440_401_920, 65_536),
    "qwen3-1.7b": (1_720_574_976, 1_409_286_144, 123_904),
    "qwen3-4b": (4_022_468_096, 3_633_315_840, 196_096),
    "qwen3-8b": (8_190_735_360, 6_945_767_424, 308_224),
    "qwen3-14b": (14_768_307_200, 13_212_057_600, 424_960),
    "qwen3-32b": (32_762_123_264, 31_205_621_760, 676_864),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    counts = {p: parameter.numel() for p, parameter in families.build(families.named(name), device="meta").named_parameters()}
    linear = sum(n for p, n in counts.items() if "_proj." in p)
    norms = sum(n for p, n in counts.items() if "norm" in p)
    assert (sum(counts.values()), linear, norms) == SIZES[name]


def test_unknown_size_is_refused():
    with pytest.raises(UserError, match="qwen3-7b"):
        families.named("qwen3-7b")


GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24,
    "eos_token_id": [1, 106],
}  # fmt: skip
TYPES = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
GEMMA_VINTAGES = {
    "new": {
        "dtype": "bfloat16", "layer_types": TYPES, "_sliding_window_pattern": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "between": {
        "torch_dtype": "bfloat16", "layer_types": TYPES, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "old": {
        "torch_dtype": "bfloat16", "sliding_window_pattern": 6, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000,
        "rope_scaling": {"type": "linear", "factor": 8.0}, "cache_implementation": "hybrid",
    },
    "mixed, theta in flat keys": {
        "dtype": "bfloat16", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
    },
}  # fmt: skip
QWEN = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": True, "eos_token_id": 7,
}  # fmt: skip
QWEN_VINTAGES = {
    "new": {
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": None,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e6},
    },
    "between": {
        "torch_dtype": "bfloat16", "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "old": {
        "torch_dtype": "bfloat16", "rope_theta": 5_000_000, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "mixed, theta in flat keys": {
        "dtype": "bfloat16", "rope_theta": 5e6,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
}  # fmt: skip


@pytest.mark.parametrize("base, vintages", [(GEMMA, GEMMA_VINTAGES), (QWEN, QWEN_VINTAGES)], ids=["gemma3", "qwen3"])
def test_vintages_agree_and_round_trip(base, vintages):
    configs = [families.read_config({**base, **keys}) for keys in vintages.values()]
    assert all(config == configs[0] for config in configs)
    assert configs[0].dtype == "bfloat16" and configs[0].rope.kind in ("linear", "yarn")
    assert families.read_config(json.loads(json.dumps(families.config_json(configs[0])))) == configs[0]


def test_what_the_vintages_say():
    config = families.read_config({**GEMMA, **GEMMA_VINTAGES["old"]})
    assert config.rope == Rope(theta=1e6, kind="linear", factor=8.0) and config.rope_sliding == Rope(theta=1e4)
    assert [config.window(i) for i in range(7)] == [8] * 5 + [None, 8] and config.eos_token_id == (1, 106)


@pytest.mark.parametrize("base, vintages", [(GEMMA, GEMMA_VINTAGES), (QWEN, QWEN_VINTAGES)], ids=["gemma3", "qwen3"])
def test_written_is_what_transformers_writes(base, vintages, tmp_path):
    """transformers reads each vintage and writes it back; we write the same keys and values. (5.23 misreads the older `type`.)"""
    import transformers

    for keys in vintages.values():
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps({**base, **keys}).replace('"type"', '"rope_type"')))
        theirs.architectures = ["Gemma3ForCausalLM" if base is GEMMA else "Qwen3ForCausalLM"]
        theirs.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        ours = families.config_json(families.read_config({**base, **keys}))
        for passed_through in ("cache_implementation", "rope_theta", "rope_local_base_freq", "sliding_window_pattern"):
            written.pop(passed_through, None)
        assert {**ours, "transformers_version": ""} == {**written, "transformers_version": ""}
        assert families.read_config(written) == families.read_config({**base, **keys})


def test_sparse_published_files():
    """The 4B file omits heads, head width and vocabulary; 12B omits head width and vocabulary; 27B states what differs."""
    four = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024, "model_type": "gemma3_text"}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    raw = {"model_type": "gemma3", "torch_dtype": "bfloat16", "eos_token_id": [1, 106], "text_config": {**four, **scaling}}
    assert families.read_config(raw) == families.named("gemma3-4b")
    twelve = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8}
    raw["text_config"] = {**twelve, **scaling, "sliding_window": 1024}
    assert families.read_config(raw) == families.named("gemma3-12b")
    big = {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16}
    raw["text_config"] = {**big, **scaling, "sliding_window": 1024, "head_dim": 128, "query_pre_attn_scalar": 168}
    assert families.read_config(raw) == families.named("gemma3-27b")


def test_end_of_turn_ids_are_the_union(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert families.config_of(tmp_path).eos_token_id == (7, 9)


REFUSED = {
    "attention_bias": True, "use_bidirectional_attention": True, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    "hidden_activation": "gelu", "layer_types": ["chunked_attention"] * 7, "attention_dropout": 0.1, "quantization_config": {"bits": 4},
    "num_attention_heads": 3, "hidden_size": -1, "vocab_size": "96", "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "sliding_window": True, "eos_token_id": "x",
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_we_do_not_honour_is_refused_by_name(key):
    named = {"rope_scaling": "rope_type", "num_attention_heads": "num_key_value_heads"}.get(key, key)
    with pytest.raises(UserError, match=named):
        families.read_config({**GEMMA, key: REFUSED[key]})


@pytest.mark.parametrize("keys", [{"use_sliding_window": True}, {"hidden_act": "gelu"}, {"layer_types": ["full_attention"]}])
def test_qwen_refuses(keys):
    with pytest.raises(UserError, match=next(iter(keys))):
        families.read_config({**QWEN, **keys})


def test_two_names_of_the_rope_type_must_agree():
    with pytest.raises(UserError, match="rope_type"):
        families.read_config({**QWEN, "rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("kind", ["llama", None])
def test_other_families_are_refused(kind):
    with pytest.raises(UserError, match="model_type"):
        families.read_config({"model_type": kind})


def test_damaged_file(tmp_path):
    with pytest.raises(UserError, match="no config"):
        families.config_of(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            families.config_of(tmp_path)


def test_new_weights_depend_on_seed_and_name_alone():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    config = families.from_architecture("gemma3", vocab_size=64, rope_theta=1e4, sliding_window=8, **shape)
    one, two, wide = families.build(config), families.build(config, dtype=torch.bfloat16), families.build(replace(config, vocab_size=70))
    for model in (one, two, wide):
        families.init_weights(model, 3)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(one.model.layers[1].mlp.up_proj.weight, wide.model.layers[1].mlp.up_proj.weight)
    assert not one.model.norm.weight.any() and abs(float(one.lm_head.weight.detach().std()) - 0.02) < 2e-3
    assert one.lm_head.weight is one.model.embed_tokens.weight
