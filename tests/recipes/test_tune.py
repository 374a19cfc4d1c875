"""Adapters from the command line: the plan, what is written, resume after a changed start, and a base that is another one."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from garage.cli import main
from garage.core.artifact import read_manifest
from garage.core.errors import UserError
from garage.core.events import read_events
from garage.store.adapter import read_adapter
from garage.store.fingerprint import base_hash
from garage.store.locate import locate
from garage.train import loop

FIT = "--fit.max_steps 4 --fit.batch_tokens 256 --fit.micro_tokens 256 --fit.max_length 128 --fit.threads 1 --fit.save_every 2".split()  # noqa: SIM905
FIT += ["--fit.optimizer.lr", "1e-2"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"What is {n} plus {n}?", "output": f"{n + n}."}) + "\n" for n in range(60)))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of nano that may be changed."""
    return Path(shutil.copytree(str(files("garage") / "assets" / "nano"), tmp_path / "base"))


def sft(model: object, rows: Path, out: Path, *more: object) -> int:
    return main([str(word) for word in ["sft", model, "--data", rows, "--out", out, *FIT, *more]])


def trained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifacts" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("settings", ["--adapter.start pissa", "--adapter.start loftq --adapter.quantize nf4"])
def test_a_run_that_changed_its_base_resumes_bit_for_bit(rows, tmp_path, monkeypatch, settings):
    words = [*settings.split(), "--adapter.rank", "8", "--adapter.targets", "attention"]
    assert sft("nano", rows, tmp_path / "straight", *words) == 0
    real = loop._Trainer._tell

    def tell(self, *args):
        real(self, *args)
        if self.progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_tell", tell)
        assert sft("nano", rows, tmp_path / "broken", *words) == 130
    assert main(["sft", "--resume", str(tmp_path / "broken"), "--adapter.alpha", "9"]) == 2
    assert main(["sft", "--resume", str(tmp_path / "broken")]) == 0
    straight, resumed = trained(tmp_path / "straight"), trained(tmp_path / "broken")
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[name], resumed[name]) for name in straight)
    config, tensors = read_adapter(tmp_path / "straight" / "artifacts" / "adapter")
    assert config.rank == 16 and config.alpha == 64.0 and set(config.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    half = next(tensor for name, tensor in tensors.items() if "lora_A" in name)
    assert not torch.equal(half[:8], half[8:]), "it learned"
    assert locate(str(tmp_path / "straight")).bits == "", "it belongs to the base as published"


def test_patterns_are_planned_trained_and_written(rows, tmp_path, capsys):
    words = ["--adapter.rank", "4", "--adapter.rank_pattern.q_proj", "9", "--adapter.alpha_pattern.layers.1.mlp.up_proj", "5", "--json"]
    assert sft("nano", rows, tmp_path / "run", *words, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["effective scale"] == "1.25, 3.55556, 8" and "warning" not in plan
    assert sft("nano", rows, tmp_path / "run", *words) == 0
    config, tensors = read_adapter(tmp_path / "run" / "artifacts" / "adapter")
    assert plan["trained"] == sum(tensor.numel() for tensor in tensors.values()) and plan["adapted layers"] == 28
    assert dict(config.rank_pattern) == {"q_proj": 9} and dict(config.alpha_pattern) == {"layers.1.mlp.up_proj": 5.0}
    assert sft("nano", rows, tmp_path / "other", "--adapter.rank_pattern.z_proj", "9") == 2


def test_too_large_a_rank_is_refused_by_name(rows, tmp_path, capsys):
    assert sft("nano", rows, tmp_path / "run", "--adapter.rank", "200", "--dry-run") == 2
    said = capsys.readouterr().err
    assert "model.layers.0.self_attn.k_proj, 128" in said and "--adapter.rank_pattern.k_proj 128" in said


def test_rslora_says_how_much_stronger_it_is(rows, tmp_path, capsys):
    words = ["--adapter.rank", "64", "--adapter.alpha", "32", "--json", "--dry-run"]
    plans = []
    for more in ((), ("--adapter.rslora",), ("--adapter.rslora", "--adapter.rank", "4")):
        assert sft("nano", rows, tmp_path / "run", *words, *more) == 0
        plans.append(json.loads(capsys.readouterr().out.splitlines()[-1])["plan"])
    assert [plan["effective scale"] for plan in plans] == ["0.5", "4", "16"]
    assert ["warning" in plan for plan in plans] == [False, True, False]
    assert "8 times" in plans[1]["warning"] and "--adapter.alpha 4 " in plans[1]["warning"]
    assert sft("nano", rows, tmp_path / "run", "--adapter.rslora") == 0
    said = [event for event in read_events(tmp_path / "run" / "events.jsonl") if "rslora" in str(event.get("message"))]
    assert len(said) == 1 and "--adapter.alpha 8 " in said[0]["remedy"]


def test_another_base_is_refused_by_its_hash(rows, tmp_path, base):
    assert sft(base, rows, tmp_path / "run") == 0
    place = tmp_path / "run" / "artifacts" / "adapter"
    assert read_manifest(place).facts["base_hash"] == base_hash(base) and locate(str(place)).base == base
    config, whole = base / "config.json", (base / "config.json").read_text()
    config.write_text(json.dumps({**json.loads(whole), "transformers_version": "9", "dtype": "float32"}))
    assert locate(str(place)).base == base, "how the file was made does not matter"
    config.write_text(whole.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    with pytest.raises(UserError, match=r"other config \("):
        locate(str(tmp_path / "run"))
    config.write_text(whole)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.clone() for name, tensor in reversed(tensors.items())}, base / "model.safetensors")
    assert locate(str(place)).base == base, "nor does the order of the tensors"
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] += 0.5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UserError, match=r"other weights \("):
        locate(str(tmp_path / "run"))
    (place / "manifest.json").unlink()
    assert locate(str(place)).base == base, "an adapter of other origin states none"


