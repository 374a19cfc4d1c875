"""Two processes are one: the same figures step for step, whatever each holds, and the same after a stop; a lost process is told of.

Figures are compared to 1e-5 in float32: a sum in another order moves a gradient by about 1e-7 of its size, and AdamW, which divides
by the gradient's own size, passes that on to the weights as such; over eight steps that stays below 1e-6. AdamW also hides a gradient that
is too small by a constant, so the norm is compared beside the loss. The twins are off by more than 1e-2.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from garage.cli import main
from garage.core.errors import UserError
from garage.core.events import read_events
from garage.models.adapters import attach
from garage.models.weights import load_model
from garage.specs.train import FitSpec, SFTSpec
from garage.store.checkpoint import saved_steps
from garage.store.locate import locate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from several import train  # noqa: E402

THREE = {"micro_tokens": 100}  # three passes a step: one process does four, two of them two each
FEW = {"batch_tokens": 64, "micro_tokens": 64}  # one pair a step: a process often has nothing to do
WIDE = {"dtype": "bfloat16", "checkpointing": "all"}  # the same two passes either way, for bfloat16 rounds each shape in its own way
EQUAL = {
    "full, replicas": {"kind": "full", "sharding": "none", "fit": THREE},
    "full, sharded": {"kind": "full", "sharding": "full", "fit": THREE},
    "full, muon": {"kind": "full", "sharding": "none", "fit": {"optimizer": {"kind": "muon", "adamw": {"lr": 1e-2}}}},
    "lora, replicas": {"kind": "lora", "sharding": "none", "fit": THREE | {"clip": 0.05}},
    "lora, sharded": {"kind": "lora", "sharding": "full", "fit": THREE | {"clip": 0.05}},
    "dora, sharded": {"kind": "dora", "sharding": "full", "fit": WIDE},
    "pairs, replicas": {"kind": "lora", "sharding": "none", "fit": FEW, "pairs": True},
    "pairs, sharded": {"kind": "lora", "sharding": "full", "fit": FEW, "pairs": True},
}
TWINS = {
    "mean": {"kind": "full", "sharding": "none", "fit": THREE, "broken": "mean"},
    "left out": {"kind": "full", "sharding": "none", "fit": THREE, "broken": "left out"},
    "mean of parts": {"kind": "full", "sharding": "full", "fit": THREE, "broken": "fsdp mean"},
}
STOPS = {
    "stop, replicas": {"kind": "lora", "sharding": "none", "fit": THREE},
    "stop, sharded": {"kind": "full", "sharding": "full", "fit": THREE},
    "stop, pairs": {"kind": "full", "sharding": "full", "fit": FEW, "pairs": True},  # the reference is asked before the weights come back
}
DROPS = {"kind": "lora", "sharding": "none", "dropout": 0.5}


def named(cases: dict, **more: object) -> list[dict]:
    return [{"name": name} | case | more for name, case in cases.items()]


@contextmanager
def launched(*words: object, processes: int = 2):
    """`torchrun` on a free port; killed with its children if it is still there at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([str(word) for word in program], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        try:
            yield process
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                child.kill()
            process.kill()


def ran(place: Path, cases: list[dict], *, seconds: float = 60) -> tuple[int, str]:
    """Run the cases on two processes; returns the exit code and what was said."""
    (place / "cases.json").write_text(json.dumps({"seconds": seconds, "cases": cases}))
    with launched(HERE / "several.py", place) as process:
        out, err = process.communicate(timeout=200)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of all cases on two processes, by name, and where their runs lie. Some were begun by one process."""
    place = tmp_path_factory.mktemp("two")
    for case in named({f"from one: {name}": case for name, case in STOPS.items()}, disturb="0:3 SIGTERM"):
        assert train(place, case)["ended"] == "cancelled"
    cases = named(EQUAL) + named(TWINS) + named(STOPS, disturb="1:3 SIGTERM")
    cases += named({f"from one: {name}": case for name, case in STOPS.items()})
    for name, broken in (("drop", ""), ("drop, one random state", "one random state")):
        cases += [{"name": name, "disturb": "1:3 SIGTERM"} | DROPS, {"name": name, "broken": broken} | DROPS]
    code, said = ran(place, [*cases, {"name": "drop, straight"} | DROPS])
    assert code == 0, said[-3000:]
    return place


def result(place: Path, name: str) -> dict:
    return json.loads((place / f"{name}.json").read_text())


def alone(tmp_path: Path, case: dict) -> dict:
    return train(tmp_path, {"name": "alone"} | case)["figures"]


def close(got: dict, want: dict) -> bool:
    """A margin is a small difference of sums of some tens, hence `abs`."""
    return got.keys() <= want.keys() and all(value == pytest.approx(want[key], rel=1e-5, abs=5e-6) for key, value in got.items())


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_are_one(two, tmp_path, name):
    want, got = train(tmp_path, {"name": "alone"} | EQUAL[name]), result(two, name)
    assert got["figures"].keys() == want["figures"].keys() and len(want["figures"]) >= 26 and close(got["figures"], want["figures"])
    assert got["weights"] == pytest.approx(want["weights"], rel=1e-5)
    assert got["share"] == (pytest.approx(0.5, abs=0.05) if EQUAL[name]["sharding"] == "full" else 1)


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_twin_is_seen(two, tmp_path, name):
    want, got = alone(tmp_path, TWINS[name]), result(two, name)["figures"]
    assert not close(got, want)
    assert max(abs(got[key] / want[key] - 1) for key in want if "norm" in key) > 1e-2


@pytest.mark.parametrize("name", STOPS)
def test_what_two_began_one_goes_on_with(two, tmp_path, name):
    """One of the two was told to stop; both did, after the same step, and saved once."""
    want, begun = alone(tmp_path, STOPS[name]), result(two, name)
    assert begun["ended"] == "cancelled" and saved_steps(two / name) == [3] and "4 loss" not in begun["figures"]
    rest = train(two, {"name": name} | STOPS[name])["figures"]
    assert "3 loss" not in rest and "8 loss" in rest and close(begun["figures"] | rest, want)


@pytest.mark.parametrize("name", STOPS)
def test_what_one_began_two_go_on_with(two, tmp_path, name):
    rest = result(two, f"from one: {name}")["figures"]
    assert "3 loss" not in rest and "8 loss" in rest and close(rest, alone(tmp_path, STOPS[name]))


def test_dropout_goes_on_in_each_process_where_it_was(two):
    want = result(two, "drop, straight")["figures"]
    rest, twin = result(two, "drop")["figures"], result(two, "drop, one random state")["figures"]
    assert "3 loss" not in rest and rest == {key: want[key] for key in rest}
    assert twin.keys() == rest.keys() and not close(twin, want)


@pytest.mark.parametrize(("disturb", "sharding", "seconds"), [("1:3 SIGKILL", "none", 60), ("1:3 sleep", "full", 4)])
def test_a_lost_process_ends_the_others(tmp_path, disturb, sharding, seconds):
    began = time.monotonic()
    code, said = ran(tmp_path, [{"name": "lost", "kind": "full", "sharding": sharding, "disturb": disturb}], seconds=seconds)
    assert code and "SAID by 0: process 0 of 2 lost another one" in said and f"silent for {seconds} s" in said
    assert said.count("SAID") == 1 and time.monotonic() - began < 40


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match="muon needs whole matrices"):
        FitSpec.parse({"max_steps": 1, "sharding": "full", "optimizer": {"kind": "muon"}})
    fit = {"max_steps": 1, "sharding": "full"}
    with pytest.raises(UserError, match="nf4 is not shared out"):
        SFTSpec.parse({"model": "nano", "data": ["rows"], "out": "run", "fit": fit, "adapter": {"kind": "lora", "quantize": "nf4"}})


FIT = "--fit.max_steps 14 --fit.batch_tokens 512 --fit.micro_tokens 256 --fit.max_length 128 --fit.eval_every 4 --fit.dtype float32"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [json.dumps({"question": f"What is {n} plus {n}?", "answer": f"It is {n + n}."}) for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def steps_of(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run / "events.jsonl") if event["kind"] == "metric" and "loss" in event]


def listening(pid: int) -> set[str]:
    """Addresses that the children of a process listen on."""
    found = [child.net_connections(kind="inet") for child in psutil.Process(pid).children(recursive=True)]
    return {connection.laddr.ip for connections in found for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_under_torchrun_is_stopped_and_one_process_goes_on(rows, tmp_path, number):
    """By a signal to torchrun, which passes it on if it can; if not, the processes see that it is gone."""
    run = tmp_path / "run"
    with launched("-m", "garage", "sft", "nano", "--data", rows, "--out", run, *FIT.split(), "--fit.max_steps", "24") as process:
        while len(steps_of(run)) < 2 and process.poll() is None:
            time.sleep(0.05)
        heard, children = listening(process.pid), psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        alive = psutil.wait_procs(children, timeout=60)[1]
        for child in alive:
            child.kill()
        err = process.communicate(timeout=60)[1]
    assert not alive
    assert heard == {"127.0.0.1"}, err[-3000:]
    stopped = saved_steps(run)[-1]
    assert 2 <= stopped < 24 and [e["state"] for e in read_events(run / "events.jsonl") if e["kind"] == "state"] == ["running", "cancelled"]
    assert number == signal.SIGKILL or err.count("interrupted") == 1
    assert main(["sft", "--resume", str(run)]) == 0
    assert steps_of(run) == list(range(1, 25))
    adapter = locate(str(run)).adapter
    assert adapter is not None and attach(load_model(locate("nano").base), adapter)


def test_a_sharded_run_leaves_one_model_and_one_answer(rows, tmp_path):
    words = ["sft", "nano", "--data", rows, *FIT.split(), "--fit.max_steps", "4", "--adapter.kind", "full"]
    with launched("-m", "garage", *words, "--fit.sharding", "full", "--out", tmp_path / "two", "--json") as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-3000:]
    answer = json.loads(out)
    assert steps_of(tmp_path / "two") == [1, 2, 3, 4] and answer["final"]["steps"] == 4
    assert main([str(word) for word in [*words, "--out", tmp_path / "one"]]) == 0
    two, one = (load_file(tmp_path / run / "artifacts" / "model" / "model.safetensors") for run in ("two", "one"))
    assert two.keys() == one.keys()
    assert max(float((two[name].float() - one[name].float()).abs().max()) for name in one) < 1e-3, "bfloat16 files: half a step of 0.1"


def test_a_mistake_is_told_once(tmp_path):
    with launched("-m", "garage", "sft", "nano", "--data", "nowhere", "--out", tmp_path / "run", "--fit.max_steps", "1") as process:
        err = process.communicate(timeout=100)[1]
    assert process.returncode and err.count("error: ") == 1 and "no dataset" in err and err.count("garage/") == 0


def test_a_defect_is_told_in_full_and_the_process_leaves(monkeypatch, capsys):
    """Python's own way out could abort: see `leave`."""
    codes: list[int] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("garage.cli._run", lambda words: 1 // 0)
    monkeypatch.setattr("garage.recipes.run.leave", codes.append)
    main([])
    assert codes == [1] and "ZeroDivisionError" in capsys.readouterr().err
