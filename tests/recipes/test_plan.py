"""A plan's figures are those of the step itself; what it suggests fits; every card from 8 to 80 GB gets a plan."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from garage.cli import main
from garage.engine.engine import Engine
from garage.models.adapters import adapt, adapter_tensors
from garage.models.families import build, from_architecture, init_weights
from garage.models.weights import save_model
from garage.recipes.opening import holding, with_adapters
from garage.specs.plan import PlanSpec, size_in_bytes
from garage.specs.serve import EngineSpec
from garage.store.adapter import AdapterConfig, write_adapter
from garage.store.locate import locate
from garage.train import loop
from garage.train.bytes import ByteCounter


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_sizes_are_read_as_people_write_them() -> None:
    assert [size_in_bytes(text) for text in ("16GB", "16 gb", "1.5GiB", "512M", "7")] == [16 * 10**9] * 2 + [3 << 29, 512 * 10**6, 7]
    with pytest.raises(Exception, match="no size"):
        PlanSpec.parse({"model": "nano", "budget": "much"})


def test_the_items_add_up_and_are_those_of_the_run(capsys, tmp_path, monkeypatch) -> None:
    rows = tmp_path / "rows.jsonl"
    made = [{"prompt": f"{n}?", "completion": f"{n} is a number, and so is {n + 1}."} for n in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    settings = ["--fit.max_steps", "1", "--fit.batch_tokens", "256", "--fit.micro_tokens", "256", "--fit.max_length", "128"]
    found = planned(capsys, "nano", *settings, "--device", "cpu")
    assert found["total_bytes"] == sum(item["bytes"] for item in found["items"]) and found["fits"] and not found["suggestions"]
    seen = []
    fit = loop._Trainer.train
    monkeypatch.setattr(loop._Trainer, "train", lambda self, stop: (seen.append(self._bytes(self.lean)), fit(self, stop))[1])
    assert main(["sft", "nano", "--data", str(rows), "--out", str(tmp_path / "run"), *settings]) == 0
    process = next(item["bytes"] for item in found["items"] if item["name"] == "process")
    assert found["total_bytes"] - process == pytest.approx(seen[0], rel=0.01)
    capsys.readouterr()
    assert planned(capsys, str(tmp_path / "run" / "spec.json"))["total_bytes"] > 0, "the spec of a run can be given"


@pytest.mark.parametrize("card", ["8GB", "16GB", "24GB", "80GB"])
def test_every_card_gets_a_plan_that_fits(card: str, capsys) -> None:
    """One that asks for too much comes down, one that leaves room goes up; the batch is kept by accumulation."""
    big = ["--adapter.kind", "full"] if card == "80GB" else []
    found = planned(capsys, "qwen3-1.7b", "--device", "cuda", "--budget", card, "--fill", *big)
    assert found["fits"] or found["suggestions"][-1]["fits"]
    for suggestion in found["suggestions"]:
        assert suggestion["total_bytes"] <= size_in_bytes(card) and not any("batch_tokens" in option for option in suggestion["options"])
        again = planned(capsys, "qwen3-1.7b", "--device", "cuda", "--budget", card, *big, *" ".join(suggestion["options"]).split())
        assert again["fits"] and again["total_bytes"] == suggestion["total_bytes"], "the options do what was said"


def test_what_can_never_fit_is_said(capsys) -> None:
    found = planned(capsys, "nano", "--device", "cuda", "--budget", "100MB")
    assert not found["fits"] and not found["suggestions"][-1]["fits"]


def test_a_server_is_planned(capsys) -> None:
    found = planned(capsys, "qwen3-0.6b", "--verb", "serve", "--budget", "2GB", "--device", "cuda", "--serving.requests", "8")
    items = {item["name"]: item["bytes"] for item in found["items"]}
    assert items["keys and values"] == 8 * 4096 * 28 * 2 * 8 * 128 * 2 and not found["fits"] and found["suggestions"]


def test_a_gpu_that_is_not_here_needs_a_budget(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "nano", "--device", "cuda"]) == 2
    assert "--budget 16GB" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "quantization", "loras"), [("float32", "none", 0), ("bfloat16", "none", 2), ("bfloat16", "int8", 0),
                                                              ("float32", "int4", 0)])  # fmt: skip
def test_what_a_server_holds_is_what_an_engine_has(tmp_path, tied, dtype, quantization, loras) -> None:
    """Every tensor that opening an engine leaves alive, to 5 %, of a model whose widths are no whole tiles; the twin forgets the form."""
    config = from_architecture(
        "qwen3", vocab_size=2053, rope_theta=1e4, sliding_window=None, hidden_size=96, intermediate_size=200, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=tied,
    )  # fmt: skip
    model = build(config, dtype=getattr(torch, dtype))
    init_weights(model, 0)
    save_model(model, tmp_path)
    config = replace(config, dtype=dtype)
    shutil.copy(locate("nano").base / "tokenizer.json", tmp_path)
    if loras:
        (tmp_path / "a").mkdir()
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        tensors = adapter_tensors(adapt(model, rank=8, alpha=8.0, targets=targets, seed=0))
        write_adapter(tmp_path / "a", tensors, AdapterConfig(base=str(tmp_path), rank=8, alpha=8.0, targets=targets))
    settings = with_adapters(EngineSpec.parse({"device": "cpu", "quantization": quantization, "kv_cache_bytes": 1 << 18, "max_loras": 4,
                                               "max_lora_rank": 8}), loras)  # fmt: skip
    with ByteCounter() as counter:
        engine = Engine.open(tmp_path, None, settings)
        for number in range(loras):
            engine.load_adapter(str(number), tmp_path / "a")
    found = holding(config, settings, "cpu")
    expected = sum(found.items.get(name, 0) for name in ("weights", "adapters", "keys and values"))
    assert expected == pytest.approx(counter.now, rel=0.05), engine
    assert found.longest == engine.max_model_len and found.tokens == engine._runner.room.tokens
    if quantization != "none" and not tied:  # a tied embedding stays as it is beside the tiles of the head
        other = holding(config, settings.model_copy(update={"quantization": "none"}), "cpu")
        assert other.items["weights"] > 1.1 * found.items["weights"]
