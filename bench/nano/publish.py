"""Takes the finished run `runs/nano` into the package as the embedded model, and stores its curve and cost.

    python bench/nano/publish.py

writes garage/assets/nano and bench/results/nano.json: the held-out curve, tokens, seconds, and the probes of `probe.py`.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

from garage.core.artifact import hash_file
from garage.core.events import read_events

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "bench"))

from record import record  # noqa: E402

COMMAND = "make nano"
CORPUS = REPO / "runs" / "nano-corpus" / "corpus.jsonl"


def main() -> None:
    run, assets = REPO / "runs" / "nano", REPO / "garage" / "assets" / "nano"
    model = run / "artifacts" / "model"
    shutil.rmtree(assets, ignore_errors=True)
    shutil.copytree(model, assets)
    metrics = {(event["step"], "loss" in event): event for event in read_events(run / "events.jsonl") if event["kind"] == "metric"}
    train = [event for event in metrics.values() if "loss" in event]
    held = [{key: event[key] for key in ("step", "held_loss", "held_accuracy")} for event in metrics.values() if "held_loss" in event]
    size = (assets / "model.safetensors").stat().st_size
    figures = {
        "parameters": _parameters(assets),
        "weight_bytes": size,
        "corpus": {"bytes": CORPUS.stat().st_size, "blake2b": hash_file(CORPUS)},
        "steps": train[-1]["step"],
        "tokens": train[-1]["tokens"],
        "tokens_per_second_median": sorted(event["tokens_per_second"] for event in train)[len(train) // 2],
        "threads": json.loads((run / "spec.json").read_text())["fit"]["threads"],
        "curve": [{"step": event["step"], "loss": event["loss"]} for event in train[::25]],
        "held": held,
        "probes": _probes(assets),
    }
    print(record("nano", COMMAND, figures))


def _parameters(place: Path) -> int:

    with safe_open(place / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _probes(place: Path) -> dict[str, float]:
    command = [sys.executable, Path(__file__).with_name("probe.py"), place, "--count", "100"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
