"""What each way of tuning is worth: nano on one-step word problems, LoRA, rsLoRA, DoRA, QLoRA, PiSSA and full, equal steps, several seeds.

The rows come from `garage synthesize --teacher worksheets`; the test items use templates that no training row uses. The learning rate of
each way is chosen among a few by the held-out loss of a seed that is not counted afterwards, never by the test items. A figure is the
mean accuracy (strict: the number, in its tags) of the counted seeds; its uncertainty joins the spread of the seeds and that of the items
they share (1.96 standard errors of each). The items are the same for all; where the figures overlap, no way is shown to be better.

    python bench/adapter_quality.py                    stores bench/results/adapter_quality.json
    python bench/adapter_quality.py --seeds 1 --steps 4 --items 20    a smoke run; stores nothing
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record, typed

ROOT = Path(__file__).parents[1]
LORA = ["--adapter.rank", "16", "--adapter.alpha", "16"]
WAYS: dict[str, list[str]] = {
    "LoRA": LORA,
    "rsLoRA": [*LORA, "--adapter.rslora", "true"],
    "DoRA": [*LORA, "--adapter.dora", "true"],
    "QLoRA (NF4)": [*LORA, "--adapter.quantize", "nf4"],
    "PiSSA": [*LORA, "--adapter.start", "pissa"],
    "full": ["--adapter.kind", "full"],
}
RATES = {"full": (5e-4, 1.5e-3)}
ADAPTER_RATES = (2e-3, 6e-3)
FULL_RUN = (3, 60, 200)


def garage(*words: object) -> dict[str, Any]:
    """One command; its JSON."""
    program = [sys.executable, "-m", "garage", *map(str, words), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"garage {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def tuned(place: Path, name: str, rate: float, seed: int, steps: int) -> tuple[Path, dict[str, Any]]:
    """A run of one way; where it lies and what it says."""
    out = place / f"{name.split()[0]}-{rate}-{seed}"
    fit = ["--fit.max_steps", steps, "--fit.batch_tokens", 2048, "--fit.micro_tokens", 2048, "--fit.max_length", 512]
    fit += ["--fit.eval_every", steps, "--fit.save_every", 10_000, "--fit.seed", seed, "--fit.optimizer.lr", rate]
    return out, garage("sft", "nano", "--data", place / "rows", "--out", out, *fit, *WAYS[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=FULL_RUN[0])
    parser.add_argument("--steps", type=int, default=FULL_RUN[1])
    parser.add_argument("--items", type=int, default=FULL_RUN[2])
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = ["--levels", "1", "--rows", 2000, "--test_rows", options.items]
        garage("synthesize", "--teacher", "worksheets", *made, "--out", place / "rows")
        asked = ["--task", "worksheets", "--data", place / "rows", "--split", "test", "--max_tokens", 160]
        found["base"] = {"accuracy": [garage("evaluate", "nano", *asked, "--out", place / "base")["accuracy"]]}
        for name in WAYS:
            rates = RATES.get(name, ADAPTER_RATES)
            losses = {rate: tuned(place, name, rate, 99, options.steps)[1]["final"]["held_loss"] for rate in rates}
            rate, scores = min(losses, key=lambda each: losses[each]), []
            for seed in range(options.seeds):
                out, _ = tuned(place, name, rate, seed, options.steps)
                scores.append(garage("evaluate", out, *asked, "--out", place / f"report-{out.name}")["accuracy"])
            found[name] = {"rate": rate, "held_loss_by_rate": losses, "accuracy": scores, **interval(scores, options.items)}
            print(name, found[name], flush=True)
    if (options.seeds, options.steps, options.items) == FULL_RUN:
        record("adapter_quality", typed(), {"steps": options.steps, "items": options.items, "ways": found})
    return 0


def interval(scores: list[float], items: int) -> dict[str, float]:
    """The mean over the seeds and what it is uncertain by: the spread of the seeds, and of the items they share."""
    mean = statistics.fmean(scores)
    seeds = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return {"mean": round(mean, 4), "plus_minus": round(1.96 * math.hypot(seeds, math.sqrt(mean * (1 - mean) / items)), 4)}


if __name__ == "__main__":
    sys.exit(main())
