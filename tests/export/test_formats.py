"""What is exported is loaded by the libraries people use, and says the same there."""

import json
from pathlib import Path

import pytest
import torch

from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.export.merge import export_merged
from garage.export.publish import tuned
from garage.export.safetensors import export_adapter
from garage.models.adapters import attach
from garage.models.weights import load_model
from garage.recipes.export import export
from garage.specs.export import ExportSpec
from garage.store.adapter import read_adapter, write_adapter
from garage.store.locate import Located, locate

IDS = [5, 9, 200, 31, 7, 7, 64, 118, 90, 12, 3, 250]
KINDS = [{}, {"rslora": True}, {"dora": True}]


def spec_of(out: Path, format: str, **options: object) -> ExportSpec:
    return ExportSpec.parse({"model": "run", "out": out, "format": format, "prompts": 4} | options)


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_peft_loads_the_adapter_and_agrees(trained, logits, tmp_path: Path, family: str, kind: dict[str, bool]) -> None:
    source = trained(family, **kind)
    certificate = export_adapter(source, spec_of(tmp_path / "out", "adapter"))
    ours = logits(tuned(source), IDS)
    torch.testing.assert_close(peft_logits(source.base, tmp_path / "out"), ours, atol=1e-5, rtol=1e-5)
    assert (logits(tuned(Located("base", source.base)), IDS) - ours).abs().max() > 0.1, "the adapter changes something"
    assert certificate.ok and certificate.kl < 1e-12 and certificate.greedy == 1.0 and certificate.effect > 1e-3


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_transformers_loads_the_merged_model_and_agrees(trained, logits, tmp_path: Path, family: str, kind: dict[str, bool]) -> None:
    transformers = pytest.importorskip("transformers")
    source = trained(family, **kind)
    certificate = export_merged(source, spec_of(tmp_path / "out", "merged", dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        scores = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(scores, logits(tuned(source), IDS), atol=1e-5, rtol=1e-5)
    assert theirs.dtype == torch.float32 and certificate.ok and certificate.kl < 1e-9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_model_stays_within_its_limits(trained, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    certificate = export_merged(trained("qwen3"), spec_of(tmp_path / "out", "merged", dtype=dtype, max_shard_bytes=1_000_000))
    assert certificate.ok and 1e-9 < certificate.kl < certificate.effect / 10 and certificate.dtype == dtype
    assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_everything_else_is_beside_the_weights(trained, tmp_path: Path, format: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = trained("gemma3")
    out, run = tmp_path / "out", export_adapter if format == "adapter" else export_merged
    certificate = run(source, spec_of(out, format))
    weights = {"adapter": {"adapter_config.json", "adapter_model.safetensors"}, "merged": {"config.json", "model.safetensors"}}[format]
    voice = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == weights | voice | {"README.md", "certificate.json", "manifest.json"}
    manifest = read_manifest(out, "export")
    assert manifest.parents == (read_manifest(source.adapter).id,) and manifest.facts["certificate"]["ok"]
    assert json.loads((out / "certificate.json").read_text())["kl"] == certificate.kl and manifest.facts["bytes"] > 1000
    assert locate(str(out)).base == (out if format == "merged" else source.base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in ends
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == ends
    ours = (source.adapter / "chat_template.jinja").read_text()
    assert tokenizer.chat_template == ours


def test_what_the_authors_say_about_sampling_is_kept(trained, bases, tmp_path: Path) -> None:
    path = bases["qwen3"] / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 300, "do_sample": True}))
    try:
        export_merged(trained("qwen3"), spec_of(tmp_path / "out", "merged"))
    finally:
        path.write_text(before)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (said["temperature"], said["top_k"], said["do_sample"]) == (0.6, 20, True)
    assert 300 in said["eos_token_id"] and len(said["eos_token_id"]) > 1


def test_an_adapter_on_some_layers_names_them(trained, logits, tmp_path: Path) -> None:
    source = trained("qwen3")
    config, tensors = read_adapter(source.adapter)
    some = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    write_adapter(source.adapter, some, config)
    export_adapter(source, spec_of(tmp_path / "out", "adapter"))
    assert all(".layers.2." in name for name in read_adapter(tmp_path / "out")[0].targets)
    torch.testing.assert_close(peft_logits(source.base, tmp_path / "out"), logits(tuned(source), IDS), atol=1e-5, rtol=1e-5)


def test_a_foreign_adapter_without_tokenizer_speaks_as_its_base(trained, tmp_path: Path) -> None:
    source = trained("qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "manifest.json"):
        (source.adapter / name).unlink()
    assert export_adapter(source, spec_of(tmp_path / "out", "adapter")).ok
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source.base / "tokenizer.json").read_bytes()


def test_a_whole_model_is_merged_as_it_is_and_has_no_adapter_to_export(bases, logits, tmp_path: Path) -> None:
    source = Located("base", bases["qwen3"])
    certificate = export_merged(source, spec_of(tmp_path / "out", "merged", dtype="float32"))
    assert certificate.ok and certificate.effect is None and certificate.max_diff == 0.0
    with pytest.raises(UserError, match="without an adapter"):
        export_adapter(source, spec_of(tmp_path / "other", "adapter"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_an_adapter_over_few_bits_is_merged_into_what_it_was_trained_on(trained, logits, tmp_path: Path, bits: str) -> None:
    """Every matrix of the merged model is 16 bits wide, of the held numbers; the loss by rounding is measured and said."""
    transformers = pytest.importorskip("transformers")
    source, said = trained("qwen3", bits=bits), []
    made = export(spec_of(tmp_path / "out", "merged", model=str(source.adapter), dtype="float32"), said.append)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        scores = theirs(torch.tensor([IDS])).logits[0]
    assert source.bits == bits and not hasattr(theirs.config, "quantization_config")
    torch.testing.assert_close(scores, logits(tuned(source), IDS), atol=1e-5, rtol=1e-5)
    wide = attach(load_model(source.base), source.adapter).eval()
    assert (scores - logits(wide, IDS)).abs().max() > 1e-3, "over the published matrices it is another model"
    rounded = export(spec_of(tmp_path / "half", "merged", model=str(source.adapter)), said.append).certificate
    assert made.certificate.max_diff < 1e-4 < rounded.mean_diff < rounded.max_diff
    words = [str(event["message"]) for event in said if event["kind"] == "warning"]
    assert len(words) == 2 and f"{bits} ones widened" in words[0] and f"{rounded.max_diff:.2g} at most" in words[1]
    assert f"{bits} matrices it was trained on" in (tmp_path / "out" / "README.md").read_text()
    export(spec_of(tmp_path / "adapter", "adapter", model=str(source.adapter)), said.append)
    assert f"trained over its base in {bits}" in str(said[-2]["message"]) + str(said[-1].get("message"))
    assert locate(str(tmp_path / "adapter")).bits == bits
