"""Several adapters over one base in one run: each is what it would be alone, the base stays as it was, an interruption costs nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from garage.cli import main
from garage.core.errors import UserError
from garage.core.events import read_events
from garage.models.weights import load_model
from garage.recipes import sft as recipe
from garage.recipes import tune
from garage.recipes.sft import plan, sft
from garage.specs.train import SFTSpec
from garage.store.locate import locate
from garage.train import loop

FIT = {"max_steps": 4, "batch_tokens": 256, "micro_tokens": 256, "max_length": 64, "threads": 1, "save_every": 2, "optimizer": {"lr": 1e-3}}


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    places = {}
    for name in ("north", "south"):
        lines = [{"question": f"Where is house {n}?", "answer": f"House {n} lies in the {name}."} for n in range(40)]
        places[name] = tmp_path / f"{name}.jsonl"
        places[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return places


def spec_of(rows: dict[str, Path], out: Path, **changes: object) -> SFTSpec:
    adapters = {name: [str(path)] for name, path in rows.items()}
    return SFTSpec.parse({"model": "nano", "adapters": adapters, "out": str(out), "fit": FIT, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifacts" / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_is_what_it_would_be_alone_and_the_base_is_loaded_once_and_not_changed(rows, tmp_path: Path, monkeypatch) -> None:
    loaded = []

    def load(*args, **kwargs):
        loaded.append(load_model(*args, **kwargs))
        return loaded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(tune, "load_model", load)
        found = sft(spec_of(rows, tmp_path / "run", adapter={"dropout": 0.1}))
    assert len(loaded) == 1 and set(found) == set(rows)
    fresh = load_model(locate("nano").base, dtype=torch.bfloat16)
    assert same(dict(loaded[0].named_parameters()), dict(fresh.named_parameters())), "no wrapper is left, and no byte is changed"
    for name, path in rows.items():
        alone = SFTSpec.parse({"model": "nano", "data": [str(path)], "out": str(tmp_path / name), "fit": FIT, "adapter": {"dropout": 0.1}})
        sft(alone)
        assert same(weights(tmp_path / "run" / "adapters" / name), weights(tmp_path / name))
        assert locate(str(tmp_path / "run" / "adapters" / name)).adapter is not None
    assert not same(weights(tmp_path / "north"), weights(tmp_path / "south"))


def test_an_adapter_left_on_the_base_would_be_seen(rows, tmp_path: Path, monkeypatch) -> None:
    """The broken twin: nothing is taken off."""
    monkeypatch.setattr(recipe, "strip", lambda model: model)
    with pytest.raises(UserError, match="matches no linear layer"):
        sft(spec_of(rows, tmp_path / "run"))


def test_an_interrupted_run_goes_on_with_the_adapter_it_was_at(rows, tmp_path: Path, monkeypatch) -> None:
    sft(spec_of(rows, tmp_path / "whole"))
    real = loop._Trainer._tell

    def tell(self, *args):
        real(self, *args)
        if self.progress.step == 3 and "south" in str(self.keeper.run):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Trainer, "_tell", tell)
        sft(spec_of(rows, tmp_path / "run"))
    assert main(["sft", "--resume", str(tmp_path / "run")]) == 0
    for name in rows:
        assert same(weights(tmp_path / "run" / "adapters" / name), weights(tmp_path / "whole" / "adapters" / name))
    logs = [read_events(tmp_path / "run" / "adapters" / name / "events.jsonl") for name in rows]
    steps = [[event["step"] for event in log if event["kind"] == "metric" and "loss" in event] for log in logs]
    assert steps == [[1, 2, 3, 4], [1, 2, 3, 3, 4]], "the first is not trained again, the second goes on from its checkpoint"


def test_the_command_line_and_its_plan(rows, tmp_path: Path, capsys) -> None:
    words = ["sft", "nano", "--out", tmp_path / "run", "--fit.epochs", "1", "--fit.max_length", "64", "--fit.threads", "1"]
    words += ["--adapters.north", rows["north"], "--adapters.south", f"{rows['south']},{rows['north']}", "--json", "--dry-run"]
    assert main([str(word) for word in words]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: entry["rows"] for name, entry in shown["plan"].items()} == {"adapter north": 40, "adapter south": 80}
    spec = SFTSpec.parse(shown["spec"])
    assert len(spec.adapters["south"]) == 2 and set(plan(spec)) == {"adapter north", "adapter south"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapters": {"../x": ["a"]}}, "no plain file name"),
        ({"adapters": {"a": ["a"], "A": ["b"]}}, "the same name"),
        ({"adapters": {"a": ["a"]}, "adapter": {"kind": "full"}}, "would change it"),
        ({"adapters": {"a": ["a"]}, "data": ["b"]}, "not both"),
        ({"adapters": {"a": []}}, "data: required"),
        ({}, "data: required"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SFTSpec.parse({"model": "nano", "out": "r", "fit": FIT} | change)


def test_missing_rows_are_told_before_anything_is_trained(rows, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no dataset"):
        sft(spec_of(rows | {"west": tmp_path / "west.jsonl"}, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
