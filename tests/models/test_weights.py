"""Hub directories: both ways with transformers, tied heads, shards, multimodal prefixes, and every kind of damage named."""

import json
import logging
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from garage.core.errors import UserError
from garage.models import weights
from garage.models.adapters import adapt
from garage.models.fuse import held
from garage.models.quantize import TiledLinear
from garage.models.weights import load_model, save_model

TOKENS = torch.arange(1, 30)[None]
UP = "model.layers.1.mlp.up_proj.weight"


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["gemma3-linear", "qwen3-tied", "qwen3-untied"])
@pytest.mark.parametrize("limit", [5e9, 40_000])
def test_transformers_loads_what_we_save(pair, kind, limit, tmp_path):
    made = pair(kind)
    save_model(made.ours, tmp_path, max_shard_bytes=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if limit > 1e9 else len(list(tmp_path.glob("*.safetensors"))) > 2
    again = type(made.theirs).from_pretrained(tmp_path)
    assert equal(again, made.theirs)
    with torch.no_grad():
        assert (again(TOKENS).logits - made.theirs(TOKENS).logits).abs().max() < 3e-5
    assert equal(load_model(tmp_path), made.ours)
    stored = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert ("lm_head.weight" in stored) == (kind == "qwen3-untied")


def test_index_has_transformers_totals(pair, tmp_path):
    pair("qwen3-tied").theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    (tmp_path / "ours").mkdir()
    save_model(pair("qwen3-tied").ours, tmp_path / "ours", max_shard_bytes=40_000)
    theirs, ours = (json.loads((tmp_path / who / "model.safetensors.index.json").read_text()) for who in ("theirs", "ours"))
    assert theirs["metadata"] == ours["metadata"] and theirs["weight_map"].keys() == ours["weight_map"].keys()
    assert equal(load_model(tmp_path / "theirs"), pair("qwen3-tied").ours)


def test_dtype_given_stated_or_stored(pair, tmp_path):
    model = pair("qwen3-untied").ours
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16 and load_model(tmp_path).config.dtype == "bfloat16"
    assert torch.equal(load_model(tmp_path, dtype=torch.float32).lm_head.weight, model.lm_head.weight.bfloat16().float())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "dtype"}))
    assert load_model(tmp_path).lm_head.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A tiny multimodal Gemma 3 as transformers saves it, and its text logits."""
    import transformers

    text = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 7, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
    text |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    vision |= {"patch_size": 14}
    ids = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        directory = tmp_path_factory.mktemp("multimodal")
        model.save_pretrained(directory)
        return directory, model(input_ids=TOKENS).logits[0]


def text_logits(directory):
    from garage.models.batch import pack

    model, batch = load_model(directory), pack(TOKENS.tolist())
    with torch.no_grad():
        return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))


def test_multimodal_gemma_loads_as_text(multimodal, caplog):
    directory, expected = multimodal
    stored = load_file(directory / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in stored) and any(name.startswith("vision_tower.") for name in stored)
    with caplog.at_level(logging.WARNING):
        assert (text_logits(directory) - expected).abs().max() < 3e-5
    others = sum(name.startswith(("vision_tower.", "multi_modal_projector.")) for name in stored)
    assert f"skipped {others} tensors" in caplog.text


def test_multimodal_names_as_in_memory(multimodal, tmp_path):
    """Other tools write model.language_model. and model.vision_tower.vision_model. instead."""
    directory, expected = multimodal
    renamed = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.vision_model."}
    renamed |= {"multi_modal_projector.": "model.multi_modal_projector."}
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        prefix = next(p for p in renamed if name.startswith(p))
        tensors[renamed[prefix] + name.removeprefix(prefix)] = tensor
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(directory / "config.json", tmp_path)
    assert (text_logits(tmp_path) - expected).abs().max() < 3e-5


def damage(pair, tmp_path, change, kind="qwen3-tied"):
    """A copy of a good directory whose tensors went through `change`."""
    tensors = load_file(pair(kind).directory / "model.safetensors")
    change(tensors)
    shutil.copy(pair(kind).directory / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


DAMAGES = {
    "missing": lambda t: t.pop(UP),
    "left over": lambda t: t.update({"model.extra.weight": torch.zeros(2)}),
    "renamed": lambda t: t.update({UP.replace("up_proj", "up"): t.pop(UP)}),
    "shape": lambda t: t.update({UP: t[UP][:-1].clone()}),
    "nan": lambda t: t[UP].__setitem__((3, 4), torch.nan),
    "infinity": lambda t: t[UP].__setitem__((3, 4), -torch.inf),
    "integers": lambda t: t.update({UP: t[UP].to(torch.int8)}),
    "vision of no gemma": lambda t: t.update({"vision_tower.x": torch.zeros(2)}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(pair, tmp_path, kind):
    name = {"left over": "model.extra.weight", "renamed": "layers.1.mlp.up", "vision of no gemma": "vision_tower.x"}.get(kind, UP)
    with pytest.raises(UserError, match=name):
        load_model(damage(pair, tmp_path, DAMAGES[kind]))


def test_overflow_of_fp16_is_refused(pair, tmp_path):
    place = damage(pair, tmp_path, lambda t: t[UP].__setitem__((0, 0), 1e5))
    assert load_model(place).model.layers[1].mlp.up_proj.weight[0, 0] == 1e5
    with pytest.raises(UserError, match=UP):
        load_model(place, dtype=torch.float16)


def test_tied_head_may_be_there_twice_but_not_differ(pair, tmp_path):
    embedding = "model.embed_tokens.weight"
    place = damage(pair, tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert equal(load_model(place), pair("qwen3-tied").ours)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_model(damage(pair, tmp_path, lambda t: t.update({"lm_head.weight": t[embedding] + 1})))


def test_untied_head_must_be_there(pair, tmp_path):
    with pytest.raises(UserError, match=r"lm_head\.weight missing"):
        load_model(damage(pair, tmp_path, lambda t: t.pop("lm_head.weight"), "qwen3-untied"))


def test_pickle_is_refused(pair, tmp_path):
    shutil.copy(pair("qwen3-tied").directory / "config.json", tmp_path)
    with pytest.raises(UserError, match="neither"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UserError, match="pickle"):
        load_model(tmp_path)


def test_torn_file_and_broken_index(pair, tmp_path):
    model, single = pair("qwen3-tied").ours, tmp_path / "model.safetensors"
    save_model(model, tmp_path)
    whole = single.read_bytes()
    for torn in (whole[: len(whole) // 2], whole[:20], b""):
        single.write_bytes(torn)
        with pytest.raises(UserError, match="damaged"):
            load_model(tmp_path)
    single.unlink()
    save_model(model, tmp_path, max_shard_bytes=40_000)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    for broken, match in (("{", "damaged"), ("[]", "damaged"), (json.dumps({"weight_map": {UP: "../elsewhere.safetensors"}}), "outside")):
        index.write_text(broken)
        with pytest.raises(UserError, match=match):
            load_model(tmp_path)
    other = next(file for file in raw["weight_map"].values() if file != raw["weight_map"][UP])
    index.write_text(json.dumps({"weight_map": {**raw["weight_map"], UP: other}}))
    with pytest.raises(UserError, match=UP):
        load_model(tmp_path)
    index.write_text(json.dumps(raw))
    (tmp_path / other).unlink()
    with pytest.raises(UserError, match=other):
        load_model(tmp_path)


def test_loading_holds_one_matrix_beside_the_model(pair, monkeypatch):
    """Before a tensor is copied, the one before it is gone, and so is its copy if something else took its place."""
    alive, real = [], weights._read

    def watched(name, tensor, dtype, device):
        assert sum(ref() is not None for ref in alive) == 0, name
        alive.append(weakref.ref(tensor))
        return real(name, tensor, dtype, device)

    def tiled(weight):
        alive.append(weakref.ref(weight))
        return held(weight, "int4", on_cpu=True)

    monkeypatch.setattr(weights, "_read", watched)
    load_model(pair("qwen3-untied").directory)
    assert len(alive) > 30
    model = load_model(pair("qwen3-untied").directory, quantize=tiled)
    assert len(alive) > 80 and sum(isinstance(module, TiledLinear) for module in model.modules()) == 21


def test_a_model_with_adapters_is_not_saved(pair, tmp_path):
    model = load_model(pair("qwen3-tied").directory)
    adapt(model, rank=2, alpha=4, targets=["q_proj"], seed=0)
    with pytest.raises(UserError, match="adapters"):
        save_model(model, tmp_path)
