"""The command line: exit codes, one clear message with a remedy, and nothing half-written after bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from garage.cli import main
from garage.core.events import read_events

SHAPE = """
[architecture]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
"""
FIT = ["--fit.batch_tokens", "256", "--fit.micro_tokens", "256", "--fit.max_length", "64", "--fit.threads", "1"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A run of a tiny model, and the rows it was trained on."""
    place = tmp_path_factory.mktemp("tiny")
    rows = [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "spec.toml").write_text("vocab_size = 300" + SHAPE)
    words = ["pretrain", place / "spec.toml", "--data", place / "rows.jsonl", "--out", place / "run", "--fit.max_steps", "6", *FIT]
    assert main([str(word) for word in words]) == 0
    return place


def fails(capsys, code: int, *words: object) -> str:
    assert main([str(word) for word in words]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if code == 2:
        assert "error: " in err and "remedy: " in err
    return err


def test_help_and_version(capsys):
    assert main([]) == 0 and main(["--version"]) == 0 and main(["sft", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: garage VERB" in out and "garage 0." in out and "--adapter.rank" in out


def test_a_dry_run_prints_and_does_nothing(tmp_path, capsys, tiny):
    words = ["pretrain", tiny / "spec.toml", "--data", tiny / "rows.jsonl", "--out", tmp_path / "r", "--fit.max_steps", "6"]
    assert main([*map(str, words), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["spec"]["fit"]["max_steps"] == 6 and plan["plan"]["parameters"] > 10_000 and not (tmp_path / "r").exists()


def test_a_dry_run_says_how_long_it_would_be(tmp_path, capsys, tiny):
    """Close to what the run then does; and which of epochs and max_steps decides."""
    words = [str(word) for word in ["sft", tiny / "run", "--data", tiny / "rows.jsonl", "--out", tmp_path / "r", "--fit.epochs", "2", *FIT]]
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["rows"] == 100 and plan["epochs"] == 2 and "190 rows read" in plan["length"]
    assert main([*words, "--dry-run", "--json", "--fit.max_steps", "3"]) == 0
    short = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert short["steps"] == 3 and f"max_steps overrides epochs, which would be {plan['steps']} steps" in short["length"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["final"]["steps"] == pytest.approx(plan["steps"], abs=2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bake"], "no verb 'bake'"),
        (["sft", "--wings", "2"], "no option --wings"),
        (["sft", "nosuchmodel", "--data", "x", "--out", "r", "--fit.max_steps", "1"], "no model 'nosuchmodel'"),
        (["ingest", "nowhere", "--out", "c"], "nowhere"),
        (["evaluate", "nano", "--task", "gsm8k"], "needs its items"),
        (["synthesize", "nowhere", "--out", "d"], "nowhere is not an artifact"),
        (["export", "nowhere", "--out", "e"], "no model 'nowhere'"),
        (["serve", "nowhere"], "no model 'nowhere'"),
        (["runs", "show", "nowhere"], "not a run"),
        (["sft", "missing.toml"], "no spec file"),
    ],
)
def test_mistakes_end_with_code_2_and_a_remedy(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, 2, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no usable row"),
        (b"\x00\x01\x02\xff" * 400, "rows.jsonl"),
        (b'{"question": "a"', "no usable row"),
        (b'{"foo": 1, "bar": 2}\n', "columns bar, foo"),
        ('{"question": "käse", "answer": "ja"}'.encode("latin-1"), "rows.jsonl"),
    ],
)
def test_bad_datasets_are_told_before_anything_is_trained(content, says, capsys, tmp_path, tiny):
    (tmp_path / "rows.jsonl").write_bytes(content)
    words = ["sft", tiny / "run", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--fit.max_steps", "1", *FIT]
    assert says in fails(capsys, 2, *words)
    assert not (tmp_path / "run" / "artifacts").exists()


def test_rows_with_missing_fields_are_named_and_the_rest_is_used(capsys, tmp_path, tiny):
    lines = [json.dumps({"question": f"q{i}", "answer": f"a{i}"}) for i in range(20)]
    lines[4], lines[9] = '{"question": "no answer"}', "not json"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = ["sft", tiny / "run", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "r", "--fit.max_steps", "1", *FIT, "--json"]
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert "line 5" in captured.err and "line 10" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["final"]["steps"] == 1


def test_answers_cut_by_max_length_are_counted_before_training(capsys, tmp_path, tiny):
    """One long answer in a hundred is said and trained on; the same rows cut short are refused, with the share and the way on."""
    lines = [{"question": f"q{i}", "answer": "four words of answer " * (30 if i == 7 else 1)} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["sft", tiny / "run", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "r", "--fit.max_steps", "1", "--eval_share", "0"]
    sizes = ["--fit.batch_tokens", "1024", "--fit.micro_tokens", "1024", "--fit.threads", "1", "--fit.max_length"]
    whole = json.loads(_plainly(capsys, "dataset", "stats", tmp_path / "rows.jsonl", "--model", tiny / "run", "--json"))["report"]["ledger"]
    keep = whole["longest"] - 20
    assert main([str(word) for word in [*words, *sizes, keep]]) == 0
    assert "1 of 100 rows are cut: 20 tokens, " in capsys.readouterr().err
    said = [event.get("message", "") for event in read_events(tmp_path / "r" / "events.jsonl")]
    first = next(n for n, message in enumerate(said) if "are cut" in message)
    assert not any("loss" in event for event in list(read_events(tmp_path / "r" / "events.jsonl"))[:first])
    short = fails(capsys, 2, *words[:-3], "1", "--eval_share", "0", "--out", tmp_path / "s", *sizes, "24")
    assert "answer tokens (" in short and "are cut off" in short and "cut" in short.partition("--allow ")[2]


def _plainly(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("damage", ["missing tensor", "wrong shape", "nan", "pickle", "no config", "cut off"])
def test_damaged_checkpoints_are_refused(damage, capsys, tmp_path, tiny):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny / "run" / "artifacts" / "model", model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    if damage == "missing tensor":
        del tensors[name]
    elif damage == "wrong shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif damage == "nan":
        tensors[name][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    if damage == "pickle":
        path.rename(model / "pytorch_model.bin")
    elif damage == "no config":
        (model / "config.json").unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    err = fails(capsys, 2, "evaluate", model, "--task", "worksheets", "--limit", "1", "--out", tmp_path / "report")
    says = {"nan": "NaN", "pickle": "pickle", "no config": "holds no model", "cut off": "damaged"}
    assert says.get(damage, name) in err
    assert not (tmp_path / "report").exists()


def test_a_run_is_not_overwritten_and_a_changed_spec_is_refused(capsys, tiny):
    again = ["pretrain", tiny / "spec.toml", "--data", tiny / "rows.jsonl", "--out", tiny / "run", "--fit.max_steps", "6", *FIT]
    assert "already holds a run" in fails(capsys, 2, *again)
    assert "lr" in fails(capsys, 2, "pretrain", "--resume", tiny / "run", "--fit.optimizer.lr", "0.5")


def losses(run: Path) -> list[dict[str, object]]:
    return [event for event in read_events(run / "events.jsonl") if event["kind"] == "metric" and "loss" in event]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, tiny):
    words = ["pretrain", tiny / "spec.toml", "--data", tiny / "rows.jsonl", "--out", tmp_path / "run", "--fit.max_steps", "4000", *FIT]
    process = subprocess.Popen([sys.executable, "-m", "garage", *map(str, words)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(losses(tmp_path / "run")) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    before = losses(tmp_path / "run")
    command = [sys.executable, "-m", "garage", "pretrain", "--resume", str(tmp_path / "run")]
    resumed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while len(metrics := losses(tmp_path / "run")) == len(before):
            assert time.monotonic() < deadline and resumed.poll() is None
            time.sleep(0.1)
    finally:
        resumed.kill()
        resumed.wait()
    assert metrics[len(before)]["step"] == before[-1]["step"] + 1


def test_one_process_at_a_time_writes_to_a_run(capsys, tmp_path, tiny):
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    (run / "spec.json").write_text(Path(tiny / "run" / "spec.json").read_text())
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in fails(capsys, 2, "pretrain", "--resume", run)


def test_a_taken_port_is_told_before_the_model_loads(capsys, tiny):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert f"port {port}" in fails(capsys, 2, "serve", tiny / "run", "--port", port)
