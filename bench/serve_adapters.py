"""What many adapters over one base cost: 32 requests at once, 64 tokens in and 64 out, offline, the 135M shape, rank 16 on all linears.

    merged      one adapter folded into the weights, as `serve ADAPTER` does: the fastest, and only one of them
    base        a server with adapters loaded, every request for the base
    one         every request under the same adapter
    mixed       the requests dealt to 8 adapters

One process each, alternating rounds, fresh prompts; the ratios are medians of rounds. Adapters and weights are random. Memory is what the
weights and the adapters hold: eight merged models would be eight times the first.

    python bench/serve_adapters.py            stores bench/results/serve_adapters.json (about 3 minutes)
    python bench/serve_adapters.py --smoke    seconds, a tiny shape; stores nothing
"""

import argparse
import json
import multiprocessing as mp
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import record, typed
from serving import CACHE, model_dir, random_prompts

from garage.core.artifact import writing
from garage.core.types import Request, Sampling
from garage.engine.engine import Engine
from garage.models.adapters import adapt, adapter_tensors
from garage.models.weights import load_model
from garage.specs.serve import EngineSpec
from garage.specs.train import LINEARS
from garage.store.adapter import AdapterConfig, write_adapter
from garage.store.fingerprint import FACT, base_hash

RANK, SLOTS = 16, 8
SIDES = ("merged", "base", "one", "mixed")


def adapter_dir(base: Path, number: int) -> Path:
    """A random adapter of the base, made once."""
    place = CACHE / f"{base.name}-adapter{number}"
    if place.exists():
        return place
    model = adapt(load_model(base, dtype=torch.bfloat16), rank=RANK, alpha=RANK, targets=LINEARS, seed=number)
    draw = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype), alpha=0.02)
    with writing(place, kind="adapter") as made:
        write_adapter(made.path, adapter_tensors(model), AdapterConfig(base=str(base), rank=RANK, alpha=RANK, targets=LINEARS))
        made.facts.update({FACT: base_hash(base)})
    return place


def side(name: str, model: str, threads: int, pipe: Connection) -> None:
    """Answers batches until it is told None: rates in, seconds out."""
    torch.set_num_threads(threads)
    base = model_dir(model)
    settings = EngineSpec.parse({"dtype": "bfloat16", "max_num_seqs": 64, "max_model_len": 512, "num_pages": 4096, "device": "cpu",
                                 "enable_prefix_caching": False, "enable_lora": name != "merged", "max_lora_rank": RANK})  # fmt: skip
    engine = Engine.open(base, adapter_dir(base, 0) if name == "merged" else None, settings)
    for number in range(SLOTS if name != "merged" else 0):
        engine.load_adapter(str(number), adapter_dir(base, number))
    pipe.send("ready")
    while (prompts := pipe.recv()) is not None:
        names = {"one": ["0"], "mixed": [str(n) for n in range(SLOTS)]}.get(name, [""])
        asked = [Request(str(n), tuple(ids), Sampling(max_tokens=64, ignore_eos=True, temperature=0), adapter=names[n % len(names)])
                 for n, ids in enumerate(prompts)]  # fmt: skip
        began = time.perf_counter()
        answers = engine.generate(asked)
        pipe.send((time.perf_counter() - began, sorted({a.error for a in answers if a.error}), len({a.token_ids for a in answers})))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen3-135m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.requests, options.rounds, options.threads = "tiny", 4, 1, 1
    for number in range(SLOTS):
        adapter_dir(model_dir(options.model), number)
    context, pipes = mp.get_context("spawn"), dict[str, Any]()
    for name in SIDES:
        pipes[name], theirs = context.Pipe()
        context.Process(target=side, args=(name, options.model, options.threads, theirs), daemon=True).start()
        assert pipes[name].recv() == "ready"
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(-1, options.rounds):  # the first is a warm-up
        prompts = random_prompts(options.requests, 64, f"adapters {number}")
        for name in SIDES:
            pipes[name].send(prompts)
            seconds, errors, _ = pipes[name].recv()
            assert not errors, errors
            rates[name] += [round(options.requests * 64 / seconds, 1)] if number >= 0 else []
    for pipe in pipes.values():
        pipe.send(None)
    ratios = {name: round(median(a / b for a, b in zip(rates[name], rates["merged"], strict=True)), 3) for name in SIDES}
    figures = {"model": options.model, "requests": options.requests, "threads": options.threads, "rank": RANK, "adapters": SLOTS,
               "over_merged": ratios, "tokens_per_second": rates}  # fmt: skip
    print(json.dumps(figures, indent=1))
    if not options.smoke:
        print(record("serve_adapters", typed(), figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
