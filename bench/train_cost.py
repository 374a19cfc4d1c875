"""What a training step on this CPU costs, against length, model size and rank: tokens per second and the largest resident set.

Each case is a process of its own: one row of random ids per micro-batch, two steps of at least 2,048 tokens after one that is not counted,
LoRA of rank 16 on all linears of random bf16 weights unless the case says otherwise, layers computed again in the backward.

    python bench/train_cost.py               stores bench/results/train_cost.json (about 12 minutes)
    python bench/train_cost.py --smoke       one small case; stores nothing
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record, typed
from serving import shape_of

from garage.core.events import EventLog
from garage.models.families import build, init_weights
from garage.models.layers import Linear
from garage.models.quantize import quantised
from garage.recipes.tune import adapted
from garage.specs.plan import PlanSpec
from garage.store.dataset import Encoded
from garage.train.loop import fit, prepare

ROOT, STEPS = Path(__file__).parents[1], 3
CASES: list[dict[str, Any]] = [
    *({"model": "qwen3-135m", "length": length} for length in (256, 512, 1024, 2048, 4096, 8192)),
    *({"model": model, "length": 1024} for model in ("gemma3-270m", "qwen3-0.6b", "gemma3-1b")),
    *({"model": "qwen3-135m", "length": 1024, "rank": rank} for rank in (4, 64, 128)),
    {"model": "qwen3-135m", "length": 1024, "dora": True}, {"model": "qwen3-135m", "length": 1024, "quantize": "nf4"},
    {"model": "qwen3-135m", "length": 1024, "kind": "full"},
]  # fmt: skip


def one(case: dict[str, Any], threads: int) -> dict[str, Any]:
    """A run in this process."""
    torch.set_num_threads(threads)
    config, length = shape_of(case["model"]), case["length"]
    asked = {"kind": case.get("kind", "lora")}
    asked |= {} if asked["kind"] == "full" else {"rank": case.get("rank", 16), "dora": case.get("dora", False)}
    asked |= {"quantize": case["quantize"]} if "quantize" in case else {}
    tokens = max(2048, length)
    step = {"max_steps": STEPS, "batch_tokens": tokens, "micro_tokens": length, "max_length": length, "checkpointing": "all",
            "eval_every": 0, "save_every": 9999, "threads": threads}  # fmt: skip
    spec = PlanSpec.parse({"model": "135m", "adapter": asked, "fit": step})
    model = build(config, dtype=torch.float32 if asked["kind"] == "full" else torch.bfloat16)
    init_weights(model, 0)
    for name, module in list(model.model.layers.named_modules()) if "quantize" in case else ():
        if isinstance(module, Linear):
            model.model.layers.set_submodule(name, quantised(module.weight, case["quantize"]))
    if asked["kind"] != "full":
        adapted(model, spec.adapter, seed=0)  # type: ignore[arg-type]
    prepare(model, spec.fit)
    rows = STEPS * tokens // length
    draw = np.random.default_rng(0)
    data = Encoded(draw.integers(3, 49_000, rows * length).astype("<u4"), np.ones(rows * length, "u1"), np.arange(rows + 1) * length)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        events = EventLog(None, lambda event: times.append(float(str(event["time"]))) if "loss" in event else None)
        fit(model, train=data, held=None, spec=spec.fit, run=Path(place), events=events)
    assert len(times) == STEPS, times
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": round((STEPS - 1) * tokens / (times[-1] - times[0]), 1), "resident_gb": round(peak / 1e9, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=json.loads, help="one case in this process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one(options.case, options.threads)))
        return 0
    found = []
    for case in CASES[:1] if options.smoke else CASES:
        command = [sys.executable, __file__, "--case", json.dumps(case), "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        if done.returncode:
            raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
        found.append({**case, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(found[-1]), flush=True)
    if not options.smoke:
        print(record("train_cost", typed(), {"threads": options.threads, "cases": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
