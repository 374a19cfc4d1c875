"""What the processes of test_parallel.py run: cases of training, each described by plain values, and some broken on purpose."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import World

from garage.core.events import EventLog
from garage.models.adapters import adapt
from garage.specs.train import PreferenceSpec
from garage.train import loop, parallel
from garage.train.objectives.preference import Preference, reference_log_probs

TARGETS = ("q_proj", "up_proj", "down_proj")


def train(place: Path, case: dict) -> dict:
    """One run; returns its figures by step, where it ended, and the sum of its trained weights."""
    world, kind = World([]), case["kind"]
    model = world.model()
    if kind != "full":
        model = adapt(model, rank=4, alpha=8, targets=TARGETS, seed=0, dropout=case.get("dropout", 0.0), dora=kind == "dora")
    spec = world.spec(**{"max_steps": 8, "eval_every": 4, "save_every": 100, "sharding": case["sharding"]} | case.get("fit", {}))
    train, held, objective = world.rows(60, prompt=2), world.rows(9, seed=1), None
    trained = loop.prepare(model, spec)
    if case.get("pairs"):
        sums = [reference_log_probs(model, train.__class__(*even(rows)), spec) for rows in (train, held)]
        train, held = (rows.__class__(*even(rows)) for rows in (train, held))
        objective = Preference(PreferenceSpec(), None, train=sums[0], held=sums[1])
    events = EventLog(None, lambda event: world.events.append(dict(event)), disturbance(case.get("disturb", "")))
    ended = "done"
    try:
        loop.fit(model, train=train, held=held, spec=spec, run=place / case["name"], events=events, objective=objective)
    except KeyboardInterrupt:
        ended = "cancelled"
    names = [name for name in trained if ended == "done" and not parallel.rank()]
    weights = {name: model.get_parameter(name).detach() for name in names}
    figures = {f"{key} {field}": value for field in ("loss", "grad_norm", "held_loss", "margin", "tokens") for key, value in world.losses(field).items()}
    return {"figures": figures, "ended": ended, "weights": {name: float(tensor.double().square().sum()) for name, tensor in weights.items()}}


def even(rows) -> tuple:
    """Without the last row, if their number is odd."""
    bounds = rows.bounds[: len(rows) // 2 * 2 + 1]
    return rows.tokens[: bounds[-1]], rows.learned[: bounds[-1]], bounds


def disturbance(kind: str):
    """A listener that does harm to this process after a step."""

    def listen(event: dict) -> None:
        number, _, what = kind.partition(" ")
        if event["kind"] != "metric" or "loss" not in event or f"{parallel.rank()}:{event['step']}" != number:
            return
        if what == "sleep":
            time.sleep(6)
        else:
            os.kill(os.getpid(), signal.Signals[what])

    return listen


def broken(kind: str) -> None:
    """Break the product in this process."""
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

    loop.add_gradients = {"": real, "mean": mean, "left out": left_out}[kind]


def main(place: Path) -> None:
    torch.set_num_threads(1)
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
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
