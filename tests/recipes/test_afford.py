"""Memory that runs out in a run: the whole ladder is walked in its order, every rung is said, and the run ends with an artifact."""

import json
from pathlib import Path

import pytest
import torch

from garage.cli import main
from garage.core.events import read_events
from garage.recipes import afford
from garage.specs.train import RUNGS, SFTSpec
from garage.store.adapter import read_adapter
from garage.train import loop

FIT = "--fit.max_steps 8 --fit.batch_tokens 1024 --fit.micro_tokens 1024 --fit.max_length 512 --fit.threads 1 --fit.save_every 100".split()  # noqa: SIM905


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    answer = "It is {m}, because {n} + {n} = {m}. " * 8
    made = [{"prompt": f"What is {n} plus {n}?", "completion": answer.format(n=n, m=n + n)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tune(rows: Path, run: Path, *more: str) -> int:
    return main([str(word) for word in ["sft", "nano", "--data", rows, "--out", run, *FIT, *more]])


def fail_unless(monkeypatch: pytest.MonkeyPatch, fits) -> None:
    gradient = loop._Trainer._gradient

    def limited(trainer, step):
        if trainer.progress.step >= 3 and not fits(trainer):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradient(trainer, step)

    monkeypatch.setattr(loop._Trainer, "_gradient", limited)


def alarms(run: Path) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event.get("alarm") == "oom"]


def test_the_whole_ladder(rows: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    fail_unless(monkeypatch, lambda trainer: {name.split(".")[-2] for name in trainer.keeper.trained} == {"q_proj", "v_proj"})
    assert tune(rows, run, "--adapter.dora", "true", "--adapter.rslora", "true") == 0
    walked = list(dict.fromkeys(event["rung"] for event in alarms(run)))
    assert walked == [rung for rung in RUNGS if rung != "offload"]
    assert all(event["saved"] > 0 for event in alarms(run) if event["rung"] != "length")
    spec = json.loads((run / "spec.json").read_text())
    assert (spec["fit"]["max_length"], spec["adapter"]["rank"], spec["adapter"]["dora"]) == (256, 8, False)
    config, tensors = read_adapter(run / "artifacts" / "adapter")
    assert config.rank == 8 and set(config.targets) == {"q_proj", "v_proj"} and config.alpha == pytest.approx(32 / 2**0.5)
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj"}
    steps = [event["step"] for event in read_events(run / "events.jsonl") if event["kind"] == "metric" and "loss" in event]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8], "no step is lost and none is made twice"


def test_the_run_goes_on_from_the_weights_it_has(rows: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A rank that is halved after three steps keeps what was learned: the loss does not jump back to the beginning."""
    run = tmp_path / "run"
    fail_unless(monkeypatch, lambda trainer: max(len(t) for n, t in trainer.keeper.trained.items() if "lora_A" in n) <= 8)
    assert tune(rows, run, "--fit.on_oom", "rank", "--fit.optimizer.lr", "5e-3", "--fit.schedule.kind", "constant") == 0
    losses = {e["step"]: e["loss"] for e in read_events(run / "events.jsonl") if e["kind"] == "metric" and "loss" in e}
    assert losses[4] < losses[1] - 0.3 * (losses[1] - losses[3]), losses
    assert [event["rung"] for event in alarms(run)] == ["rank"]


def test_an_empty_ladder_stops_with_a_remedy_and_the_run_can_go_on(rows: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_unless(patch, lambda trainer: False)
        assert tune(rows, run, "--fit.on_oom", "none") == 2
    said = capsys.readouterr().err
    assert "step 4: out of memory" in said and "garage plan" in said
    assert main(["sft", "--resume", str(run)]) == 0


def test_what_presets_patterns_and_starts_leave_to_give_up():
    """The rank where patterns set it, and all of an adapter that its base depends on, stay; a preset is what it stands for."""
    def cheaper(rung: str, **lora: object) -> object:
        spec = SFTSpec.parse({"model": "nano", "data": ["a"], "out": "r", "fit": {"max_steps": 1}, "adapter": lora})
        found = afford._cheaper(spec, rung)
        return None if found is None else found.adapter

    assert cheaper("rank", rank=16).rank == 8 and cheaper("rank", rank=16, rank_pattern={"q_proj": 32}) is None
    few = cheaper("targets", targets=["attention"], rank_pattern={"k_proj": 4, "q_proj": 8}, alpha_pattern={"o_proj": 2.0})
    assert few.targets == ("q_proj", "v_proj") and dict(few.rank_pattern) == {"q_proj": 8} and not few.alpha_pattern
    assert cheaper("targets", targets=["qv"]) is None and cheaper("targets", targets=["mlp"]) is None
    for rung in ("rank", "targets"):
        assert cheaper(rung) is not None and cheaper(rung, start="pissa") is None
