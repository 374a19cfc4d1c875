"""Continued pretraining: an existing model goes on learning texts, all of them, with its own tokenizer."""

import json
from pathlib import Path

import pytest
import torch

from garage.cli import main
from garage.core.errors import UserError
from garage.core.events import read_events
from garage.models.weights import load_model
from garage.specs.train import PretrainSpec
from garage.store.dataset import read_encoded
from garage.store.locate import locate
from garage.tokens.tokenizer import Tokenizer
from garage.tokens.voice import Voice

FIT = {"max_steps": 20, "batch_tokens": 512, "micro_tokens": 512, "max_length": 128, "threads": 1, "save_every": 100, "eval_every": 10}


def options(table: dict, prefix: str = "fit") -> list[str]:
    return [word for key, value in table.items() for word in (f"--{prefix}.{key}", str(value))]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Documents in words of their own, so that there is something to learn on those held out."""
    place = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    said = ["the varn of the {n}th dorel is kept in the brask", "every dorel has a varn, every brask a dorel", "no varn without a brask"]
    lines = [{"text": ". ".join(said[(n + k) % 3].format(n=n) for k in range(10)) + "."} for n in range(60)]
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def held_losses(run: Path) -> list[float]:
    return [event["held_loss"] for event in read_events(run / "events.jsonl") if "held_loss" in event]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_nano_learns_new_texts_and_keeps_its_tokenizer(texts: Path, tmp_path: Path, capsys, kind: str) -> None:
    run, rate = tmp_path / "run", {"full": "1e-3", "lora": "5e-3"}[kind]
    words = ["pretrain", "--model", "nano", str(texts), "--out", str(run), "--adapter.kind", kind, "--fit.optimizer.lr", rate, "--json"]
    words += ["--eval_share", "0.2", *options(FIT)]
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["rows"] == 60 and plan["steps"] == 20 and (plan["trained"] == plan["parameters"]) == (kind == "full")
    assert main(words) == 0
    started = [event["name"] for event in read_events(run / "events.jsonl") if str(event.get("name")).startswith("length")]
    assert plan["epochs"] == pytest.approx(float(started[0].split(", ")[1].split()[0]), rel=0.25), "the plan was near what was done"
    losses = held_losses(run)
    assert losses[-1] < 0.8 * losses[0] and losses[0] < 7
    found = locate(str(run))
    assert (found.adapter is None) == (kind == "full") and Tokenizer.load(found.newest).hash == Tokenizer.load(locate("nano").base).hash
    data = read_encoded(run / "data", "train")
    assert data is not None
    windows, learned = len(data), int((data.learned != 0).sum())
    assert windows > 48 and learned == len(data.tokens) - (windows - 48), "every token once; a window begins with the last token before it"
    assert Voice.load(found.newest).chat.hash == Voice.load(locate("nano").base).chat.hash
    if kind == "full":
        old, new = (load_model(place, dtype=torch.float32).requires_grad_(False) for place in (locate("nano").base, found.base))
        moved = [float((a - b).norm() / a.norm()) for a, b in zip(old.parameters(), new.parameters(), strict=True)]
        assert 0 < max(moved) < 0.5, "it goes on from the weights, and does not begin anew"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "give an architecture"),
        ({"model": "nano", "architecture": {"hidden_size": 32}}, "architecture"),
        ({"model": "nano", "vocab_size": 500}, "vocab_size belongs to a new model"),
        ({"model": "nano", "tokenizer": "t"}, "tokenizer belongs to a new model"),
        ({"model": "nano", "chat": "qwen3"}, "chat belongs to a new model"),
    ],
)
def test_what_has_no_meaning_is_refused(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        PretrainSpec.parse({"data": ["x"], "out": "r", "fit": FIT} | change)


def test_a_new_model_takes_no_adapter() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(UserError, match="trained whole"):
        PretrainSpec.parse({"data": ["x"], "out": "r", "fit": FIT, "architecture": shape, "adapter": {"kind": "lora"}})
