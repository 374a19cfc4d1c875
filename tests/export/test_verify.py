"""A certificate is worth what its failures are: every way an export goes wrong here must be refused, and leave nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from garage.core.errors import UserError
from garage.export import merge as merging
from garage.export import publish
from garage.export import safetensors as adapters
from garage.export.merge import export_merged
from garage.export.publish import tuned
from garage.export.safetensors import export_adapter
from garage.export.verify import NEW_TOKENS, certify, default_prompts, distance, replay
from garage.models.batch import pack
from garage.models.weights import load_model, save_model
from garage.specs.export import ExportSpec
from garage.store.locate import Located
from garage.tokens.voice import Voice

O_PROJ, Q_PROJ = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def spec_of(out: Path, format: str = "merged", **options: object) -> ExportSpec:
    return ExportSpec.parse({"model": "run", "out": out, "format": format, "prompts": 4, **options})


def edit_weights(place: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors", {"format": "pt"})


def transpose(place: Path) -> None:
    edit_weights(place, lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].T}))


def swap_template(place: Path) -> None:
    path = place / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\\n", "assistant\\n ").replace("'assistant'", "'assistant '"))


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Spoils every merged export after its weights and voice are written, as a bug in the writer would."""

    def spoil(change: Callable[[Path], None]) -> None:
        honest = publish.write_voice

        def write_voice(source, voice, place):
            honest(source, voice, place)
            change(place)

        monkeypatch.setattr(publish, "write_voice", write_voice)

    return spoil


def drop_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "tuned", lambda source: tuned(Located(source.name, source.base)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.1, 0.02])
def test_an_export_without_the_adapter_is_refused(trained, monkeypatch, tmp_path: Path, dtype: str, size: float) -> None:
    source = trained("qwen3", size=size)
    assert export_merged(source, spec_of(tmp_path / "good", dtype=dtype)).ok
    drop_adapter(monkeypatch)
    with pytest.raises(UserError, match="the tuning is lost"):
        export_merged(source, spec_of(tmp_path / "out", dtype=dtype))
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["good"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transposed_weight_is_refused(trained, spoiled, tmp_path: Path, dtype: str) -> None:
    source = trained("qwen3")
    spoiled(transpose)
    with pytest.raises(UserError, match=r"is not what was trained.*mean KL"):
        export_merged(source, spec_of(tmp_path / "out", dtype=dtype))
    assert not (tmp_path / "out").exists()


def test_another_template_is_refused_and_an_earlier_export_kept(trained, spoiled, tmp_path: Path) -> None:
    source = trained("qwen3")
    export_merged(source, spec_of(tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    spoiled(swap_template)
    with pytest.raises(UserError, match="the chat template is another one"):
        export_merged(source, spec_of(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_token_that_changed_its_role_is_refused(trained, spoiled, tmp_path: Path) -> None:
    source = trained("gemma3")

    def mistake(place: Path) -> None:
        text = (place / "tokenizer_config.json").read_text()
        (place / "tokenizer_config.json").write_text(text.replace('"<bos>"', '"<pad>"'))

    spoiled(mistake)
    with pytest.raises(UserError, match=r"is another one|other token ids"):
        export_merged(source, spec_of(tmp_path / "out"))


def test_adapter_matrices_that_are_swapped_are_refused(trained, monkeypatch, tmp_path: Path) -> None:
    source = trained("qwen3", targets=("o_proj",), rank=32)
    honest = adapters.adapter_tensors

    def swapped(model):
        tensors = honest(model)
        return {name: tensors[name.replace("lora_A", "_").replace("lora_B", "lora_A").replace("_.w", "lora_B.w")] for name in tensors}

    monkeypatch.setattr(adapters, "adapter_tensors", swapped)
    with pytest.raises(UserError, match="is not what was trained"):
        export_adapter(source, spec_of(tmp_path / "out", "adapter"))
    assert not (tmp_path / "out").exists()


def test_a_tuning_smaller_than_the_rounding_is_not_certified(trained, tmp_path: Path) -> None:
    source = trained("qwen3", size=0.0003)
    with pytest.raises(UserError, match="the tuning is lost"):
        export_merged(source, spec_of(tmp_path / "out", dtype="bfloat16"))
    assert export_merged(source, spec_of(tmp_path / "out", dtype="float32")).ok


def test_distances_are_what_they_say(bases, tmp_path: Path) -> None:
    model, voice = load_model(bases["gemma3"]), Voice.load(bases["gemma3"])
    replayed = replay(model, voice, default_prompts(3))
    assert all(len(ids) == start + NEW_TOKENS for ids, start in zip(replayed.ids, replayed.starts, strict=True))
    same = distance(model, load_model(bases["gemma3"]), replayed)
    assert (same.kl, same.max_diff, same.top1, same.greedy) == (0.0, 0.0, 1.0, 1.0)
    other = load_model(bases["gemma3"])
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    found = distance(model, other, replayed)
    kls, widest = [], 0.0
    for ids, start in zip(replayed.ids, replayed.starts, strict=True):
        for end in range(start, len(ids)):
            p, q = (next_logits(m, ids[:end]) for m in (model, other))
            assert int(p.argmax()) == ids[end], "the continuation is the source's own greedy text"
            widest = max(widest, float((p - q).abs().max()))
            kls.append(float(torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")))
    assert found.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3) and found.max_diff == pytest.approx(widest, rel=1e-4)


def next_logits(model, ids):
    batch = pack([ids])
    with torch.no_grad():
        return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend())[-1:])[0]


def test_numbers_that_are_not_finite_are_no_certificate(bases) -> None:
    model, voice = load_model(bases["qwen3"]), Voice.load(bases["qwen3"])
    replayed = replay(model, voice, default_prompts(2))
    broken = load_model(bases["qwen3"])
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    found = distance(model, broken, replayed)
    assert not certify(found, dtype="bfloat16", effect=None, replayed=replayed, voice_faults=[]).ok


def test_prompts_are_different_and_the_same_every_time() -> None:
    prompts = default_prompts(200)
    assert len(set(prompts)) == 200 and prompts == default_prompts(200)


def test_save_model_of_this_test_is_honest(bases, tmp_path: Path) -> None:
    """The spoilers above change one thing only: an untouched round trip has no distance."""
    model = load_model(bases["qwen3"])
    save_model(model, tmp_path)
    edit_weights(tmp_path, lambda tensors: None)
    replayed = replay(model, Voice.load(bases["qwen3"]), default_prompts(1))
    assert distance(model, load_model(tmp_path), replayed).max_diff == 0.0
