"""What the processes of test_parallel.py run: cases of training, each described by plain values, and some broken on purpose."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

sys.path.insert(0, str(Path(__file__).parent))
from conftest import World

from garage.core.events import EventLog
from garage.models.adapters import adapt
from garage.specs.train import PreferenceSpec
from garage.train import loop, parallel, resume
from garage.train.objectives.preference import Preference, reference_log_probs

DIVIDE, OF = FSDPModule.set_gradient_divide_factor, resume._of
TARGETS = ("q_proj", "up_proj", "down_proj")


def train(place: Path, case: dict) -> dict:
    """One run; returns its figures by step, how it ended, its trained weights' squares, and which share of them a process held."""
    world, kind = World([]), case["kind"]
    model = world.model()
    if kind != "full":
        model = adapt(model, rank=4, alpha=8, targets=TARGETS, seed=0, dropout=case.get("dropout", 0.0), dora=kind == "dora")
    spec = world.spec(**{"max_steps": 8, "eval_every": 4, "save_every": 100, "sharding": case["sharding"]} | case.get("fit", {}))
    train, held, objective = world.rows(60, prompt=2), world.rows(8, seed=1), None
    trained = loop.prepare(model, spec)
    if case.get("pairs"):
        sums = [reference_log_probs(model, rows, spec) for rows in (train, held)]
        objective = Preference(PreferenceSpec(), None, train=sums[0], held=sums[1])
    mine = [getattr(weight, "_local_tensor", weight).numel() for weight in trained.values()]
    events = EventLog(None, lambda event: world.events.append(dict(event)), disturbance(case.get("disturb", "")))
    ended = "done"
    try:
        loop.fit(model, train=train, held=held, spec=spec, run=place / case["name"], events=events, objective=objective)
    except KeyboardInterrupt:
        ended = "cancelled"
    names = [name for name in trained if ended == "done" and not parallel.rank()]
    weights = {name: model.get_parameter(name).detach() for name in names}
    fields = ("loss", "grad_norm", "held_loss", "margin", "tokens")
    figures = {f"{step} {field}": value for field in fields for step, value in world.losses(field).items()}
    squares = {name: float(tensor.double().square().sum()) for name, tensor in weights.items()}
    share = sum(mine) / sum(weight.numel() for weight in trained.values())
    return {"figures": figures, "ended": ended, "weights": squares, "share": share}


def disturbance(kind: str):
    """A listener that does harm to this process after a step."""

    def listen(event: dict) -> None:
        number, _, what = kind.partition(" ")
        if event["kind"] != "metric" or "loss" not in event or f"{parallel.rank()}:{event['step']}" != number:
            return
        if what == "sleep":
            time.sleep(7)
        else:
            os.kill(os.getpid(), signal.Signals[what])

    return listen


def broken(kind: str) -> None:
    """Break the product in this process, or mend it."""
    real = parallel.add_gradients

    def mean(weights) -> None:
        weights = list(weights)
        real(weights)
        for weight in weights:
            weight.grad /= parallel.size()

    def left_out(weights) -> None:
        weights = list(weights)
        for weight in weights if parallel.rank() else ():
            weight.grad = None
        real(weights)

    loop.add_gradients = {"mean": mean, "left out": left_out}.get(kind, real)
    FSDPModule.set_gradient_divide_factor = (lambda module, factor: DIVIDE(module, 2.0)) if kind == "fsdp mean" else DIVIDE
    resume._of = (lambda name, rank: name) if kind == "one random state" else OF


def main(place: Path) -> None:
    torch.set_num_threads(1)
    sys.setswitchinterval(1000)  # gloo's threads wait for the lock as long as they can: see `parallel.leave`
    setup = json.loads((place / "cases.json").read_text())
    parallel.SECONDS = setup["seconds"]
    try:
        with parallel.joined():
            for case in setup["cases"]:
                broken(case.get("broken", ""))
                out = train(place, case)
                if not parallel.rank():
                    (place / f"{case['name']}.json").write_text(json.dumps(out))
    except Exception as error:
        print(f"SAID by {os.environ['RANK']}: {error}", flush=True)
        parallel.leave(2)
    parallel.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
