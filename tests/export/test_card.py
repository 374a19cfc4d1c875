"""The card says what is known, in a form the Hub reads, and its snippet runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from garage.export.card import licence_of
from garage.export.merge import export_merged
from garage.export.safetensors import export_adapter
from garage.specs.export import ExportSpec
from garage.store.adapter import read_adapter, write_adapter
from garage.store.locate import Located
from garage.store.report import EvalProtocol, Report

PROTOCOL = EvalProtocol(1, "gsm8k", "i", "t", "rules", 256, 0.0, 0)
REPORT = Report("gsm8k", "tuned", 400, 0.4325, (0.385, 0.4815), 0.5, (0.45, 0.55), 0.5, 0.9, 0.0, 0, 99.0, PROTOCOL, ())


def spec_of(out: Path, format: str) -> ExportSpec:
    return ExportSpec.parse({"model": "run", "out": out, "format": format, "prompts": 2})


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_the_hub_reads_it_and_the_snippet_runs(trained, tmp_path: Path, monkeypatch, capsys, format: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("peft")
    source, out = trained("qwen3"), tmp_path / "out"
    run = export_adapter if format == "adapter" else export_merged
    certificate = run(source, spec_of(out, format), reports=[REPORT])
    text = (out / "README.md").read_text()
    data = hub.ModelCard(text).data
    library = "peft" if format == "adapter" else "transformers"
    said = data.to_dict()
    assert [said[key] for key in ("license", "pipeline_tag", "library_name")] == ["gemma", "text-generation", library]
    assert [result.metric_value for result in data.eval_results] == [0.4325, 0.5] and "lora" in data.tags
    assert "| tuned | gsm8k | 400 | 43.2% | 38.5% to 48.1% | 50.0% |" in text and "- rows.jsonl" in text
    assert "| `fit.learning_rate` | 0.001 |" in text and f"{certificate.kl:.2e} nats" in text and "max_steps" not in text
    assert str(tmp_path) not in text and "/home/" not in text and str(source.base) not in text, "no path of this machine"
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(compile(snippet.replace("64", "4"), "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_a_base_on_the_hub_is_linked(trained, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    source = trained("qwen3", dora=True, rank=20, targets=("q_proj", "o_proj"))
    config, tensors = read_adapter(source.adapter)
    write_adapter(source.adapter, tensors, replace(config, base="Qwen/Qwen3-0.6B"))
    export_adapter(source, spec_of(tmp_path / "a", "adapter"))
    text = (tmp_path / "a" / "README.md").read_text()
    data = hub.ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-0.6B" and data.base_model_relation == "adapter"
    assert "vLLM does not load DoRA" in text and "--max-lora-rank 20" in text


def test_what_is_not_known_is_not_said(bases, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in bases["qwen3"].iterdir():
        if path.name != "README.md":
            (bare / path.name).write_bytes(path.read_bytes())
    export_merged(Located("m", bare), spec_of(tmp_path / "out", "merged"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("Not recorded.") == 3 and "states no licence here" in text and "license:" not in text and "base_model" not in text
    assert licence_of(bare) == "" and licence_of(bases["qwen3"]) == "gemma"