def test_a_damaged_base_is_named(base):
    (base / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="damaged"):
        base_hash(base)


def test_adapters_are_averaged_from_the_command_line(rows, tmp_path, capsys):
    for name, more in (("a", ()), ("b", ("--fit.seed", "5")), ("held", ("--adapter.quantize", "nf4")), ("dora", ("--adapter.dora",))):
        assert sft("nano", rows, tmp_path / name, "--adapter.rank", "4", *more) == 0
    words = ["adapters", "average", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both"), "--json"]
    capsys.readouterr()
    assert main([*words, "--weights", "0.5,0.5"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["rank"] == 8 and made["lost"] == 0
    assert main([*words[:-3], "--out", str(tmp_path / "less"), "--json", "--rank", "3"]) == 0
    assert 0 < json.loads(capsys.readouterr().out.splitlines()[-1])["lost"] < 1
    assert locate(str(tmp_path / "both")).adapter and read_adapter(tmp_path / "less")[0].rank == 3
    assert main(["export", str(tmp_path / "both"), "--format", "merged", "--out", str(tmp_path / "merged"), "--prompts", "2"]) == 0
    for other, says in (("held", "bits"), ("dora", "DoRA")):
        assert main(["adapters", "average", str(tmp_path / "a"), str(tmp_path / other), "--out", str(tmp_path / "no")]) == 2
        assert says in capsys.readouterr().err
    assert main([*words, "--weights", "1"]) == 2 and not (tmp_path / "no").exists()


def test_a_checkpoint_in_four_bits_is_tuned_by_adapters_only(rows, tmp_path, base, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = transformers.Qwen3ForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(base)
    assert sft(base, rows, tmp_path / "full", "--adapter.kind", "full") == 2
    assert "few bits" in capsys.readouterr().err
    assert sft(base, rows, tmp_path / "run", "--adapter.targets", "attention") == 0
    assert main(["export", str(tmp_path / "run"), "--format", "merged", "--out", str(tmp_path / "merged"), "--prompts", "2"]) == 0
    assert sum(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()) > 28
